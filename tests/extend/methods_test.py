"""Which position embedding a model goes on with, which not and why, and what that changes."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from fope_jax.extend.frequencies import frequency_changes, pair_frequencies, unwrapped
from fope_jax.extend.methods import extend_position, fope_form, is_own, target_classes
from fope_jax.gallery.examples import examples
from fope_jax.position import (
    FIRE,
    METHODS,
    ALiBi,
    ByLayer,
    ClipFloor,
    CoPE,
    DroPE,
    DynamicNTK,
    FoPE,
    Kerple,
    Learned,
    Llama3,
    LocalChunks,
    LogitScaling,
    LongRoPE,
    NoPE,
    NTKAware,
    PositionEmbedding,
    PositionInterpolation,
    PRoPE,
    Proportional,
    RoPE,
    Scaling,
    Sinusoidal,
    SlidingWindow,
    SnapToCycles,
    T5Bias,
    XPos,
    YaRN,
    yarn_temperature,
)
from fope_jax.position.mixing import Wrapper

HEAD_DIM = 64
PI = PositionInterpolation
LEAST = {"zero_sine": 0.0, "outputs": "surviving"}  # FoPE that changes RoPE least
CODE = {"attention_factor": 1.0}  # the released code leaves YaRN's temperature out
SLOW = tuple(1.0 + i / 8 for i in range(HEAD_DIM // 2))


def go_on(parent, target, length=1024, from_length=512, allow_shorter=False, **knobs):
    return extend_position(
        parent,
        target,
        from_length=from_length,
        length=length,
        head_dim=HEAD_DIM,
        knobs=knobs,
        allow_shorter=allow_shorter,
    )


@pytest.mark.parametrize(
    ("parent", "target", "knobs", "expected"),
    [
        (RoPE(), "pi", {}, RoPE(scaling=(PI(2.0),))),
        (RoPE(), "position_interpolation", {}, RoPE(scaling=(PI(2.0),))),
        (RoPE(), "ntk", {}, RoPE(scaling=(NTKAware(2.0),))),
        (RoPE(), "dynamic_ntk", {}, RoPE(scaling=(DynamicNTK(2.0, 512, length=1024),))),
        (RoPE(), "llama3", {}, RoPE(scaling=(Llama3(2.0, 512),))),
        (
            RoPE(),
            "longrope",
            {"long_factor": SLOW},
            RoPE(scaling=(LongRoPE((1.0,) * 32, SLOW, 512, 2.0, length=1024),)),
        ),
        (RoPE(), "clip", {}, RoPE(scaling=(ClipFloor(1024),))),
        (RoPE(), "p_rope", {"share": 0.5}, RoPE(scaling=(PRoPE(0.5),))),
        (RoPE(theta=500.0), "snap_to_cycles", {}, RoPE(theta=500.0, scaling=(SnapToCycles(1024),))),
        # The paper's own: YaRN with a factor of 16 for twice the length.
        (RoPE(), "yarn", {"factor": 16.0}, RoPE(scaling=(YaRN(16.0, 512),))),
        # A knob of the scaling goes there, one of the method to the method.
        (
            RoPE(),
            "yarn",
            {"beta_fast": 8.0, "theta": 99.0},
            RoPE(theta=99.0, scaling=(YaRN(2.0, 512, beta_fast=8.0),)),
        ),
        (RoPE(), "adjusted_base", {"theta": 9e5}, None),
        (RoPE(interleaved=True), "pi", {}, RoPE(interleaved=True, scaling=(PI(2.0),))),
        (RoPE(), "nope", {}, NoPE()),
        (RoPE(), "rope", {}, RoPE()),
        (RoPE(), "same", {}, RoPE()),
        (RoPE(theta=99.0), "fope", {"sigma": 0.5}, FoPE(1024, theta=99.0, sigma=0.5, **LEAST)),
        (RoPE(), "fope", {"zero_sine": 1.0}, FoPE(1024, outputs="surviving")),
        (RoPE(), "fope", {"preset": "official"}, FoPE(1024)),
        (RoPE(), "fope", {"preset": "equations"}, FoPE.equations(1024)),
        (
            RoPE(scaling=(ClipFloor(512), YaRN(2.0, 256))),
            "fope",
            {},
            FoPE(1024, scaling=(YaRN(2.0, 256),), **LEAST),
        ),
        # Positions dropped; the temperature is of the length that was trained on.
        (RoPE(), "drope", {}, DroPE(512)),
        (FoPE(512), "drope", {"coefficient": 0.103}, DroPE(512, 0.103)),
        (DroPE(512), "nope", {}, NoPE()),
        (DroPE(512), "same", {}, DroPE(512)),
        # Wrappers hold any method that they can; "inner" takes one away, others change the inside.
        (RoPE(), "sliding_window", {"window": 64}, SlidingWindow(RoPE(), 64)),
        (ALiBi(), "local_chunks", {"chunk": 64}, LocalChunks(ALiBi(), 64)),
        (RoPE(), "logit_scaling", {}, LogitScaling(RoPE(), training_length=512)),
        (
            RoPE(),
            "logit_scaling",
            {"form": "yarn", "factor": 2.0},
            LogitScaling(RoPE(), form="yarn", factor=2.0),
        ),
        (SlidingWindow(RoPE(), 64), "inner", {}, RoPE()),
        (SlidingWindow(RoPE(), 64), "inner", {"theta": 99.0}, RoPE(theta=99.0)),
        (SlidingWindow(RoPE(), 64), "sliding_window", {"window": 9}, SlidingWindow(RoPE(), 9)),
        (SlidingWindow(RoPE(), 64), "yarn", {}, SlidingWindow(RoPE(scaling=(YaRN(2.0, 512),)), 64)),
        (
            SlidingWindow(FoPE(512), 64),
            "logit_scaling",
            {},
            LogitScaling(SlidingWindow(FoPE(512), 64), training_length=512),
        ),
        (FoPE(512, sigma=0.1), "fope", {}, FoPE(1024, sigma=0.1)),
        (FoPE(512), "same", {}, FoPE(512)),
        (FoPE(512), "nope", {}, NoPE()),
        (FoPE(512), "yarn", {}, FoPE(1024, scaling=(YaRN(2.0, 512, attention_factor=1.0),))),
        (
            FoPE(512),
            "yarn",
            {"scaling_order": "after_clip", "factor": 16.0},
            FoPE(1024, scaling=(YaRN(16.0, 512, **CODE),), scaling_order="after_clip"),
        ),
        (Learned(512), "learned", {}, Learned(1024)),
        (Learned(2048), "same", {}, Learned(2048)),
        # Stretched again: from the length that the unscaled frequencies were trained on.
        (RoPE(scaling=(YaRN(2.0, 256),)), "yarn", {}, RoPE(scaling=(YaRN(4.0, 256),))),
        (RoPE(scaling=(PI(2.0),)), "yarn", {}, RoPE(scaling=(YaRN(4.0, 256),))),
        (
            RoPE(scaling=(ClipFloor(512),)),
            "yarn",
            {},
            RoPE(scaling=(ClipFloor(512), YaRN(2.0, 512))),
        ),
        (RoPE(scaling=(ClipFloor(512),)), "clip", {}, RoPE(scaling=(ClipFloor(1024),))),
        # What no length gives goes on: the ramp, and a temperature left out, kept or stated.
        (
            RoPE(scaling=(YaRN(2.0, 256, 16.0, 2.0, 1.0, truncate=False),)),
            "yarn",
            {},
            RoPE(scaling=(YaRN(4.0, 256, 16.0, 2.0, 1.0, truncate=False),)),
        ),
        (
            RoPE(scaling=(YaRN(2.0, 256, mscale=1.0, mscale_all_dim=0.5),)),
            "yarn",
            {},
            RoPE(scaling=(YaRN(4.0, 256, mscale=1.0, mscale_all_dim=0.5),)),
        ),
        (
            RoPE(scaling=(YaRN(2.0, 256, attention_factor=yarn_temperature(2.0)),)),
            "yarn",
            {},
            RoPE(scaling=(YaRN(4.0, 256),)),
        ),
        (FoPE(512, scaling=(YaRN(2.0, 256),)), "yarn", {}, FoPE(1024, scaling=(YaRN(4.0, 256),))),
        (
            RoPE(scaling=(LongRoPE((2.0,) * 32, SLOW, 256, 2.0, 1.0),)),
            "longrope",
            {"long_factor": SLOW},
            RoPE(scaling=(LongRoPE((2.0,) * 32, SLOW, 256, 4.0, 1.0, length=1024),)),
        ),
        (
            RoPE(scaling=(YaRN(2.0, 256, **CODE),)),
            "yarn",
            {"attention_factor": 1.5},
            RoPE(scaling=(YaRN(4.0, 256, attention_factor=1.5),)),
        ),
        (
            RoPE(scaling=(Proportional(0.25, 2.0),)),
            "proportional",
            {},
            RoPE(scaling=(Proportional(0.25, 4.0),)),
        ),
        (RoPE(scaling=(PRoPE(0.25),)), "p_rope", {}, RoPE(scaling=(PRoPE(0.25),))),
        # Pairs that p-RoPE or a floor keeps still stay so, whatever stretches the others.
        (
            RoPE(scaling=(Proportional(0.5),)),
            "yarn",
            {},
            RoPE(scaling=(PRoPE(0.5), YaRN(2.0, 512))),
        ),
        (
            RoPE(scaling=(YaRN(2.0, 256), ClipFloor(512))),
            "yarn",
            {},
            RoPE(scaling=(YaRN(4.0, 256), ClipFloor(512))),
        ),
        (
            RoPE(scaling=(PI(2.0), ClipFloor(512))),
            "ntk",
            {},
            RoPE(scaling=(NTKAware(4.0), ClipFloor(512))),
        ),
        (
            RoPE(scaling=(ClipFloor(512), YaRN(2.0, 256))),
            "clip",
            {},
            RoPE(scaling=(ClipFloor(1024), YaRN(2.0, 256))),
        ),
        (RoPE(scaling=(ClipFloor(512, 2.0),)), "clip", {}, RoPE(scaling=(ClipFloor(1024, 2.0),))),
        (
            RoPE(scaling=(SnapToCycles(512, 0),)),
            "snap_to_cycles",
            {},
            RoPE(scaling=(SnapToCycles(1024, 0),)),
        ),
        *(
            (method, "same", {}, method)
            for method in examples().values()
            if method.limits.max_length is None
        ),
        *(
            (method, name, {}, method)
            for method, name in (
                (ALiBi(), "alibi"),
                (T5Bias(), "t5"),
                (Kerple(), "kerple"),
                (FIRE(), "fire"),
                (CoPE(), "cope"),
                (XPos(), "xpos"),
                (NoPE(), "nope"),
                (Sinusoidal(), "sinusoidal"),
                (ByLayer((RoPE(), NoPE())), "by_layer"),
                (SlidingWindow(RoPE(), 64), "sliding_window"),
            )
        ),
    ],
)
def test_what_a_model_goes_on_with(parent, target, knobs, expected):
    child = go_on(parent, target, **knobs)
    if expected is None:
        np.testing.assert_allclose(
            pair_frequencies(child, HEAD_DIM).inv_freq, RoPE(9e5).frequencies(HEAD_DIM), rtol=1e-12
        )
    else:
        assert child == expected


ROTATION = "attention was never trained with rotation"


class SlowRoPE(RoPE):
    def frequencies(self, head_dim):
        return super().frequencies(head_dim) / 2


@pytest.mark.parametrize(
    ("parent", "target", "reason"),
    [
        (ALiBi(), "rope", f"alibi to rope: {ROTATION}: a bias ordered its scores; accepted: same"),
        (ALiBi(), "yarn", f"alibi to yarn: {ROTATION}"),
        (T5Bias(), "fope", f"t5 to fope: {ROTATION}"),
        (Kerple(), "alibi", f"kerple to alibi: {ROTATION}: a bias ordered its scores"),
        (NoPE(), "rope", f"nope to rope: {ROTATION}: its queries and keys hold no phase"),
        (CoPE(), "rope", "it counts positions from its scores"),
        (Learned(512), "rope", "positions stand in the token embeddings"),
        (Sinusoidal(), "pi", "positions stand in the token embeddings"),
        (ByLayer((RoPE(), NoPE())), "yarn", "it is made of several methods: extend it as it is"),
        (RoPE(), "alibi", "queries and keys hold phases, and alibi was never part of what it lear"),
        (
            RoPE(),
            "xpos",
            "queries and keys hold phases; accepted: same, nope, drope, rope, fope, position_",
        ),
        (
            RoPE(),
            "alibi",
            "yarn, .*; around it, if it fits, logit_scaling, .*, self_extend, rerope",
        ),
        (RoPE(interleaved=True), "alibi", "accepted: same, nope, drope, rope, position_interpol"),
        (XPos(), "yarn", "queries and keys hold phases; accepted: same, xpos; around it"),
        (FoPE(512), "rope", "its zero-frequency pairs were never trained with rotation"),
        (FoPE(512), "clip", "FoPE clips by itself"),
        (RoPE(interleaved=True), "fope", "interleaved=True, which FoPE does not know"),
        (RoPE(partial_rotary_factor=0.5), "fope", "partial_rotary_factor=0.5, which FoPE"),
        (RoPE(learnable=True), "fope", "learnable=True, which FoPE does not know"),
        (SlowRoPE(), "fope", "SlowRoPE has frequencies of its own, in place of which FoPE would"),
        (ALiBi(), "drope", f"alibi to drope: {ROTATION}: a bias ordered its scores"),
        (DroPE(512), "rope", f"drope to rope: {ROTATION}: its queries and keys hold no phase"),
        (RoPE(), "inner", "rope to inner: nothing stands inside it, as in a sliding window"),
        (SlidingWindow(ALiBi(), 8), "yarn", f"alibi to yarn: {ROTATION}"),
        (SlidingWindow(RoPE(), 8), "local_chunks", "local_chunks needs chunk, which no length giv"),
    ],
)
def test_pairs_that_make_no_sense_say_why(parent, target, reason):
    with pytest.raises(ValueError, match=reason):
        go_on(parent, target)


@dataclass(frozen=True)
class TwoBases(PositionEmbedding):
    """A rotation of somebody else; only its knobs matter here."""

    kind: ClassVar[str] = "rotation"
    second_theta: float
    theta: float = 10_000.0
    share: float = 0.5


@dataclass(frozen=True)
class Slope(PositionEmbedding):
    kind: ClassVar[str] = "bias"
    rate: float = 1.0


@dataclass(frozen=True)
class Halved(Scaling):
    stretches: ClassVar[bool] = True
    original_length: int

    def __call__(self, rotary, length=None):
        return rotary._replace(inv_freq=rotary.inv_freq / 2)


@dataclass(frozen=True)
class Plain(Wrapper):
    def layers(self):
        return self.inner.layers()


TWO_BASES, SLOPE, HALVED, PLAIN = (
    f"{__name__}:{cls.__name__}" for cls in (TwoBases, Slope, Halved, Plain)
)


@pytest.mark.parametrize(
    ("parent", "target", "knobs", "expected"),
    [
        (RoPE(theta=5e5), TWO_BASES, {"second_theta": 9.0}, TwoBases(9.0, theta=5e5)),
        (FoPE(512, theta=9e4), TWO_BASES, {"second_theta": 9.0}, TwoBases(9.0, theta=9e4)),
        (TwoBases(9.0, 5e5), TWO_BASES, {"share": 0.25}, TwoBases(9.0, 5e5, 0.25)),
        (ALiBi(), SLOPE, {}, Slope()),
        (SlidingWindow(ALiBi(), 8), SLOPE, {"rate": 2.0}, SlidingWindow(Slope(2.0), 8)),
        (RoPE(theta=5e5), HALVED, {}, RoPE(theta=5e5, scaling=(Halved(512),))),
        (RoPE(scaling=(Halved(512),)), "pi", {}, RoPE(scaling=(PI(2.0),))),
        (ALiBi(), PLAIN, {}, Plain(ALiBi())),
        (RoPE(), "fope_jax.position.fope:FoPE", {}, FoPE(1024, **LEAST)),
    ],
)
def test_a_class_of_ones_own_follows_its_kind_and_keeps_what_the_parent_has(
    parent, target, knobs, expected
):
    assert go_on(parent, target, **knobs) == expected


@pytest.mark.parametrize(
    ("parent", "target", "reason"),
    [
        (RoPE(), SLOPE, f"{SLOPE} was never part of what it learned; a method of your own follows"),
        (ALiBi(), TWO_BASES, f"parent's is 'bias', that of {TWO_BASES} 'rotation'; accepted: same"),
        (ALiBi(), HALVED, f"alibi to {HALVED}: {ROTATION}"),
        (RoPE(), TWO_BASES, f"{TWO_BASES} needs second_theta, .*--config.position.second_theta=V"),
        (RoPE(), f"{__name__}:Nothing", f"the module '{__name__}' has no 'Nothing'"),
        (RoPE(), "not_imported:Mine", "allow it with --allow-module not_imported if you trust it"),
    ],
)
def test_a_class_of_ones_own_that_cannot_follow_says_why(parent, target, reason):
    with pytest.raises(ValueError, match=reason):
        go_on(parent, target)


def test_every_pair_of_methods_is_decided():
    """Of all pairs of methods only the ones named here change the method."""
    allowed = set()
    for method in examples().values():
        for name in (name for name in METHODS if not is_own(METHODS[name])):
            try:
                cls, scaling = target_classes(method, name)
            except ValueError as error:
                assert " to " in str(error)
            else:
                assert scaling is None and cls is METHODS[name]
                inner = unwrapped(method)
                if not (issubclass(cls, Wrapper) or cls in (type(method), type(inner))):
                    allowed |= {(type(inner), cls)}
    dropped = {(method, none) for method in (RoPE, FoPE) for none in (NoPE, DroPE)}
    assert allowed == {(RoPE, FoPE), (NoPE, DroPE), (DroPE, NoPE)} | dropped


@pytest.mark.parametrize(
    ("parent", "target", "arguments", "message"),
    [
        (RoPE(), "yarn:factor=2", {}, "give knobs as --config.position.KNOB=VALUE"),
        (RoPE(), "yarm", {}, "unknown method 'yarm'; did you mean 'yarn'. Known: same, inner, n"),
        (RoPE(), "linear", {}, "'linear'; did you mean 'position_interpolation'"),
        (RoPE(), "pi", {"length": 256}, "length=256: shorter than the 512 tokens the .* --allow-"),
        (
            RoPE(),
            "pi",
            {"length": 256, "allow_shorter": True},
            "length=256: shorter than the 512 tokens before any stretch, .*--config.position.facto",
        ),
        (RoPE(), "sliding_window", {}, "sliding_window needs window, .*position.window=VALUE"),
        (RoPE(), "nope", {"preset": "official"}, "preset='official': NoPE after rope has none"),
        (SlidingWindow(RoPE(), 8), "sliding_window", {"inner": NoPE(), "length": 512}, "not long"),
        (
            RoPE(scaling=(YaRN(2.0, 512),)),
            "logit_scaling",
            {},
            "inner holds YaRN, whose temperature .*logits would be scaled twice",
        ),
        (RoPE(), "fope", {"length": 512}, "length=512: not longer than the 512 .*RoPE.* to FoPE"),
        (RoPE(), "clip", {"length": 512}, "only a change that is none, such as same, keeps the l"),
        (RoPE(), "yarn", {"length": 512, "factor": 4.0}, "length=512: not longer"),
        (ALiBi(), "alibi", {"length": 512, "slopes": (0.1, 0.2)}, "length=512: not longer"),
        (RoPE(), "longrope", {}, "LongRoPE needs the knob 'long_factor', which no length gives"),
        (RoPE(), "yarn", {"beta": 3.0}, "unknown knob 'beta' of yarn. Known: factor, .*, theta, "),
        (RoPE(), "fope", {"preset": "paper"}, "preset='paper': expected official or equations"),
        (FoPE(512), "fope", {"preset": "equations"}, "the parent's FoPE has its knobs already"),
        (Learned(512), "same", {}, "table_length=512: the learned table ends before length=1024"),
        (Learned(512), "learned", {"table_length": 700}, "table_length=700: .* ends before length"),
        (
            XPos(scale_base=8.0),
            "same",
            {},
            "scale_base=8: float32 holds xPos to 408 tokens, .* length=1024; .*base=21 or more",
        ),
        (
            ByLayer((XPos(scale_base=8.0), NoPE())),
            "same",
            {},
            "length=1024: by_layer is defined for at most 408 tokens",
        ),
        (
            SlidingWindow(Learned(2048), 8),
            "learned",
            {"table_length": 256, "length": 128, "allow_shorter": True},
            "table_length=256: the parent has 512 trained positions, .*; expected 512 or more",
        ),
        (
            RoPE(scaling=(YaRN(8.0, 512),)),
            "pi",
            {},
            "parent stretches its 512 tokens by 8 already, more than to 1024; give a factor, or",
        ),
    ],
)
def test_mistakes_are_named(parent, target, arguments, message):
    with pytest.raises(ValueError, match=message):
        go_on(parent, target, **arguments)


def test_the_knob_that_an_error_asks_for_is_enough():
    with pytest.raises(ValueError, match="scale_base=21"):
        go_on(XPos(scale_base=8.0), "xpos")
    child = go_on(XPos(scale_base=8.0), "xpos", scale_base=21.0)
    assert child.limits.max_length >= 1024 > XPos(scale_base=20.0).limits.max_length


@pytest.mark.parametrize("target", ["pi", "ntk", "yarn", "llama3", "same", "rope"])
def test_at_the_same_length_a_stretch_changes_nothing(target):
    child = go_on(RoPE(), target, length=512)
    before, after = pair_frequencies(RoPE(), HEAD_DIM), pair_frequencies(child, HEAD_DIM)
    np.testing.assert_allclose(after.inv_freq, before.inv_freq, rtol=1e-12)
    assert after.attention_factor == 1
    if target == "pi":  # where every number is the same, not nearly
        assert after.inv_freq.tobytes() == before.inv_freq.tobytes()


def test_a_stretch_of_partial_rotary_counts_the_pairs_that_rotate():
    child = go_on(RoPE(partial_rotary_factor=0.25), "longrope", long_factor=SLOW[:8])
    assert child.scaling[0].short_factor == (1.0,) * 8
    np.testing.assert_allclose(
        child.frequencies(HEAD_DIM) * SLOW[:8], RoPE(partial_rotary_factor=0.25).frequencies(64)
    )


@dataclass(frozen=True)
class SlowerRoPE(RoPE):
    def frequencies(self, head_dim):
        return super().frequencies(head_dim) / 2


def test_changes_are_counted_from_the_frequencies_that_a_method_states():
    changes = frequency_changes(SlowerRoPE(), RoPE(), HEAD_DIM)
    assert changes.text == "of 32 frequencies 0 kept, 32 divided by 0.5, 0 zeroed, 0 new"


def test_changes_of_frequencies_are_counted():
    """The paper's 60M model: 16 of 32 pairs turn within 512 tokens, 18 within 1,024."""
    assert frequency_changes(RoPE(), FoPE(1024), HEAD_DIM).text == (
        "of 32 frequencies 18 kept, 14 zeroed, 0 new"
    )
    grown = frequency_changes(FoPE(512), FoPE(1024), HEAD_DIM)
    assert grown.text == "of 32 frequencies 16 kept, 0 zeroed, 2 new, 14 zero before and after"
    assert frequency_changes(RoPE(), go_on(RoPE(), "pi"), HEAD_DIM).text == (
        "of 32 frequencies 0 kept, 32 divided by 2, 0 zeroed, 0 new"
    )
    dropped = frequency_changes(RoPE(), NoPE(), HEAD_DIM)
    assert (dropped.zeroed, dropped.kept, dropped.least) == (32, 0, None)
    yarn = frequency_changes(RoPE(), go_on(RoPE(), "yarn", length=4096), HEAD_DIM)
    # Faster than 32 turns in 512 tokens: kept; slower than one: divided by 8, the ramp between.
    low = math.floor(64 * math.log(512 / (32 * 2 * math.pi)) / (2 * math.log(10_000)))
    assert yarn.kept == low + 1 and yarn.changed == 32 - yarn.kept
    assert 1 < yarn.least < 2 and yarn.most == pytest.approx(8)
    assert "cosine and sine times 1.208" in yarn.text
    assert frequency_changes(RoPE(), ALiBi(), HEAD_DIM) is None
    assert frequency_changes(RoPE(partial_rotary_factor=0.5), NoPE(), HEAD_DIM).text == (
        "of 32 frequencies 0 kept, 16 zeroed, 0 new, 16 zero before and after"
    )


@pytest.mark.parametrize(
    ("target", "knobs", "expected"),
    [
        ("same", {}, RoPE()),
        ("fope", {}, FoPE(128, **LEAST)),
        ("fope", {"training_length": 512}, FoPE(512, **LEAST)),
        ("clip", {}, RoPE(scaling=(ClipFloor(128),))),
        ("yarn", {"factor": 2.0}, RoPE(scaling=(YaRN(2.0, 512),))),
        ("drope", {}, DroPE(512)),
    ],
)
def test_a_shorter_length_is_allowed_when_asked_for(target, knobs, expected):
    assert go_on(RoPE(), target, length=128, allow_shorter=True, **knobs) == expected
    with pytest.raises(ValueError, match="shorter than the 512"):
        go_on(RoPE(), target, length=128, **knobs)


def test_at_the_trained_length_positions_are_dropped_and_other_changes_are_asked_for():
    assert go_on(RoPE(), "drope", length=512) == DroPE(512)
    of_one_length = {"from_length": 512, "length": 512, "knobs": {"length": 2048}}
    child = extend_position(DroPE(512), "drope", head_dim=HEAD_DIM, **of_one_length)
    assert child == DroPE(512, length=2048)
    assert go_on(RoPE(), "clip", length=512, allow_shorter=True) == RoPE(scaling=(ClipFloor(512),))


def test_a_stretch_without_training_is_not_taken_for_the_trained_length():
    """PI keeps no length of its own: of 512 trained tokens stretched to 2,048, not 2,048."""
    stretched = RoPE(scaling=(PI(4.0),))
    arguments = {"from_length": 512, "length": 4096, "head_dim": HEAD_DIM}
    child = extend_position(stretched, "yarn", made_for=2048, **arguments)
    assert child == RoPE(scaling=(YaRN(8.0, 512),))
    window = extend_position(stretched, "logit_scaling", made_for=2048, **arguments)
    assert window == LogitScaling(stretched, training_length=512)


def test_a_stretch_counts_from_the_range_that_positions_were_drawn_from():
    drawn = {"from_length": 128, "positions": 512, "head_dim": HEAD_DIM}

    def at(length, parent=None, target="yarn", **knobs):
        parent = parent or RoPE()
        return extend_position(parent, target, length=length, knobs=knobs, **drawn)

    assert at(1024) == RoPE(scaling=(YaRN(2.0, 512),))
    assert at(1024, RoPE(scaling=(PI(4.0),))) == RoPE(scaling=(YaRN(8.0, 128),))
    assert at(256, factor=2.0) == RoPE(scaling=(YaRN(2.0, 512),))
    with pytest.raises(ValueError, match="length=256: shorter than the 512 tokens before any stre"):
        at(256)
    assert at(256, Learned(512), "learned") == Learned(512)
    assert at(1024, Learned(2048), "learned") == Learned(1024)
    window = at(1024, RoPE(), "logit_scaling")
    assert window.training_length == 128, "a number of keys, not a position"


def test_which_fope_follows_rope_is_said():
    said = fope_form(RoPE(), go_on(RoPE(), "fope"))
    assert "zero_sine=0.0, outputs='surviving'" in said and "preset=official" in said
    official = go_on(RoPE(), "fope", preset="official")
    assert fope_form(RoPE(), official) == "FoPE with zero_sine=1.0, outputs='official', as stated"
    assert fope_form(FoPE(512), FoPE(1024)) == fope_form(RoPE(), NoPE()) == ""
