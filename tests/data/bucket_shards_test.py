"""Token caches in a bucket: ranges first, copies beside, every byte checked."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fope_jax.data import bucket_shards, build, cache, mirror
from fope_jax.data.bucket_shards import BucketShards, Range
from fope_jax.data.cache import CacheError
from fope_jax.data.loader import Loader
from fope_jax.data.manifest import MANIFEST, load_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """What a program found that read a cache through gcsfs."""
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


@pytest.fixture
def far(text_config, tmp_path, monkeypatch):
    """A cache on disk, what opens it as one in a bucket, and the ranges that are asked for."""
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(cache, "SHARD_TOKENS", 1024)
    local = build.build(text_config(), workers=1)["train"]
    stored, asked = load_manifest(local.directory), []

    class Asked(LocalBucket):
        def cat_ranges(self, places, begins, ends):
            asked.append(
                [(Path(p).name, a, b) for p, a, b in zip(places, begins, ends, strict=True)]
            )
            return super().cat_ranges(places, begins, ends)

    monkeypatch.setattr(bucket_shards, "gcs_file_system", Asked)

    def open_far(copies, machine="one"):
        monkeypatch.setenv("FOPE_CACHE", str(tmp_path / machine))
        return cache._open_in_bucket(local.directory, stored, "train", copies)

    return local, open_far, asked


def finished(far_cache):
    while far_cache._bucket._threads:
        time.sleep(0.01)
    return sorted(path.name for path in far_cache.directory.iterdir())


def test_rows_of_a_batch_are_asked_for_together_and_are_those_of_the_disk(far):
    local, open_far, asked = far
    read = open_far(copies=False)
    fields = {"length": 48, "batch_size": 16, "seed": 3}
    for step, rows in ((2, np.arange(16)), (5, np.array([1, 7]))):
        asked.clear()
        one = Loader(read, **fields, rows=rows).batch(step)
        for leaf, wanted in zip(one, Loader(local, **fields, rows=rows).batch(step), strict=True):
            np.testing.assert_array_equal(leaf, wanted)
        (together,) = asked
        assert len(together) >= len(rows) and all(b - a in (128, 256) for _, a, b in together)
    assert {Path(name).suffix for name in finished(read)} == {".index"}
    assert read.documents.tolist() == local.documents.tolist()


def test_copies_are_made_once_a_machine_and_known_after_a_restart(far):
    local, open_far, asked = far
    everything = local.tokens(0, local.num_tokens)
    for _ in range(2):
        read = open_far(copies=True)
        np.testing.assert_array_equal(read.tokens(0, local.num_tokens), everything)
        assert len(finished(read)) == 2 * local.num_shards
        np.testing.assert_array_equal(read.tokens(0, local.num_tokens), everything)
    assert len(asked) == 1  # by the first, before its copies were there


@pytest.mark.parametrize("named", ["by configuration", "by fingerprint"])
def test_opening_reads_the_manifest_once(far, text_config, monkeypatch, named):
    """Also where the whole cache has been copied to this machine before."""
    local, _, _ = far
    read_bytes, read = Path.read_bytes, []
    fingerprint = local.fingerprint if named == "by fingerprint" else None

    def counted(path):
        if path == local.directory / MANIFEST:
            read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(cache, "is_in_bucket", lambda path: True)
    monkeypatch.setattr(Path, "read_bytes", counted)
    parts = cache.open_cache(text_config(), "train", fingerprint)
    assert len(read) == 1 and parts.location == local.directory != parts.directory
    copy = parts.directory.with_name(parts.directory.name.removesuffix(".shards"))
    shutil.copytree(local.directory, copy)
    read.clear()
    assert cache.open_cache(text_config(), "train", fingerprint).directory == copy
    assert len(read) == 1


def test_a_shard_that_changed_in_the_bucket_is_refused_by_name(far):
    local, open_far, _ = far
    path = local.directory / "train-00001.tokens"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    read = open_far(copies=True)
    read.tokens(1024, 1100)  # blocks that are what they were
    assert "train-00001.tokens" not in finished(read)
    with pytest.raises(CacheError, match="train-00001.tokens is damaged: sha256 .*, expected "):
        read.tokens(1024, 1100)
    with pytest.raises(
        CacheError, match="train-00001.tokens is damaged: .* in block 15; delete the"
    ):
        open_far(copies=False, machine="two").tokens(0, local.num_tokens)
    path.write_bytes(sound)
    (local.directory / "train-00000.index").write_bytes(b"x" * 400)
    with pytest.raises(CacheError, match="train-00000.index is damaged: sha256"):
        open_far(copies=False, machine="three").tokens(0, 10)
    path.unlink()
    with pytest.raises(CacheError, match="train-00001.tokens is missing"):
        open_far(copies=False, machine="four")


@pytest.mark.slow
def test_opening_reads_no_token_and_a_window_reads_its_blocks(service):
    found = service["by_range"]
    assert service["shards"] > 8 and found["opened"] == [] and found["manifest_reads"] == 1
    assert found["location"].startswith("gs://bucket/caches/text-bytes-")
    # 100 tokens over the end of a shard: a block of 64 tokens, 2 bytes each, in one, 2 in the next.
    ranges = [(name.rpartition("/")[2], asked) for name, asked in found["ranges"]]
    assert sorted(ranges) == [
        ("train-00000.tokens", "bytes=1920-2047"),
        ("train-00001.tokens", "bytes=0-255"),
    ]
    assert found["one"] and service["built"]


@pytest.mark.slow
def test_processes_read_their_own_rows_from_the_bucket(service):
    found = service["by_range"]
    assert found["rows"] and found["documents"]
    assert found["bytes"] <= 16 * 2 * 128  # 16 rows of 48 tokens and a target: 1 or 2 blocks each


@pytest.mark.slow
def test_without_copies_only_what_is_small_comes_to_the_machine(service):
    assert {Path(name).suffix for name in service["by_range"]["files"]} == {".index", ".npz"}
    assert service["verified"]  # `fope data build` again: hashed where it is


@pytest.mark.slow
def test_shards_that_were_read_are_copied_once_and_known_after_a_restart(service):
    found = service["with_copies"]
    assert found["all"] and found["all_again"] and found["read_again"] == []
    # A range of each shard, and the copy of it.
    assert found["copies"] == 2 * service["shards"]
    names = [
        f"train-{i:05d}.{kind}" for i in range(service["shards"]) for kind in ("index", "tokens")
    ]
    assert found["files"] == names  # no lock, nothing unfinished


@pytest.mark.slow
def test_a_damaged_copy_is_named_and_made_again(service):
    found = service["with_copies"]
    assert "/train-00001.tokens is damaged: sha256 " in found["damaged_copy"]
    assert "in block 0; delete it: it is copied from gs://bucket/" in found["damaged_copy"]
    assert found["copied_again"]


@pytest.mark.slow
def test_a_bucket_that_refuses_some_requests_is_asked_again(service):
    assert service["under_faults"]["refused_sometimes"]


@pytest.mark.slow
def test_a_changed_shard_is_refused_by_name(service):
    found = service["under_faults"]
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
