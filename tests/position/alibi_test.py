"""ALiBi's slopes for any number of heads."""

from pathlib import Path

import numpy as np
import pytest

from fope_jax.position import alibi_slopes

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "peers_rope.npz")
HEADS = sorted(int(key.rpartition("_")[2]) for key in GOLDENS.files if key.startswith("alibi/"))


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_are_those_of_bloom(heads):
    np.testing.assert_allclose(alibi_slopes(heads), GOLDENS[f"alibi/slopes_{heads}"], rtol=1e-6)


def test_slopes_of_a_head_count_that_is_no_power_of_two():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    np.testing.assert_allclose(alibi_slopes(6), expected, rtol=1e-6)
    assert len({*alibi_slopes(12).tolist()}) == 12
