"""What a process does that is asked to end, by each of the three signals."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from fope_jax import main as program
from fope_jax.command_line.common import VERBS
from fope_jax.processes.signals import (
    SIGNALS,
    Stopped,
    defer_signals,
    exit_after_grace_period,
    keep_process,
    raise_on_signal,
)

pytestmark = pytest.mark.usefixtures("as_in_a_terminal")


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_under_way_is_left_and_cleans_up(number):
    before, done = [signal.getsignal(n) for n in SIGNALS], []
    with pytest.raises(Stopped) as caught, raise_on_signal():
        try:
            send(number)
            time.sleep(5)
        finally:
            done.append("cleaned up")
    assert done and isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.exit_code == 128 + number
    assert str(caught.value) == f"stopped by {number.name}"
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_what_must_go_on_is_told(number):
    with defer_signals() as noted:
        assert noted() is None
        send(number)
        time.sleep(0)
        assert noted() == number
        if number != signal.SIGINT:
            send(number)  # some send it twice
        assert noted() == number
    with pytest.raises(Stopped), raise_on_signal():
        with defer_signals() as noted:
            send(signal.SIGTERM)
            assert noted()
        send(signal.SIGTERM)


@pytest.mark.parametrize("how", [raise_on_signal, defer_signals])
def test_a_signal_that_is_ignored_stays_so_and_a_second_ctrl_c_kills(how):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # in the background of a shell
    with how():
        send(signal.SIGHUP)
        send(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(Stopped) if how is raise_on_signal else defer_signals(), how():
        try:
            send(signal.SIGINT)
        finally:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_a_second_ctrl_c_in_a_notebook_raises_and_kills_nothing():
    with keep_process(), defer_signals() as noted:
        send(signal.SIGINT)
        assert noted() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with defer_signals():
        send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_cleans_up_is_not_broken_into(number):
    done = []
    for _ in range(2):
        with pytest.raises(Stopped, match="SIGTERM"), raise_on_signal():
            try:
                with raise_on_signal():
                    send(signal.SIGTERM)
            finally:
                send(number)
                done.append("cleaned up")
    assert len(done) == 2


def test_in_another_thread_nothing_is_caught():
    before = [signal.getsignal(n) for n in SIGNALS]
    seen = []

    def elsewhere():
        with exit_after_grace_period(), raise_on_signal(), defer_signals() as noted:
            seen.extend([noted(), [signal.getsignal(n) for n in SIGNALS]])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [None, before]


def run(body, number, **options):
    """Runs a program, sends it a signal when it is ready, and returns the code and its output."""
    imports = "from fope_jax.processes.signals import *\nimport hashlib, os, sys, threading, time\n"
    process = subprocess.Popen(
        [sys.executable, "-c", imports + body],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def test_a_process_that_python_does_not_come_back_to_is_ended():
    body = (
        "with exit_after_grace_period(0.3), raise_on_signal():\n"
        "    threading.Timer(0.2, lambda: print('ready', flush=True)).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)\n"
    )
    code, _, err = run(body, signal.SIGTERM)
    assert code == 143
    assert err == "fope: stopped by SIGTERM, in the middle of what was under way\n"


def test_one_that_saves_is_not():
    body = (
        "with exit_after_grace_period(0.2), raise_on_signal(), defer_signals() as noted:\n"
        "    print('ready', flush=True)\n"
        "    while not noted(): time.sleep(0.01)\n"
        "    time.sleep(1)\n"
        "    print('saved')\n"
    )
    assert run(body, signal.SIGHUP)[:2] == (0, "saved\n")


def test_a_terminal_that_is_closed_stops_nothing_that_is_said(tmp_path):
    """What kills a run when ssh breaks off is a progress bar that can no longer be written."""
    master, slave = pty.openpty()
    code = (
        "import fcntl, sys, termios, time; from fope_jax.processes.signals import defer_signals\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "with defer_signals() as noted:\n"
        "    print('ready', flush=True)\n"
        "    while not noted(): time.sleep(0.01)\n"
        "    print('a bar', flush=True); print('a line', file=sys.stderr, flush=True)\n"
        "    open(sys.argv[1], 'w').write('saved')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "file"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    assert b"ready" in os.read(master, 100)
    os.close(master)
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "file").read_text() == "saved"


def test_the_child_of_a_parent_that_is_killed_gets_sigterm():
    child = (
        "import os, time; from fope_jax.processes.signals import end_with_parent, defer_signals\n"
        "with defer_signals() as noted:\n"
        "    end_with_parent(); print('ready', flush=True)\n"
        "    while not noted(): time.sleep(0.01)\n"
        "    print('asked to end by', noted())\n"
    )
    body = (
        "import subprocess\n"
        "os.environ[PARENT_VARIABLE] = str(os.getpid())\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])\n"
    )
    assert run(body, signal.SIGKILL)[:2] == (-signal.SIGKILL, "asked to end by 15\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_program_says_what_ended_it(monkeypatch, capsys, number):
    verb = VERBS["methods"]._replace(run=lambda arguments: send(number))
    monkeypatch.setitem(VERBS, "methods", verb)
    assert program.main(["methods"]) == 128 + number
    assert capsys.readouterr().err == (
        f"fope: stopped by {number.name}; the same command goes on from what has been saved\n"
    )
