"""Sandwich: the inner product of sinusoidal embeddings, and NeMo's numbers."""

import numpy as np
import pytest

from fope_jax.position import Sandwich, sandwich_bias, sandwich_ratios

# NVIDIA NeMo's SandwichRelativePositionEmbedding (commit 000b931, torch 2.13.0): 4 heads,
# hidden_size 16, the last query of 300 with keys at these distances.
DISTANCES = [0, 1, 10, 100, 299]
NEMO = [
    [0.0, -0.027568, -1.257310, -2.187502, -2.721569],
    [0.0, -0.013784, -0.628655, -1.093751, -1.360784],
    [0.0, -0.009189, -0.419103, -0.729167, -0.907190],
    [0.0, -0.006892, -0.314327, -0.546875, -0.680392],
]


def test_numbers_of_nemo():
    keys = 299 - np.array([DISTANCES])
    ours = sandwich_bias(np.array([[299]]), keys, sandwich_ratios(4), width=16)
    np.testing.assert_allclose(np.asarray(ours)[0, :, 0], NEMO, atol=2e-6)


@pytest.mark.parametrize("start", [0, 2**20 - 50])
def test_it_is_the_product_of_two_sinusoidal_embeddings(start):
    """Also a million tokens apart: float64's product of the two positions' embeddings."""
    width, ratios = 128, np.array([0.5, 8.0], np.float32)
    frequencies = 10_000.0 ** (-2 * np.arange(1, 65) / width)

    def embedding(positions):
        phase = positions[:, None] * frequencies
        return np.concatenate([np.sin(phase), np.cos(phase)], axis=-1)

    queries, keys = np.arange(start, start + 50), np.arange(0, 50)
    product = embedding(queries) @ embedding(keys).T - width / 2
    ours = sandwich_bias(queries[None], keys[None], ratios, width)
    np.testing.assert_allclose(ours[0], product / ratios[:, None, None], atol=5e-4)


def test_the_bias_follows_the_logarithm_of_distance():
    """W/2 frequencies over a factor of 10,000: one term for each 10,000 ** (2 / W) tokens."""
    distances = np.unique(np.geomspace(8, 2000, 200).astype(int))
    bias = sandwich_bias(distances[None], np.array([[0]]), np.ones(1, np.float32), 128)[0, 0, :, 0]
    slope, _ = np.polyfit(np.log(distances), bias, 1)
    np.testing.assert_allclose(slope, -64 / np.log(10_000), rtol=0.05)
    assert np.corrcoef(np.log(distances), bias)[0, 1] < -0.95


def test_errors():
    for width, message in ((1, "must be 2 or more"), (7, "must be even"), (8.0, "a whole number")):
        with pytest.raises(ValueError, match=message):
            Sandwich(width)
    with pytest.raises(ValueError, match=r"ratios \(\): expected \[N\]"):
        sandwich_bias(np.array([[1]]), np.array([[0]]), np.float32(1), 16)
    with pytest.raises(ValueError, match="num_heads=0: heads must be 1 or more"):
        sandwich_ratios(0)
