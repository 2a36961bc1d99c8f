"""The schedule against its formula and the optimizer against AdamW written out in numpy."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fope_jax.config import TrainConfig
from fope_jax.train.optim import learning_rate, make_optimizer, unfinished_warmup


def config(**changes) -> TrainConfig:
    values = {"steps": 19_073, "batch_size": 8, "length": 512} | changes
    return TrainConfig(**values)


def expected_rate(c: TrainConfig, step: int) -> float:
    update = c.schedule_start + step + 1
    if update <= c.warmup_steps:
        return c.learning_rate * update / c.warmup_steps
    if c.schedule == "constant":
        return c.learning_rate
    end = c.final_learning_rate_fraction * c.learning_rate
    last = c.schedule_start + (c.decay_steps or c.steps)
    angle = math.pi * (min(update, last) - c.warmup_steps) / (last - c.warmup_steps)
    return end + (c.learning_rate - end) * (1 + math.cos(angle)) / 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "constant"},
        {"warmup_steps": 0, "steps": 100, "learning_rate": 3e-3},
        {"warmup_steps": 7, "steps": 100, "final_learning_rate_fraction": 0.0},
        {"warmup_steps": 7, "steps": 100, "schedule_start": 3},
        {"warmup_steps": 7, "steps": 100, "schedule_start": 300},
        {"warmup_steps": 7, "steps": 100, "schedule_start": 3, "decay_steps": 50},
        {"warmup_steps": 7, "steps": 100, "decay_steps": 200},
    ],
)
def test_schedule_is_the_formula(changes):
    c = config(**changes)
    steps = {0, 1, 5, 6, 7, c.warmup_steps, c.steps // 2, c.steps - 2, c.steps - 1}
    for step in steps:
        want = expected_rate(c, step)
        np.testing.assert_allclose(
            learning_rate(c, step), want, rtol=1e-6, atol=1e-7 * c.learning_rate
        )


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_schedule_in_two_runs_is_that_of_one(schedule):
    whole = config(warmup_steps=7, steps=100, schedule=schedule)
    rest = config(warmup_steps=7, steps=60, schedule=schedule, schedule_start=40)
    rates = [float(learning_rate(whole, 40 + step)) for step in range(60)]
    assert [float(learning_rate(rest, step)) for step in range(60)] == rates


def test_the_paper_schedule_at_its_ends():
    c = config()
    assert float(learning_rate(c, 0)) == pytest.approx(6e-8)
    assert float(learning_rate(c, 9_999)) == pytest.approx(6e-4)
    assert float(learning_rate(c, 19_072)) == pytest.approx(6e-5)


def adamw(c: TrainConfig, p, gradients):
    """AdamW with clipping, in float64, from the paper's algorithm."""
    p = {name: np.asarray(x, np.float64) for name, x in p.items()}
    m = {name: 0.0 for name in p}
    v = {name: 0.0 for name in p}
    for t, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float((np.float64(g) ** 2).sum()) for g in gradient.values()))
        clip = min(1.0, c.gradient_clip / norm) if c.gradient_clip else 1.0
        for name in p:
            g = np.float64(gradient[name]) * clip
            m[name] = c.b1 * m[name] + (1 - c.b1) * g
            v[name] = c.b2 * v[name] + (1 - c.b2) * g**2
            m_hat, v_hat = m[name] / (1 - c.b1**t), v[name] / (1 - c.b2**t)
            decay = c.weight_decay * p[name]
            p[name] = p[name] - expected_rate(c, t - 1) * (m_hat / (np.sqrt(v_hat) + c.eps) + decay)
    return p


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_clip": None},
        {"gradient_clip": 0.3, "weight_decay": 0.0},
        {"weight_decay": 0.7, "b1": 0.5, "b2": 0.99, "eps": 1e-2},
    ],
)
def test_updates_are_adamw_with_clipping(changes):
    c = config(steps=10, warmup_steps=2, learning_rate=0.05, **changes)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)).astype("f"), "norm": rng.normal(size=5).astype("f")}
    # Norms far over and under the clip: clipping every gradient or none would both show.
    gradients = [
        {name: (scale * rng.normal(size=x.shape)).astype("f") for name, x in params.items()}
        for scale in (30.0, 0.01, 3.0, 0.1)
    ]
    optimizer = make_optimizer(c)
    got = {name: jnp.asarray(x) for name, x in params.items()}
    state = optimizer.init(got)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, got)
        got = optax.apply_updates(got, updates)
    want = adamw(c, params, gradients)
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-6)


def test_a_warmup_longer_than_the_run_says_the_rate_that_it_reaches():
    short = config(steps=20, warmup_steps=100, learning_rate=1.0)
    assert "rises to 0.2 at the last update and never reaches" in unfinished_warmup(short)
    goes_on = config(steps=20, warmup_steps=100, schedule_start=50, learning_rate=1.0)
    assert "steps = 20 after 50 of before: the learning rate rises to 0.7" in unfinished_warmup(
        goes_on
    )
    for ends in ({"schedule_start": 80}, {"warmup_steps": 20}, {"warmup_steps": 0}):
        assert not unfinished_warmup(config(steps=20, **({"warmup_steps": 100} | ends)))
