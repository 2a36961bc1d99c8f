"""Parity with the FoPE authors' PyTorch code (commit bd94b20), see tests/goldens/README.md."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import (
    ClipFloor,
    FoPE,
    ModelShape,
    PositionInterpolation,
    RoPE,
    YaRN,
    angles,
    clip_floor,
    coefficient_std,
    fourier_tables,
    inverse_frequencies,
    normalise_columns,
    rotate,
    scaled_frequencies,
)
from fope_jax.position.fourier import step_identity

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "official_fope.npz")
HEAD_DIM, LENGTH, HEADS = 32, 64, 2


def golden(case, name):
    return GOLDENS[f"{case}/{name}"]


PI, YARN = PositionInterpolation(2.0), YaRN(4.0, LENGTH, attention_factor=1.0)
CLIP = ClipFloor(2 * LENGTH)


def clip(inv_freq, length=LENGTH):
    return clip_floor(inv_freq, length)


def scaled(*scaling):
    return scaled_frequencies(HEAD_DIM, 10_000.0, scaling).inv_freq


def drop_zero(inv_freq):
    return inv_freq[inv_freq > 0]


ROPE = inverse_frequencies(HEAD_DIM)
FREQUENCIES = {
    "rope": ROPE,
    "rope_clip_floor": clip(ROPE),
    "rope_pi": scaled(PI),
    "rope_yarn": scaled(YARN),
    "fope": drop_zero(clip(ROPE)),
    "fope_keep_zero": clip(ROPE),
    "fope_shared_heads": drop_zero(clip(ROPE)),
    "fope_shared_basis": drop_zero(clip(ROPE)),
    "fope_more_frequencies": drop_zero(clip(inverse_frequencies(128))),
    "fope_series_only": ROPE,
    "fope_eye": drop_zero(clip(ROPE)),
    "fope_normalised": drop_zero(clip(ROPE)),
    "fope_pi_after_clip": scaled(CLIP, PI),
    "fope_pi_before_clip": drop_zero(scaled(PI, CLIP)),
    "fope_yarn_after_clip": scaled(CLIP, YARN),
    "fope_yarn_before_clip": drop_zero(scaled(YARN, CLIP)),
}

METHODS = {
    "rope": RoPE(),
    "rope_clip_floor": FoPE(LENGTH, series=False),
    "fope": FoPE(LENGTH),
    "fope_keep_zero": FoPE(LENGTH, drop_zero=False),
    "fope_shared_heads": FoPE(LENGTH, heads="shared"),
    "fope_shared_basis": FoPE(LENGTH, separate_sine=False),
    "fope_more_frequencies": FoPE(LENGTH, frequencies_from="grid", num_frequencies=64),
    # Like "keep_zero" and those after a clip, made with the code's fourier_ignore_zero off.
    "fope_series_only": FoPE(LENGTH, clip=False, drop_zero=False),
    "fope_eye": FoPE(LENGTH, sigma=0.0),
    "fope_normalised": FoPE(LENGTH, normalise=True),
    "rope_pi": RoPE(scaling=(PI,)),
    "rope_yarn": RoPE(scaling=(YARN,)),
    "fope_pi_after_clip": FoPE(
        2 * LENGTH, scaling=(PI,), scaling_order="after_clip", drop_zero=False
    ),
    "fope_yarn_after_clip": FoPE(
        2 * LENGTH, scaling=(YARN,), scaling_order="after_clip", drop_zero=False
    ),
    "fope_pi_before_clip": FoPE(2 * LENGTH, scaling=(PI,)),
    "fope_yarn_before_clip": FoPE(2 * LENGTH, scaling=(YARN,)),
}


def coefficients(case, goldens=GOLDENS):
    if f"{case}/fourier_coef" in goldens:
        return (goldens[f"{case}/fourier_coef"],) * 2
    return goldens[f"{case}/cos_coef"], goldens[f"{case}/sin_coef"]


def positions(length):
    return jnp.arange(length, dtype=jnp.int32)[None]


def heads_last(x):
    """The goldens are [batch, heads, time, head_dim]."""
    return jnp.swapaxes(x, 1, 2)


def test_every_rotation_golden_is_covered():
    cases = {key.partition("/")[0] for key in GOLDENS.files}
    assert cases == set(FREQUENCIES) | {c for c in cases if c.startswith("paper_")}


@pytest.mark.parametrize("case", FREQUENCIES)
def test_frequencies(case):
    np.testing.assert_allclose(FREQUENCIES[case], golden(case, "inv_freq"), rtol=1e-6, atol=0)


@pytest.mark.fast("fope-160", "rope_yarn-160", "fope_normalised-160", "fope_more_frequencies-160")
@pytest.mark.parametrize("length", [pytest.param(16, marks=pytest.mark.slow), 160])
@pytest.mark.parametrize("case", FREQUENCIES)
def test_pure_functions(case, length):
    inv_freq = FREQUENCIES[case]
    if case.startswith("rope"):
        phase = angles(positions(length), inv_freq)
        cos, sin = jnp.cos(phase), jnp.sin(phase)
    else:
        cos_coef, sin_coef = coefficients(case)
        if case == "fope_normalised":
            cos_coef, sin_coef = normalise_columns(cos_coef), normalise_columns(sin_coef)
        cos, sin = fourier_tables(
            positions(length), inv_freq, cos_coef, sin_coef, head_dim=HEAD_DIM, zero_sine=1.0
        )
    ours = rotate(heads_last(golden(case, f"x_{length}")), cos, sin)
    theirs = heads_last(golden(case, f"y_{length}"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", METHODS)
def test_methods(case):
    """The dataclass with its own shapes, holding the golden coefficients."""
    method = METHODS[case]
    shape = ModelShape(64, 1, HEADS, HEADS, HEAD_DIM)
    method.check(shape)
    variables = method.init(jax.random.key(0), shape)
    layer = dict(variables.layer_constants)
    if layer:
        cos_coef, sin_coef = coefficients(case)
        theirs = {"cos_coef": cos_coef, "sin_coef": sin_coef}
        assert {k: v.shape[1:] for k, v in layer.items()} == {k: theirs[k].shape for k in layer}
        layer = {name: theirs[name] for name in layer}
    tables = method.tables(variables.model_constants, positions(160), HEAD_DIM)
    x = heads_last(golden(case, "x_160"))
    q, k = method.rotate(layer, tables, x, x)
    theirs = heads_last(golden(case, "y_160"))
    np.testing.assert_allclose(q, theirs, atol=1e-5, rtol=0)
    np.testing.assert_allclose(k, theirs, atol=1e-5, rtol=0)


KNOBS = np.load(Path(__file__).parents[1] / "goldens" / "official_fope_knobs.npz")
SHORT_YARN = YaRN(4.0, LENGTH // 2, attention_factor=1.0)
KNOB_METHODS = {
    # Nothing is clipped, and still at most H/4 pairs get a series; the others stand still.
    "series_only": FoPE.official(LENGTH, clip=False),
    "series_only_grid": FoPE(LENGTH, clip=False, frequencies_from="grid", num_frequencies=40),
    "series_only_normalised": FoPE(LENGTH, clip=False, normalise=True),
    "series_only_shared": FoPE(LENGTH, clip=False, heads="shared", separate_sine=False),
    "series_only_normal": FoPE(LENGTH, clip=False, sigma_convention="normal"),
    "series_only_yarn": FoPE(LENGTH, clip=False, scaling=(SHORT_YARN,)),
    "clip_grid_keep_zero": FoPE(
        LENGTH, frequencies_from="grid", num_frequencies=40, drop_zero=False
    ),
    "clip_yarn_after": FoPE(LENGTH, scaling=(SHORT_YARN,), scaling_order="after_clip"),
    "clip_pi_after": FoPE(LENGTH, scaling=(PI,), scaling_order="after_clip"),
    "clip_ratio": FoPE(LENGTH, floor_ratio=2.5),
}


def test_every_golden_of_a_combination_of_knobs_is_covered():
    assert {key.partition("/")[0] for key in KNOBS.files} == set(KNOB_METHODS)


@pytest.mark.fast("series_only_grid", "clip_yarn_after")
@pytest.mark.parametrize("case", KNOB_METHODS)
def test_combinations_of_knobs(case):
    """Shapes, dominant terms and outputs of the released code with these knobs."""
    method = KNOB_METHODS[case]
    shape = ModelShape(64, 1, HEADS, HEADS, HEAD_DIM)
    method.check(shape)
    inv_freq = KNOBS[f"{case}/inv_freq"]
    np.testing.assert_allclose(method.frequencies(HEAD_DIM), inv_freq, rtol=1e-6, atol=0)
    drawn = method.init(jax.random.key(0), shape).layer_constants
    given = dict(zip(("cos_coef", "sin_coef"), coefficients(case, KNOBS), strict=True))
    for name, coef in drawn.items():
        assert coef.shape[1:] == given[name].shape
    placed = method.dominant_terms(HEAD_DIM)
    np.testing.assert_array_equal(placed, step_identity(*given["cos_coef"].shape[-2:]))
    tables = method.tables({}, positions(24), HEAD_DIM)
    x = heads_last(KNOBS[f"{case}/x"])
    q, k = method.rotate(given, tables, x, x)
    theirs = heads_last(KNOBS[f"{case}/y"])
    size = np.abs(theirs).max()  # normalised columns may have sums near 0
    np.testing.assert_allclose(q / size, theirs / size, atol=2e-6, rtol=0)
    np.testing.assert_allclose(k / size, theirs / size, atol=2e-6, rtol=0)


PAPER = {"60m": (8, 64, 0.3), "180m": (8, 128, 0.4), "1200m": (16, 128, 0.6)}


@pytest.mark.fast("60m-512", "1200m-1024")
@pytest.mark.parametrize("length", [512, 1024])
@pytest.mark.parametrize("size", PAPER)
def test_paper_shapes(size, length):
    heads, head_dim, sigma = PAPER[size]
    case = f"paper_{size}_{length}"
    method = FoPE(length, sigma=sigma)
    shape = ModelShape(heads * head_dim, 1, heads, heads, head_dim)
    np.testing.assert_allclose(
        method.frequencies(head_dim), golden(case, "inv_freq"), rtol=1e-6, atol=0
    )
    coef = method.init(jax.random.key(1), shape).layer_constants["cos_coef"][0]
    coef = np.asarray(coef)
    assert coef.shape == tuple(golden(case, "coef_shape"))
    identity = step_identity(*coef.shape[1:])
    np.testing.assert_array_equal(identity, golden(case, "coef_identity"))
    std = coefficient_std(sigma, heads, *coef.shape[1:])
    # One draw of 2,000 to 18,000 numbers scatters by one in the square root of twice their count.
    tolerance = 5 / np.sqrt(2 * coef.size)
    np.testing.assert_allclose(golden(case, "coef_noise_std"), std, rtol=tolerance)
    np.testing.assert_allclose(np.std(coef - identity), std, rtol=tolerance)
