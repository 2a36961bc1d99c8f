import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fope_jax.model.finite import count_non_finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e5m2"])
@pytest.mark.parametrize("library", [np, jnp])
def test_counts_every_value_that_is_not_finite(library, dtype, bad):
    array = np.zeros((3, 4), np.float32)
    array[1, 2] = array[2, 0] = bad
    kind = getattr(ml_dtypes, dtype) if hasattr(ml_dtypes, dtype) else dtype
    tree = {
        "layers": {"attention": library.asarray(array.astype(kind))},
        "steps": library.asarray(array, "float32") * 0 == 0,
        "norm": library.ones(3, kind),
        "ids": library.arange(4),
    }
    assert count_non_finite(tree) == {"layers.attention": 2}
