"""A method's Fourier series against its own rotation, and the logits as a sum over frequencies."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import (
    ALiBi,
    ByShare,
    CoPE,
    DynamicNTK,
    FoPE,
    FoX,
    LogitScaling,
    ModelShape,
    NoPE,
    PoPE,
    RoPE,
    XPos,
    YaRN,
)
from fope_jax.spectrum.series import (
    attention_coefficients,
    before_rotation,
    frequency_components,
    rotation_factors,
    series_of,
    trained_pairs,
)
from fope_jax.spectrum.transform import extrapolate, fit_amplitudes

SHAPE = ModelShape(d_model=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)
METHODS = {
    "rope": RoPE(theta=500.0),
    "rope, interleaved": RoPE(interleaved=True),
    "rope, partial and YaRN": RoPE(partial_rotary_factor=0.5, scaling=(YaRN(4.0, 64),)),
    "rope, learnable": RoPE(learnable=True),
    "xpos": XPos(scale_base=64.0, interleaved=True),
    "fope": FoPE(64, sigma=0.5),
    "fope, equations": FoPE.equations(64, sigma=0.2, num_frequencies=12, heads="query"),
    "fope, one matrix": FoPE(64, separate_sine=False, heads="shared", normalise=True, sigma=0.05),
    "fope, clipped alone": FoPE(64, series=False),
    "by share": ByShare((FoPE(64), NoPE(), RoPE()), (0.5, 0.25, 0.25)),
    "scaled logits": LogitScaling(RoPE(), training_length=1024),  # at 1 within its length
}


def drawn(method):
    """A layer's variables with the model's, none of them at a special value."""
    made = method.init(jax.random.key(1), SHAPE)
    layer = {**made.layer_params, **made.layer_constants}
    model = {**made.model_params, **made.model_constants}
    variables = {name: x[0] for name, x in layer.items()} | model
    if "log_ratio" in variables:
        variables["log_ratio"] = jnp.linspace(-0.3, 0.5, SHAPE.head_dim // 2)
    return variables


@pytest.fixture(scope="module", params=METHODS)
def turned(request):
    """A method's series, q and k before its rotation, and after it at positions of their own."""
    (layer,) = METHODS[request.param].layers()
    method, variables = layer.method, drawn(layer.method)
    rng = np.random.default_rng(0)
    positions = np.array([[0, 1, 3, 9, 17, 30]], np.int32)  # float32 phases to 1e-5
    shape = (1, positions.size, SHAPE.num_heads, SHAPE.head_dim)
    q = 0.5 * rng.standard_normal(shape).astype(np.float32)
    k = 0.5 * rng.standard_normal(shape)[:, :, : SHAPE.num_kv_heads].astype(np.float32)
    tables = method.tables(variables, jnp.asarray(positions), SHAPE.head_dim)
    after = method.rotate(variables, tables, jnp.asarray(q), jnp.asarray(k))
    group = SHAPE.num_heads // SHAPE.num_kv_heads
    k = np.repeat(k, group, axis=2)
    after = [np.asarray(x, np.float64) for x in after]
    if after[1].shape[2] < SHAPE.num_heads:
        after[1] = np.repeat(after[1], group, axis=2)
    series = series_of(method, variables, SHAPE)
    return series, positions[0], q[0], k[0], after[0][0], after[1][0]


@pytest.mark.fast("fope", "by share", "fope, clipped alone", "scaled logits", "xpos")
def test_the_series_is_what_the_method_does_to_q_and_k(turned):
    series, positions, q, k, turned_q, turned_k = turned
    assert sorted(series.pairs.ravel().tolist()) == list(range(SHAPE.head_dim))
    for before, after, of_keys in ((q, turned_q, False), (k, turned_k, True)):
        u = rotation_factors(series, positions, of_keys)
        moved = (before[..., series.pairs[:, 0]] + 1j * before[..., series.pairs[:, 1]]) * u
        np.testing.assert_allclose(after[..., series.pairs[:, 0]], moved.real, atol=1e-5)
        np.testing.assert_allclose(after[..., series.pairs[:, 1]], moved.imag, atol=1e-5)


@pytest.mark.fast("fope", "by share", "xpos")
def test_logits_are_the_sum_over_own_frequencies(turned):
    """Eq. 1-5 for every pair of positions: the key fixed, the query anywhere."""
    series, positions, q, k, turned_q, turned_k = turned
    for key in range(len(positions)):
        coefficients = attention_coefficients(series, q, k[key], positions[key])
        found = frequency_components(series, coefficients, positions).sum(axis=-2)
        found = found[np.arange(len(positions)), :, np.arange(len(positions))]
        expected = np.einsum("tnh,nh->tn", turned_q, turned_k[key])
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_each_frequency_is_periodic_and_a_damaged_one_is_not():
    """Eq. 5 at periods that are no whole tokens; Eq. 6 with a second frequency."""
    series = series_of(RoPE(), {}, SHAPE)
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, SHAPE.num_heads, SHAPE.head_dim))
    coefficients = attention_coefficients(series, q, k)
    at = np.array([0.0, 3.0, 20.5])
    for index, w in enumerate(series.frequencies):
        own = frequency_components(series, coefficients, at)[:, index]
        later = frequency_components(series, coefficients, at + 2 * np.pi / w)[:, index]
        np.testing.assert_allclose(later, own, atol=1e-8)
    whole = frequency_components(series, coefficients, at).sum(axis=1)
    at = at + 2 * np.pi / series.frequencies[1]
    later = frequency_components(series, coefficients, at).sum(axis=1)
    assert np.abs(later - whole).max() > 0.1


def test_rope_has_the_products_of_q_and_k_alone():
    series = series_of(RoPE(), {}, SHAPE)
    q, k = np.random.default_rng(3).standard_normal((2, SHAPE.num_heads, SHAPE.head_dim))
    half = SHAPE.head_dim // 2
    products = (q[:, :half] + 1j * q[:, half:]) * (k[:, :half] - 1j * k[:, half:])
    np.testing.assert_allclose(attention_coefficients(series, q, k), products, atol=1e-12)


def test_a_scaling_that_follows_the_length_has_the_frequencies_of_each():
    method = RoPE(scaling=(DynamicNTK(4.0, 64),))
    short, long = (series_of(method, {}, SHAPE, length).frequencies for length in (64, 256))
    np.testing.assert_allclose(short, RoPE().frequencies(SHAPE.head_dim), rtol=1e-6)
    assert long[-1] < 0.5 * short[-1]


@dataclass(frozen=True)
class SlowerRoPE(RoPE):
    def frequencies(self, head_dim):
        return super().frequencies(head_dim) / 2


def test_the_series_of_a_subclass_has_the_frequencies_that_it_states():
    found = series_of(SlowerRoPE(), {}, SHAPE).frequencies
    np.testing.assert_allclose(found, RoPE().frequencies(SHAPE.head_dim) / 2, rtol=1e-12)


@pytest.mark.parametrize("method", [NoPE(), ALiBi(), CoPE(), ByShare((NoPE(),), (1.0,))])
def test_methods_without_frequencies_have_no_series(method):
    assert series_of(method, {}, SHAPE) is None


def test_undertrained_dimensions():
    """Turns within L = 64: the pairs under the floor are those that clipping removes."""
    pairs = trained_pairs(series_of(RoPE(), {}, SHAPE), training_length=64)
    clipped = FoPE(64, series=False)
    kept = clipped.frequencies(SHAPE.head_dim) > 0
    assert [pair.undertrained for pair in pairs] == (~kept).tolist()
    assert 0 < kept.sum() < len(kept)
    assert pairs[1].dims == (1, 9)
    assert pairs[1].turns == pytest.approx(64 * 10 ** (-0.5) / (2 * np.pi))
    assert pairs[1].period == pytest.approx(2 * np.pi * 10**0.5)
    still = trained_pairs(series_of(clipped, {}, SHAPE), 64)
    assert not any(pair.undertrained for pair in still)
    assert [pair.turns for pair in still if pair.frequency == 0] == [0.0] * int((~kept).sum())


def test_interleaved_pairs_are_neighbours_and_series_count_by_their_strongest_term():
    pairs = trained_pairs(series_of(RoPE(interleaved=True), {}, SHAPE), 64)
    assert [pair.dims for pair in pairs[:2]] == [(0, 1), (2, 3)]
    method = FoPE.equations(64, sigma=0.05)
    found = trained_pairs(series_of(method, drawn(method), SHAPE), 64)
    own = method.frequencies(SHAPE.head_dim)
    np.testing.assert_allclose([p.frequency for p in found[: len(own)]], own, rtol=1e-6)
    assert all(pair.frequency == 0 for pair in found[len(own) :])


MIXED = FoPE(64, sigma=0.5, scaling=(YaRN(2.0, 64),), heads="query")


@pytest.mark.parametrize(
    "method",
    [
        ByShare((PoPE(50.0, phase="uniform"), RoPE(theta=50.0)), (0.25, 0.75)),
        ByShare((RoPE(theta=50.0), PoPE(50.0), NoPE()), (0.5, 0.25, 0.25)),
        ByShare((PoPE(50.0), MIXED, RoPE(scaling=(YaRN(4.0, 32),))), (0.25, 0.5, 0.25)),
        ByShare((ByShare((PoPE(50.0), RoPE()), (0.5, 0.5)), XPos(scale_base=16.0)), (0.5, 0.5)),
        PoPE(50.0, partial_rotary_factor=7 / 16),
        PoPE(50.0, partial_rotary_factor=15 / 16),
        ByShare((NoPE(), RoPE(), NoPE()), (3 / 16, 0.5, 5 / 16)),
    ],
    ids=str,
)
def test_logits_are_those_of_the_series(method):
    variables, rng = drawn(method), np.random.default_rng(5)
    q = jnp.asarray(rng.standard_normal((1, 6, 4, 16)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((1, 6, 2, 16)), jnp.float32)
    positions = np.array([[0, 1, 3, 9, 17, 30]])
    tables = method.tables(variables, jnp.asarray(positions), 16)
    rotated_q, rotated_k = method.rotate(variables, tables, q, k)
    rotated_k = np.repeat(rotated_k, 4 // rotated_k.shape[2], axis=2)
    expected = np.einsum("tnh,snh->nts", rotated_q[0], rotated_k[0])

    series = series_of(method, variables, SHAPE)
    assert set(series.pairs.ravel()) == set(range(rotated_q.shape[-1]))
    before = [
        np.repeat(x[0], 4 // x.shape[2], axis=1) for x in before_rotation(method, variables, q, k)
    ]
    turned = [
        np.asarray(x, np.float64)[..., series.pairs]
        @ [1, 1j]
        * rotation_factors(series, positions[0], of_keys)
        for x, of_keys in zip(before, (False, True), strict=True)
    ]
    found = np.einsum("tnm,snm->nts", turned[0], np.conj(turned[1])).real
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # So are the coefficients of one query and key.
    key = attention_coefficients(series, before[0][5], before[1][2], positions[0, 2])
    parts = frequency_components(series, key, positions[0, 5:])
    np.testing.assert_allclose(parts.sum(axis=(-2, -1)), expected[:, 5, 2], rtol=1e-5, atol=1e-5)


def test_a_signal_of_own_frequencies_is_extended_exactly():
    frequencies = np.array([0.2, 0.9, 1.7])
    amplitudes = np.array([1 - 0.5j, 0.3j, -2.0])
    seen = extrapolate(amplitudes, frequencies, np.arange(64))
    found = fit_amplitudes(seen, frequencies)
    np.testing.assert_allclose(found, amplitudes, atol=1e-10)
    far = np.arange(1000, 1100)
    np.testing.assert_allclose(
        extrapolate(found, frequencies, far), extrapolate(amplitudes, frequencies, far), atol=1e-9
    )


@pytest.mark.fast("method0")
@pytest.mark.parametrize("method", [PoPE(100.0, 0.5, "uniform"), FoX(rotation=PoPE(100.0))])
def test_polar_pairs_turn_from_where_they_stand_at_position_0(method):
    """q and k are made twice as wide; delta is part of what k is at position 0."""
    series, variables = series_of(method, drawn(method), SHAPE), drawn(method)
    rng = np.random.default_rng(4)
    q = jnp.asarray(rng.standard_normal((1, 5, 4, 16)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((1, 5, 2, 16)), jnp.float32)
    positions = jnp.array([[0, 1, 3, 9, 30]], jnp.int32)
    at_0, after = (
        method.rotate(variables, method.tables(variables, at, 16), q, k)
        for at in (jnp.zeros_like(positions), positions)
    )
    u = rotation_factors(series, np.asarray(positions[0]))
    for before, rotated, heads in zip(at_0, after, (4, 2), strict=True):
        moved = np.asarray(before[0], np.float64)[..., series.pairs] @ [1, 1j] * u[:, :heads]
        np.testing.assert_allclose(rotated[0][..., series.pairs[:, 0]], moved.real, atol=1e-5)
        np.testing.assert_allclose(rotated[0][..., series.pairs[:, 1]], moved.imag, atol=1e-5)
    assert sorted(series.pairs.ravel().tolist()) == list(range(after[0].shape[-1]))
