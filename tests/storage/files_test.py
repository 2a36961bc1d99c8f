"""Files on disk and the paths that a user may give; buckets themselves are in buckets_test.py."""

import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fope_jax.command_line.common import local_path
from fope_jax.config import ConfigError, load_config
from fope_jax.interop.hub import local_checkpoint
from fope_jax.main import main
from fope_jax.report.html import make_output
from fope_jax.report.rows import ReportError
from fope_jax.spectrum.tables import write_spectrum
from fope_jax.storage import directories, files, paths
from fope_jax.storage.directories import (
    check_output,
    check_space,
    check_writable,
    make_directory,
    remove_empty_directories,
)
from fope_jax.storage.files import BucketLineWriter, LineWriter, open_line_writer, write_json
from fope_jax.storage.paths import as_path, glob_paths


@pytest.mark.parametrize("given", ["runs/x", Path("runs/x"), "/a/b", "."])
def test_a_path_of_this_machine_is_that_of_pathlib(given):
    assert as_path(given) == Path(given) and type(as_path(given)) is type(Path())


def test_a_leading_tilde_is_the_home_directory_as_in_a_shell(tmp_path, monkeypatch):
    """Else `--workdir=~/runs/x`, which no shell expands, makes a directory called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").touch()
    assert as_path("~/runs") == as_path(Path("~/runs")) == tmp_path / "runs"
    assert glob_paths("~/*.txt") == [tmp_path / "a.txt"]
    assert local_checkpoint("hf:~/model") == tmp_path / "model"
    assert make_output("~/page", "the report") == tmp_path / "page"
    assert local_path("~/out") == tmp_path / "out"
    with pytest.raises(ConfigError, match=f"'{tmp_path}/none.py' does not exist"):
        load_config("~/none.py")
    assert as_path("a/~/b") == Path("a/~/b") and as_path("~x") == Path("~x")


@pytest.mark.parametrize("given", ["gs://bucket/out", "s3://bucket/out"])
def test_what_is_written_on_this_machine_alone_is_refused_in_one_wording(
    given, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    accepted = f"'{given}'; accepted: a path of this machine"
    with pytest.raises(ValueError, match=f"^{accepted}$"):
        paths.local_path(given)
    with pytest.raises(SystemExit):
        main(["report", "run", "-o", given])
    assert f"argument -o/--out: {accepted}\n" in capsys.readouterr().err
    writers = {"report": partial(make_output, what="the report")}
    writers["spectra"] = partial(write_spectrum, {"variant": "rope", "seed": 0, "step": 1})
    for what, write in writers.items():
        with pytest.raises(ReportError, match=f"^cannot write the {what} to {accepted}$"):
            write(given)
    assert not list(tmp_path.iterdir()), "a directory called gs:"


@pytest.mark.parametrize("given", ["s3://bucket/run", "http://host/x", "gs://", "gs:///x"])
def test_another_scheme_is_refused_with_what_is_accepted(given):
    with pytest.raises(ValueError, match="accepted: a path of this machine, or gs://BUCKET/PATH"):
        as_path(given)


def test_a_bucket_without_its_package_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[buckets\]'"):
        as_path("gs://bucket/run")


def test_tensorflow_reads_no_bucket_although_epath_was_used_before(tmp_path):
    """epath decides at its first path, as when JAX keeps a program of a run on disk."""
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')")
    program = "from fope_jax.storage.paths import as_path; from etils import epath\n"
    program += "epath.Path('x').exists(); print(as_path('gs://bucket/x')._backend.__class__)"
    environment = {name: value for name, value in os.environ.items() if name != "EPATH_USE_TF"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "FileSystemSpec" in done.stdout, done.stderr


def test_a_file_is_the_old_one_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "its own temporary file is gone"


def test_a_line_that_does_not_fit_is_kept_and_the_file_ends_in_a_whole_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = open_line_writer(path)
    lines.write("first")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}: File too large"):
            lines.write("second, of which four bytes fit")
        assert path.read_text() == "first\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.write("third")
    assert path.read_text() == "first\nsecond, of which four bytes fit\nthird\n"
    lines.close()


def test_lines_on_disk_are_in_the_file_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("first\n")
    lines = open_line_writer(path)
    assert type(lines) is LineWriter
    lines.write("second")
    assert path.read_text() == "first\nsecond\n"
    lines.close()


def test_lines_in_a_bucket_wait_for_the_clock_or_a_flush(tmp_path, monkeypatch):
    now, written = 100.0, []
    monkeypatch.setattr(files.time, "monotonic", lambda: now)
    monkeypatch.setattr(files, "write_text", lambda path, text: written.append(text))
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    lines = BucketLineWriter(path, seconds=10)
    lines.write("a")
    now = 109.0
    lines.write("b")
    assert written == []
    lines.flush()
    lines.flush()
    assert written == ["old\na\nb\n"]  # once: nothing was new the second time
    now = 118.0
    lines.write("c")
    now = 119.0
    lines.write("d")
    assert written[1:] == ["old\na\nb\nc\nd\n"]
    lines.write("e")
    lines.close()
    assert written[2:] == ["old\na\nb\nc\nd\ne\n"]


def test_the_cache_of_a_user_has_one_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FOPE_CACHE", raising=False)
    assert paths.user_cache_dir() == tmp_path / "fope_jax"
    monkeypatch.setenv("FOPE_CACHE", str(tmp_path / "own"))
    assert paths.user_cache_dir() == tmp_path / "own"


def test_a_place_to_write_is_probed_and_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for good in (tmp_path, tmp_path / "a", tmp_path / "a" / "b" / "c"):
        check_writable(good)
    for bad in ("file", "file/x", "file/x/y", "loop", "loop/x", "dangling/x", "n" * 300):
        with pytest.raises(OSError, match=f"cannot write the page to {tmp_path}/{bad}: "):
            check_output(tmp_path / bad, "the page")
    with pytest.raises(OSError, match="cannot write the page to /proc/x/y"):
        check_output(Path("/proc/x/y"), "the page")
    assert sorted(tmp_path.rglob("*")) == before
    made = make_directory(tmp_path / "a" / "b")
    assert made == [tmp_path / "a" / "b", tmp_path / "a"]
    (tmp_path / "a" / "kept").write_text("")
    remove_empty_directories(made)
    assert (tmp_path / "a" / "kept").exists() and not (tmp_path / "a" / "b").exists()


def test_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(directories.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    check_space(tmp_path / "a" / "b", 10**9, "a checkpoint")
    with pytest.raises(OSError, match=r"a/b: a checkpoint takes 2 GB, and 1 GB are free"):
        check_space(tmp_path / "a" / "b", 2 * 10**9, "a checkpoint")
