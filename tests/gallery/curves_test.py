"""The numbers of the gallery, against closed forms worked out here by other means."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.gallery.curves import BIAS, KEYS, LOGITS, SIMILARITY, gallery_row, gallery_rows
from fope_jax.gallery.examples import EXAMPLES
from fope_jax.gallery.examples import SHAPE as EXAMPLE_SHAPE
from fope_jax.position import (
    ALiBi,
    FoPE,
    FoX,
    Learned,
    LocalChunks,
    ModelShape,
    NoPE,
    PoPE,
    ReRoPE,
    RoPE,
    Sinusoidal,
    SlidingWindow,
)
from fope_jax.position.mixing import ByLayer

SHAPE = ModelShape(d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
LENGTH, REACH = 64, 3
DISTANCES = np.arange(REACH * LENGTH + 1)


def row(method, **options):
    return gallery_row("it", method, shape=SHAPE, length=LENGTH, reach=REACH, **options)


@pytest.mark.parametrize("mean", [1.0, 0.5])
def test_the_expectation_of_a_rotation_is_a_sum_of_cosines(mean):
    found = row(RoPE(theta=100.0), mean=mean)
    phase = DISTANCES[:, None] * 100.0 ** (-np.arange(8) / 8)
    expected = mean**2 * 2 * np.cos(phase).sum(axis=1) / np.sqrt(16)
    assert found["quantity"] == LOGITS
    (line,) = found["lines"]
    assert line["label"] == "all heads" and "low" not in line
    np.testing.assert_allclose(line["value"], expected, atol=2e-4)
    np.testing.assert_allclose(found["frequencies"][0]["values"], phase[1], rtol=1e-6)


@pytest.mark.slow
def test_the_expectation_agrees_with_random_queries_and_keys():
    """FoPE is no rotation: nothing but its linearity makes the closed form right."""
    method = FoPE(LENGTH, sigma_convention="normal", heads="query")
    found = row(method)
    (line,) = found["lines"]
    drawn = method.init(jax.random.key(0), SHAPE)
    variables = {name: value[0] for name, value in drawn.layer_constants.items()}
    random, draws, distance = np.random.default_rng(5), 4_000, 50
    places = np.arange(KEYS) * LENGTH // KEYS
    positions = np.concatenate([places, places + distance])[None].astype(np.int32)
    tables = method.tables({}, positions, 16)
    q = jnp.asarray(random.normal(1.0, 1.0, (draws, 2 * KEYS, 4, 16)), jnp.float32)
    k = jnp.asarray(random.normal(1.0, 1.0, (draws, 2 * KEYS, 2, 16)), jnp.float32)
    q, k = method.rotate(variables, tables, q, k)
    dots = np.einsum("btnh,btnh->btn", q[:, KEYS:], k[:, :KEYS]) / 4
    error = dots.std() / np.sqrt(draws * KEYS * 4)
    assert abs(dots.mean() - line["value"][distance]) < 4 * error
    assert line["low"][distance] < line["value"][distance] < line["high"][distance]


def test_a_bias_is_shown_alone_for_every_head():
    found = row(ALiBi(slopes=(0.5, 0.25, 0.125, 0.0)))
    assert found["quantity"] == BIAS and found["note"] == ""
    for line, slope in zip(found["lines"], (0.5, 0.25, 0.125, 0.0), strict=True):
        np.testing.assert_allclose(line["value"], -slope * DISTANCES, rtol=1e-6)
    assert found["parameters"] == [{"label": "slopes", "values": [0.5, 0.25, 0.125, 0.0]}]
    assert not found["frequencies"] and not found["others"]


@pytest.mark.slow
def test_a_bias_that_depends_on_the_query_is_shown_for_two_queries():
    fire = EXAMPLES["fire"]
    lines = gallery_row("fire", fire)["lines"]
    far, near = lines[:4], lines[4:]
    assert [line["label"] for line in near] == [f"query at 512, head {n}" for n in (1, 2, 3, 4)]
    for one, other in zip(far, near, strict=True):
        assert len(one["value"]) == 2049 and len(other["value"]) == 513
        # the distance as a share of the query's position decides: 4 * d at four times the length
        np.testing.assert_allclose(one["value"][-1], other["value"][-1], rtol=1e-4)
        assert one["value"][256] != other["value"][256]


def test_layers_of_a_pattern_have_lines_and_frequencies_of_their_own():
    found = row(ByLayer((RoPE(), NoPE())))
    turning, still = found["lines"]
    assert turning["label"] == "layer 1 of 2, all heads"
    assert still["label"] == "layer 2 of 2, all heads"
    np.testing.assert_allclose(still["value"], 16 / 4, rtol=1e-6)
    assert np.ptp(turning["value"]) > 1
    assert [series["label"] for series in found["frequencies"]] == ["layer 1 of 2"]


def test_a_contextual_bias_interpolates_its_table_at_the_expected_count():
    method = EXAMPLES["cope"]
    found = gallery_row("cope", method, length=64)
    assert found["quantity"] == BIAS
    table = method.init(jax.random.key(0), EXAMPLE_SHAPE).layer_params["position_table"][0]
    last = float(np.asarray(table, np.float64)[-1].sum())
    open_gates = found["lines"][-1]
    assert open_gates["label"] == "gates of N(0, 1), all heads"
    # half of the gates are open: beyond 2 * 63 tokens every count is at the end of the table
    np.testing.assert_allclose(open_gates["value"][160:], last, rtol=1e-4)
    assert abs(open_gates["value"][20] - last) > 1e-3


def test_vectors_added_to_embeddings_are_compared_by_their_angle():
    found = row(Sinusoidal(theta=100.0))
    assert found["quantity"] == SIMILARITY
    (line,) = found["lines"]
    phase = DISTANCES[:, None] * 100.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(line["value"], np.cos(phase).mean(axis=1), atol=1e-5)
    assert len(found["frequencies"][0]["values"]) == 32


def test_a_learned_table_ends_where_it_ends():
    (line,) = row(Learned(table_length=LENGTH))["lines"]
    assert len(line["value"]) == LENGTH and line["value"][0] == 1.0
    assert np.isfinite(line["value"]).all()


@pytest.mark.slow
def test_a_row_is_json_and_the_same_twice():
    method = FoPE.equations(LENGTH)
    first = row(method)
    assert json.loads(json.dumps(first)) == first == row(method)
    assert row(method, seed=1)["lines"] != first["lines"]
    assert [series["label"] for series in first["frequencies"]] == ["fixed", "random"]
    assert first["summary"].startswith("FoPE(training_length=64, sigma_convention='normal'")


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="slopes has 2 entries: the model has 4 heads"):
        row(ALiBi(slopes=(0.5, 0.25)))
    with pytest.raises(ValueError, match="unknown method 'alibbi'; did you mean 'alibi'"):
        gallery_rows(["alibbi"])


def test_far_keys_are_shown_by_their_own_version():
    """ReRoPE holds the logit of its window; leaky ReRoPE goes on k times slower."""
    rope = RoPE(theta=100.0)
    ((plain,), (held,), (leaky,)) = (
        row(method)["lines"] for method in (rope, ReRoPE(rope, 16), ReRoPE(rope, 16, leak=8))
    )
    plain, held, leaky = (np.asarray(line["value"]) for line in (plain, held, leaky))
    np.testing.assert_allclose(held, plain[np.minimum(DISTANCES, 16)], atol=2e-4)
    np.testing.assert_allclose(leaky[:16], plain[:16], atol=2e-4)
    np.testing.assert_allclose(leaky[16 + 8 * np.arange(10)], plain[16:26], atol=2e-4)


def test_the_line_of_a_window_ends_where_no_key_is_seen():
    windowed = row(ByLayer((SlidingWindow(RoPE(theta=100.0), 20), RoPE(theta=100.0))))
    local, whole = windowed["lines"]
    assert len(local["value"]) == 20 and local["value"] == whole["value"][:20]
    assert "layer 1 of 2, a query sees at most 20 tokens" in windowed["note"]


def test_a_polar_method_is_the_mean_of_its_sizes_times_cosines():
    """E[softplus(x)] of N(1, 1) by a fine sum, not by the quadrature."""
    found = row(PoPE(theta=100.0))
    grid = np.linspace(-9.0, 11.0, 20_001)
    density = np.exp(-((grid - 1) ** 2) / 2) / np.sqrt(2 * np.pi) * (grid[1] - grid[0])
    size = np.sum(np.logaddexp(grid, 0) * density)
    phase = DISTANCES[:, None] * 100.0 ** (-np.arange(16) / 16)
    (line,) = found["lines"]
    np.testing.assert_allclose(line["value"], size**2 * np.cos(phase).sum(axis=1) / 4, atol=3e-4)
    assert len(found["frequencies"][0]["values"]) == 16


def test_a_running_bias_is_a_line_of_the_mean_gate():
    """With gates that read nothing, log sigmoid(b) a token, for every text."""
    found = row(FoX(init_std=0.0, bias_init=2.0))
    assert found["quantity"] == BIAS and "16 random texts" in found["note"]
    (line,) = found["lines"]
    np.testing.assert_allclose(line["value"], -np.log1p(np.exp(-2.0)) * DISTANCES, rtol=1e-5)


def test_chunks_end_and_hide_what_lies_before_them():
    """Of the keys at 0, 8, .. 56 only those at 0, 24 and 48 begin a chunk of 12."""
    found = row(LocalChunks(ALiBi(slopes=(0.5,) * 4), 12))
    (line,) = found["lines"]
    np.testing.assert_allclose(line["value"], -0.5 * np.arange(12), rtol=1e-6)
