"""Trainings that are made to go wrong, each in a process of its own that begins in a moment.

A nursery is one process that has everything imported and forks: a training of a few steps then
takes a second and not ten. As a program it reads requests, JSON lines, and answers each:

    {"start": REQUEST}   -> {"pid": 12}
    {"wait": 12}         -> {"code": -9}

With a REQUEST as its argument the program is that training itself.

    argv          of `fope`
    log           file for what it says, on both streams
    environment   variables, beside those of the nursery
    pace          seconds that each batch takes to come
    nan_at        steps whose loss is no number
    shuffled_at   steps whose targets are drawn at random
    strange_at    steps with a token beyond any vocabulary
    die           [name, call, seconds]: SIGKILL so long after that call of a function began
    full_at       which calls of CheckpointStore.start_save find that no file can grow
    clock         seconds that the wall clock jumps to and fro by between steps
    nobody        without the rights of root
    distributed   port: jax.distributed is initialized for this one process
    broken        which promise is broken, of broken.py
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any

Request = dict[str, Any]


# ---------------------------------------------------------------------------- from outside


class Nursery:
    """Starts trainings by a process that has everything imported.

    Args:
      start_new_session: what is sent to the caller's process group, as by `timeout` or Ctrl-C, does
        not reach it and the trainings; the caller ends them.
    """

    def __init__(self, environment: dict[str, str], start_new_session: bool = False):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=start_new_session,
        )

    def start(self, request: Request) -> int:
        """Returns the process id."""
        return self._ask({"start": request})["pid"]

    def wait(self, pid: int) -> int:
        """Returns the exit code, negative after a signal."""
        return self._ask({"wait": pid})["code"]

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


# ---------------------------------------------------------------------------- inside

offset = [0]  # of the wall clock


def serve() -> None:
    for module in ("fope_jax.extend.run", "fope_jax.main", "fope_jax.train.loop"):
        importlib.import_module(module)

    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                os._exit(run(question["start"]))
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def run(request: Request) -> int:
    """Prepares what goes wrong, and trains; returns the exit code."""
    os.environ.update(request.get("environment", {}))
    if "log" in request:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
    # A shell's background ignores the first of these and nohup the second, so that what they run
    # would not hear the signal of a trial.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        prepare(request)
        from fope_jax.main import main

        code = main(request["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        return code
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        return 1


def prepare(request: Request) -> None:
    from fope_jax.data import task_mixture

    if "broken" in request:
        from tests.faults.broken import BREAKS

        BREAKS[request["broken"]].make()
    task_mixture.Loader = harmed_loader(task_mixture.Loader, request)
    if "die" in request:
        name, call, seconds = request["die"]
        wrap(name, call, lambda: kill_after(seconds))
    for call in request.get("full_at", ()):
        name = "fope_jax.storage.checkpoint.CheckpointStore.start_save"
        wrap(name, call, no_file_can_grow, end=lambda save: save.join())
    if "clock" in request:
        now = time.time
        time.time = lambda: now() + offset[0]
    if request.get("nobody") and os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    if "distributed" in request:
        import jax

        jax.distributed.initialize(f"127.0.0.1:{request['distributed']}", 1, 0)


def harmed_loader(base: Any, request: Request) -> Any:
    import numpy as np

    def harmed(step: int, batch: Any) -> Any:
        if step in request.get("nan_at", ()):
            return batch._replace(weights=batch.weights * np.float32(np.nan))
        if step in request.get("shuffled_at", ()):
            targets = np.random.default_rng(step).integers(0, 250, batch.targets.shape, np.int32)
            return batch._replace(targets=targets)
        if step in request.get("strange_at", ()):
            return batch._replace(tokens=np.full_like(batch.tokens, 10**6))
        return batch

    class Loader(base):
        def iterate(self, start_step=0, num_steps=None):
            for step, batch in enumerate(super().iterate(start_step, num_steps), start_step + 1):
                time.sleep(request.get("pace", 0.0))
                offset[0] = random.choice((-1, 0, 1)) * request.get("clock", 0)
                yield harmed(step, batch)

    return Loader


def wrap(name: str, call: int, begin: Any, end: Any = lambda _: None) -> None:
    """Calls ``begin`` when a function is called for the ``call``-th time, from 1, and ``end`` with
    its result; the context that ``begin`` returns is left then."""
    place, _, attribute = name.rpartition(".")
    try:
        owner: Any = importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, cls = place.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    real, calls = getattr(owner, attribute), itertools.count(1)

    def wrapped(*arguments, **named):
        if next(calls) != call:
            return real(*arguments, **named)
        with begin() or contextlib.nullcontext():
            result = real(*arguments, **named)
            end(result)
            return result

    setattr(owner, attribute, wrapped)


def kill_after(seconds: float) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if seconds:
        threading.Timer(seconds, kill).start()
    else:
        kill()


@contextlib.contextmanager
def no_file_can_grow():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(run(json.loads(sys.argv[1])))
    serve()
