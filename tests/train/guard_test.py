"""Bad steps: what is left out stays out to the bit, and what is told."""

import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.config import TrainConfig
from fope_jax.data import task_mixture
from fope_jax.data.cache import open_cache
from fope_jax.data.loader import Loader
from fope_jax.evaluate.metrics import read_rows
from fope_jax.train import loop
from fope_jax.train.bad_steps import (
    WARMUP,
    WINDOW,
    BadStep,
    BadStepCounter,
    BadStepError,
    Guard,
    check_tokens,
    make_guard,
)
from fope_jax.train.loop import train
from fope_jax.train.metrics import MetricsBuffer, curve_points
from fope_jax.train.optim import learning_rate
from fope_jax.train.state import (
    experiment_at_stage,
    init_constants,
    init_train_state,
    plan_state,
    trace_step,
)
from fope_jax.train.step import StepMetrics


def config(**changes):
    return TrainConfig(steps=100, batch_size=2, length=16, **changes)


def test_no_guard_where_every_update_is_made():
    assert make_guard(config()) is None
    assert make_guard(config(on_bad_step="skip")) == Guard(None)
    assert make_guard(config(spike_factor=3.0)) == Guard(3.0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_bad_without_any_state(bad):
    judge = jax.jit(Guard().judge)
    assert judge((), jnp.float32(2.0), jnp.float32(1.0)) == (True, ())
    assert not judge((), jnp.float32(bad), jnp.float32(1.0))[0]
    assert not judge((), jnp.float32(2.0), jnp.float32(bad))[0]


def test_a_spike_is_beyond_the_factor_of_the_mean_once_there_is_one():
    guard, judge = Guard(2.0), jax.jit(Guard(2.0).judge)
    losses = np.float32(4.0) + np.random.default_rng(0).uniform(-0.5, 0.5, 150).astype(np.float32)
    state = guard.state()
    assert judge(state, jnp.float32(9.0), jnp.float32(90.0))[0], "nothing to compare with yet"
    for count, loss in enumerate(losses):
        assert int(state.steps) == count
        if count == WARMUP:
            assert not judge(state, jnp.float32(8.9), jnp.float32(1.0))[0]
            assert not judge(state, jnp.float32(4.0), jnp.float32(2.1))[0]
            assert judge(state, jnp.float32(7.0), jnp.float32(1.9))[0]
        good, state = judge(state, loss, jnp.float32(1.0))
        assert good
        unscored, zero = jnp.bool(False), jnp.float32(0.0)
        good, same = judge(state, zero, zero, unscored)
        assert good and [float(x) for x in same] == [float(x) for x in state]
    mean = 0.0
    for count, loss in enumerate(losses, start=1):
        mean += (float(loss) - mean) / min(count, WINDOW)
    assert float(state.loss) == pytest.approx(mean, rel=1e-6)
    again = guard.state(json.loads(json.dumps([x.item() for x in state])))
    assert [x.tobytes() for x in again] == [np.asarray(x).tobytes() for x in state]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [None, 5.0])
def test_a_skipped_step_leaves_every_bit_and_a_good_one_is_that_without_a_guard(runs, factor):
    plain = runs.experiment()
    guarded = runs.experiment(on_bad_step="skip", spike_factor=factor)
    loader = Loader(open_cache(plain.data, "train"), length=16, batch_size=2, seed=1)
    good = loader.batch(0)
    bad = good._replace(weights=good.weights * np.float32(np.nan))

    def step(experiment):
        plan = plan_state(experiment_at_stage(experiment, experiment.train.stages[0]))
        # Without fusions the two programs would round differently.
        options = (
            {"xla_cpu_use_fusion_emitters": True} if "fusion" in os.environ["XLA_FLAGS"] else {}
        )
        run = trace_step(plan).lower().compile(compiler_options=options)
        constants = init_constants(plan)
        return lambda batch: run(
            init_train_state(plan), constants, loop.shard_batch(batch, plan.mesh)
        )

    def bits(tree):
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]

    before = init_train_state(plan_state(guarded))
    state, metrics = step(guarded)(bad)
    assert bits(state) == bits(before)
    assert float(metrics.skipped) == 1 and np.isnan(float(metrics.nats))
    state, metrics = step(guarded)(good)
    expected, _ = step(plain)(good)
    assert bits((state.params, state.optimizer)) == bits((expected.params, expected.optimizer))
    assert bits(state.params) != bits(before.params) and float(metrics.skipped) == 0


def poison(monkeypatch, *steps, by=np.nan):
    class Poisoned(task_mixture.Loader):
        def iterate(self, start, count):
            for step, batch in enumerate(super().iterate(start, count), start + 1):
                bad = np.float32(by if step in steps else 1)
                yield batch._replace(weights=batch.weights * bad)

    monkeypatch.setattr(task_mixture, "Loader", Poisoned)


def test_steps_without_a_scored_token_end_no_run_and_are_in_no_mean(runs, tmp_path, monkeypatch):
    poison(monkeypatch, 4, 8, by=0)  # 4 has a row of its own, 8 shares one with 7
    train(runs.experiment(), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    rows = {row["step"]: row for row in rows if row["kind"] == "train"}
    assert [rows[4][key] for key in ("nats", "tokens", "loss", "grad_norm")] == [0, 0, None, None]
    others = [row for step, row in rows.items() if step != 4]
    assert [row["step"] for row in others] == [3, 6, 8, 9, 12]
    for row in others:
        assert row["loss"] == pytest.approx(row["nats"] / row["tokens"])
    assert rows[8]["tokens"] == pytest.approx(rows[6]["tokens"] / 2, abs=4)
    assert rows[8]["grad_norm"] > 0.7 * rows[6]["grad_norm"]
    assert "train/loss" not in curve_points([rows[4]])


@pytest.mark.slow
def test_skipped_steps_are_counted_and_use_up_no_learning_rate(runs, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, 4, 5, 9)
    with caplog.at_level(logging.WARNING, logger="fope_jax"):
        train(runs.experiment(on_bad_step="skip", max_skipped=3), tmp_path)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert [(row["step"], row["skipped"]) for row in rows] == [
        (3, 0),
        (4, 1),
        (6, 1),
        (8, 0),
        (9, 1),
        (12, 0),
    ]
    assert np.isnan(rows[1]["loss"]) and rows[1]["tokens"] == 0
    assert all(np.isfinite(row["loss"]) for row in rows if row["step"] not in (4, 9))
    expected = [made - 1 for made in (3, 4, 4, 6, 7, 9)]  # updates before the newest step
    train_config = runs.experiment().train
    assert [row["learning_rate"] for row in rows] == [
        float(learning_rate(train_config, updates)) for updates in expected
    ]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"step {step}: loss is nan, gradient norm nan; skipped ({n} in a row, "
        "train.max_skipped = 3)"
        for step, n in ((4, 1), (5, 2), (9, 1))
    ]


@pytest.mark.parametrize(("skipped", "updates"), [((0, 1, 0), 1), ((1, 0, 1), 1), ((0, 0, 1), 2)])
def test_the_learning_rate_of_a_row_is_that_of_the_updates_made(runs, skipped, updates):
    """Of 3 steps: a skipped one uses up no rate, and if it is the newest the rate is its own."""
    run = runs.experiment(on_bad_step="skip", max_skipped=3, warmup_steps=8)
    buffer = MetricsBuffer(run, 0.0, None)
    for is_skipped in skipped:
        loss = np.nan if is_skipped else 96.0
        buffer.add(StepMetrics(np.float32(loss), 32.0, np.float32(1.0), float(is_skipped)))
    buffer.fetch(3)
    row = buffer.take_row(3)
    assert row["skipped"] == sum(skipped)
    assert row["learning_rate"] == pytest.approx(1e-2 * (updates + 1) / 8)  # in the warmup


def test_too_many_in_a_row_end_the_run_with_their_batches_and_documents(
    runs, tmp_path, monkeypatch
):
    poison(monkeypatch, 6, 7)
    with pytest.raises(BadStepError) as caught:
        train(runs.experiment(on_bad_step="skip", max_skipped=2), tmp_path)
    assert "step 7: loss is nan" in str(caught.value)
    assert f"{tmp_path}/bad_steps: 6.npz, 7.npz, and .json beside" in str(caught.value)
    loader = Loader(open_cache(runs.experiment().data, "train"), length=16, batch_size=2, seed=1)
    with np.load(tmp_path / "bad_steps/7.npz") as kept:
        assert (kept["tokens"] == loader.batch(6).tokens).all()
    facts = json.loads((tmp_path / "bad_steps/7.json").read_text())
    assert (facts["step"], facts["batch"], facts["loss"]) == (7, 6, "nan")
    assert facts["rows"] == loader.row_sources(6)
    names = {d["name"] for row in facts["rows"] for d in row["documents"]}
    assert names and all("train_" in name for name in names)


def test_a_spike_is_told_as_one():
    bad = BadStepCounter(config(spike_factor=4.0))
    bad.record(1, 3.0, 1.0, False)
    with pytest.raises(BadStepError, match="step 2: loss is 90, gradient norm 7, beyond train.spi"):
        bad.record(2, 90.0, 7.0, True)


def test_a_good_step_between_bad_ones_begins_the_count_anew():
    bad = BadStepCounter(
        config(on_bad_step="skip", max_skipped=2), total=5, in_a_row=[BadStep(1, 1, 1)]
    )
    bad.record(2, 3.0, 1.0, False)
    bad.record(3, float("nan"), 1.0, True)
    assert bad.total == 6
    with pytest.raises(BadStepError, match="step 4: .*bad steps: 2 in a row") as caught:
        bad.record(4, float("nan"), 1.0, True)
    assert [step.step for step in caught.value.steps] == [3, 4]


def test_a_token_without_a_place_in_the_model_is_found_on_the_host(runs):
    loader = Loader(open_cache(runs.experiment().data, "train"), length=16, batch_size=2, seed=1)
    batch = loader.batch(0)
    check_tokens(batch, 1, 300)
    with pytest.raises(ValueError, match=r"step 7, targets of the batch: token ids .* 0 to 299"):
        check_tokens(batch._replace(targets=batch.targets + 300), 7, 300)
