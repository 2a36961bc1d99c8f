import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.model import fused
from fope_jax.model.attention import attend
from fope_jax.model.backends import choose_backend
from fope_jax.model.context import attend_on_mesh
from fope_jax.position import ALiBi, ByLayer, FoPE, RoPE
from fope_jax.position.contextual import CoPE
from fope_jax.train.state import plan_state
from tests.train.mesh_runs import experiment

SHAPES = {"methods": [FoPE(512)], "length": 1024, "head_dim": 64, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("platform", "changes", "name", "reason"),
    [
        ("cpu", {}, "chunked", "platform cpu has no fused kernel"),
        ("tpu", {}, "splash", "the fused kernel of platform tpu"),
        ("gpu", {}, "cudnn", "the fused kernel of platform gpu"),
        ("tpu", {"methods": [ALiBi()]}, "pallas", "splash cannot run: ALiBi adds a bias"),
        ("tpu", {"methods": [RoPE(), ALiBi()]}, "pallas", "ALiBi adds a bias"),
        ("tpu", {"methods": [RoPE(), CoPE()]}, "chunked", "CoPE has no form of its bias for one"),
        ("tpu", {"length": 1000}, "chunked", "1000 tokens a row are no multiple of 128"),
        ("tpu", {"context": 4}, "pallas", "mesh.context=4"),
        ("tpu", {"context": 16}, "chunked", "no multiple of 128 on each of mesh.context=16"),
        ("gpu", {"dtype": "float32"}, "chunked", "bfloat16 or float16"),
        ("gpu", {"head_dim": 256}, "chunked", "head_dim=256"),
        ("gpu", {"length": 65536}, "chunked", "quadratic"),
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
        ("splash", "tpu", {"methods": [ALiBi()], "length": 100}, ["ALiBi", "100 tokens"]),
        ("pallas", "cpu", {"methods": [CoPE()]}, ["platform tpu, this is cpu", "CoPE"]),
        ("cudnn", "tpu", {"dtype": "float32"}, ["it needs platform gpu", "float32"]),
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
    with pytest.raises(ValueError, match="attention='splash' cannot add this method's bias"):
        attend_on_mesh(
            *[jnp.ones((1, 128, 1, 8))] * 3, positions=jnp.arange(128)[None],
            segments=jnp.ones((1, 128), jnp.int32), variables={}, constants={},
            axes_of=ALiBi().variable_axes, head_bias=ALiBi().head_bias, bias_fn=ALiBi().bias,
            backend="splash",
        )  # fmt: skip


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


@pytest.mark.parametrize(
    "kernel",
    [
        lambda *x: fused.splash(*x, interpret=True),
        lambda *x: fused.cudnn(*x, implementation="xla"),
    ],
    ids=["splash", "cudnn"],
)
def test_fused_kernels_equal_the_reference_with_gradients(kernel):
    """Several documents a row, padding, grouped heads, a head_dim of no whole lanes."""
    arrays, positions, segments = packed(2, 384, 4, 2, 24)
    direction = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)

    def both(attention):
        def loss(q, k, v):
            out = attention(q, k, v)
            return jnp.sum(out * direction), out

        (_, out), gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        return out, gradient

    def reference(q, k, v):
        return attend(
            q, k, v, q_positions=positions, k_positions=positions,
            q_segments=segments, k_segments=segments, backend="reference",
        )  # fmt: skip

    out, gradient = both(lambda q, k, v: kernel(q, k, v, segments))
    expected, expected_gradient = both(reference)
    assert np.abs(expected[0, -37:]).max() == 0 < np.abs(expected[0, :-37]).min()
    np.testing.assert_allclose(out, expected, atol=3e-6)
    for found, right in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(found, right, atol=2e-5)


def test_one_row_of_segments_serves_all_rows():
    arrays, _, segments = packed(2, 128, 2, 2, 16)
    found = fused.splash(*arrays, segments[:1], interpret=True)
    expected = fused.splash(*arrays, np.repeat(segments[:1], 2, axis=0), interpret=True)
    np.testing.assert_array_equal(found, expected)


def test_splash_refuses_a_length_of_no_whole_lanes():
    arrays, _, segments = packed(1, 100, 2, 2, 16)
    with pytest.raises(ValueError, match="100 tokens: splash takes multiples of 128"):
        fused.splash(*arrays, segments)


def test_rotations_are_what_reaches_a_fused_kernel():
    assert not RoPE().has_bias and not FoPE(8).has_bias
