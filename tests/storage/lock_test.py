"""One writer a run directory: who is refused, what is taken over, and that nothing stays behind."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fope_jax.storage import lock
from fope_jax.storage.lock import LOCK, LockError, LockOwner, lock_run, read_lock_owner

HOLDER = """
import sys
from pathlib import Path
from fope_jax.storage.lock import lock_run
with lock_run(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path / "run"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def leave(directory, **changes):
    """Writes a lock as an owner that never gave it back would leave it."""
    owner = LockOwner(socket.gethostname(), os.getpid(), 1, "2026-01-01T00:00:00+00:00", "train")
    directory.mkdir(exist_ok=True)
    content = owner._replace(**changes)._asdict() | {"beats": 1}
    (directory / LOCK).write_text(json.dumps(content).ljust(511) + "\n")


def test_the_second_is_refused_with_the_first_by_name_until_that_is_killed(
    holder, tmp_path, caplog
):
    run = tmp_path / "run"
    began = time.monotonic()
    with pytest.raises(LockError) as caught, lock_run(run, "evaluate"):
        pass
    assert time.monotonic() - began < 1, "at once"
    who = rf"fope train, host {socket.gethostname()}, pid {holder.pid}, since 20\d\d-\S+"
    assert re.match(rf"{run} is written by another process \({who}\); wait", str(caught.value))
    assert str(caught.value).endswith(f"delete {run / LOCK}")
    holder.kill()
    holder.wait()
    with caplog.at_level(logging.WARNING, logger="fope_jax"), lock_run(run, "evaluate"):
        assert read_lock_owner(run).pid == os.getpid()
    assert re.search(rf"taking over .*its process is gone \({who}\)", caplog.text)
    assert not (run / LOCK).exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_process_that_has_ended_and_was_not_waited_for_is_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    status = Path(f"/proc/{process.pid}/stat")
    state, deadline = None, time.monotonic() + 60
    while state != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
        state, *fields = status.read_text().rpartition(")")[2].split()
    leave(tmp_path, pid=process.pid, began=int(fields[18]))
    assert not lock.is_owner_alive(read_lock_owner(tmp_path))
    process.wait()


def test_a_process_id_that_came_again_is_not_the_owner(tmp_path):
    leave(tmp_path)  # this very process id, begun at another time
    with lock_run(tmp_path, "train"):
        assert read_lock_owner(tmp_path).began > 1


@pytest.mark.parametrize("content", ['{"host": "bo', "[" * 100_000], ids=["cut off", "nested"])
def test_a_damaged_lock_is_nobodys(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with lock_run(tmp_path, "train"):
        assert read_lock_owner(tmp_path).verb == "train"


def test_an_owner_on_another_machine_is_watched_and_then_taken_over(tmp_path, caplog):
    leave(tmp_path, host="elsewhere")
    caplog.set_level(logging.INFO, logger="fope_jax")
    with lock_run(tmp_path, "train", lease_seconds=0.2):
        assert read_lock_owner(tmp_path).host == socket.gethostname()
    assert "held from another machine (fope train, host elsewhere" in caplog.text
    assert "no sign of life for 0.2 s" in caplog.text


def test_an_owner_on_another_machine_that_counts_is_alive(tmp_path):
    leave(tmp_path, host="elsewhere")

    def beat():
        time.sleep(0.1)
        text = (tmp_path / LOCK).read_text()
        (tmp_path / LOCK).write_text(text.replace('"beats": 1', '"beats": 2'))

    thread = threading.Thread(target=beat)
    thread.start()
    with (
        pytest.raises(LockError, match="host elsewhere"),
        lock_run(tmp_path, "train", lease_seconds=5),
    ):
        pass
    thread.join()
    assert read_lock_owner(tmp_path).host == "elsewhere"


def test_the_owner_counts_and_finds_out_that_it_was_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    with lock_run(tmp_path, "train") as held:
        deadline = time.monotonic() + 5
        while '"beats": 1}' in (tmp_path / LOCK).read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert '"beats": 1}' not in (tmp_path / LOCK).read_text()
        held.check()
        leave(tmp_path, host="elsewhere")
        time.sleep(0.1)
        with pytest.raises(LockError, match=r"another process now \(.*host elsewhere"):
            held.check()
    assert read_lock_owner(tmp_path).host == "elsewhere", "what is not ours stays"


def test_the_owner_may_enter_again_and_keeps_it(tmp_path):
    with lock_run(tmp_path, "train"):
        with lock_run(tmp_path, "evaluate") as inner:
            assert inner is None
        assert read_lock_owner(tmp_path).verb == "train"
    assert not (tmp_path / LOCK).exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=f"cannot write to workdir {tmp_path}/file/run: Not a dir"),
        lock_run(tmp_path / "file" / "run", "train"),
    ):
        pass
