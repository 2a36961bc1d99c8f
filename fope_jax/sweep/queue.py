"""Runs a sweep: each run in its own process, several at once; finished runs are kept."""

from __future__ import annotations

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

from fope_jax.config import build_experiment, experiment_to_dict
from fope_jax.position.registry import named_modules, to_spec
from fope_jax.processes.cores import available_cores
from fope_jax.processes.signals import PARENT_VARIABLE, defer_signals
from fope_jax.storage.files import read_json, write_json
from fope_jax.sweep.progress import SweepProgress
from fope_jax.sweep.runs import PlannedRun, as_stored
from fope_jax.train.workdir import CONFIG, has_checkpoint

PROGRAM = (sys.executable, "-m", "fope_jax.main")
DONE = "sweep.json"  # in the directory of a finished run: its experiment

# Otherwise glibc returns large buffers to the kernel after every step and page-faults them back.
MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "536870912",
}


class SweepError(RuntimeError):
    """Runs of a sweep failed; the message names their logs."""


def run_sweep(
    planned: Sequence[PlannedRun],
    workdir: Path,
    *,
    jobs: int = 1,
    say: Callable[[str], None] = tqdm.write,
    keep: Callable[[str], None] = lambda name: None,
) -> None:
    """Trains and evaluates every run that is not done yet, each in ``workdir / name``.

    ``sweep.json`` in its directory marks a run as done. After an interruption the same call
    resumes. If the sweep is stopped, so are its runs, and it waits until they have saved.

    Args:
      planned: from `load_sweep`, parents first.
      workdir: directory of the sweep, with a log ``name.log`` for each run.
      jobs: runs at once; each gets an equal share of the cores.
      say: called with a line for each run that ends.
      keep: called with the name of each run that is done, before or now, as soon as it is.

    Raises:
      ConfigError: a directory holds another run.
      SweepError: a run failed; raised after all other runs.
    """
    shares = core_shares(jobs)
    done = {run.name for run in planned if _is_done(run, workdir)}
    for name in sorted(done):
        keep(name)
    if done:
        say(f"{len(done)} of {len(planned)} runs are done and kept")
    waiting = [run for run in planned if run.name not in done]
    seconds = {name: read_json(workdir / name / DONE).get("seconds", 0.0) for name in done}
    failed: dict[str, str] = {}
    workdir.mkdir(parents=True, exist_ok=True)
    running: dict[Future[dict[str, float]], tuple[PlannedRun, list[int]]] = {}
    progress = SweepProgress(planned, workdir, seconds, jobs, say)
    with progress, ThreadPoolExecutor(jobs) as pool, _Children() as children:
        while waiting or running:
            ready = [run for run in waiting if run.parent is None or run.parent in done]
            for run in ready[: len(shares)]:
                waiting.remove(run)
                cores = shares.pop()
                progress.begin(run)
                running[pool.submit(_run, run, workdir, cores, children)] = run, cores
            ended = wait(running, progress.interval, return_when=FIRST_COMPLETED).done
            if not ended:
                progress.show()
            for future in ended:
                run, cores = running.pop(future)
                shares.append(cores)
                if (error := future.exception()) is None:
                    done.add(run.name)
                    keep(run.name)
                    progress.end(run, future.result())
                else:
                    progress.fail(run)
                    failed[run.name] = str(error)
                    say(f"failed: {run.name}: {error}")
            for run in [run for run in waiting if run.parent in failed]:
                waiting.remove(run)
                progress.fail(run)
                failed[run.name] = f"its parent {run.parent} has failed"
    if failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise SweepError(
            f"{len(failed)} of {len(planned)} runs have failed; the same command runs them again:\n"
            f"{reasons}"
        )


def core_shares(jobs: int) -> list[list[int]]:
    """The cores of this process in ``jobs`` parts, shared if there are more jobs than cores."""
    if jobs < 1:
        raise ValueError(f"jobs = {jobs}; accepted: an integer of 1 or more")
    cores = available_cores()
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def _is_done(run: PlannedRun, workdir: Path) -> bool:
    directory = workdir / run.name
    config, stamp = directory / CONFIG, directory / DONE
    # Without either, it is a failed start that may be overwritten.
    if config.is_file() and (stamp.is_file() or has_checkpoint(directory)):
        run.check_same(read_json(config), directory, "use another --workdir")
    if not stamp.is_file():
        return False
    # Built again: an older one lacks the keys that have come since.
    stored = as_stored(build_experiment(read_json(stamp)["experiment"]))
    return stored == as_stored(run.experiment)


def _run(run: PlannedRun, workdir: Path, cores: list[int], children: _Children) -> dict[str, float]:
    """Trains and evaluates one run; the seconds of each verb. SweepError if a command fails."""
    directory, log = workdir / run.name, workdir / f"{run.name}.log"
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, cores)  # child processes inherit it from this thread
    environment = MEMORY | {"TQDM_MININTERVAL": "30"} | dict(os.environ)  # bars go into the log
    environment[PARENT_VARIABLE] = str(os.getpid())  # so that runs end if the sweep is killed
    # The sweep's files name them, but `extend` and `evaluate` read them from a run's config.json.
    modules = named_modules(to_spec(run.experiment.position))
    if tracker := run.experiment.train.tracker:
        modules.append(tracker.partition(":")[0])
    allow = [f"--allow-module={module}" for module in modules]
    seconds = {}
    for command in (run.command(workdir), ["evaluate", str(directory)]):
        line, began = [*PROGRAM, *command, *allow], time.perf_counter()
        with log.open("ab") as stream:
            code = children.run(line, stdout=stream, stderr=stream, env=environment)
        if code:
            lines = log.read_bytes().decode(errors="replace").strip().splitlines() or ["no output"]
            raise SweepError(f"fope {command[0]} ended with code {code}: {lines[-1]} ({log})")
        seconds[command[0]] = time.perf_counter() - began
    stamp = {
        "experiment": experiment_to_dict(run.experiment),
        "commands": [run.command(workdir)],
        "seconds": sum(seconds.values()),
        "cores": len(cores),
    }
    write_json(directory / DONE, stamp)
    return seconds


class _Children:
    """The running processes of a sweep; it stops them when the sweep ends early."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._is_ending = False

    def run(self, command: Sequence[str], **options: Any) -> int:
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
        with defer_signals():  # a further signal must not interrupt their saving
            with self._lock:
                self._is_ending = True
                running = list(self._running)
            for child in running:
                child.terminate()
            for child in running:
                child.wait()
