import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.model import fused
from fope_jax.model.attention import attend
from fope_jax.model.backends import choose_backend, query_width
from fope_jax.model.config import TransformerConfig
from fope_jax.model.context_parallel import sharded_attention
from fope_jax.model.transformer import Transformer
from fope_jax.position import DAPE, ALiBi, ByLayer, FoPE, NoPE, PoPE, ReRoPE, RoPE, SelfExtend
from fope_jax.position.base import Layer, ModelShape, PositionEmbedding, has_hook
from fope_jax.position.contextual import CoPE
from fope_jax.train.state import plan_state
from tests.train.mesh_runs import experiment


class Doubled(PositionEmbedding):
    """q and k twice as wide."""

    def rotate(self, variables, tables, q, k):
        return jnp.concatenate([q, -q], axis=-1), jnp.concatenate([k, 0.5 * k], axis=-1)


class Decay(PositionEmbedding):
    """A bias that is a running sum."""

    def running_bias(self, variables, x):
        return -jnp.ones((*x.shape[:2], 1))


def of_heads(head_dim):
    return ModelShape(4 * head_dim, 2, 4, 2, head_dim)


SHAPES = {"layers": FoPE(512).layers(), "length": 1024, "shape": of_heads(64), "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("platform", "changes", "name", "reason"),
    [
        ("cpu", {}, "chunked", "platform cpu has no fused kernel"),
        ("tpu", {}, "splash", "the fused kernel of platform tpu"),
        ("gpu", {}, "cudnn", "the fused kernel of platform gpu"),
        ("tpu", {"layers": ALiBi().layers()}, "pallas", "splash cannot run: ALiBi adds a bias"),
        ("tpu", {"layers": (Layer(RoPE()), Layer(ALiBi()))}, "pallas", "ALiBi adds a bias"),
        (
            "tpu",
            {"layers": (Layer(RoPE()), Layer(CoPE()))},
            "chunked",
            "CoPE needs whole rows of scores",
        ),
        ("tpu", {"layers": (Layer(RoPE(), window=512), Layer(NoPE()))}, "splash", "the fused"),
        ("gpu", {"layers": (Layer(RoPE(), chunk=512), Layer(NoPE()))}, "cudnn", "the fused"),
        ("tpu", {"layers": (Layer(Doubled()),)}, "splash", "the fused"),
        ("gpu", {"layers": (Layer(Doubled()),)}, "cudnn", "the fused"),
        (
            "gpu",
            {"layers": (Layer(Doubled()),), "shape": of_heads(128)},
            "chunked",
            "head_dim=128, of queries 256: it takes multiples of 8 up to 128",
        ),
        (
            "tpu",
            {"layers": (Layer(RoPE()), Layer(Doubled(), far_from=64))},
            "pallas",
            "Doubled has other logits for keys 64 tokens back or further",
        ),
        ("gpu", {"layers": (Layer(Doubled(), far_from=64),)}, "chunked", "keys 64 tokens back"),
        ("tpu", {"layers": (Layer(Decay()),)}, "pallas", "Decay adds a running sum to the logits"),
        ("gpu", {"layers": (Layer(Decay()),)}, "chunked", "Decay adds a running sum"),
        ("tpu", {"sinks": True}, "splash", "the fused kernel"),
        ("gpu", {"sinks": True}, "chunked", "cudnn cannot run: it takes no attention sinks"),
        ("tpu", {"length": 1000}, "chunked", "1000 tokens a row are no multiple of 128"),
        ("tpu", {"context": 4}, "pallas", "mesh.context=4"),
        ("tpu", {"context": 16}, "chunked", "no multiple of 128 on each of mesh.context=16"),
        ("gpu", {"dtype": "float32"}, "chunked", "bfloat16 or float16"),
        ("gpu", {"shape": of_heads(256)}, "chunked", "head_dim=256"),
        ("gpu", {"length": 65536}, "chunked", "quadratic"),
        ("gpu", {"length": 1023}, "chunked", "1023 tokens a row: it takes even numbers"),
        ("gpu", {"length": 1}, "chunked", "1 tokens a row"),
        (
            "gpu",
            {"shape": of_heads(100)},
            "chunked",
            "head_dim=100: it takes multiples of 8 up to 128",
        ),
        ("gpu", {"shape": of_heads(256), "compute_capability": "9.0"}, "cudnn", "the fused kernel"),
        ("gpu", {"shape": of_heads(264), "compute_capability": "10.0"}, "chunked", "8 up to 256"),
        ("gpu", {"shape": of_heads(256), "compute_capability": "8.9"}, "chunked", "8 up to 128"),
        ("gpu", {"compute_capability": "8.0"}, "cudnn", "the fused kernel"),
        ("gpu", {"compute_capability": "7.5"}, "chunked", "compute capability 8.0, this is 7.5"),
        ("gpu", {"compute_capability": "gfx942"}, "chunked", "a GPU of NVIDIA, this is gfx942"),
        ("gpu", {"derivatives": "all"}, "chunked", "derivatives='all'"),
        ("tpu", {"derivatives": "all"}, "chunked", "derivatives='all'"),
    ],
)
def test_the_choice_follows_platform_and_shapes(platform, changes, name, reason):
    choice = choose_backend("auto", platform=platform, **(SHAPES | changes))
    assert choice.name == name and reason in choice.reason


@pytest.mark.parametrize("requested", ["reference", "chunked"])
def test_what_runs_everywhere_is_taken_as_asked(requested):
    for platform in ("cpu", "tpu", "gpu"):
        assert choose_backend(requested, platform=platform, **SHAPES).name == requested


@pytest.mark.parametrize(
    ("requested", "platform", "changes", "reasons"),
    [
        ("splash", "cpu", {}, ["it needs platform tpu, this is cpu"]),
        ("splash", "tpu", {"layers": ALiBi().layers(), "length": 100}, ["ALiBi", "100 tokens"]),
        ("pallas", "cpu", {"layers": CoPE().layers()}, ["platform tpu, this is cpu", "CoPE"]),
        ("cudnn", "tpu", {"dtype": "float32"}, ["it needs platform gpu", "float32"]),
        ("cudnn", "gpu", {"length": 77, "shape": of_heads(20)}, ["77 tokens a row", "head_dim=20"]),
        ("pallas", "tpu", {"derivatives": "all"}, ["derivatives='all'"]),
    ],
)
def test_a_forced_backend_that_cannot_run_says_every_reason(requested, platform, changes, reasons):
    with pytest.raises(ValueError, match=f"attention='{requested}' cannot run") as caught:
        choose_backend(requested, platform=platform, **(SHAPES | changes))
    assert all(reason in str(caught.value) for reason in reasons)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="attention='flash': expected one of auto, reference"):
        choose_backend("flash", platform="cpu", **SHAPES)


def test_training_knows_its_backend_before_it_compiles():
    setup = experiment({"method": "rope", "mesh": {}})
    assert plan_state(setup, jax.devices()[:1]).attention.name == "chunked"
    forced = dataclasses.replace(setup.model, attention="splash")
    with pytest.raises(ValueError, match=re.escape("attention='splash' cannot run")):
        plan_state(dataclasses.replace(setup, model=forced), jax.devices()[:1])


def test_a_pattern_of_layers_is_chosen_for_as_a_whole():
    """Each layer's bias counts, though the pattern has none by itself."""
    setup = experiment({"method": "rope", "mesh": {}})
    setup = dataclasses.replace(setup, position=ByLayer((RoPE(), ALiBi())))
    forced = dataclasses.replace(setup.model, attention="splash")
    with pytest.raises(ValueError, match="ALiBi adds a bias to the logits"):
        plan_state(dataclasses.replace(setup, model=forced), jax.devices()[:1])


def test_no_backend_leaves_a_bias_out():
    with pytest.raises(
        ValueError, match="attention='splash' cannot run: ALiBi adds a bias to the logits"
    ):
        sharded_attention(
            *[jnp.ones((1, 128, 1, 8))] * 3,
            positions=jnp.arange(128)[None],
            segments=jnp.ones((1, 128), jnp.int32),
            variables={},
            constants={},
            position=Layer(ALiBi()),
            sums=None,
            sinks=None,
            backend="splash",
        )


@pytest.mark.parametrize(
    ("method", "width"),
    [
        (RoPE(), 8),
        (PoPE(), 16),
        (ALiBi(slopes=(0.5, 0.25)), 8),
        (DAPE(ALiBi(slopes=(0.5, 0.25))), 8),
        (SelfExtend(FoPE(64), window=8, group=2), 16),
        (SelfExtend(RoPE(learnable=True), window=8, group=2), 16),
        (ReRoPE(PoPE(), window=8), 32),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PositionEmbedding) else "",
)
def test_the_width_of_queries_is_found_for_the_shape_of_the_model(method, width):
    """Also where arrays have a size for each head, or belong to two versions of a rotation."""
    shape = ModelShape(16, 1, 2, 1, 8)
    assert {query_width(layer, shape) for layer in method.layers()} == {width}


def packed(batch, length, heads, kv_heads, head_dim):
    random = np.random.default_rng(0)
    q = random.normal(size=(batch, length, heads, head_dim)).astype(np.float32)
    k, v = (
        random.normal(size=(batch, length, kv_heads, head_dim)).astype(np.float32) for _ in range(2)
    )
    starts = np.zeros((batch, length), np.int32)
    for row in range(batch):
        starts[row, random.choice(length, 3, replace=False)] = 1
    starts[:, 0] = 1
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    index = np.arange(length, dtype=np.int32)
    begin = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    segments[0, -37:] = 0
    return (q, k, v), (index - begin).astype(np.int32), segments


ON_CPU = {
    "splash": functools.partial(fused.splash_attention, interpret=True),
    "cudnn": functools.partial(fused.cudnn_attention, implementation="xla"),
}


@pytest.mark.fast("splash-limits1-40-True", "cudnn-limits5-40-False")
@pytest.mark.parametrize(
    ("backend", "limits", "width", "sinks"),
    [
        ("splash", {}, 24, False),
        ("splash", {"window": 50}, 40, True),
        pytest.param("splash", {"chunk": 50}, 24, False, marks=pytest.mark.slow),
        pytest.param("splash", {"window": 30, "chunk": 50}, 24, True, marks=pytest.mark.slow),
        ("cudnn", {}, 24, False),
        ("cudnn", {"window": 30, "chunk": 50}, 40, False),
    ],
)
def test_fused_kernels_equal_the_reference_with_gradients(
    monkeypatch, backend, limits, width, sinks
):
    """Several documents a row, padding, grouped heads, a head_dim of no whole lanes."""
    monkeypatch.setitem(fused._KERNELS, backend, ON_CPU[backend])
    (q, k, v), positions, segments = packed(2, 256, 4, 2, 40)
    arrays = [q[..., :width], k[..., :width], v[..., :24]]
    arrays += [np.array([-1.0, 0.5, 2.0, 3.0], np.float32)] if sinks else []
    direction = np.random.default_rng(1).normal(size=(2, 256, 4, 24)).astype(np.float32)

    def both(attention):
        def loss(arrays):
            out = attention(*arrays)
            return jnp.sum(out * direction), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return out, gradient

    def of_kernel(q, k, v, sinks=None):
        places = {"positions": positions, "segments": segments}
        return fused.fused_attention(backend, q, k, v, **places, **limits, sinks=sinks)

    def reference(q, k, v, sinks=None):
        return attend(
            q,
            k,
            v,
            q_positions=positions,
            k_positions=positions,
            q_segments=segments,
            k_segments=segments,
            backend="reference",
            sinks=sinks,
            **limits,
        )

    out, gradient = both(of_kernel)
    expected, expected_gradient = both(reference)
    assert np.abs(expected[0, -37:]).max() == 0 < np.abs(expected[0, :-37]).min()
    np.testing.assert_allclose(out, expected, atol=3e-6)
    for found, right in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(found, right, atol=2e-5)


def test_one_row_of_segments_serves_all_rows():
    arrays, _, segments = packed(2, 128, 2, 2, 16)
    found = fused.splash_attention(*arrays, segments[:1], interpret=True)
    expected = fused.splash_attention(*arrays, np.repeat(segments[:1], 2, axis=0), interpret=True)
    np.testing.assert_array_equal(found, expected)


def test_splash_refuses_a_length_of_no_whole_lanes():
    arrays, _, segments = packed(1, 100, 2, 2, 16)
    with pytest.raises(ValueError, match="100 tokens: splash takes multiples of 128"):
        fused.splash_attention(*arrays, segments)


def test_rotations_are_what_reaches_a_fused_kernel():
    assert not has_hook(RoPE(), "bias") and not has_hook(FoPE(8), "bias")


def test_cudnn_refuses_an_odd_length_before_the_gradient():
    arrays, _, segments = packed(1, 99, 2, 2, 16)
    with pytest.raises(ValueError, match="99 tokens: cudnn takes even numbers"):
        fused.cudnn_attention(*arrays, segments)


@pytest.mark.parametrize(
    ("attention", "length", "message"),
    [("cudnn", 15, "15 tokens a row"), ("splash", 100, "100 tokens a row are no multiple of 128")],
)
def test_a_forced_kernel_that_does_not_fit_a_length_is_named_by_the_model(
    attention, length, message
):
    config = TransformerConfig(
        vocab_size=8,
        d_model=16,
        num_layers=1,
        num_heads=2,
        mlp_dim=8,
        attention=attention,
        dtype="bfloat16",
    )
    model = Transformer(config, RoPE(), rngs=nnx.Rngs(0))
    ones = jnp.ones((1, length), jnp.int32)
    with pytest.raises(ValueError, match=f"attention='{attention}' cannot run: {message}"):
        jax.eval_shape(lambda tokens: model.hidden(tokens, tokens, tokens), ones)


def test_cudnn_refuses_sinks():
    arrays, _, segments = packed(1, 64, 2, 2, 16)
    with pytest.raises(ValueError, match="cudnn takes no attention sinks"):
        fused.cudnn_attention(*arrays, segments, sinks=jnp.zeros(2))


ROWS = {
    "in order": ([0, 1, 2, 0, 1, 2], [1, 1, 1, 2, 2, 2], True),
    "a window that starts within a document": ([7, 8, 9, 0, 1, 2], [1, 1, 1, 2, 2, 2], True),
    "padding at the end": ([0, 1, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0], False),
    "padding at the end, after a document": ([0, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], True),
    "padding at the beginning": ([0, 0, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1], True),
    "padding within a document": ([0, 1, 0, 2, 3, 4], [1, 1, 0, 1, 1, 1], False),
    "backwards": ([5, 4, 3, 2, 1, 0], [1] * 6, False),
    "two tokens swapped": ([0, 1, 3, 2, 4, 5], [1] * 6, False),
    "a document that goes on after another": ([0, 1, 0, 1, 2, 3], [1, 1, 2, 2, 1, 1], False),
}


@pytest.mark.parametrize("name", ROWS)
def test_which_rows_are_stored_as_fused_kernels_take_them(name):
    positions, segments, right = ROWS[name]
    rows = jnp.array([positions]), jnp.array([segments] * 2)
    assert fused.is_stored_in_order(*rows).tolist() == [right] * 2
    # In these rows no position is left out.
    assert fused.is_stored_in_order(*rows, without_gaps=True).tolist() == [right] * 2


def test_a_position_left_out_is_a_gap():
    positions = jnp.array([[0, 1, 2, 0, 1], [0, 1, 3, 0, 1], [0, 1, 2, 0, 2]])
    rows = positions, jnp.array([[1, 1, 1, 2, 2]] * 3)
    assert fused.is_stored_in_order(*rows).tolist() == [True] * 3
    assert fused.is_stored_in_order(*rows, without_gaps=True).tolist() == [True, False, False]


FULL = Layer(RoPE())


def test_tokens_stored_in_another_order_are_nan_and_not_another_number(monkeypatch):
    """The kernel sees the index of a token; the reference its position, whatever the order."""
    monkeypatch.setitem(fused._KERNELS, "cudnn", ON_CPU["cudnn"])
    arrays, positions, segments = packed(2, 64, 2, 2, 8)
    order = np.arange(64)
    order[[3, 4]] = 4, 3

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def attended(backend, order, layer=FULL, stretch=1):
        q, k, v, at, of = (jnp.asarray(x)[:, order] for x in (*arrays, positions, segments))
        return sharded_attention(
            q,
            k,
            v,
            positions=at * stretch,
            segments=of,
            variables={},
            constants={},
            position=layer,
            sums=None,
            sinks=None,
            backend=backend,
        )

    stored = attended("reference", np.arange(64))
    np.testing.assert_allclose(attended("cudnn", np.arange(64)), stored, atol=3e-6)
    np.testing.assert_allclose(attended("reference", order), stored[:, order], atol=3e-6)
    assert np.isnan(attended("cudnn", order)).all()
    # A window by index has more keys than one by position, where positions are left out.
    for limits, is_nan in (({"window": 8}, True), ({"chunk": 8}, False)):
        layer = Layer(RoPE(), **limits)
        expected = attended("reference", np.arange(64), layer, 2)
        assert jnp.abs(expected - stored).max() > 0.1
        expected = expected * (np.nan if is_nan else 1)
        found = attended("cudnn", np.arange(64), layer, 2)
        np.testing.assert_allclose(found, expected, atol=3e-6)
