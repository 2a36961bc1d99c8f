"""A step whose loss, tokens or clock is not what it should be."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np

from fope_jax.evaluate.metrics import read_rows
from tests.faults import world
from tests.faults.fault import Fault
from tests.faults.world import SAVE_EVERY, STEPS

SKIP = "train.on_bad_step=skip"


def one_bad_step(directory: Path, seed: int) -> None:
    rng, run = random.Random(seed), directory / "run"
    bad = rng.randint(2, STEPS)
    harm = {"nan_at": (bad,)}
    reference = world.unbroken(world.ROW_EVERY, SKIP, **harm)
    rows = [row for row in read_rows(reference / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["skipped"] for row in rows] == [
        int(start < bad <= row["step"])
        for start, row in zip([0, *(r["step"] for r in rows)], rows, strict=False)
    ]
    assert all(np.isfinite(row["loss"]) for row in rows)
    told = rf"step {bad}: loss is nan, gradient norm nan; skipped \(1 in a row"
    assert re.search(told, world.said(reference))
    # also through an interruption
    pid = world.start(
        run, world.ROW_EVERY, SKIP, pace=world.PACE, **harm
    )  # also through an interruption
    world.wait_for(lambda: (run / "metrics.jsonl").exists() and world.steps(run))
    time.sleep(rng.uniform(0, world.PACE * (STEPS - 12)))
    os.kill(pid, signal.SIGTERM)
    assert world.nursery().wait(pid) == 143, world.said(run)
    assert world.train(run, world.ROW_EVERY, SKIP, **harm)[0] == 0
    world.assert_whole(run, reference)


def ten_bad_steps(directory: Path, seed: int) -> None:
    first, run = random.Random(seed).randint(2, STEPS - 9), directory / "run"
    bad = tuple(range(first, first + 10))
    code, text = world.train(run, world.ROW_EVERY, SKIP, nan_at=bad)
    assert code == 2, text
    assert f"step {bad[-1]}: loss is nan" in text
    assert "10 in a row, train.max_skipped = 10" in text
    for step in bad:
        facts = json.loads((run / "bad_steps" / f"{step}.json").read_text())
        assert facts["step"] == step and facts["loss"] == "nan" and len(facts["rows"]) == 4
        assert all(row["documents"] and row["documents"][0]["name"] for row in facts["rows"])
        with np.load(run / "bad_steps" / f"{step}.npz") as batch:
            assert batch["tokens"].shape == (4, 16)
    code, text = world.train(run, world.ROW_EVERY, SKIP, "train.max_skipped=11", nan_at=bad)
    assert code == 0, text
    assert world.arrays(run) == world.arrays(
        world.unbroken(world.ROW_EVERY, SKIP, "train.max_skipped=11", nan_at=bad)
    )


def stop_at_a_bad_step(directory: Path, seed: int) -> None:
    bad, run = random.Random(seed).randint(2, STEPS), directory / "run"
    code, text = world.train(run, nan_at=[bad])
    assert code == 2, text
    last = text.splitlines()[-1]
    assert f"step {bad}: loss is nan, gradient norm nan; nothing has been saved since" in last
    assert f"{run}/bad_steps: {bad}.npz" in last
    assert world.valid_step(run) == (bad - 1) // SAVE_EVERY * SAVE_EVERY
    world.resume_killed(run, world.unbroken())  # as if the memory that did it had been replaced


def a_spike(directory: Path, seed: int) -> None:
    run = directory / "run"
    factor, bad = "train.spike_factor=1.25", 22 + seed % 3
    code, text = world.train(run, SKIP, factor, shuffled_at=[bad])
    assert code == 0, text
    assert re.search(
        rf"step {bad}: loss is [\d.]+, gradient norm [\d.]+, beyond train.spike_factor = 1.25 "
        r"times the running mean; skipped",
        text,
    ), text
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows if row["skipped"]] == [bad]
    code, text = world.train(directory / "stops", factor, shuffled_at=[bad])
    assert code == 2 and f"step {bad}: loss is " in text.splitlines()[-1], text


def a_strange_token(directory: Path, seed: int) -> None:
    bad, run = 1 + random.Random(seed).randrange(STEPS), directory / "run"
    code, text = world.train(run, strange_at=[bad])
    assert code == 2, text
    last = text.splitlines()[-1]
    assert f"step {bad}, tokens of the batch: token ids 1000000 to 1000000: vocab_size=300" in last
    world.resume_killed(run, world.unbroken())


def a_jumping_clock(directory: Path, seed: int) -> None:
    run = directory / "run"
    code, text = world.train(run, clock=10**8 if seed % 2 else 10**4)  # years, or hours
    assert code == 0, text
    rows = read_rows(run / "metrics.jsonl")
    clock = [row["seconds"] for row in rows if row["kind"] == "train"]
    assert clock == sorted(clock) and 0 < clock[-1] < 600
    assert all(0 <= row["seconds"] < 600 for row in rows if row["kind"] == "time")
    world.assert_whole(run, world.unbroken())


FAULTS = [
    Fault(
        "one loss that is no number, on_bad_step = skip",
        "left out and counted; resumed in any place the run has the same bits",
        one_bad_step,
        trials=5,
        short=0,
    ),
    Fault(
        "ten in a row, on_bad_step = skip",
        "the run ends; batches and documents of all ten are written out",
        ten_bad_steps,
        trials=3,
        short=0,
    ),
    Fault(
        "one loss that is no number, on_bad_step = stop",
        "the run ends and names the step; its batch is written out, nothing of it is saved",
        stop_at_a_bad_step,
        trials=5,
        short=0,
    ),
    Fault(
        "a spike in the loss",
        "beyond train.spike_factor it is skipped, or the run ends, as configured",
        a_spike,
        trials=3,
        short=0,
    ),
    Fault(
        "a token beyond the vocabulary",
        "an error before the step, with the step and the ids",
        a_strange_token,
        trials=2,
        short=0,
    ),
    Fault(
        "a clock that jumps",
        "no time is negative and no number changes",
        a_jumping_clock,
        trials=2,
        short=0,
    ),
]
