"""PoPE: pope-pytorch's numbers, float64 formulas, the bounds of delta, phases to a million."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax import testing
from fope_jax.position import ModelShape, PoPE, polar

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "pope.npz")
SHAPE = ModelShape(d_model=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12)


def logits_of(method, variables, q, k, positions):
    """q.k ``[N, T, S]`` of ``q, k [N, T, H]``, before the scale."""
    q, k = (jnp.asarray(x, jnp.float32).swapaxes(0, 1)[None] for x in (q, k))
    tables = method.tables(variables, positions, q.shape[-1])
    q, k = method.rotate(variables, tables, q, k)
    return jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")[0]


@pytest.mark.fast("plain-1.0-zeros", "bias-1.0-zeros")
@pytest.mark.parametrize(
    ("case", "share", "phase"),
    [
        ("plain", 1.0, "none"),
        ("plain", 1.0, "zeros"),
        ("bias", 1.0, "zeros"),
        ("partial", 0.5, "zeros"),
    ],
)
def test_numbers_of_another_implementation(case, share, phase):
    q, k, delta, expected = (GOLDENS[f"{case}/{x}"] for x in ("q", "k", "bias", "logits"))
    positions = np.arange(q.shape[1], dtype=np.int32)[None]
    method = PoPE(float(GOLDENS[f"{case}/theta"]), partial_rotary_factor=share, phase=phase)
    found = logits_of(method, {"delta": jnp.asarray(delta)}, q, k, positions)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_the_formula_in_float64_far_out():
    """At positions about a million, where float32 products of position and frequency fail."""
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 2, 5, 6)).astype(np.float32)
    delta = random.uniform(-2 * np.pi, 0, (2, 6)).astype(np.float32)
    positions = np.array([1_048_575, 1_048_574, 1_000_000, 524_288, 3], np.int32)
    found = logits_of(PoPE(100.0), {"delta": jnp.asarray(delta)}, q, k, positions[None])
    w = 100.0 ** (-np.arange(6) / 6)
    gap = (positions[None] - positions[:, None]).astype(np.float64)  # s - t
    phase = gap[None, :, :, None] * w + delta.astype(np.float64)[:, None, None]
    sizes = [np.log1p(np.exp(x.astype(np.float64))) for x in (q, k)]
    expected = np.einsum("nth,nsh,ntsh->nts", *sizes, np.cos(phase))
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_phases_to_a_million():
    method = PoPE(500_000.0)

    def tables(positions):
        return [table[:, :, 0] for table in method.tables({}, positions, 64)]

    testing.assert_phases_accurate(tables, method.frequencies(64))


def test_delta_ends_at_its_bounds_and_learns_on_them():
    """Zero, where it starts, has the whole gradient; outside there is none."""
    method = PoPE(100.0)
    random = np.random.default_rng(1)
    q, k = random.normal(size=(2, 1, 4, 5)).astype(np.float32)
    positions = np.arange(4, dtype=np.int32)[None]

    @jax.jit
    def total(delta):
        weights = jnp.arange(16.0).reshape(1, 4, 4)
        return jnp.sum(weights * logits_of(method, {"delta": delta}, q, k, positions))

    inside = np.float32(-2 * np.pi)
    delta = jnp.array([[0.0, 0.4, -1.0, inside, -7.0]])
    clipped = jnp.array([[0.0, 0.0, -1.0, inside, inside]])
    np.testing.assert_allclose(total(delta), total(clipped), rtol=1e-6)
    gradient = np.asarray(jax.jit(jax.grad(total))(delta))[0]
    slope = (total(delta.at[0, 0].set(-2e-3)) - total(delta)) / -2e-3
    np.testing.assert_allclose(gradient[0], slope, rtol=1e-2)
    assert gradient[1] == gradient[4] == 0 and np.abs(gradient[[0, 2, 3]]).min() > 1e-2


def test_draws():
    """One phase a layer, key-value head and polar dimension."""
    drawn = PoPE(phase="uniform", partial_rotary_factor=0.5).init(jax.random.key(0), SHAPE)
    delta = np.asarray(drawn.layer_params["delta"])
    assert delta.shape == (3, 2, 6) and -2 * np.pi <= delta.min() < -4 < -2 < delta.max() <= 0
    assert not np.any(PoPE().init(jax.random.key(0), SHAPE).layer_params["delta"])
    assert not PoPE(phase="none").init(None, SHAPE).layer_params


X, ONE = np.ones((2, 3, 4, 6), np.float32), np.ones((2, 3, 1, 6), np.float32)
ERRORS = {
    "theta": (lambda: PoPE(theta=0.0), "theta=0.0"),
    "phase": (
        lambda: PoPE(phase="zero"),
        "phase='zero': expected one of 'zeros', 'uniform', 'none'",
    ),
    "share": (lambda: PoPE(partial_rotary_factor=1.5), "partial_rotary_factor=1.5.*above 0, to 1"),
    "no whole number": (
        lambda: PoPE(partial_rotary_factor=0.3).check(SHAPE),
        "partial_rotary_factor=0.3: 3.6 of head_dim=12 dimensions.*a whole number",
    ),
    "tables of no head": (lambda: polar(X, ONE[:, :, 0], ONE[:, :, 0]), r"cos \(2, 3, 6\)"),
    "too many": (
        lambda: polar(X[..., :5], ONE, ONE),
        r"cos \(2, 3, 1, 6\).*do not fit x \(2, 3, 4, 5\)",
    ),
    "other tokens": (lambda: polar(X, ONE[:, :2], ONE[:, :2]), "do not fit x"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
