import dataclasses

import jax
import jax.numpy as jnp
import pytest

from fope_jax.model.backends import visited_blocks
from fope_jax.model.config import TransformerConfig
from fope_jax.model.context_parallel import sharded_attention
from fope_jax.model.presets import PRESETS
from fope_jax.position import LocalChunks, RoPE
from fope_jax.position.base import Layer
from fope_jax.tpu.flops import model_flops, program_flops, visits_of_queries
from fope_jax.train.state import plan_state, trace_step
from tests.train.mesh_runs import experiment


def of_step(changes, **train):
    case = {"method": "rope", "mesh": {"fsdp": 1}, "model": changes}
    setup = experiment(case)
    setup = dataclasses.replace(setup, train=dataclasses.replace(setup.train, **train))
    length = setup.train.length
    trips = visits_of_queries(length, setup.model.attention_block)
    found = program_flops(trace_step(plan_state(setup, jax.devices()[:1])).jaxpr, trips)
    return found, model_flops(setup.model, setup.position, setup.train.batch_size, length)


@pytest.mark.fast("180m")
@pytest.mark.parametrize("size", ["60m", "180m", "1200m"])
def test_the_papers_sizes_agree_with_the_analytic_count(size):
    """Nothing is run: a traced step of the real model."""
    found, expected = of_step(dict(PRESETS[size]), batch_size=16, length=512)
    assert 1 < found / expected < 1.1


@pytest.mark.slow
def test_scanned_and_unrolled_layers_count_alike():
    scanned, _ = of_step({"num_layers": 6})
    unrolled, _ = of_step({"num_layers": 6, "scan_layers": False})
    shallow, _ = of_step({"num_layers": 2})
    assert scanned == unrolled > 1.5 * shallow


@pytest.mark.slow
def test_what_is_computed_again_counts_again():
    kept, model = of_step({})
    again, same = of_step({"remat": "full"})
    assert same == model
    assert 1.1 < again / kept < 1.4
    # With the products kept, attention alone is computed again.
    dots, _ = of_step({"remat": "dots"})
    assert 1 < dots / kept < 1 + (again / kept - 1) / 2


@pytest.mark.slow
def test_pieces_of_a_batch_add_up():
    whole, _ = of_step({})
    pieces, _ = of_step({}, accumulate=4)
    assert pieces == whole


def test_model_flops_by_hand():
    config = TransformerConfig(
        vocab_size=7, d_model=4, num_layers=3, num_heads=2, num_kv_heads=1, mlp_dim=5
    )
    # Matrices of a layer: query and out 4 x 4, key and value 4 x 2, three of 4 x 5.
    matrices = 3 * (2 * 16 + 2 * 8 + 3 * 20) + 4 * 7
    assert model_flops(config, RoPE(), 2, 8) == 2 * 8 * (6 * matrices + 6 * 3 * 8 * 4)
    # A query sees half of 8 keys, or 2 of a window and 1 the first, or half of a chunk of 4.
    windows = dataclasses.replace(config, windows=(2, None, 8))
    attention = 12 * 4 * ((2 - 2**2 / 16) + 4 + 4)
    assert model_flops(windows, RoPE(), 2, 8) == 2 * 8 * (6 * matrices + attention)
    chunks = model_flops(config, LocalChunks(RoPE(), 4), 2, 8)
    assert chunks == 2 * 8 * (6 * matrices + 12 * 3 * 2 * 4)


def test_a_window_in_the_program_counts_the_blocks_that_it_visits():
    """Chunked attention has 7 products a block: 2 forward, and 5 backward."""
    shapes = {"batch_size": 2, "length": 2048}
    full, _ = of_step({"attention_block": 128}, **shapes)
    halved, _ = of_step({"attention_block": 128, "windows": (256, None)}, **shapes)
    blocks = visited_blocks(16, 128) - visited_blocks(16, 128, 256)
    assert blocks == 16 * 17 / 2 - (1 + 2 + 14 * 3)
    assert full - halved == 7 * 2 * 2 * 4 * blocks * 128**2 * 16  # rows, heads, head_dim


def traced_attention(layer, backend, width=64):
    """The gradient of one layer's attention: 2 rows of 4,096 tokens, 4 heads, 2 of keys."""

    def loss(q, k, v):
        positions = jnp.arange(4096, dtype=jnp.int32)[None]
        out = sharded_attention(
            q,
            k,
            v,
            positions=positions,
            segments=jnp.ones_like(positions),
            variables={},
            constants={},
            position=layer,
            sums=None,
            sinks=None,
            backend=backend,
        )
        return jnp.sum(out)

    arrays = [
        jax.ShapeDtypeStruct((2, 4096, *heads), jnp.float32)
        for heads in ((4, width), (2, width), (2, 64))
    ]
    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays).jaxpr


def count(jaxpr):
    return program_flops(jaxpr, lambda names: pytest.fail("a loop of unknown length"))


@pytest.mark.fast("{'window': 700}")
@pytest.mark.parametrize("limits", [{}, {"window": 700}, {"chunk": 1024}], ids=str)
def test_splash_counts_the_blocks_that_it_computes(limits):
    """9 products a block of 512: 2 forward, 3 for queries, 4 for keys; heads fill 128 lanes."""
    blocks = visited_blocks(8, 512, *limits.values())  # a chunk as a window of its length
    found = count(traced_attention(Layer(RoPE(), **limits), "splash"))
    delta = 2 * 2 * 4 * 4096 * 128  # sum(out * d_out), before the kernels
    assert found == 9 * 2 * 2 * 4 * blocks * 512**2 * 128 + delta


@pytest.mark.parametrize("limits", [{}, {"window": 700}, {"chunk": 1024, "far_from": 99}], ids=str)
def test_the_estimate_of_our_kernel_is_what_its_blocks_do(limits):
    far_from = limits.get("far_from")
    jaxpr = traced_attention(Layer(RoPE(), **limits), "pallas", width=96 if far_from else 48)
    (forward, queries, keys) = [x for x in equations(jaxpr) if x.primitive.name == "pallas_call"]
    blocks = visited_blocks(8, 512, limits.get("window"), limits.get("chunk"))
    for call in (forward, queries, keys):
        assert call.params["cost_estimate"].flops == 2 * 4 * blocks * count(call.params["jaxpr"])
    assert count(jaxpr) == sum(x.params["cost_estimate"].flops for x in (forward, queries, keys))


def equations(jaxpr):
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for leaf in jax.tree.leaves(list(equation.params.values())):
                if hasattr(getattr(leaf, "jaxpr", leaf), "eqns"):
                    yield from equations(leaf)
