"""Queries of a row are exchanged so that every device has as much attention to compute.

That the results are those of one device, for every method: tests/train/mesh_test.py.
"""

from functools import partial

import jax
import numpy as np
import pytest

from fope_jax.model.context_parallel import (
    from_balanced,
    pieces_of,
    shares_work_by_exchange,
    to_balanced,
)
from fope_jax.position import ALiBi, RoPE
from fope_jax.position.base import Layer


def on_devices(function, shards):
    """On devices that are rows of an array; ``vmap`` has the same collectives."""
    return jax.vmap(partial(function, shards=shards), axis_name="context")


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_a_device_gets_two_pieces_and_gives_them_back(shards):
    piece, batch = 3, 2
    row = np.arange(2 * shards * piece)
    x = np.stack([row, row + 1000]).reshape(batch, shards, 2 * piece, 1).swapaxes(0, 1)
    moved = on_devices(to_balanced, shards)(x)
    for device in range(shards):
        expected = [row[n * piece : (n + 1) * piece] for n in pieces_of(device, shards)]
        np.testing.assert_array_equal(moved[device, 0, :, 0], np.concatenate(expected))
    np.testing.assert_array_equal(on_devices(from_balanced, shards)(moved), x)


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_every_device_has_as_many_pairs_of_a_query_and_a_key_that_it_sees(shards):
    keys_seen = 1 + np.arange(2 * shards * 5).reshape(shards, 1, 10)
    before, after = keys_seen.sum((1, 2)), on_devices(to_balanced, shards)(keys_seen).sum((1, 2))
    assert len(set(after.tolist())) == 1 and after.sum() == before.sum()
    assert before[-1] / after[-1] == pytest.approx(2 - 1 / shards, rel=0.02)


def test_the_gradient_goes_back_where_the_query_came_from():
    x = np.random.default_rng(0).normal(size=(4, 2, 6, 1)).astype(np.float32)
    weights = np.arange(x.size, dtype=np.float32).reshape(x.shape)

    def weighted(x):
        return (on_devices(from_balanced, 4)(on_devices(to_balanced, 4)(x) ** 2) * weights).sum()

    np.testing.assert_allclose(jax.grad(weighted)(x), 2 * x * weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "length", "shards", "backend", "exchanged"),
    [
        (Layer(RoPE()), 512, 4, "pallas", True),
        (Layer(ALiBi()), 256, 2, "pallas", True),
        (Layer(RoPE()), 384, 4, "pallas", False),  # pieces of one and a half tiles
        (Layer(RoPE()), 384, 4, "chunked", True),
        (Layer(RoPE()), 7, 4, "chunked", False),
        (Layer(RoPE()), 512, 1, "pallas", False),
        (Layer(RoPE(), window=64), 512, 4, "pallas", False),
        (Layer(RoPE(), chunk=64), 512, 4, "chunked", False),
    ],
)
def test_when_queries_are_exchanged(layer, length, shards, backend, exchanged):
    assert shares_work_by_exchange(layer, length, shards, backend) is exchanged
