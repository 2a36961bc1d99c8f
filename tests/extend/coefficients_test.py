"""Position arrays carried over: exact where a frequency is kept, drawn where it is new."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.extend.coefficients import (
    carry_coefficients,
    carry_variables,
    interpolate_table,
    match_frequencies,
)
from fope_jax.extend.methods import extend_position
from fope_jax.gallery.examples import examples
from fope_jax.position import FoPE, Learned, ModelShape, NoPE, RoPE, T5Bias, YaRN, fourier_tables

SHAPE = ModelShape(d_model=128, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=64)


def arrays(variables):
    groups = vars(variables).values()
    return {name: np.asarray(x) for group in groups for name, x in group.items()}


def move(parent, child, shape=SHAPE, from_length=512, match="frequency"):
    """The parent's arrays, those drawn for the child, and those carried over."""
    trained = parent.init(jax.random.key(0), shape)
    drawn = child.init(jax.random.key(1), shape)
    moved = carry_variables(
        parent, trained, child, drawn, shape.head_dim, from_length=from_length, match=match
    )
    assert jax.tree.structure(moved.variables) == jax.tree.structure(drawn)
    assert all(
        new.shape == old.shape and new.dtype == old.dtype
        for new, old in zip(jax.tree.leaves(moved.variables), jax.tree.leaves(drawn), strict=True)
    )
    return arrays(trained), arrays(drawn), arrays(moved.variables), moved


# ---------------------------------------------------------------------------- matching


@given(
    st.sets(st.integers(1, 60), min_size=1, max_size=20),
    st.sets(st.integers(1, 60), min_size=1, max_size=20),
    st.floats(-4e-7, 4e-7),
)
@settings(deadline=None, max_examples=50)
def test_a_frequency_finds_itself_and_nothing_else(old, new, error):
    old, new = sorted(old, reverse=True), sorted(new, reverse=True)
    rows = match_frequencies(np.array(old) * 0.05, np.array(new) * 0.05 * (1 + error))
    assert [old[row] if row >= 0 else None for row in rows] == [
        value if value in old else None for value in new
    ]


def test_an_unknown_way_to_match_is_named():
    with pytest.raises(ValueError, match="match='order': expected one of 'frequency', 'index'"):
        match_frequencies(np.ones(1), np.ones(1), by="order")


# ---------------------------------------------------------------------------- FoPE


def test_the_papers_60m_model_from_512_to_1024_tokens():
    """16 frequencies turn within 512 tokens, 18 within 1,024; 16 pairs have a series both times."""
    old, drawn, new, moved = move(FoPE(512), FoPE(1024))
    for name in ("cos_coef", "sin_coef"):
        assert (old[name].shape, new[name].shape) == ((2, 2, 16, 16), (2, 2, 18, 16))
        assert new[name][..., :16, :].tobytes() == old[name].tobytes()
        # With a step of 2 the drawn matrix has its ones in rows 0, 2, .. 16. Row 16 must not give
        # pair 8 a second dominant term: what is new is noise.
        assert drawn[name][..., 16, 8].min() > 0.8
        assert np.abs(new[name][..., 16:, :]).max() < 0.2
        np.testing.assert_allclose(new[name][..., 17, :], drawn[name][..., 17, :], atol=1e-7)
    assert moved.text == (
        "series of 16 frequencies into 18: coefficients of 16 kept (by frequency), of 2 drawn; "
        "16 pairs with a series before, 16 after"
    )
    assert moved.names == frozenset()


def test_by_index_is_what_the_released_code_does():
    """The old matrix in the upper left corner, new draws around it, a second dominant term kept."""
    old, drawn, new, _ = move(FoPE(512), FoPE(1024), match="index")
    for name in ("cos_coef", "sin_coef"):
        expected = drawn[name].copy()
        expected[..., :16, :16] = old[name]
        np.testing.assert_array_equal(new[name], expected)
        assert new[name][..., 16, 8].min() > 0.8


def test_pairs_that_are_new_to_the_series_are_drawn_whole():
    """The paper's 180M heads: 31 frequencies and pairs at 512 tokens, 36 and 32 at 1,024."""
    shape = SHAPE._replace(head_dim=128)
    old, drawn, new, _ = move(FoPE(512), FoPE(1024), shape)
    assert (old["cos_coef"].shape[-2:], new["cos_coef"].shape[-2:]) == ((31, 31), (36, 32))
    np.testing.assert_array_equal(new["cos_coef"][..., :31, :31], old["cos_coef"])
    np.testing.assert_array_equal(new["cos_coef"][..., 31], drawn["cos_coef"][..., 31])


def test_on_a_finer_grid_only_the_frequency_tells_what_is_what():
    """Frequency i of RoPE is frequency 2 i of a grid twice as fine; its index is another's."""
    coarse = FoPE(512, frequencies_from="grid", num_frequencies=32)
    fine = FoPE(512, frequencies_from="grid", num_frequencies=64)
    np.testing.assert_allclose(fine.frequencies(64)[::2], coarse.frequencies(64), rtol=1e-12)
    old, _, new, moved = move(coarse, fine)
    np.testing.assert_array_equal(new["cos_coef"][..., ::2, :16], old["cos_coef"])
    assert "coefficients of 16 kept (by frequency), of 15 drawn" in moved.text
    _, _, wrong, _ = move(coarse, fine, match="index")
    np.testing.assert_array_equal(wrong["cos_coef"][..., 1, :], old["cos_coef"][..., 1, :])
    assert coarse.frequencies(64)[1] != pytest.approx(fine.frequencies(64)[1], rel=0.1)


def test_random_frequencies_stay_with_their_coefficients():
    """The equations' 64: 16 of RoPE and 48 drawn at 512 tokens, 18 and 46 at 1,024."""
    old, _, new, moved = move(FoPE.equations(512), FoPE.equations(1024))
    np.testing.assert_array_equal(new["extra_frequencies"], old["extra_frequencies"][:46])
    np.testing.assert_array_equal(new["cos_coef"][..., :16, :16], old["cos_coef"][..., :16, :])
    np.testing.assert_array_equal(new["cos_coef"][..., 18:, :16], old["cos_coef"][..., 16:62, :])
    assert (
        "coefficients of 62 kept (by frequency), of 2 drawn; 16 pairs with a series" in moved.text
    )
    _, _, by_index, _ = move(FoPE.equations(512), FoPE.equations(1024), match="index")
    # By index RoPE's 17th frequency gets what a random one had, and all random ones move on by two.
    np.testing.assert_array_equal(by_index["cos_coef"][..., 16:, :16], old["cos_coef"][..., 16:, :])
    more = dataclasses.replace(FoPE.equations(1024), num_frequencies=80)
    old, drawn, new, _ = move(FoPE.equations(512), more)
    assert new["extra_frequencies"].shape == (62,)
    np.testing.assert_array_equal(new["extra_frequencies"][:48], old["extra_frequencies"])
    np.testing.assert_array_equal(new["extra_frequencies"][48:], drawn["extra_frequencies"][48:])


OWN = {"outputs": "surviving", "identity": "own", "zero_sine": 0.0}


@pytest.mark.fast("32-300-8-10000.0-knobs1")
@pytest.mark.parametrize(
    ("head_dim", "length", "times", "theta", "knobs"),
    [
        (16, 40, 2, 100.0, {}),
        (32, 300, 8, 10_000.0, OWN),
        (16, 97, 1.5, 10_000.0, {"drop_zero": False}),
        (32, 128, 1, 10_000.0, {}),
    ],
)
def test_the_series_of_kept_frequencies_is_the_parents(head_dim, length, times, theta, knobs):
    """Without the coefficients of new frequencies each pair of the parent turns as before."""
    shape = SHAPE._replace(head_dim=head_dim, num_layers=1)
    parent = FoPE(length, theta=theta, **knobs)
    child = FoPE(round(length * times), theta=theta, **knobs)
    old, _, new, _ = move(parent, child, shape, from_length=length)
    before, after = parent.frequencies(head_dim), child.frequencies(head_dim)
    pairs = old["cos_coef"].shape[-1]
    known = np.isin(child.origins(head_dim), parent.origins(head_dim))[:, None]
    assert known.sum() == len(before) and known.all() == (times == 1 or not parent.drop_zero)
    positions = jnp.arange(length)[None]
    kept = [(new[name][0] * known).astype(np.float32) for name in ("cos_coef", "sin_coef")]
    had = [old[name][0] for name in ("cos_coef", "sin_coef")]
    if parent.drop_zero:  # kept zeros become frequencies, whose coefficients go with them
        for ours, theirs in zip(
            fourier_tables(positions, after, *kept, head_dim=head_dim),
            fourier_tables(positions, before, *had, head_dim=head_dim),
            strict=True,
        ):
            np.testing.assert_allclose(ours[..., :pairs], theirs[..., :pairs], atol=2e-5)
    else:
        np.testing.assert_array_equal(kept, had)


@pytest.mark.parametrize("order", ["before_clip", "after_clip"])
def test_a_scaled_frequency_counts_as_the_one_it_was(order):
    child = extend_position(
        FoPE(512), "yarn", from_length=512, length=1024, head_dim=64, knobs={"scaling_order": order}
    )
    assert len(child.frequencies(64)) == {"before_clip": 16, "after_clip": 18}[order]
    assert np.isin(child.frequencies(64), FoPE(512).frequencies(64)).sum() < 8
    old, _, new, _ = move(FoPE(512), child)
    np.testing.assert_array_equal(new["cos_coef"][..., :16, :16], old["cos_coef"])


def test_a_pair_whose_dominant_frequency_is_gone_is_drawn_anew():
    """YaRN by 16 for twice the length drops frequencies below the new floor before the mix."""
    child = FoPE(1024, scaling=(YaRN(16.0, 512, attention_factor=1.0),), outputs="surviving")
    parent = FoPE(512, outputs="surviving")
    old, drawn, new, moved = move(parent, child)
    left = len(child.frequencies(64))
    assert left < 16 and new["cos_coef"].shape[-2:] == (left, left)
    np.testing.assert_array_equal(new["cos_coef"], old["cos_coef"][..., :left, :left])
    terms = np.eye(3, dtype=np.float32)[:, [0, 2]]
    one, two = np.full((3, 2), 5.0), np.array([[1.1, 0.1], [0.2, 1.2]])
    carried = carry_coefficients(one, two, np.array([0, 1]), terms, np.eye(2))
    np.testing.assert_array_equal(carried, [[5.0, 0.1], [5.0, 1.2]])


@pytest.mark.parametrize(
    "change",
    [
        {"separate_sine": False},
        {"frequencies_from": "uniform"},
        {"series": False},
        {"heads": "shared"},
    ],
)
def test_knobs_that_shape_the_arrays_must_stay(change):
    child = FoPE(1024, **change)
    parent, child = (child, FoPE(1024)) if change.get("series") is False else (FoPE(512), child)
    with pytest.raises(ValueError, match="must stay as they are"):
        move(parent, child)


def test_what_becomes_learnable_keeps_its_coefficients():
    trained, _, new, moved = move(FoPE(512), FoPE(512, learnable=True))
    assert moved.variables.layer_params.keys() == {"cos_coef", "sin_coef"}
    assert new["cos_coef"].tobytes() == trained["cos_coef"].tobytes()
    assert moved.names == {"cos_coef", "sin_coef"}


# ---------------------------------------------------------------------------- the others


@pytest.mark.fast("fope", "t5", "fire", "cope", "learned")
@pytest.mark.parametrize("label", sorted(examples()))
def test_a_method_that_stays_keeps_every_bit(label):
    method = examples(head_dim=64)[label]
    shape = SHAPE._replace(num_layers=2)
    old, _, new, moved = move(method, method, shape)
    assert old.keys() == new.keys() == moved.names
    assert all(new[name].tobytes() == old[name].tobytes() for name in old)


def test_from_rope_coefficients_are_drawn_and_to_nope_nothing_is_left():
    _, drawn, new, moved = move(RoPE(), FoPE(1024))
    np.testing.assert_array_equal(new["cos_coef"], drawn["cos_coef"])
    assert moved.text == "cos_coef, sin_coef drawn" and not moved.names
    assert move(FoPE(512), NoPE())[3].text == "" == move(RoPE(), RoPE())[3].text
    assert move(T5Bias(), T5Bias())[3].text == "bias_table kept"


def test_a_bias_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"'bias_table': the parent has \(.*32, 2\), the child ne"):
        move(T5Bias(), T5Bias(num_buckets=16))


def test_a_learned_table_is_stretched_between_its_trained_rows():
    old, _, new, moved = move(Learned(64), Learned(127), from_length=64)
    np.testing.assert_array_equal(new["table"][::2], old["table"])
    between = (old["table"][:-1] + old["table"][1:]) / 2
    np.testing.assert_allclose(new["table"][1::2], between, rtol=1e-6, atol=1e-9)
    assert moved.text == "table of 64 trained positions stretched to 127" and not moved.names
    # Rows that training never reached are left out.
    old, _, new, _ = move(Learned(64), Learned(63), from_length=32)
    np.testing.assert_array_equal(new["table"][[0, -1]], old["table"][[0, 31]])


def test_a_table_of_fewer_than_the_trained_rows_is_refused():
    with pytest.raises(ValueError, match="table_length=4: the parent has 8 trained positions, .*8"):
        move(Learned(16), Learned(4), from_length=8)
    table = np.arange(8.0)[:, None]
    with pytest.raises(ValueError, match="table_length=7"):
        interpolate_table(table, trained=8, length=7)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_table_of_the_same_length_keeps_its_bits(length):
    table = np.random.default_rng(0).normal(size=(length, 3)).astype(np.float32)
    stretched = interpolate_table(table, length, length)
    assert stretched.dtype == np.float32 and stretched.tobytes() == table.tobytes()
