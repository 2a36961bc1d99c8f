"""FoPE in the keys and tensors of serving engines, against their formula in plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.interop.serving import (
    fope_coefficients_from_serving,
    fope_coefficients_to_serving,
    fope_from_rope_parameters,
    fope_to_rope_parameters,
)
from fope_jax.position import FoPE, ModelShape, PositionInterpolation, RoPE

SHAPE = ModelShape(d_model=96, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=24)
SERVED = FoPE(40, theta=500.0, share_layers=True, outputs="surviving")
KEYS = {
    "rope_type": "default",
    "rope_theta": 500.0,
    "use_fope": True,
    "num_inv_freq": 4,
    "fope_sep_head": True,
    "fope_init_factor": 0.3,
}
DRAWS = {"official strength": 0.3, "strong": 5.0}


def by_the_engines_formula(keys, tensors, positions, q, k):
    """Written from what the engines compute: tables, padding with 1, halves, then the heads.

    ``q [T, N, H]``, ``k [T, K, H]`` float64; a query head n uses the matrix of key head n K / N.
    """
    head_dim = q.shape[-1]
    inv_freq = keys["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    inv_freq = inv_freq[: keys["num_inv_freq"]]
    phase = np.asarray(positions, np.float64)[:, None] * inv_freq
    tables = []
    for name, turn in (("cos_coef", np.cos), ("sin_coef", np.sin)):
        coef = tensors["model.rotary_emb." + name].astype(np.float64)
        if keys["fope_sep_head"]:
            table = np.einsum("td,hdo->tho", turn(phase), coef)
        else:
            table = (turn(phase) @ coef)[:, None].repeat(k.shape[1], axis=1)
        rest = head_dim // 2 - table.shape[-1]
        table = np.pad(table, ((0, 0), (0, 0), (0, rest)), constant_values=1.0)
        tables.append(np.concatenate([table, table], axis=-1))

    def turned(x):
        cos, sin = (table.repeat(x.shape[1] // k.shape[1], axis=1) for table in tables)
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate([-second, first], axis=-1) * sin

    return turned(q), turned(k)


@pytest.mark.fast("official strength-True-key_value", "strong-False-shared")
@pytest.mark.parametrize("heads", ["key_value", "shared"])
@pytest.mark.parametrize("separate_sine", [True, False])
@pytest.mark.parametrize("strength", DRAWS)
def test_exported_numbers_are_what_the_engines_compute(heads, separate_sine, strength):
    """Positions to 900, 22 times the training length, in float32: phases near 900 radians."""
    method = dataclasses.replace(
        SERVED, heads=heads, separate_sine=separate_sine, sigma=DRAWS[strength]
    )
    variables = method.init(jax.random.key(1), SHAPE)
    random = np.random.default_rng(0)
    q, k = random.normal(size=(1, 30, 6, 24)), random.normal(size=(1, 30, 2, 24))
    positions = np.sort(random.integers(0, 900, size=(1, 30)))
    layer = {name: value[2] for name, value in variables.layer_constants.items()}
    ours = method.rotate(
        layer,
        method.tables({}, positions, 24),
        jnp.asarray(q, jnp.float32),
        jnp.asarray(k, jnp.float32),
    )
    keys = fope_to_rope_parameters(method, SHAPE)
    tensors = fope_coefficients_to_serving(method, variables, SHAPE)
    theirs = by_the_engines_formula(keys, tensors, positions[0], q[0], k[0])
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine[0], other, rtol=0, atol=1e-4 * np.abs(other).max())


def test_the_formula_is_sensitive_to_orientation_and_padding():
    """Transposed coefficients and sine 0 in the padding would be seen by the test above."""
    variables = SERVED.init(jax.random.key(1), SHAPE)
    keys = fope_to_rope_parameters(SERVED, SHAPE)
    tensors = fope_coefficients_to_serving(SERVED, variables, SHAPE)
    random = np.random.default_rng(0)
    q, k = random.normal(size=(30, 6, 24)), random.normal(size=(30, 2, 24))
    right, _ = by_the_engines_formula(keys, tensors, np.arange(30), q, k)
    for wrong in (
        {name: value.swapaxes(-1, -2) for name, value in tensors.items()},
        {name: value[::-1] for name, value in tensors.items()},
    ):
        assert np.abs(by_the_engines_formula(keys, wrong, np.arange(30), q, k)[0] - right).max() > 1
    rest = slice(keys["num_inv_freq"], 12)
    assert np.abs(right[..., rest] - q[..., rest]).max() > 1  # sine 0 would leave these alone


def test_keys():
    assert fope_to_rope_parameters(SERVED, SHAPE) == KEYS
    tensors = fope_coefficients_to_serving(SERVED, SERVED.init(jax.random.key(0), SHAPE), SHAPE)
    assert {name: value.shape for name, value in tensors.items()} == {
        "model.rotary_emb.cos_coef": (2, 4, 4),
        "model.rotary_emb.sin_coef": (2, 4, 4),
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip(data):
    """Method to keys to method, with and without the training length said."""
    head_dim = data.draw(st.sampled_from([16, 64, 128]))
    method = FoPE(
        data.draw(st.integers(8, 300_000)),
        theta=data.draw(st.floats(10.0, 1e7)),
        sigma=data.draw(st.floats(0.0, 2.0)),
        heads=data.draw(st.sampled_from(["key_value", "shared"])),
        share_layers=True,
        outputs="surviving",
    )
    shape = SHAPE._replace(head_dim=head_dim)
    keys = fope_to_rope_parameters(method, shape)
    again = fope_from_rope_parameters(
        keys, head_dim=head_dim, training_length=method.training_length
    )
    assert again == method
    shortest = fope_from_rope_parameters(keys, head_dim=head_dim)
    assert shortest.training_length <= method.training_length
    np.testing.assert_array_equal(shortest.frequencies(head_dim), method.frequencies(head_dim))
    assert fope_to_rope_parameters(shortest, shape) == keys


@pytest.mark.parametrize("heads", ["key_value", "shared"])
def test_coefficients_round_trip(heads):
    method = dataclasses.replace(SERVED, heads=heads)
    drawn = method.init(jax.random.key(5), SHAPE)
    tensors = fope_coefficients_to_serving(method, drawn, SHAPE, prefix="a.")
    tensors["a.other"] = np.zeros(3)
    back = fope_coefficients_from_serving(method, tensors, SHAPE, prefix="a.")
    assert jax.tree.structure(back) == jax.tree.structure(drawn)
    jax.tree.map(np.testing.assert_array_equal, back, drawn)


def test_learnable_coefficients_come_back_as_parameters():
    """Trained coefficients of a one-layer model are served, and may be trained on."""
    method, shape = (
        dataclasses.replace(SERVED, share_layers=False, learnable=True),
        SHAPE._replace(num_layers=1),
    )
    drawn = method.init(jax.random.key(5), shape)
    tensors = fope_coefficients_to_serving(method, drawn, shape)
    back = fope_coefficients_from_serving(method, tensors, shape)
    assert not back.layer_constants
    np.testing.assert_array_equal(back.layer_params["sin_coef"], drawn.layer_params["sin_coef"])


def test_other_spellings_and_strict_floor():
    """LMDeploy's and XTuner's names; Intern-S1-Pro's own values keep 45 of 64 frequencies."""
    lmdeploy = {"rope_type": "fope", "fope_num_inv_freq": 4, "fope_sep_heads": True}
    method = fope_from_rope_parameters(
        lmdeploy | {"fope_init_factor": 0.3}, head_dim=24, training_length=40, rope_theta=500.0
    )
    assert method == SERVED
    intern = {"rope_type": "default", "fope_sep_head": True, "fope_init_factor": 0.5}
    method = fope_from_rope_parameters(
        intern | {"num_inv_freq": None}, head_dim=128, training_length=262_144, rope_theta=5_000_000
    )
    assert method.num_outputs(128) == 45


def test_a_count_of_frequencies_is_that_of_the_shortest_length_that_keeps_them():
    """Where a period is nearly a whole number of tokens rounding decides by one of them."""
    for theta in (10_000.0, 49_490_630.58580127):
        keys = {"rope_type": "fope", "fope_sep_head": True, "fope_init_factor": 0.3}
        keys |= {"num_inv_freq": 2}
        method = fope_from_rope_parameters(keys, head_dim=8, rope_theta=theta)
        kept = [
            np.count_nonzero(dataclasses.replace(method, training_length=length).frequencies(8))
            for length in (method.training_length, method.training_length - 1)
        ]
        assert kept == [2, 1]


def test_query_heads_are_key_value_heads_without_groups():
    shape = SHAPE._replace(num_kv_heads=6)
    query = dataclasses.replace(SERVED, heads="query")
    assert fope_to_rope_parameters(query, shape) == KEYS
    drawn = [method.init(jax.random.key(0), shape) for method in (query, SERVED)]
    jax.tree.map(np.testing.assert_array_equal, *drawn)


READING = {
    "no sep_head": ("fope_sep_head", None, {}, "'fope_sep_head' is missing"),
    "sep_head": ("fope_sep_head", 1, {}, "'fope_sep_head' is 1: expected True or False"),
    "no strength": ("fope_init_factor", None, {}, "'fope_init_factor' is missing.*sigma"),
    "strength": ("fope_init_factor", -1.0, {}, "sigma=-1.0"),
    "no FoPE": ("use_fope", False, {}, "'use_fope' is False.*from_rope_parameters"),
    "no base": ("rope_theta", None, {}, "'rope_theta' is missing"),
    "unknown": ("fope_sep_haed", True, {}, "'fope_sep_haed'.*mean 'fope_sep_head'"),
    "type": ("rope_type", "yarn", {}, "'rope_type' is 'yarn'.*Known: default, fope"),
    "two spellings": ("fope_num_inv_freq", 5, {}, "'fope_num_inv_freq' is 5, 'num_inv_freq' is 4"),
    "share": ("partial_rotary_factor", 0.5, {}, "'partial_rotary_factor' is 0.5.*whole head"),
    "count": ("num_inv_freq", 13, {}, "'num_inv_freq' is 13: head_dim=24 has 1 to 12"),
    "no count": ("num_inv_freq", 0, {}, "'num_inv_freq' is 0: head_dim=24 has 1 to 12"),
    "half a count": ("num_inv_freq", 3.5, {}, "'num_inv_freq' is 3.5.*whole number"),
    "neither": ("num_inv_freq", None, {}, "'num_inv_freq' is missing.*training_length"),
    "both": ("num_inv_freq", 5, {"training_length": 40}, "'num_inv_freq' is 5.*keeps 4"),
    "length": ("num_inv_freq", None, {"training_length": 5}, "training_length=5.*7 tokens"),
    "no length": ("rope_theta", 2.0, {}, "'num_inv_freq' is 4: 7 .* fewer.*, 8 keep 5"),
    "length 0": ("num_inv_freq", None, {"training_length": 0}, "training_length=0"),
}


@pytest.mark.parametrize("name", READING)
def test_reading_raises(name):
    key, value, arguments, message = READING[name]
    with pytest.raises(ValueError, match=message):
        fope_from_rope_parameters(KEYS | {key: value}, head_dim=24, **arguments)


@pytest.mark.parametrize("period", range(8, 60, 4))
def test_a_frequency_on_the_floor(period):
    """Engines round to float32 and drop what is on the floor: neither reading would be safe.

    With the number said there is nothing to decide, whichever way the logarithms were rounded.
    """
    theta = (period / (2 * np.pi)) ** 12  # frequency 1 of head_dim 24 is 2 pi / period
    keys = KEYS | {"rope_theta": theta * (1 - 1e-9), "num_inv_freq": None}
    with pytest.raises(ValueError, match="frequency 1 is on the floor"):
        fope_from_rope_parameters(keys, head_dim=24, training_length=period)
    method = fope_from_rope_parameters(keys | {"rope_theta": theta, "num_inv_freq": 2}, head_dim=24)
    assert len(method.frequencies(24)) == 2
    assert method.training_length in (period, period + 1)


WRITING = {
    "series": (dict(series=False), "series=False"),
    "grid": (dict(frequencies_from="grid", num_frequencies=48), "frequencies_from='grid'"),
    "uniform": (dict(frequencies_from="uniform"), "frequencies_from='uniform'"),
    "normalise": (dict(normalise=True), "normalise=True"),
    "scaling": (dict(scaling=(PositionInterpolation(2.0),)), "scaling=.*PositionInterpolation"),
    "query heads": (dict(heads="query"), "heads='query' with 6 query and 2 key-value heads"),
    "layers": (dict(share_layers=False), "share_layers=False with 3 layers"),
    "outputs": (
        dict(outputs="official", training_length=900),
        "outputs='official' mixes 10 .* 6 p",
    ),
    "no floor": (dict(outputs="official", clip=False), "outputs='official' mixes 12 .* 6 p"),
    "zero": (dict(drop_zero=False), "drop_zero=False"),
    "zero_sine": (dict(zero_sine=0.0), "zero_sine=0: .* the 8 pairs without a series with 1"),
    "sigma": (dict(sigma_convention="normal"), "sigma_convention='normal'.*'xavier'"),
}


@pytest.mark.parametrize("name", WRITING)
def test_writing_raises(name):
    changes, message = WRITING[name]
    method = dataclasses.replace(SERVED, **changes)
    with pytest.raises(ValueError, match=message):
        fope_to_rope_parameters(method, SHAPE)


def test_another_method_is_not_written_as_fope():
    with pytest.raises(ValueError, match="expected FoPE; to_rope_parameters writes RoPE"):
        fope_to_rope_parameters(RoPE(), SHAPE)


def test_coefficients_raise():
    drawn = SERVED.init(jax.random.key(0), SHAPE)
    tensors = fope_coefficients_to_serving(SERVED, drawn, SHAPE)
    with pytest.raises(ValueError, match="'a.cos_coef' is missing; did you mean 'model.rot"):
        fope_coefficients_from_serving(SERVED, tensors, SHAPE, prefix="a.")
    bad = tensors | {"model.rotary_emb.sin_coef": np.zeros((2, 4, 5))}
    with pytest.raises(ValueError, match=r"sin_coef' has shape \(2, 4, 5\): expected \(2, 4, 4\)"):
        fope_coefficients_from_serving(SERVED, bad, SHAPE)
    shared_sine = dataclasses.replace(SERVED, separate_sine=False)
    with pytest.raises(ValueError, match="separate_sine=False"):
        fope_coefficients_from_serving(shared_sine, tensors, SHAPE)
    differing = dataclasses.replace(
        drawn, layer_constants={n: x.at[1].add(1.0) for n, x in drawn.layer_constants.items()}
    )
    with pytest.raises(ValueError, match="cos_coef differs between layers"):
        fope_coefficients_to_serving(SERVED, differing, SHAPE)
