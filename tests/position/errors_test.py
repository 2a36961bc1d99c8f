"""Bad input: each message names the field, its value and what is accepted."""

import dataclasses
import math
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.gallery.examples import examples
from fope_jax.position import (
    METHODS,
    SCALINGS,
    AdjustedBase,
    ALiBi,
    ByLayer,
    ByShare,
    ClipFloor,
    DynamicNTK,
    FoPE,
    Learned,
    Llama3,
    LocalChunks,
    LogitScaling,
    LongRoPE,
    ModelShape,
    NoPE,
    NTKAware,
    PoPE,
    PositionInterpolation,
    PRoPE,
    Proportional,
    ReRoPE,
    RoPE,
    RotaryFrequencies,
    SelfExtend,
    Sinusoidal,
    SlidingWindow,
    SnapToCycles,
    XPos,
    YaRN,
    alibi_bias,
    alibi_slopes,
    angles,
    clip_floor,
    fourier_coefficients,
    fourier_tables,
    from_spec,
    inverse_frequencies,
    make,
    make_scaling,
    rotate,
    scaled_frequencies,
    sinusoidal_table,
)
from fope_jax.position.scaling import Scaling, apply_scaling


def shape(**changes):
    base = dict(d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
    return ModelShape(**(base | changes))


class OfOnesOwn(RoPE):
    def frequencies(self, head_dim):
        return np.linspace(1.0, 0.1, head_dim // 2)


class Broken(Scaling):
    def __call__(self, rotary, length=None):
        return rotary._replace(inv_freq=rotary.inv_freq * np.nan)


GRID = inverse_frequencies(16)
ERRORS = {
    "a text for a number": (lambda: RoPE(theta="10000"), "theta='10000': .*a number"),
    "a switch for a number": (lambda: RoPE(theta=True), "theta=True: .*a number"),
    "a text for a spread": (lambda: FoPE(64, sigma="0.3"), "sigma='0.3': .*a number"),
    "a text for a sine": (lambda: FoPE(64, zero_sine="1"), "zero_sine='1': .*a number"),
    "a text for a factor": (lambda: YaRN("4", 64), "factor='4': .*a number"),
    "a text for a share": (
        lambda: RoPE(partial_rotary_factor="0.5"),
        "partial_rotary_factor='0.5': the share of dimensions that rotate, a number",
    ),
    "a text for a share of polar pairs": (
        lambda: PoPE(partial_rotary_factor="1"),
        "partial_rotary_factor='1': the share of dimensions that are polar, a number",
    ),
    "none for a base": (lambda: inverse_frequencies(8, None), "theta=None: .*a number"),
    "odd head_dim": (lambda: inverse_frequencies(7), "head_dim=7.*even"),
    "odd head_dim of a model": (lambda: RoPE().check(shape(head_dim=15)), "head_dim=15.*even"),
    "odd head_dim of FoPE": (lambda: FoPE(64).check(shape(head_dim=15)), "head_dim=15.*even"),
    "theta": (lambda: inverse_frequencies(8, theta=0.0), "theta=0.0.*above 0"),
    "theta of RoPE": (lambda: RoPE(theta=-1.0), "theta=-1.0.*above 0"),
    "theta of FoPE": (lambda: FoPE(64, theta=-1.0), "theta=-1.0.*above 0"),
    "theta of Sinusoidal": (lambda: Sinusoidal(theta=0), "theta=0.*above 0"),
    "unknown method": (lambda: make("rop"), "unknown position embedding 'rop'.*mean 'rope'"),
    "a scaling for a method": (
        lambda: make("yarn"),
        r"'yarn' is a scaling .* 'rope', .*: \[\{'scaling': 'yarn', 'factor': .., 'original_l",
    ),
    "a scaling for a method, as Hugging Face calls it": (
        lambda: make("linear"),
        r"'linear' is a scaling .*: \[\{'scaling': 'position_interpolation', 'factor': ..\}\]",
    ),
    "a method as others call it": (lambda: make("rotary"), "'rotary'; did you mean 'rope'"),
    "a scaling as others call it": (lambda: make_scaling("dynamic"), "did you mean 'dynamic_ntk'"),
    "no method inside": (
        lambda: make("rerope", window=8),
        r"rerope needs the knob 'inner', such as \{'method': 'rope'\}",
    ),
    "a class for a name": (lambda: make(RoPE), "method = <class .*RoPE'>; accepted: a name"),
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
    "training length": (lambda: FoPE(0), "training_length=0.*1 or more"),
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
        "num_frequencies=0: .*1 or more",
    ),
    "shared and learnable": (
        lambda: FoPE(64, learnable=True, share_layers=True),
        "learnable=True, share_layers=True.*choose one",
    ),
    "ALiBi shapes": (
        lambda: alibi_bias(np.arange(3), np.arange(3)[None], np.ones(2)),
        r"q_positions \(3,\).*expected \[B, T\]",
    ),
    "ALiBi slopes": (
        lambda: alibi_bias(np.arange(3)[None], np.arange(3)[None], np.ones((2, 1))),
        r"slopes \(2, 1\).*expected \[N\]",
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
    "outputs": (
        lambda: FoPE(64, outputs="half"),
        "outputs='half'.*'official', 'surviving', 'quarter'",
    ),
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
    "one slope": (
        lambda: ALiBi(slopes=0.5),
        "slopes=0.5: expected a tuple of numbers, one for each query head",
    ),
    "an array as a number": (lambda: RoPE(theta=np.ones(2)), r"theta=array.*a number"),
    "an array as a choice": (lambda: FoPE(64, heads=np.ones(2)), r"heads=array.*expected one of"),
    "one method": (lambda: ByLayer(RoPE()), r"methods=RoPE\(.*expected a tuple of methods"),
    "one slope as an array": (
        lambda: ALiBi(slopes=np.array(0.5)),
        r"slopes=array\(0.5\): expected",
    ),
    "one share": (lambda: ByShare((RoPE(),), 1.0), "shares=1.0: expected a tuple of numbers"),
    "a text as a share": (
        lambda: ByShare((RoPE(),), ("1",)),
        r"shares\[0\]='1': a share of head_dim, a number",
    ),
    "one factor": (
        lambda: LongRoPE(2.0, (1.0,), 64, 2.0),
        "short_factor=2.0: expected a tuple of factors",
    ),
    "no scalings": (lambda: RoPE(scaling=None), "scaling=None: expected a tuple of scalings"),
    "slopes": (lambda: ALiBi(slopes=(1.0,)).check(shape()), "slopes has 1 entries.*4 heads"),
    "count": (lambda: fourier_coefficients(jax.random.key(0), 2, 0, 2, 0.3), "num_frequencies=0"),
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
    "PI factor": (lambda: PositionInterpolation(0.5), "factor=0.5.*1 or more"),
    "NTK factor": (lambda: NTKAware(0.9), "factor=0.9.*1 or more"),
    "NTK of one pair": (
        lambda: RoPE(scaling=(NTKAware(2.0),)).check(shape(head_dim=2)),
        "head_dim=2.*at least 4",
    ),
    "dynamic NTK factor": (lambda: DynamicNTK(float("inf"), 64), "factor=inf.*1 or more"),
    "dynamic NTK original length": (lambda: DynamicNTK(2.0, 0), "original_length=0.*1 or more"),
    "dynamic NTK length": (lambda: DynamicNTK(2.0, 8, length=0), "length=0.*1 or more"),
    "adjusted base": (lambda: AdjustedBase(0.0), "theta=0.0.*above 0"),
    "YaRN factor": (lambda: YaRN(0.5, 64), "factor=0.5.*1 or more"),
    "YaRN length": (lambda: YaRN(2.0, 0), "original_length=0.*1 or more"),
    "YaRN betas": (lambda: YaRN(2.0, 64, beta_fast=0.5), "beta_fast=0.5, beta_slow=1.0"),
    "YaRN attention factor": (
        lambda: YaRN(2.0, 64, attention_factor=0.0),
        "attention_factor=0.0.*above 0",
    ),
    "YaRN mscale": (lambda: YaRN(2.0, 64, mscale=1.0), "mscale_all_dim=None.*both or none"),
    "YaRN mscale value": (
        lambda: YaRN(2.0, 64, mscale=-1.0, mscale_all_dim=1.0),
        "mscale=-1.0.*above 0",
    ),
    "YaRN twice the factor": (
        lambda: YaRN(2.0, 64, attention_factor=1.0, mscale=1.0, mscale_all_dim=1.0),
        "attention_factor=1.0, mscale=1.0.*give one",
    ),
    "YaRN base": (
        lambda: RoPE(theta=1.0, scaling=(YaRN(2.0, 64),)).check(shape()),
        "theta=1.0.*above 1",
    ),
    "Llama 3 factor": (lambda: Llama3(0.5, 64), "factor=0.5.*1 or more"),
    "Llama 3 length": (lambda: Llama3(2.0, -1), "original_length=-1"),
    "Llama 3 low": (lambda: Llama3(2.0, 64, low_freq_factor=0.0), "low_freq_factor=0.0.*above 0"),
    "Llama 3 order": (
        lambda: Llama3(2.0, 64, low_freq_factor=5.0),
        "low_freq_factor=5.0, high_freq_factor=4.0",
    ),
    "LongRoPE factors": (
        lambda: LongRoPE((1.0, 0.0), (1.0, 2.0), 64, 2.0),
        r"short_factor\[1\]=0.0.*above 0",
    ),
    "LongRoPE count": (
        lambda: RoPE(scaling=(LongRoPE((1.0,) * 8, (1.0,) * 7, 64, 2.0),)).check(shape()),
        "long_factor has 7 entries: 8 frequencies",
    ),
    "LongRoPE original length": (lambda: LongRoPE((1.0,), (1.0,), 1, 2.0), "original_length=1"),
    "LongRoPE length": (lambda: LongRoPE((1.0,), (1.0,), 8, 2.0, length=0), "length=0"),
    "LongRoPE attention": (
        lambda: LongRoPE((1.0,), (1.0,), 8, 2.0, attention_factor=-1.0),
        "attention_factor=-1.0",
    ),
    "LongRoPE factor": (lambda: LongRoPE((1.0,), (1.0,), 8, 0.5), "factor=0.5"),
    "proportional share": (lambda: Proportional(0.0), "share=0.0.*above 0"),
    "proportional factor": (lambda: Proportional(0.5, 0.5), "factor=0.5"),
    "p-RoPE share of text": (lambda: PRoPE("0.5"), "share='0.5': .*a number"),
    "p-RoPE share": (lambda: PRoPE(1.5), "share=1.5.*above 0, to 1"),
    "p-RoPE keeps none": (
        lambda: RoPE(scaling=(PRoPE(0.1),)).check(shape()),
        "share=0.1: of 8 frequencies none is kept; 0.125 or more",
    ),
    "clip length": (lambda: ClipFloor(0), "training_length=0.*1 or more"),
    "clip ratio": (lambda: ClipFloor(8, ratio=-1.0), "ratio=-1.0.*above 0"),
    "snap length": (lambda: SnapToCycles(-3), "training_length=-3.*1 or more"),
    "snap least": (lambda: SnapToCycles(8, least=-1), "least=-1.*0 or more"),
    "negative frequency": (
        lambda: apply_scaling(RotaryFrequencies(np.array([1.0, -0.1]), 1e4), ()),
        r"inv_freq\[1\]=-0.1.*finite and positive",
    ),
    "a frequency that is no number": (
        lambda: apply_scaling(RotaryFrequencies(np.array([np.nan]), 1e4), (PRoPE(0.5),)),
        r"inv_freq\[0\]=nan.*finite and positive",
    ),
    "a scaling that gives no number": (
        lambda: RoPE(scaling=(PRoPE(0.5), Broken())).check(shape()),
        r"Broken gives inv_freq\[0\]=nan.*finite and positive",
    ),
    "a NumPy switch for a number": (lambda: RoPE(theta=np.True_), "theta=.*True.*: .*a number"),
    "a NumPy text for a number": (lambda: RoPE(theta=np.str_("4")), "theta=.*'4'.*: .*a number"),
    "a name in place of what is scaled": (
        lambda: LogitScaling("rope", training_length=512),
        "inner='rope': expected a method such as RoPE",
    ),
    "a leak of frequencies that follow no scaling": (
        lambda: ReRoPE(OfOnesOwn(), window=8, leak=4),
        "leak=4, inner holds OfOnesOwn: only RoPE has angles between whole positions",
    ),
    "Self-Extend's group beyond positions": (
        lambda: SelfExtend(RoPE(), window=8, group=2**31),
        "group=2147483648: .* at most 2147483647",
    ),
    "a window beyond positions": (
        lambda: SlidingWindow(RoPE(), 2**31),
        "window=2147483648: .* at most 2147483647",
    ),
    "a chunk beyond positions": (
        lambda: LocalChunks(RoPE(), 2**40),
        "chunk=1099511627776: .* at most 2147483647",
    ),
    "ReRoPE's queries beyond positions": (
        lambda: ReRoPE(RoPE(), window=2**20, leak=2**20),
        "leak=1048576, window=1048576: .* at most 2147483647",
    ),
    "a slope beyond float32": (
        lambda: ALiBi(slopes=(1.0, -1e39)),
        r"slopes\[1\]=-1e\+39: a slope must be finite",
    ),
    "a base below float32": (lambda: RoPE(theta=1e-40), "theta=1e-40: .*above 0"),
    "a scaling given twice": (
        lambda: RoPE(scaling=(ClipFloor(8), ClipFloor(16))),
        "scaling gives ClipFloor twice",
    ),
    "two that stretch": (
        lambda: RoPE(scaling=(PositionInterpolation(2.0), YaRN(2.0, 8))),
        "PositionInterpolation and YaRN.*keep one",
    ),
    "no tuple": (lambda: RoPE(scaling=NTKAware(2.0)), r"expected a tuple.*write \(NTKAware"),
    "no scaling": (lambda: RoPE(scaling=("yarn",)), r"scaling holds 'yarn': .*\{'scaling': 'ntk'"),
    "the name of a scaling": (lambda: RoPE(scaling="yarn"), "scaling holds 'yarn'"),
    "unknown scaling": (lambda: make_scaling("yarm", factor=2.0), "unknown scaling 'yarm'.*'yarn'"),
    "knob of a scaling": (lambda: make_scaling("ntk", s=2.0), "unknown knob 's' of ntk"),
    "scaling without its knob": (lambda: make_scaling("ntk"), "ntk needs the knob 'factor'"),
    "no specification": (lambda: from_spec({"factor": 2.0}), "expected 'method', or 'scaling'"),
    "partial rotary": (
        lambda: RoPE(partial_rotary_factor=0.0),
        "partial_rotary_factor=0.0.*above 0, to 1",
    ),
    "partial rotary of odd size": (
        lambda: RoPE(partial_rotary_factor=0.3).check(shape()),
        "partial_rotary_factor=0.3: 4.8 of head_dim=16.*even number",
    ),
    "partial rotary of nearly a whole number": (
        lambda: RoPE(partial_rotary_factor=0.999999).check(shape()),
        "partial_rotary_factor=0.999999: 15.999984 of head_dim=16",
    ),
    "polar dimensions of nearly a whole number": (
        lambda: PoPE(partial_rotary_factor=0.999999).check(shape()),
        "partial_rotary_factor=0.999999: 15.999984 of head_dim=16",
    ),
    "shares of nearly whole numbers": (
        lambda: ByShare((RoPE(), NoPE()), (0.5000003, 0.4999997)).check(shape()),
        r"\[8.0000048, 7.9999952\] of head_dim=16",
    ),
    "share of no dimension": (
        lambda: ByShare((NoPE(), RoPE()), (1e-300, 1.0)).check(shape()),
        r"shares=\(1e-300, 1.0\): .* 1 or more",
    ),
    "trained and following": (
        lambda: RoPE(learnable=True, scaling=(DynamicNTK(2.0, 8),)),
        "learnable=True, scaling=DynamicNTK with length=None",
    ),
    "FoPE following": (
        lambda: FoPE(64, scaling=(DynamicNTK(2.0, 8),)),
        "DynamicNTK with length=None: FoPE mixes a fixed set",
    ),
    "FoPE clipping twice": (lambda: FoPE(64, scaling=(ClipFloor(64),)), "FoPE clips by itself"),
    "FoPE order": (lambda: FoPE(64, scaling_order="first"), "scaling_order='first'.*'before_clip'"),
    "floor removes all that a scaling slowed": (
        lambda: FoPE(20, scaling=(PositionInterpolation(4.0),)).check(shape()),
        "training_length=20: no frequency completes 1 periods.*26 tokens or more",
    ),
    "xPos base": (lambda: XPos(scale_base=0.0), "scale_base=0.0.*above 0"),
    "xPos gamma": (lambda: XPos(gamma=-0.4), "gamma=-0.4.*above 0"),
    "xPos theta": (lambda: XPos(theta=0.0), "theta=0.0.*above 0"),
    "xPos odd": (lambda: XPos().check(shape(head_dim=15)), "head_dim=15.*even"),
    "empty pattern": (lambda: ByLayer(()), "methods=\\(\\): at least one"),
    "no method": (lambda: ByLayer(("rope",)), "methods holds 'rope'"),
    "pattern of the wrong length": (
        lambda: ByLayer((RoPE(), NoPE(), NoPE())).check(shape()),
        "methods has 3 entries: num_layers=2 is not a multiple",
    ),
    "pattern drawn for the wrong length": (
        lambda: ByLayer((FoPE(64),) * 4).init(jax.random.key(0), shape()),
        "methods has 4 entries: num_layers=2",
    ),
    "pattern within a pattern": (lambda: ByLayer((ByLayer((RoPE(),)),)), "holds a ByLayer"),
    "absolute by layer": (
        lambda: ByLayer((RoPE(), Sinusoidal())),
        "methods holds Sinusoidal: it changes the token embeddings",
    ),
    "a bad method of a pattern": (
        lambda: ByLayer((NoPE(), FoPE(3))).check(shape()),
        "training_length=3: no frequency",
    ),
    "bias by share": (lambda: ByShare((RoPE(), ALiBi()), (0.5, 0.5)), "methods holds ALiBi"),
    "pattern inside a logit scaling by share": (
        lambda: ByShare((LogitScaling(ByLayer((RoPE(),)), training_length=8), NoPE()), (0.5, 0.5)),
        "methods holds LogitScaling",
    ),
    "pattern by share": (
        lambda: ByShare((ByLayer((RoPE(),)), NoPE()), (0.5, 0.5)),
        "methods holds ByLayer",
    ),
    "shares of the wrong length": (
        lambda: ByShare((RoPE(), NoPE()), (1.0,)),
        "shares has 1 entries: methods has 2",
    ),
    "shares that do not add up": (
        lambda: ByShare((RoPE(), NoPE()), (0.5, 0.6)),
        r"shares=\(0.5, 0.6\).*sum to 1",
    ),
    "negative share": (lambda: ByShare((RoPE(), NoPE()), (1.5, -0.5)), "shares=.*above 0"),
    "share of no whole dimension": (
        lambda: ByShare((RoPE(), NoPE()), (0.3, 0.7)).check(shape()),
        r"\[4.8, 11.2\] of head_dim=16",
    ),
    "share of an odd number": (
        lambda: ByShare((RoPE(), NoPE()), (5 / 16, 11 / 16)).check(shape()),
        "head_dim=5.*even",
    ),
    "form": (lambda: LogitScaling(RoPE(), form="log"), "form='log'.*'log_n', 'yarn'"),
    "log-n without a length": (lambda: LogitScaling(RoPE()), "training_length=None.*needs it"),
    "log-n of a share of a token": (
        lambda: LogitScaling(RoPE(), training_length=2.5),
        "training_length=2.5: the trained length in tokens, a whole number",
    ),
    "Llama 4's step that is no number": (
        lambda: LogitScaling(RoPE(), form="llama4", training_length=True),
        "training_length=True: .*, a whole number",
    ),
    "Llama 4's step beyond positions": (
        lambda: LogitScaling(RoPE(), form="llama4", training_length=2**31),
        "training_length=2147483648: .* at most 2147483647",
    ),
    "log-n of one token": (lambda: LogitScaling(RoPE(), training_length=1), "training_length=1"),
    "log-n with a factor": (
        lambda: LogitScaling(RoPE(), training_length=8, factor=2.0),
        "factor=2.0: form='log_n' does not use it",
    ),
    "temperature without a factor": (
        lambda: LogitScaling(RoPE(), form="yarn"),
        "factor=None: form='yarn' needs it",
    ),
    "temperature's factor": (
        lambda: LogitScaling(RoPE(), form="yarn", factor=0.5),
        "factor=0.5.*1 or more",
    ),
    "scaled twice": (
        lambda: LogitScaling(LogitScaling(RoPE(), training_length=8), training_length=8),
        "logits would be scaled twice",
    ),
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


ONES = (1.0,) * 8
EXAMPLES = {type(method): method for method in reversed(examples(head_dim=16).values())}
EXAMPLES |= {
    type(scaling): scaling
    for scaling in (
        PositionInterpolation(2.0),
        NTKAware(2.0),
        DynamicNTK(2.0, 64, length=128),
        YaRN(2.0, 64, mscale=1.0, mscale_all_dim=0.7),
        Llama3(2.0, 64),
        LongRoPE(ONES, ONES, 64, 2.0, length=128),
        Proportional(0.5, 2.0),
        AdjustedBase(1e5),
        ClipFloor(64),
        SnapToCycles(64),
        PRoPE(0.5),
    )
}


def numbers():
    """The knobs that are numbers, of every method and scaling: instance, name, type in words."""
    for cls in (METHODS | SCALINGS).values():
        for name, kind in typing.get_type_hints(cls).items():
            words = set(re.findall(r"int|float|bool", str(kind)))
            if words & {"int", "float"} and name in {f.name for f in dataclasses.fields(cls)}:
                yield pytest.param(EXAMPLES[cls], name, words, id=f"{cls.__name__}-{name}")


@pytest.mark.parametrize(("method", "name", "words"), list(numbers()))
def test_a_knob_takes_no_number_that_is_none(method, name, words):
    """NaN and infinity, and a share of a token or a truth where something is counted."""
    now = getattr(method, name)
    wrong = [math.nan, math.inf, -math.inf] + ([2.5, True] if "float" not in words else [])
    for value in wrong:
        several = (value, *(now or ())[1:]) if isinstance(now, tuple) or name == "slopes" else value
        with pytest.raises(ValueError, match=rf"{name}\b.*{value}"):
            dataclasses.replace(method, **{name: several})


def test_learned_table_length_is_the_methods_limit():
    assert Learned(8).limits.max_length == 8
    assert RoPE().limits.max_length is None


def test_positions_beyond_the_learned_table_are_never_another_row():
    method = Learned(8)
    table = {"table": jnp.ones((8, 4))}
    for rows in (table, {"table": np.ones((8, 4), np.float32)}):
        out = method.embed(rows, jnp.zeros((1, 3, 4)), jnp.array([[7, 8, -1]]))
        assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1:]).all()


def test_one_scaling_in_place_of_a_chain_is_shown_as_one():
    with pytest.raises(ValueError, match=r"expected a tuple of scalings, write \(YaRN\("):
        scaled_frequencies(64, 10_000.0, YaRN(4.0, 512))
