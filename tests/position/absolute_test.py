"""Position vectors beside the embeddings that they are added to, and the formula itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import Learned, ModelShape, Sinusoidal, sinusoidal_table

D = 256
POSITIONS = jnp.arange(64, dtype=jnp.int32)[None]


def test_the_formula():
    """One value after the other, in float64 with math alone."""
    table = np.asarray(sinusoidal_table(jnp.array([[0, 1, 7, 900]]), 6, theta=100.0))
    for row, position in zip(table[0], (0, 1, 7, 900), strict=True):
        for m in range(3):
            phase = position * 100.0 ** (-2 * m / 6)
            np.testing.assert_allclose(row[2 * m], math.sin(phase), atol=1e-4)
            np.testing.assert_allclose(row[2 * m + 1], math.cos(phase), atol=1e-4)


def vectors(method):
    """What the method adds to embeddings ``[T, D]``."""
    shape = ModelShape(D, 1, 2, 2, 8)
    variables = method.init(jax.random.key(0), shape).model_params
    return np.asarray(method.embed(variables, jnp.zeros((1, 64, D)), POSITIONS)[0], np.float64)


@pytest.mark.parametrize(
    ("method", "std", "ratio"),
    [
        # Sinusoids have mean square 1/2; embeddings there have 1 (tensor2tensor).
        (Sinusoidal(), 0.02, math.sqrt(1 / 2)),
        (Sinusoidal(amplitude=1.0), 1.0, math.sqrt(1 / 2)),
        (Sinusoidal(amplitude=0.06), 0.06, math.sqrt(1 / 2)),
        # Rows of one matrix with the tokens' in the code of GPT-1.
        (Learned(table_length=64), 0.02, 1.0),
    ],
)
def test_positions_are_as_large_beside_embeddings_as_in_their_source(method, std, ratio):
    """Root mean square of what is added over the standard deviation of the embeddings."""
    added = vectors(method)
    np.testing.assert_allclose(np.sqrt(np.mean(added**2)) / std, ratio, rtol=0.02)
    tokens = std * np.random.default_rng(0).normal(size=(2, D))
    one, other = tokens[:, None] + added
    cosine = np.sum(one * other, -1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    # Two tokens at one position share the position alone: r^2 / (1 + r^2), within 4 / sqrt(D).
    np.testing.assert_allclose(cosine.mean(), ratio**2 / (1 + ratio**2), atol=0.2)


def test_an_amplitude_is_a_number():
    with pytest.raises(ValueError, match="amplitude=nan: .* must be finite"):
        Sinusoidal(amplitude=math.nan)
