"""Runs a sweep: each run in a process of its own, several at once, what is done left as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fope_jax.config import build_experiment, experiment_to_dict, incompatible_changes
from fope_jax.config.fields import ConfigError
from fope_jax.processes.signals import PARENT_VARIABLE, defer_signals
from fope_jax.storage.files import read_json, write_json
from fope_jax.sweep.runs import PlannedRun
from fope_jax.train.workdir import CONFIG, has_checkpoint

PROGRAM = (sys.executable, "-m", "fope_jax.main")
DONE = "sweep.json"  # in the directory of a finished run: what it was finished as

# glibc hands large buffers back to the kernel after every step and gets them again page by page.
MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "536870912",
}


class SweepError(RuntimeError):
    """Runs that failed, each with its log."""


def run_sweep(
    planned: Sequence[PlannedRun],
    workdir: Path,
    *,
    jobs: int = 1,
    say: Callable[[str], None] = tqdm.write,
) -> None:
    """Trains and evaluates every run that is not done yet, each in ``workdir / name``.

    A run is done when its directory says so in ``sweep.json``, with the experiment that it was
    done as. Interrupted, the same call goes on: a half-trained run from its newest checkpoint.
    Where it is asked to end, its runs are too, and it waits until they have saved. They notice when
    it is killed.

    Args:
      planned: from `load_sweep`; a parent comes before its children.
      workdir: of the sweep; also holds a log a run, ``name.log``.
      jobs: runs at once. Each has its own share of the processor's cores.
      say: where lines for people go.

    Raises:
      ConfigError: a directory holds a run of other numbers than the sweep's.
      SweepError: after everything else has been run, where a run has failed.
    """
    shares = core_shares(jobs)
    done = {run.name for run in planned if _is_done(run, workdir)}
    if done:
        say(f"{len(done)} of {len(planned)} runs are done and kept")
    waiting = [run for run in planned if run.name not in done]
    failed: dict[str, str] = {}
    workdir.mkdir(parents=True, exist_ok=True)
    running: dict[Future[None], tuple[PlannedRun, list[int]]] = {}
    bar = tqdm(total=len(planned), initial=len(done), desc="sweep", unit="run")
    with bar, ThreadPoolExecutor(jobs) as pool, _Children() as children:
        while waiting or running:
            ready = [run for run in waiting if run.parent is None or run.parent in done]
            for run in ready[: len(shares)]:
                waiting.remove(run)
                cores = shares.pop()
                running[pool.submit(_run, run, workdir, cores, children)] = run, cores
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, cores = running.pop(future)
                shares.append(cores)
                if (error := future.exception()) is None:
                    done.add(run.name)
                    bar.update()
                else:
                    failed[run.name] = str(error)
                    say(f"failed: {run.name}: {error}")
            for run in [run for run in waiting if run.parent in failed]:
                waiting.remove(run)
                failed[run.name] = f"its parent {run.parent} has failed"
    if failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise SweepError(
            f"{len(failed)} of {len(planned)} runs have failed; the same command runs them again:\n"
            f"{reasons}"
        )


def core_shares(jobs: int) -> list[list[int]]:
    """The cores of this process in ``jobs`` parts, none empty: with more jobs they share.

    Raises:
      ValueError: jobs below 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs = {jobs}; accepted: an integer of 1 or more")
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def _is_done(run: PlannedRun, workdir: Path) -> bool:
    def as_json(values: Any) -> Any:
        return json.loads(json.dumps(values))  # lists in place of tuples

    directory, wanted = workdir / run.name, as_json(experiment_to_dict(run.experiment))
    config, stamp = directory / CONFIG, directory / DONE
    # Without either it holds no more than a start that failed.
    if config.is_file() and (stamp.is_file() or has_checkpoint(directory)):
        there = as_json(experiment_to_dict(build_experiment(read_json(config))))
        if changes := incompatible_changes(there, wanted):
            raise ConfigError(
                f"{directory} holds another run than the sweep's; use another --workdir."
                " Different:\n" + "\n".join(f"  {change}" for change in changes)
            )
    return stamp.is_file() and read_json(stamp)["experiment"] == wanted


def _run(run: PlannedRun, workdir: Path, cores: list[int], children: _Children) -> None:
    """Trains and evaluates one run; raises SweepError where a command fails."""
    directory, log = workdir / run.name, workdir / f"{run.name}.log"
    os.sched_setaffinity(0, cores)  # of this thread, and so of the processes that it starts
    environment = MEMORY | {"TQDM_MININTERVAL": "30"} | dict(os.environ)  # bars go into the log
    environment["JAX_COMPILATION_CACHE_DIR"] = str(workdir.resolve() / ".compiled")
    environment[PARENT_VARIABLE] = str(os.getpid())
    began = time.perf_counter()
    for command in (run.command(workdir), ["evaluate", "--run", str(directory)]):
        with log.open("ab") as stream:
            code = children.run([*PROGRAM, *command], stdout=stream, stderr=stream, env=environment)
        if code:
            lines = log.read_bytes().decode(errors="replace").strip().splitlines() or ["no output"]
            raise SweepError(f"fope {command[0]} ended with code {code}: {lines[-1]} ({log})")
    stamp = {
        "experiment": experiment_to_dict(run.experiment),
        "commands": [run.command(workdir)],
        "seconds": time.perf_counter() - began,
        "cores": len(cores),
    }
    write_json(directory / DONE, stamp)


class _Children:
    """The running processes of a sweep; none outlives it, and none begins when it ends."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._is_ending = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Runs a command to its end; returns its exit code."""
        with self._lock:
            if self._is_ending:
                raise SweepError("the sweep is ending")
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
            self._running.add(child)
        code = child.wait()
        self._running.discard(child)
        return code

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            return
        with defer_signals():  # they get the time to save, whatever signals come meanwhile
            with self._lock:
                self._is_ending = True
                running = list(self._running)
            for child in running:
                child.terminate()
            for child in running:
                child.wait()
