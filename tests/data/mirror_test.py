"""Directories copied from and to a bucket, which is another directory here."""

import fcntl
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fope_jax.data import mirror
from fope_jax.data.mirror import MirrorError, download, local_directory, upload

MANIFEST = "manifest.json"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A directory with two files that a manifest names, one that it does not, and the manifest."""
    monkeypatch.setenv("FOPE_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "remote"
    (directory / "sub").mkdir(parents=True)
    (directory / "a").write_bytes(b"first" * 100)
    (directory / "sub" / "b").write_bytes(b"second" * 100)
    (directory / "tokenizer").write_bytes(b"t")
    (directory / MANIFEST).write_text(json.dumps(hashes(directory)))
    return directory


def hashes(directory):
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in ("a", "sub/b")
    }


def copy_of(remote, expected=None):
    content = (remote / MANIFEST).read_bytes()
    return download(remote, MANIFEST, content, expected or hashes(remote))


def content(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def copies(monkeypatch):
    """Names of the files that are copied, as they are."""
    names, real = [], mirror._copy

    def copy(source, target, progress):
        names.append(Path(source).name)
        real(source, target, progress)

    monkeypatch.setattr(mirror, "_copy", copy)
    return names


def test_processes_that_come_together_copy_each_file_once(remote, copies, capsys):
    """Locks are of open files, so threads are to each other what processes are."""
    together = threading.Barrier(4)

    def one(_):
        together.wait()
        return copy_of(remote)

    with ThreadPoolExecutor(4) as pool:
        (local,) = set(pool.map(one, range(4)))
    assert sorted(copies) == ["a", "b", "tokenizer"]
    assert content(local) == content(remote)
    assert copy_of(remote) == local
    assert len(copies) == 3


def test_an_interrupted_download_goes_on(remote, copies, monkeypatch):
    counted = mirror._copy

    def stopped(source, target, progress):
        if source.name == "b":
            target.write_bytes(b"sec")
            raise OSError("connection lost")
        counted(source, target, progress)

    monkeypatch.setattr(mirror, "_copy", stopped)
    with pytest.raises(OSError, match="connection lost"):
        copy_of(remote)
    assert not [
        p for p in (mirror.user_cache_dir() / "mirrors").iterdir() if (p / MANIFEST).exists()
    ]
    monkeypatch.setattr(mirror, "_copy", counted)
    local = copy_of(remote)
    assert content(local) == content(remote)
    assert copies.count("a") == 1 and copies.count("b") == 1


def test_other_text_under_the_same_name_is_another_copy(remote):
    before = copy_of(remote)
    (remote / "a").write_bytes(b"changed")
    (remote / MANIFEST).write_text(json.dumps(hashes(remote)))
    after = copy_of(remote)
    assert after != before and content(after) == content(remote)


def test_a_damaged_and_a_missing_file_are_named(remote):
    expected = hashes(remote)
    (remote / "a").write_bytes(b"first" * 99 + b"fifth")
    with pytest.raises(MirrorError, match=rf"{remote}/a is damaged: sha256 \w{{16}}..., expected"):
        copy_of(remote, expected)
    (remote / "a").unlink()
    with pytest.raises(MirrorError, match=f"{remote}/a is missing"):
        copy_of(remote, expected)


def test_an_upload_replaces_all_and_its_manifest_frames_it(remote, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "stale").write_text("of an older cache")
    (target / MANIFEST).write_text("{}")
    seen, real = [], mirror._copy

    def copy(source, goal, progress):
        seen.append((source.name, (target / MANIFEST).exists()))
        real(source, goal, progress)

    monkeypatch.setattr(mirror, "_copy", copy)
    upload(remote, target, MANIFEST)
    assert content(target) == content(remote)
    assert seen[-1] == (MANIFEST, False) and not any(there for _, there in seen)


def test_a_lock_is_taken_though_its_holder_fails_and_removes_its_directory(tmp_path):
    path = tmp_path / "new" / "a.lock"
    path.parent.mkdir()
    holder = os.open(path, os.O_CREAT | os.O_WRONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def fail():
        path.unlink()
        path.parent.rmdir()
        os.close(holder)

    with mirror.exclusive_lock(path, waiting=fail):
        assert path.is_file()


def test_what_belongs_in_a_bucket_is_made_in_a_place_of_its_own(remote, tmp_path):
    assert local_directory(tmp_path) == tmp_path
    places = {str(local_directory(path)) for path in ("gs://b/x", "gs://b/x/", "gs://b/y")}
    assert len(places) == 2 and all(place.startswith(str(tmp_path / "cache")) for place in places)
