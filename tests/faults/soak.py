"""A soak test: one training is preempted again and again: `python -m tests.faults.soak`.

Four processes train in a bucket behind a slow link, which refuses some requests and is lost for
moments. They are preempted at random moments, asked to stop or killed, until there have been
``--preemptions``; the same command starts them again each time. When a training ends, it is
compared with an unbroken one, and the next begins. Prints a table; a broken promise ends it with
what was promised.

``--directory`` keeps all of it: the same command goes on after the last preemption that it has.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.cloud_storage import Object, Storage, serving
from tests.faults import world
from tests.faults.nursery import Nursery

PROCESSES = 4
STEPS, SAVE_EVERY = 96, 12
PACE = 0.03  # seconds that each batch takes to come
WORKDIR = "gs://soak/run"
TRACKER = "tests.faults.soak:Progress"
GRACE = 60.0  # seconds; a machine that trains other models meanwhile is slow
AFTER_THE_FIRST_STEP = 10.0  # seconds of the window in which three of four preemptions come


# ---------------------------------------------------------------------------- inside a training


class Progress:
    """A tracker that appends each row's numbers and the time to a local file."""

    def __init__(self, workdir: str, config: Mapping[str, Any]):
        self._path = Path(os.environ["SOAK_PROGRESS"])

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        kept = {
            name: numbers[name] for name in ("train/loss", "train/grad_norm") if name in numbers
        }
        if kept:
            with self._path.open("a") as file:
                file.write(json.dumps([step, kept, time.time()]) + "\n")


# ---------------------------------------------------------------------------- the storage


class PoorLink:
    """What stands between the processes and their bucket.

    Attributes:
      latency: seconds that each request waits.
      rate: bytes per second that all requests share.
      refused: fraction of requests that are answered with 503.
      outage: seconds during which all are, once in a life.
    """

    def __init__(
        self, seed: str, latency=0.003, rate=4e6, refused=0.01, outage: float = 2.0
    ) -> None:
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self._latency, self._rate, self._refused = latency, rate, refused
        self._free = 0.0  # when the link has sent what it has taken
        self._lost = time.monotonic() + self._rng.uniform(0, 40)
        self._found = self._lost + outage
        self.requests = self.refusals = self.bytes = 0

    def fails(self) -> bool:
        time.sleep(self._latency)
        with self._lock:
            is_lost = self._lost < time.monotonic() < self._found
            is_refused = is_lost or self._rng.random() < self._refused
            self.requests, self.refusals = self.requests + 1, self.refusals + is_refused
        return is_refused

    def send(self, size: int) -> None:
        with self._lock:
            self.bytes += size
            self._free = max(self._free, time.monotonic()) + size / self._rate
            wait = self._free - time.monotonic()
        time.sleep(max(0.0, wait))


# ---------------------------------------------------------------------------- one life


@dataclass
class Life:
    """A training from its start until it was preempted, or came to its end.

    ``first`` and ``last`` are the steps whose rows it has written, 0 where it came to none.
    """

    training: int
    kind: str
    first: int = 0
    last: int = 0
    start_seconds: float = 0.0  # to the first step's row
    end_seconds: float = 0.0  # from the preemption to the end of all processes
    codes: list[int] = field(default_factory=list)
    requests: int = 0
    refusals: int = 0
    said: list[list[str]] = field(default_factory=list)  # of one that gave up


class Training:
    """The processes of one life."""

    def __init__(self, nursery: Nursery, config: Path, log: Path, progress: Path):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self._nursery, self.began = nursery, time.time()
        argv = ["train", "--config", str(config), "--workdir", WORKDIR]
        self.running, self.codes = {}, {}
        for index in range(PROCESSES):
            environment = {
                "FOPE_COORDINATOR": f"127.0.0.1:{port}",
                "FOPE_NUM_PROCESSES": str(PROCESSES),
                "FOPE_PROCESS_ID": str(index),
                "SOAK_PROGRESS": str(progress),
            }
            request = {"argv": argv, "log": f"{log}.{index}", "environment": environment}
            self.running[index] = nursery.start(request | {"pace": PACE})

    def poll(self) -> bool:
        """Whether a process still runs."""
        for index, pid in list(self.running.items()):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                self.codes[index] = self._nursery.wait(self.running.pop(index))
        return bool(self.running)

    def wait(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Waits until all have ended, or ``enough``; False where that takes longer."""
        deadline = time.monotonic() + seconds
        while self.poll() and not enough():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def send(self, number: signal.Signals) -> None:
        self.poll()
        for pid in self.running.values():
            os.kill(pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self.wait(30)


def asked(training: Training, rng: random.Random) -> None:
    training.send(signal.SIGTERM)
    training.wait(GRACE)


def asked_too_late(training: Training, rng: random.Random) -> None:
    training.send(signal.SIGTERM)
    training.wait(rng.uniform(0, 3))


def killed(training: Training, rng: random.Random) -> None:
    pass


def one_killed(training: Training, rng: random.Random) -> None:
    os.kill(rng.choice(list(training.running.values())), signal.SIGKILL)
    training.wait(rng.uniform(0, 1))
    training.send(signal.SIGTERM)
    training.wait(3)


PREEMPTIONS = {
    f"SIGTERM, {GRACE:.0f} s to save": asked,
    "SIGTERM, SIGKILL within 3 s": asked_too_late,
    "SIGKILL to all at once": killed,
    "SIGKILL to one, the others stopped": one_killed,
}
ASKED = next(iter(PREEMPTIONS))
ENDED = "came to its end"
GAVE_UP = "gave up by itself, as when its bucket is lost for too long"
GIVES_UP = 5  # lives in a row that give up: the soak would never end


# ---------------------------------------------------------------------------- what is kept


class Soak:
    """Everything of a soak test, in one directory.

    ``state.pickle`` is replaced after each life, when no process runs: the bucket, and the lives so
    far. A soak that is itself killed goes on from there.
    """

    def __init__(self, directory: Path, seed: int):
        self.directory, self.seed = directory, seed
        self.config, self._state = directory / "config.py", directory / "state.pickle"
        self.lives: list[Life] = []
        self.reference: dict[str, Any] = {}
        self.storage = Storage("soak")
        if self._state.exists():
            kept = pickle.loads(self._state.read_bytes())
            self.lives = [Life(**life) for life in kept["lives"]]
            self.reference = kept["reference"]
            found = {name: Object(*content) for name, content in kept["bucket"].items()}
            self.storage.buckets["soak"] = found
            # Clients tell versions apart by numbers that grow.
            newest = max((one.generation for one in found.values()), default=0)
            self.storage.numbers = itertools.count(newest + 1)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Serves the bucket, and starts trainings, as long as the context lasts."""
        self.directory.mkdir(parents=True, exist_ok=True)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled")}
        with serving(self.storage) as service:
            environment = world.environment() | cache | service
            self._nursery = Nursery(environment, start_new_session=True)
            try:
                self._prepare()
                yield
            finally:
                self._nursery.close()

    @property
    def bucket(self) -> dict[str, Object]:
        return self.storage.buckets["soak"]

    def keep(self) -> None:
        kept = {
            "bucket": {name: tuple(found) for name, found in self.bucket.items()},
            "lives": [asdict(life) for life in self.lives],
            "reference": self.reference,
        }
        partial = self._state.with_suffix(".new")
        partial.write_bytes(pickle.dumps(kept))
        partial.replace(self._state)

    def preempted(self) -> list[Life]:
        return [life for life in self.lives if life.kind in PREEMPTIONS]

    def live(self, kind: str | None) -> Life:
        """One life, preempted at a random moment as ``kind`` says; to its end with None."""
        number = len(self.lives)
        training = sum(life.kind == ENDED for life in self.lives)
        rng, life = random.Random(f"{self.seed} {number}"), Life(training, kind or ENDED)
        link = PoorLink(f"{self.seed} {number}")
        if self.reference:
            self.storage.fails, self.storage.send = link.fails, link.send
        progress = self.directory / "progress.jsonl"
        progress.unlink(missing_ok=True)
        logs = self.directory / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir()
        run = Training(self._nursery, self.config, logs / f"life-{number}", progress)
        try:
            self._wait_for(run, self._moment(rng) if kind else math.inf)
            is_preempted = kind is not None and not run.codes
            if is_preempted:
                asked_at = time.monotonic()
                PREEMPTIONS[kind](run, rng)
                life.end_seconds = time.monotonic() - asked_at
        finally:
            run.kill()
        if not any(run.codes.values()):
            life.kind = ENDED
        elif not is_preempted:
            life.kind = GAVE_UP
            life.said = [log.read_text().splitlines()[-1:] for log in sorted(logs.glob("*"))]
        life.codes = [run.codes[index] for index in range(PROCESSES)]
        life.requests, life.refusals = link.requests, link.refusals
        self._check(life, read_progress(progress), run.began)
        self.lives.append(life)
        return life

    def _moment(self, rng: random.Random) -> float:
        """Seconds from the start: a quarter of them come before the first step."""
        starts = [life.start_seconds for life in self.lives if life.first][-20:]
        start = statistics.median(starts or [self.reference["start_seconds"]])
        if rng.random() < 0.25:
            return rng.uniform(0, start)
        return start + rng.uniform(0, AFTER_THE_FIRST_STEP)

    def _wait_for(self, run: Training, moment: float) -> None:
        """Until the moment of the preemption, or until all processes have ended by themselves."""
        limit = 300.0
        enough = lambda: bool(run.codes) or time.time() - run.began > moment  # noqa: E731
        assert run.wait(limit, enough), f"neither preempted nor ended after {limit:g} s"
        if run.codes:
            run.wait(10)

    def _check(self, life: Life, rows: list[list[Any]], began: float) -> None:
        """What is promised of a life, by the rows that it has written."""
        if rows:
            life.first, life.last = rows[0][0], rows[-1][0]
            life.start_seconds = rows[0][2] - began
        steps = [row[0] for row in rows]
        assert steps == list(range(life.first, life.last + 1))[: len(steps)], steps
        if not self.reference:
            return
        for step, numbers, _ in rows:
            expected = self.reference["rows"][step]
            assert numbers == expected, f"step {step}: {numbers}, unbroken {expected}"
        before = [x for x in self.lives if x.training == life.training and x.first]
        if rows and before:
            lost = before[-1].last + 1 - life.first
            limit = 0 if before[-1].kind == ASKED else 2 * SAVE_EVERY
            assert 0 <= lost <= limit, f"{lost} steps are lost of {before[-1]}"
        elif rows:
            assert life.first == 1
        if life.kind == ASKED and 0 < life.last < STEPS:
            assert life.codes == [143] * PROCESSES, life
        if life.kind == ENDED:
            assert life.codes == [0] * PROCESSES, life

    # ------------------------------------------------------------------------ whole trainings

    def _prepare(self) -> None:
        """The corpus, its token cache, and the unbroken training, in a bucket that never fails."""
        if not self.config.exists():
            world.make_corpus(self.directory)
            text = world.CONFIG.format(self.directory, STEPS, SAVE_EVERY)
            assert '"log_every": 1' in text
            more = f'"log_every": 1, "evaluate_every": None, "tracker": "{TRACKER}"'
            text = text.replace('"log_every": 1', more)
            self.config.write_text(f"import {TRACKER.partition(':')[0]}\n" + text)
            world.build_cache(self.config)
        if not self.reference:
            life = self.live(None)
            assert life.codes == [0] * PROCESSES, life
            rows = read_progress(self.directory / "progress.jsonl")
            self.reference = {
                "rows": {step: numbers for step, numbers, _ in rows},
                "result": self.result(),
                "start_seconds": life.start_seconds,
            }
            self.lives = []
            self.bucket.clear()
            self.keep()

    def result(self) -> dict[str, Any]:
        """The rows and the arrays of a training that has ended."""
        place = self.directory / "result/run"
        for name, found in self.bucket.items():
            path = place.parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(found.content)
        try:
            return {"rows": world.numbers(place), "arrays": stored_arrays(place, STEPS)}
        finally:
            shutil.rmtree(place.parent)

    def go_on(
        self, preemptions: int, minutes: float, say: Callable[[str], None], to_the_end: bool = True
    ) -> bool:
        """Lives until there have been so many preemptions; False where the time was too short.

        The training that is under way by then comes to its end. Once the time is over no life
        begins; one that has begun takes a minute or two.
        """
        deadline = time.monotonic() + 60 * minutes
        kinds = list(PREEMPTIONS)
        while (count := len(self.preempted())) < preemptions or (to_the_end and self.bucket):
            if time.monotonic() > deadline:
                return False
            life = self.live(kinds[count % len(kinds)] if count < preemptions else None)
            say(f"{len(self.preempted()):4} of {preemptions}: {describe(life)}")
            if life.kind == ENDED:
                result = self.result()
                assert result["rows"] == self.reference["result"]["rows"], "other rows"
                assert result["arrays"] == self.reference["result"]["arrays"], "other arrays"
                self.bucket.clear()
            self.keep()
            last = self.lives[-GIVES_UP:]
            if len(last) == GIVES_UP and all(life.kind == GAVE_UP for life in last):
                raise AssertionError(f"{GIVES_UP} lives in a row gave up: {last[-1].said}")
        return True


def stored_arrays(workdir: Path, step: int) -> dict[str, str]:
    """The sha256 of every piece of every array of a checkpoint, as TensorStore has it."""
    import tensorstore as ts

    found = {}
    for item in ("params", "constants", "optimizer"):
        path = workdir / "checkpoints" / str(step) / item
        stored = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
        for key in stored.list().result():
            content = stored.read(key).result().value
            found[f"{item}/{key.decode()}"] = hashlib.sha256(content).hexdigest()
    assert len(found) > 10, f"arrays are missing: {sorted(found)}"
    return found


def read_progress(path: Path) -> list[list[Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def describe(life: Life) -> str:
    steps = f"steps {life.first} to {life.last}" if life.first else "before the first step"
    return f"{life.kind}, {steps}; codes {life.codes}, ended within {life.end_seconds:.1f} s"


# ---------------------------------------------------------------------------- the table


def steps_lost(lives: list[Life]) -> list[int | None]:
    """For each life the steps that were trained again after it; None where that is not known.

    >>> a, b = Life(0, ASKED, first=1, last=27), Life(0, ENDED, first=21, last=240)
    >>> steps_lost([a, Life(0, ASKED), b])
    [7, None, 0]
    """
    lost: list[int | None] = []
    for index, life in enumerate(lives):
        after = [x for x in lives[index + 1 :] if x.training == life.training and x.first]
        again = life.last + 1 - after[0].first if after else None
        lost.append(0 if life.kind == ENDED else again if life.first else None)
    return lost


def table(lives: list[Life]) -> str:
    """Markdown: for each kind how many there were, and what they cost."""
    lost = steps_lost(lives)
    lines = [
        "| preemption | times | before the first step | steps lost, mean | at most "
        "| seconds to the end, median | at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in (*PREEMPTIONS, GAVE_UP):
        chosen = [(x, n) for x, n in zip(lives, lost, strict=True) if x.kind == kind]
        trained = [n for _, n in chosen if n is not None]
        ends = [x.end_seconds for x, _ in chosen]
        if chosen:
            lines.append(
                f"| {kind} | {len(chosen)} | {sum(not x.first for x, _ in chosen)} "
                f"| {statistics.mean(trained or [0]):.1f} | {max(trained, default=0)} "
                f"| {statistics.median(ends):.1f} | {max(ends):.1f} |"
            )
    done = sum(x.last - x.first + 1 for x in lives if x.first)
    again = sum(n or 0 for n in lost)
    requests, refusals = (sum(getattr(x, name) for x in lives) for name in ("requests", "refusals"))
    preempted = sum(x.kind in PREEMPTIONS for x in lives)
    ended = sum(x.kind == ENDED for x in lives)
    lines += [
        "",
        f"{preempted} preemptions of {PROCESSES} processes; {ended} trainings of {STEPS} steps "
        "came to their end, each with the rows and the arrays of the unbroken one. "
        f"{done:,} steps were trained, {again:,} of them again ({again / max(1, done):.1%}); a "
        f"checkpoint every {SAVE_EVERY}. The bucket got {requests:,} requests and refused "
        f"{refusals:,}.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--preemptions", type=int, default=200)
    parser.add_argument("--directory", type=Path, default=Path("runs/soak"), help="runs/soak")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="after which no life begins any more"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    soak = Soak(arguments.directory.absolute(), arguments.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of the life too
    is_done = False
    try:
        with soak.running():
            is_done = soak.go_on(
                arguments.preemptions,
                arguments.minutes - (time.monotonic() - began) / 60,
                lambda line: print(line, flush=True),
            )
    finally:  # also where it is stopped, or a promise is broken
        print(table(soak.lives))
        if not is_done:
            done = len(soak.preempted())
            print(f"{done} of {arguments.preemptions}; the same command goes on", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
