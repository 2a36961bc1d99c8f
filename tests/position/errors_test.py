"""Bad input: each message names the field, its value and what is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import (
    ALiBi,
    FoPE,
    Learned,
    ModelShape,
    RoPE,
    Sinusoidal,
    alibi_bias,
    alibi_slopes,
    angles,
    clip_floor,
    fourier_coefficients,
    fourier_tables,
    inverse_frequencies,
    make,
    position_interpolation,
    rotate,
    sinusoidal_table,
    yarn,
)


def shape(**changes):
    base = dict(d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
    return ModelShape(**(base | changes))


GRID = inverse_frequencies(16)
ERRORS = {
    "odd head_dim": (lambda: inverse_frequencies(7), "head_dim=7.*even"),
    "odd head_dim of a model": (lambda: RoPE().check(shape(head_dim=15)), "head_dim=15.*even"),
    "odd head_dim of FoPE": (lambda: FoPE(64).check(shape(head_dim=15)), "head_dim=15.*even"),
    "theta": (lambda: inverse_frequencies(8, theta=0.0), "theta=0.0.*above 0"),
    "theta of RoPE": (lambda: RoPE(theta=-1.0), "theta=-1.0.*above 0"),
    "theta of FoPE": (lambda: FoPE(64, theta=-1.0), "theta=-1.0.*above 0"),
    "theta of Sinusoidal": (lambda: Sinusoidal(theta=0), "theta=0.*above 0"),
    "unknown method": (lambda: make("rop"), "unknown position embedding 'rop'.*mean 'rope'"),
    "unknown knob": (lambda: make("rope", thta=1.0), "unknown knob 'thta' of rope.*mean 'theta'"),
    "unknown preset": (
        lambda: make("fope", preset="oficial", training_length=8),
        "unknown preset 'oficial' of fope.*mean 'official'",
    ),
    "preset of a method that has none": (
        lambda: make("rope", preset="official"),
        r"unknown preset 'official' of rope\. Known: none",
    ),
    "missing knob": (lambda: make("fope"), "fope needs the knob 'training_length'"),
    "training length": (lambda: FoPE(0), "training_length=0.*above 0"),
    "floor ratio": (lambda: clip_floor(GRID, 64, ratio=0.0), "ratio=0.0.*above 0"),
    "floor removes all": (
        lambda: FoPE(6).check(shape()),
        "training_length=6: no frequency completes 1 periods.*7 tokens or more",
    ),
    "sigma": (lambda: FoPE(64, sigma=-0.1), "sigma=-0.1"),
    "sigma of coefficients": (
        lambda: fourier_coefficients(jax.random.key(0), 1, 2, 2, -1.0),
        "sigma=-1.0",
    ),
    "endless sigma": (lambda: FoPE(64, sigma=float("inf")), "sigma=inf"),
    "no frequencies": (
        lambda: FoPE(64, frequencies_from="uniform", num_frequencies=0),
        "num_frequencies=0: at least one",
    ),
    "shared and learnable": (
        lambda: FoPE(64, learnable=True, share_layers=True),
        "learnable=True, share_layers=True.*choose one",
    ),
    "ALiBi shapes": (
        lambda: alibi_bias(np.arange(3), np.arange(3)[None], np.ones(2)),
        r"q_positions \(3,\).*expected \[B, T\]",
    ),
    "a position beyond 32 bits": (
        lambda: angles(np.array([[2**31 + 5]]), GRID),
        "position 2147483653 does not fit 32 bits",
    ),
    "tables of another length": (
        lambda: rotate(jnp.ones((1, 5, 3, 8)), jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4))),
        r"cos \(1, 2, 4\).*x \(1, 5, 3, 8\)",
    ),
    "tables of more heads": (
        lambda: rotate(jnp.ones((1, 5, 1, 8)), jnp.ones((1, 5, 3, 4)), jnp.ones((1, 5, 3, 4))),
        r"cos \(1, 5, 3, 4\).*x \(1, 5, 1, 8\)",
    ),
    "YaRN base": (lambda: yarn(GRID, 2.0, 64, head_dim=16, theta=1.0), "theta=1.0.*above 1"),
    "zero sine": (lambda: FoPE(64, zero_sine=float("nan")), "zero_sine=nan"),
    "sigma convention": (
        lambda: FoPE(64, sigma_convention="kaiming"),
        "sigma_convention='kaiming'.*'xavier', 'normal'",
    ),
    "convention": (
        lambda: fourier_coefficients(jax.random.key(0), 1, 2, 2, 0.3, convention="x"),
        "convention='x'.*'xavier', 'normal'",
    ),
    "heads": (lambda: FoPE(64, heads="all"), "heads='all'.*'query', 'key_value', 'shared'"),
    "outputs": (lambda: FoPE(64, outputs="half"), "outputs='half'.*'quarter', 'surviving'"),
    "identity": (lambda: FoPE(64, identity="eye"), "identity='eye'.*'step', 'own'"),
    "frequencies": (lambda: FoPE(64, frequencies_from="fft"), "frequencies_from='fft'"),
    "number without a source": (
        lambda: FoPE(64, num_frequencies=32),
        "num_frequencies=32.*'grid' or 'uniform'",
    ),
    "fewer than RoPE's": (
        lambda: FoPE.equations(64, num_frequencies=2).check(shape()),
        "num_frequencies=2: RoPE alone has 3",
    ),
    "coarser than RoPE's": (
        lambda: FoPE(64, frequencies_from="grid", num_frequencies=4).check(shape()),
        "num_frequencies=4.*at least 8",
    ),
    "own identity without a frequency": (
        lambda: FoPE(64, frequencies_from="grid", num_frequencies=64, identity="own").check(
            shape()
        ),
        "identity='own'.*makes 4 pairs, RoPE has 3",
    ),
    "nothing left": (lambda: FoPE(64, clip=False, series=False), "use RoPE"),
    "head too small": (lambda: FoPE(64).check(shape(head_dim=2)), "head_dim=2.*4 or more"),
    "no heads": (lambda: alibi_slopes(0), "num_heads=0"),
    "slopes": (lambda: ALiBi(slopes=(1.0,)).check(shape()), "slopes has 1 entries.*4 heads"),
    "count": (
        lambda: fourier_coefficients(jax.random.key(0), 2, 0, 2, 0.3),
        "num_frequencies=0",
    ),
    "identity shape": (
        lambda: fourier_coefficients(jax.random.key(0), 2, 3, 2, 0.3, identity=np.eye(2)),
        r"identity has shape \(2, 2\).*\(3, 2\)",
    ),
    "coefficients that differ": (
        lambda: tables(np.ones((3, 2)), np.ones((3, 1))),
        r"cos_coef \(3, 2\) and sin_coef \(3, 1\)",
    ),
    "wrong D": (lambda: tables(np.ones((4, 2)), np.ones((4, 2))), "D=4 frequencies: 3 are given"),
    "d beyond the head": (
        lambda: tables(np.ones((3, 5)), np.ones((3, 5))),
        "d=5 pairs: head_dim=8 holds 4",
    ),
    "tables that do not fit": (
        lambda: rotate(jnp.ones((1, 2, 3, 8)), jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3))),
        r"cos \(1, 2, 3\).*x \(1, 2, 3, 8\)",
    ),
    "odd width": (lambda: sinusoidal_table(jnp.zeros((1, 1), jnp.int32), 7), "d_model=7.*even"),
    "odd width of a model": (lambda: Sinusoidal().check(shape(d_model=63)), "d_model=63.*even"),
    "empty table": (lambda: Learned(0), "table_length=0"),
    "negative spread": (lambda: Learned(8, init_std=-1.0), "init_std=-1.0"),
    "sequence beyond a learned table": (
        lambda: Learned(8).embed({}, jnp.zeros((1, 9, 4)), jnp.zeros((1, 9), jnp.int32)),
        "sequence of 9 tokens.*table_length=8",
    ),
    "PI factor": (lambda: position_interpolation(GRID, 0.5), "factor=0.5.*1 or more"),
    "YaRN factor": (lambda: yarn(GRID, 0.5, 64, head_dim=16), "factor=0.5.*1 or more"),
    "YaRN length": (lambda: yarn(GRID, 2.0, 0, head_dim=16), "original_length=0"),
    "YaRN betas": (
        lambda: yarn(GRID, 2.0, 64, head_dim=16, beta_fast=1.0),
        "beta_fast=1.0, beta_slow=1.0",
    ),
    "YaRN grid": (lambda: yarn(GRID[:5], 2.0, 64, head_dim=16), r"shape \(5,\).*\[8\]"),
}


def tables(cos_coef, sin_coef):
    positions = jnp.zeros((1, 1), jnp.int32)
    inv_freq = np.array([1.0, 0.5, 0.1])
    return fourier_tables(positions, inv_freq, cos_coef, sin_coef, head_dim=8)


@pytest.mark.parametrize("name", ERRORS)
def test_message(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_learned_table_length_is_the_methods_limit():
    assert Learned(8).max_length() == 8
    assert RoPE().max_length() is None


def test_positions_beyond_the_learned_table_are_never_another_row():
    method = Learned(8)
    table = {"table": jnp.ones((8, 4))}
    out = method.embed(table, jnp.zeros((1, 3, 4)), jnp.array([[7, 8, -1]]))
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1:]).all()
