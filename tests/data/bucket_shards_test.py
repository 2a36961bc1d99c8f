"""Token caches in a bucket: ranges first, copies beside, every byte checked."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fope_jax.data import bucket_shards, mirror
from fope_jax.data.bucket_shards import BucketShards, Range

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("bucket")
    command = [sys.executable, "-m", "tests.data.bucket_shards_run", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((scratch / "found.json").read_text()) | {"stderr": done.stderr}


class LocalBucket:
    """What the bucket's library does, for a directory."""

    def cat_ranges(self, places, begins, ends):
        return [Path(p).read_bytes()[a:b] for p, a, b in zip(places, begins, ends, strict=True)]


def test_a_full_disk_ends_the_copies_and_not_the_run(tmp_path, monkeypatch, caplog):
    remote, local = tmp_path / "remote", tmp_path / "local"
    remote.mkdir()
    for number in range(20):
        (remote / f"{number}.tokens").write_bytes(bytes([number]) * 100)
    monkeypatch.setattr(bucket_shards, "gcs_file_system", LocalBucket)
    copy, tried = mirror._copy, []

    def full(source, target, progress):
        tried.append(source.name)
        if len(tried) < 3:
            return copy(source, target, progress)
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(mirror, "_copy", full)
    monkeypatch.setattr(bucket_shards, "PARALLEL_TRANSFERS", 1)
    shards = BucketShards(remote, local, {}, copies=True)
    ranges = [Range(f"{number}.tokens", 5, 15) for number in range(20)]
    expected = [bytes([number]) * 10 for number in range(20)]
    with caplog.at_level("WARNING", "fope_jax"):
        for _ in range(3):
            assert shards.read(ranges) == expected
            while shards._threads:
                time.sleep(0.01)
    assert tried == ["0.tokens", "1.tokens", "2.tokens"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("no more shards are copied, but read by range: [Errno 28] No space left")
    assert sorted(path.name for path in local.iterdir()) == ["0.tokens", "1.tokens"]


def test_a_name_that_leads_out_of_the_directory_is_refused(tmp_path):
    shards = BucketShards(tmp_path / "remote", tmp_path / "local", {}, copies=False)
    with pytest.raises(ValueError, match="is no path within"):
        shards.fetch(["../x"])


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


def test_a_bucket_that_refuses_some_requests_is_asked_again(story):
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
