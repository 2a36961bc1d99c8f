"""Token caches in a bucket: ranges first, copies beside, every byte checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("bucket")
    command = [sys.executable, "-m", "tests.data.bucket_shards_run", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((scratch / "found.json").read_text()) | {"stderr": done.stderr}


def test_opening_reads_no_token_and_a_window_reads_its_blocks(story):
    found = story["by_range"]
    assert story["shards"] > 8 and found["opened"] == []
    assert found["location"].startswith("gs://bucket/caches/text-bytes-")
    # 100 tokens over the end of a shard: a block of 64 tokens, 2 bytes each, in one, 2 in the next.
    ranges = [(name.rpartition("/")[2], asked) for name, asked in found["ranges"]]
    assert sorted(ranges) == [
        ("train-00000.tokens", "bytes=1920-2047"),
        ("train-00001.tokens", "bytes=0-255"),
    ]
    assert found["one"] and story["built"]


def test_processes_read_their_own_rows_from_the_bucket(story):
    found = story["by_range"]
    assert found["rows"] and found["documents"]
    assert found["bytes"] <= 16 * 2 * 128  # 16 rows of 48 tokens and a target: 1 or 2 blocks each


def test_without_copies_only_what_is_small_comes_to_the_machine(story):
    assert {Path(name).suffix for name in story["by_range"]["files"]} == {".index", ".npz"}
    assert story["verified"]  # `fope data build` again: hashed where it is


def test_shards_that_were_read_are_copied_once_and_known_after_a_restart(story):
    found = story["with_copies"]
    assert found["all"] and found["all_again"] and found["read_again"] == []
    # A range of each shard, and the copy of it.
    assert found["copies"] == 2 * story["shards"]
    names = [
        f"train-{i:05d}.{kind}" for i in range(story["shards"]) for kind in ("index", "tokens")
    ]
    assert found["files"] == names  # no lock, nothing unfinished


def test_a_damaged_copy_is_named_and_made_again(story):
    found = story["with_copies"]
    assert "/train-00001.tokens is damaged: sha256 " in found["damaged_copy"]
    assert "in block 0; delete it: it is copied from gs://bucket/" in found["damaged_copy"]
    assert found["copied_again"]


def test_a_bucket_that_refuses_every_fourth_request_is_asked_again(story):
    assert story["under_faults"]["refused_sometimes"]


def test_a_changed_shard_is_refused_by_name(story):
    found = story["under_faults"]
    place = "gs://bucket/caches/"
    assert found["sound_part"]  # the checksums are those of blocks
    assert found["changed"].startswith(f"CacheError: token cache: {place}")
    assert "/train-00002.tokens is damaged: sha256 " in found["changed"]
    assert ", in block 15; delete the directory and run `fope data build`" in found["changed"]
    assert found["changed_copy"].startswith(f"CacheError: token cache: {place}")
    assert "/train-00002.tokens is damaged: sha256 " in found["changed_copy"] and found["no_copy"]
    assert "/train-00002.tokens is damaged: sha256 " in found["cut"]
    assert "it ends after 2039 bytes" in found["cut"]
    for name in ("gone", "gone_at_opening"):
        assert f"token cache: {place}" in found[name]
        assert "/train-00002.tokens" in found[name]
    assert "/train-00003.index is damaged: sha256 " in found["changed_index"]
