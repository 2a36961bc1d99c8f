"""The table of methods, fingerprints, ALiBi's slopes, and the weight of an import."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from fope_jax.position import (
    METHODS,
    ALiBi,
    FoPE,
    Learned,
    ModelShape,
    RoPE,
    alibi_slopes,
    angles,
    clip_floor,
    fingerprint,
    fourier_tables,
    inverse_frequencies,
    make,
    name_of,
    position_interpolation,
    yarn,
)
from fope_jax.position.base import PositionEmbedding

SHAPE = ModelShape(d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_frozen_documented_and_made_by_name(name):
    required = {"fope": {"training_length": 64}, "learned": {"table_length": 64}}
    method = make(name, **required.get(name, {}))
    assert type(method) is METHODS[name] and name_of(method) == name
    described_by = PositionEmbedding if name == "nope" else type(method)
    assert "Reference:" in described_by.__doc__
    for knob in dataclasses.fields(method):
        assert f"{knob.name}:" in type(method).__doc__, f"{name} does not document {knob.name}"
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.theta = 1.0


def test_presets():
    assert make("fope", preset="official", training_length=64) == FoPE(64)
    text = make("fope", preset="equations", training_length=64, sigma=0.6)
    assert (text.sigma, text.sigma_convention, text.zero_sine) == (0.6, "normal", 0.0)


def test_a_class_of_the_users_own_is_named_after_itself():
    class Mine(PositionEmbedding):
        pass

    assert name_of(Mine()) == "Mine"


def print_of(method, seed=0):
    return fingerprint(method, SHAPE, method.init(jax.random.key(seed), SHAPE))


def test_fingerprint_tells_effective_numbers_apart():
    methods = [
        RoPE(),
        RoPE(theta=10_001.0),
        RoPE(interleaved=True),
        ALiBi(),
        ALiBi(slopes=(0.1, 0.2, 0.3, 0.4)),
        FoPE(64),
        FoPE(65),
        FoPE(64, zero_sine=0.0),
        Learned(64),
    ]
    hashes = {print_of(method).hash for method in methods} | {print_of(FoPE(64), seed=1).hash}
    assert len(hashes) == len(methods) + 1
    assert print_of(FoPE(64)) == print_of(FoPE(np.int64(64)))
    assert "constants" in print_of(FoPE(64)).summary


def test_fingerprint_is_stable_over_processes():
    code = (
        "import jax; from fope_jax.position import *;"
        f"s = ModelShape(*{tuple(SHAPE)}); m = FoPE(64);"
        "print(fingerprint(m, s, m.init(jax.random.key(0), s)).hash)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == print_of(FoPE(64)).hash


def test_lists_do_as_well_as_arrays():
    np.testing.assert_array_equal(angles([[3]], [0.5, 0.25]), [[[1.5, 0.75]]])
    np.testing.assert_array_equal(clip_floor([1.0, 0.01], 64), [1.0, 0.0])
    np.testing.assert_array_equal(position_interpolation([1.0], 2.0), [0.5])
    assert hash(ALiBi(slopes=[0.5, 0.25])) == hash(ALiBi(slopes=(0.5, 0.25)))
    cos, _ = fourier_tables(range(5), [0.5], [[1.0]], [[1.0]], head_dim=4)
    np.testing.assert_allclose(cos[:, 0, 0], np.cos(0.5 * np.arange(5)), atol=1e-6)


def test_slopes_of_a_head_count_that_is_no_power_of_two():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    np.testing.assert_allclose(alibi_slopes(6), expected, rtol=1e-6)
    assert len({*alibi_slopes(12).tolist()}) == 12


def test_yarn_ramps_without_width_and_beyond_the_grid():
    """Where both ends of the ramp fall on one index: a step there, no division by zero."""
    grid = RoPE().frequencies(16)
    step = yarn(grid, 4.0, 6, head_dim=16)
    np.testing.assert_allclose(step, np.r_[grid[0], grid[1:] / 4], rtol=1e-12)
    one = yarn(grid, 4.0, 1, head_dim=16)  # even the fastest pair turns less than beta_slow times
    np.testing.assert_allclose(one, grid / 4, rtol=1e-12)
    fast = inverse_frequencies(16, 10.0)
    np.testing.assert_array_equal(yarn(fast, 4.0, 65_536, head_dim=16, theta=10.0), fast)


def test_importing_position_is_light():
    """jax and numpy only, and under a second beyond jax itself."""
    code = (
        "import sys, time, jax, numpy; before = set(sys.modules); start = time.perf_counter();"
        "import fope_jax.position; seconds = time.perf_counter() - start;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "heavy = new & {'flax', 'optax', 'orbax', 'tensorflow', 'seqio', 'chex', 'ml_collections'};"
        "assert not heavy, heavy; assert seconds < 1, seconds"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
