"""Scalings of rotary frequencies: parity with transformers, and what each must do."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.position import (
    SCALINGS,
    AdjustedBase,
    ClipFloor,
    DynamicNTK,
    FoPE,
    Llama3,
    LongRoPE,
    NTKAware,
    PositionInterpolation,
    PRoPE,
    Proportional,
    RoPE,
    RotaryFrequencies,
    SnapToCycles,
    YaRN,
    inverse_frequencies,
    rotate,
    scaled_frequencies,
)
from fope_jax.position.scaling import Scaling, apply_scaling

FOLDER = Path(__file__).parents[1] / "goldens"
GOLDENS = np.load(FOLDER / "peers_rope.npz")
CASES = json.loads((FOLDER / "peers_rope.json").read_text())
ROPE = inverse_frequencies(64)
FACTORS = tuple(1.0 + 0.5 * m for m in range(32))

# Every scaling at settings where none of its terms vanishes.
EXAMPLES = {
    "position_interpolation": PositionInterpolation(4.0),
    "ntk": NTKAware(4.0),
    "dynamic_ntk": DynamicNTK(4.0, 512, length=2048),
    "yarn": YaRN(4.0, 512),
    "llama3": Llama3(4.0, 512),
    "longrope": LongRoPE((1.0,) * 32, FACTORS, 512, 4.0, length=2048),
    "proportional": Proportional(0.5, 2.0),
    "adjusted_base": AdjustedBase(500_000.0),
    "clip_floor": ClipFloor(512),
    "snap_to_cycles": SnapToCycles(512),
    "p_rope": PRoPE(0.75),
}


def golden_method(case):
    """The method that the golden's parameters describe, put together by hand."""
    given = CASES[case]
    knobs = dict(given["rope_parameters"])
    kind, theta = knobs.pop("rope_type"), knobs.pop("rope_theta")
    if "original_max_position_embeddings" in knobs:
        knobs["original_length"] = knobs.pop("original_max_position_embeddings")
    if kind == "proportional":
        knobs["share"] = knobs.pop("partial_rotary_factor")
    if given["seq_len"] is not None:
        knobs["length"] = given["seq_len"]
    names = {"linear": "position_interpolation", "dynamic": "dynamic_ntk"}
    return theta, SCALINGS[names.get(kind, kind)](**knobs)


@pytest.mark.parametrize("case", [case for case in CASES if case != "xpos"])
def test_parity_with_transformers(case):
    theta, scaling = golden_method(case)
    ours = scaled_frequencies(CASES[case]["head_dim"], theta, (scaling,))
    np.testing.assert_allclose(ours.inv_freq, GOLDENS[f"{case}/inv_freq"], rtol=1e-6, atol=0)
    expected = float(GOLDENS[f"{case}/attention_factor"])
    assert ours.attention_factor == pytest.approx(expected, rel=1e-6)


def test_every_golden_is_covered():
    cases = {key.partition("/")[0] for key in GOLDENS.files if key.endswith("/inv_freq")}
    assert cases == set(CASES) - {"xpos"}
    assert set(EXAMPLES) == set(SCALINGS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_every_scaling_must_keep(name):
    """No frequency grows or turns round; float64 in and out; the input is left alone."""
    scaling = EXAMPLES[name]
    before = ROPE.copy()
    after = scaling(RotaryFrequencies(before, 10_000.0))
    np.testing.assert_array_equal(before, ROPE)
    assert after.inv_freq.dtype == np.float64 and after.inv_freq.shape == ROPE.shape
    if name != "snap_to_cycles":
        assert (after.inv_freq <= ROPE * (1 + 1e-12)).all()
    assert (after.inv_freq >= 0).all() and after.attention_factor >= 1
    assert (after.inv_freq != ROPE).any()
    assert hash(scaling) == hash(type(scaling)(**vars(scaling)))


@pytest.mark.parametrize(
    "scaling",
    [
        PositionInterpolation(1.0),
        NTKAware(1.0),
        DynamicNTK(4.0, 512, length=512),
        DynamicNTK(4.0, 512, length=3),
        YaRN(1.0, 512),
        Llama3(1.0, 512),
        LongRoPE((1.0,) * 32, FACTORS, 512, 1.0, length=512),
        Proportional(1.0),
        AdjustedBase(10_000.0),
        ClipFloor(10**9),
        PRoPE(1.0),
    ],
    ids=lambda scaling: type(scaling).__name__,
)
def test_neutral_settings_change_nothing(scaling):
    after = scaled_frequencies(64, 10_000.0, (scaling,))
    np.testing.assert_allclose(after.inv_freq, ROPE, rtol=1e-12)
    assert after.attention_factor == 1.0


def test_adjusted_base_is_the_grid_of_that_base():
    ours = scaled_frequencies(64, 10_000.0, (AdjustedBase(500_000.0),))
    np.testing.assert_allclose(ours.inv_freq, inverse_frequencies(64, 500_000.0), rtol=1e-12)
    assert ours.theta == pytest.approx(500_000.0)


def test_ntk_keeps_the_fastest_and_interpolates_the_slowest():
    after = scaled_frequencies(64, 10_000.0, (NTKAware(8.0),)).inv_freq
    np.testing.assert_allclose([after[0], after[-1]], [ROPE[0], ROPE[-1] / 8], rtol=1e-12)
    base = 10_000.0 * 8.0 ** (64 / 62)
    np.testing.assert_allclose(after, inverse_frequencies(64, base), rtol=1e-12)


def test_dynamic_ntk_at_a_length_is_ntk_by_what_it_needs():
    dynamic = scaled_frequencies(64, 1e4, (DynamicNTK(3.0, 512, length=2048),)).inv_freq
    static = scaled_frequencies(64, 1e4, (NTKAware(3.0 * 4 - 2),)).inv_freq
    np.testing.assert_allclose(dynamic, static, rtol=1e-12)


def test_yarn_keeps_fast_and_interpolates_slow():
    after = scaled_frequencies(64, 1e4, (YaRN(8.0, 2048),)).inv_freq
    turns = 2048 * ROPE / (2 * math.pi)
    # One index beyond either end, since the ends are rounded outwards.
    np.testing.assert_allclose(after[turns > 45], ROPE[turns > 45], rtol=1e-12)
    np.testing.assert_allclose(after[turns < 0.7], ROPE[turns < 0.7] / 8, rtol=1e-12)
    between = (turns < 20) & (turns > 2)
    assert between.sum() > 5
    assert ((after < ROPE) & (after > ROPE / 8))[between].all()


def test_yarn_ramps_without_width_and_beyond_the_grid():
    """Where both ends of the ramp fall on one index: a step there, no division by zero."""
    grid = inverse_frequencies(16)
    step = scaled_frequencies(16, 1e4, (YaRN(4.0, 6),)).inv_freq
    np.testing.assert_allclose(step, np.r_[grid[0], grid[1:] / 4], rtol=1e-12)
    # Not even the fastest pair turns beta_slow times within one token.
    one = scaled_frequencies(16, 1e4, (YaRN(4.0, 1),)).inv_freq
    np.testing.assert_allclose(one, grid / 4, rtol=1e-12)
    fast = scaled_frequencies(16, 10.0, (YaRN(4.0, 65_536),)).inv_freq
    np.testing.assert_array_equal(fast, inverse_frequencies(16, 10.0))


def test_yarn_ramp_follows_an_adjusted_base():
    """YaRN after another base is YaRN on that base's own grid."""
    chain = scaled_frequencies(64, 1e4, (AdjustedBase(5e5), YaRN(4.0, 512)))
    own = scaled_frequencies(64, 5e5, (YaRN(4.0, 512),))
    np.testing.assert_allclose(chain.inv_freq, own.inv_freq, rtol=1e-12)


def test_llama3_keeps_fast_and_interpolates_slow():
    after = scaled_frequencies(64, 1e4, (Llama3(8.0, 2048),)).inv_freq
    turns = 2048 * ROPE / (2 * math.pi)
    np.testing.assert_array_equal(after[turns >= 4], ROPE[turns >= 4])
    np.testing.assert_allclose(after[turns <= 1], ROPE[turns <= 1] / 8, rtol=1e-12)


def test_llama3_with_equal_ends_is_a_step():
    """Llama 4 Scout: pairs 0 to 34 turn once or more within 8,192 tokens, and stay."""
    grid = inverse_frequencies(128, 5e5)
    scout = scaled_frequencies(128, 5e5, (Llama3(16.0, 8192, 1.0, 1.0),)).inv_freq
    np.testing.assert_array_equal(scout, np.r_[grid[:35], grid[35:] / 16])
    # A pair that turns exactly so often is kept, as from high_freq_factor on where there is a ramp.
    exact = RotaryFrequencies(np.array([1.0, 2 * math.pi / 32, 0.1]), 1e4)
    np.testing.assert_array_equal(
        Llama3(4.0, 64, 2.0, 2.0)(exact).inv_freq[1:], [2 * math.pi / 32, 0.1 / 4]
    )


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("beta", [1.0, 7.3, 32.0])
def test_yarn_with_equal_ends_is_a_step(beta, truncate):
    """Pairs with fewer turns than beta are interpolated; a whole index has its own."""
    turns = 2048 * ROPE / (2 * math.pi)
    yarn = YaRN(8.0, 2048, beta_fast=beta, beta_slow=beta, truncate=truncate)
    after = scaled_frequencies(64, 1e4, (yarn,)).inv_freq
    expected = np.where(turns >= beta, ROPE, ROPE / 8)
    assert 5 < (turns >= beta).sum() < 27
    np.testing.assert_allclose(after, expected, rtol=1e-12)


def test_longrope_switches_at_the_trained_length():
    scaling = LongRoPE((1.0,) * 32, FACTORS, 512, 4.0)
    rope = RotaryFrequencies(ROPE, 1e4)
    traced = jax.jit(lambda length: scaling(rope, length).inv_freq)
    for length, factors in ((None, 1.0), (512, 1.0), (513, np.array(FACTORS))):
        np.testing.assert_allclose(scaling(rope, length).inv_freq, ROPE / factors, rtol=1e-12)
        if length:
            np.testing.assert_allclose(traced(jnp.int32(length)), ROPE / factors, rtol=1e-6)
        assert scaling(rope, length).attention_factor == pytest.approx(math.sqrt(1 + 2 / 9))


def test_snapped_frequencies_return_after_the_training_length():
    """RoPE-A: at position L every rotation is back at the identity."""
    for least in (0, 1):
        method = RoPE(scaling=(SnapToCycles(96, least),))
        turns = method.frequencies(32) * 96 / (2 * math.pi)
        np.testing.assert_allclose(turns, np.round(turns), atol=1e-9)
        assert turns.min() == pytest.approx(least)
        cos, sin = method.tables({}, jnp.array([[0, 96, 192]]), 32)
        np.testing.assert_allclose(cos, 1.0, atol=1e-5)
        np.testing.assert_allclose(sin, 0.0, atol=3e-5)


@pytest.mark.parametrize("least", [0, 1, 3])
def test_snapping_sets_no_still_pair_in_motion(least):
    still = scaled_frequencies(32, 1e4, (PRoPE(0.5), SnapToCycles(96, least))).inv_freq
    assert not least or (still[:8] > 0).all()
    assert not still[8:].any()


@pytest.mark.parametrize(
    ("kept", "half"), [(15, 44), (1, 49), *((kept, 57) for kept in range(1, 58))]
)
def test_a_share_that_is_a_whole_number_of_pairs_keeps_them(kept, half):
    """15 / 44 of 88 dimensions is 29.999999999999996 in float64."""
    for scaling in (PRoPE(kept / half), Proportional(kept / half, 2.0)):
        found = scaled_frequencies(2 * half, 1e4, (scaling,)).inv_freq
        assert np.count_nonzero(found) == kept


@given(share=st.floats(0.05, 1.0), half=st.integers(20, 64))
@settings(max_examples=30, deadline=None)
def test_p_rope_keeps_the_fastest(share, half):
    after = scaled_frequencies(2 * half, 1e4, (PRoPE(share),)).inv_freq
    kept = math.floor(share * half + 1e-6)
    np.testing.assert_array_equal(after[:kept], inverse_frequencies(2 * half)[:kept])
    assert not after[kept:].any()


def test_order_is_the_order_given():
    """Clipping after interpolation drops frequencies that clipping before it would keep."""
    before = scaled_frequencies(64, 1e4, (ClipFloor(512), PositionInterpolation(4.0))).inv_freq
    after = scaled_frequencies(64, 1e4, (PositionInterpolation(4.0), ClipFloor(512))).inv_freq
    assert (before > 0).sum() == 16 and (after > 0).sum() == 11
    clip_first = FoPE(512, scaling=(PositionInterpolation(4.0),), scaling_order="after_clip")
    clip_last = FoPE(512, scaling=(PositionInterpolation(4.0),))
    np.testing.assert_allclose(clip_first.frequencies(64), before[before > 0], rtol=1e-12)
    np.testing.assert_allclose(clip_last.frequencies(64), after[after > 0], rtol=1e-12)


@pytest.mark.parametrize(
    "scaling",
    [DynamicNTK(2.0, 32), LongRoPE((1.0, 1.5, 2.0, 3.0), (2.0, 3.0, 5.0, 9.0), 32, 4.0)],
    ids=["dynamic_ntk", "longrope"],
)
def test_tables_follow_the_length_of_each_row(scaling):
    """Traced: each row has the frequencies that its own length gives, static ones in float64."""
    positions = jnp.stack([jnp.arange(80), jnp.arange(80) % 20])
    cos, sin = jax.jit(lambda p: RoPE(scaling=(scaling,)).tables({}, p, 8))(positions)
    for row, length in ((0, 80), (1, 20)):
        static = scaled_frequencies(8, 1e4, (scaling,), length)
        phase = np.asarray(positions)[row, :, None] * static.inv_freq
        factor = static.attention_factor
        np.testing.assert_allclose(cos[row], factor * np.cos(phase), atol=5e-5)
        np.testing.assert_allclose(sin[row], factor * np.sin(phase), atol=5e-5)


def test_scalings_after_one_that_follows_the_length_are_traced_too():
    chain = (DynamicNTK(2.0, 32), SnapToCycles(64, 0), ClipFloor(40), PRoPE(0.5), AdjustedBase(1e5))
    traced = jax.jit(lambda n: scaled_frequencies(16, 1e4, chain, n).inv_freq)(jnp.int32(100))
    static = scaled_frequencies(16, 1e4, chain, 100).inv_freq
    assert (static > 0).sum() >= 2
    np.testing.assert_allclose(traced, static, rtol=1e-5, atol=1e-9)


def test_the_attention_factor_multiplies_every_logit():
    """On RoPE, and on FoPE with its pairs that have no series: q.k grows by its square."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 2, 32)), jnp.float32)
    positions = jnp.arange(9)[None]
    for method in (
        RoPE(scaling=(YaRN(4.0, 64, attention_factor=1.5),)),
        FoPE(64, series=False, scaling=(YaRN(4.0, 64, attention_factor=1.5),)),
        FoPE(64, sigma=0.0, scaling=(YaRN(4.0, 64, attention_factor=1.5),)),
    ):
        step = method.scaling[0]
        plain = type(method)(**vars(method) | {"scaling": (YaRN(4.0, 64, attention_factor=1.0),)})
        layers = [{}, {}]
        if getattr(method, "series", False):
            coef = jnp.eye(len(method.frequencies(32)), method.num_outputs(32))[None]
            layers = [{"cos_coef": coef, "sin_coef": coef}] * 2
        big, small = (
            m.rotate(layer, m.tables({}, positions, 32), q, q)[0]
            for m, layer in zip((method, plain), layers, strict=True)
        )
        assert step.attention_factor == 1.5
        np.testing.assert_allclose(big, 1.5 * small, rtol=1e-6, atol=1e-6)


def test_partial_rotary_turns_its_dimensions_and_leaves_the_rest():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 32)), jnp.float32)
    for interleaved in (False, True):
        method = RoPE(partial_rotary_factor=0.25, interleaved=interleaved)
        turned, _ = method.rotate({}, method.tables({}, jnp.arange(5)[None], 32), q, q)
        np.testing.assert_array_equal(turned[..., 8:], q[..., 8:])
        own = RoPE(interleaved=interleaved).tables({}, jnp.arange(5)[None], 8)
        np.testing.assert_allclose(
            turned[..., :8], rotate(q[..., :8], *own, interleaved=interleaved), rtol=1e-6
        )


def test_learned_frequencies_start_at_the_given_ones():
    method = RoPE(learnable=True, scaling=(YaRN(4.0, 64),))
    fixed = RoPE(scaling=(YaRN(4.0, 64),))
    zero = {"log_ratio": jnp.zeros(16)}
    positions = jnp.arange(200)[None]
    for ours, theirs in zip(
        method.tables(zero, positions, 32), fixed.tables({}, positions, 32), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)
    doubled = method.tables({"log_ratio": jnp.full(16, np.log(2.0))}, positions, 32)
    expected = fixed.tables({}, 2 * positions, 32)
    np.testing.assert_allclose(doubled[0], expected[0], atol=1e-4)


def test_a_scaling_says_what_it_does():
    with pytest.raises(NotImplementedError):
        Scaling()(RotaryFrequencies(ROPE, 1e4))


def test_frequencies_of_ones_own():
    """A grid that is not RoPE's goes through scalings that need no base."""
    own = RotaryFrequencies(np.array([2.0, 0.3, 0.0]), theta=1e4)
    after = apply_scaling(own, (PositionInterpolation(2.0), ClipFloor(20)))
    np.testing.assert_allclose(after.inv_freq, [1.0, 0.0, 0.0])
