"""``rope_parameters`` of Hugging Face: golden frequencies, round trips, and what must raise."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.interop.rope_parameters import (
    ROPE_TYPES,
    from_rope_parameters,
    inverted_ramp_message,
    to_rope_parameters,
)
from fope_jax.position import (
    AdjustedBase,
    ALiBi,
    ClipFloor,
    DynamicNTK,
    FoPE,
    Llama3,
    LongRoPE,
    ModelShape,
    NTKAware,
    PositionInterpolation,
    PRoPE,
    Proportional,
    RoPE,
    SnapToCycles,
    YaRN,
)
from tests.interop.random_rope import random_parameters

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = {
    name: case
    for name, case in json.loads((GOLDENS / "peers_rope.json").read_text()).items()
    if isinstance(case, dict)
}
ORIGINAL = "original_max_position_embeddings"


def at_length(method, length):
    """The method with its scaling told the length, which the parameters cannot say."""
    steps = (dataclasses.replace(step, length=length) for step in method.scaling)
    return dataclasses.replace(method, scaling=tuple(steps))


@pytest.mark.parametrize("name", CASES)
def test_golden_frequencies(name):
    case = CASES[name]
    method = from_rope_parameters(case["rope_parameters"], head_dim=case["head_dim"])
    if case["seq_len"] is not None:
        method = at_length(method, case["seq_len"])
    golden = np.load(GOLDENS / "peers_rope.npz")
    np.testing.assert_allclose(
        method.frequencies(case["head_dim"]), golden[f"{name}/inv_freq"], rtol=1e-6, atol=0
    )
    np.testing.assert_allclose(
        method.attention_factor(case["head_dim"]), golden[f"{name}/attention_factor"], rtol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_golden_parameters_round_trip(name):
    parameters = CASES[name]["rope_parameters"]
    assert to_rope_parameters(from_rope_parameters(parameters)) == parameters


def test_goldens_have_every_type_but_the_plain_one():
    types = {case["rope_parameters"]["rope_type"] for case in CASES.values()}
    assert types == set(ROPE_TYPES) - {"default"}


def floats(low, high):
    return st.floats(low, high, allow_nan=False)


LENGTHS = st.integers(64, 1_000_000)
FACTORS = floats(1.0, 64.0)
OPTIONAL = {
    "attention_factor": floats(0.5, 2.0),
    "beta_fast": floats(8.0, 31.0),
    "beta_slow": floats(1.5, 4.0),
    "truncate": st.just(False),
}
PER_FREQUENCY = st.lists(floats(1.0, 64.0), min_size=8, max_size=8)
TYPES = {
    "default": st.fixed_dictionaries({}),
    "linear": st.fixed_dictionaries({"factor": FACTORS}),
    "dynamic": st.fixed_dictionaries({"factor": FACTORS, ORIGINAL: LENGTHS}),
    "yarn": st.fixed_dictionaries({"factor": FACTORS, ORIGINAL: LENGTHS}, optional=OPTIONAL)
    | st.fixed_dictionaries(
        {
            "factor": FACTORS,
            ORIGINAL: LENGTHS,
            "mscale": floats(0.1, 2.0),
            "mscale_all_dim": floats(0.1, 2.0),
        }
    ),
    "longrope": st.fixed_dictionaries(
        {
            "short_factor": PER_FREQUENCY,
            "long_factor": PER_FREQUENCY,
            "factor": FACTORS,
            ORIGINAL: LENGTHS,
        },
        optional={"attention_factor": floats(0.5, 2.0)},
    ),
    "llama3": st.fixed_dictionaries(
        {
            "factor": FACTORS,
            ORIGINAL: LENGTHS,
            "low_freq_factor": floats(0.5, 1.9),
            "high_freq_factor": floats(2.0, 8.0),
        }
    ),
    "proportional": st.fixed_dictionaries(
        {"partial_rotary_factor": st.sampled_from([0.25, 0.5, 0.75, 1.0])},
        optional={"factor": floats(1.5, 64.0)},
    ),
}


@pytest.mark.fast("yarn", "longrope", "default")
@pytest.mark.parametrize("rope_type", TYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(rope_type, data):
    """Both ways exactly, and the method that comes back turns by the same angles."""
    drawn = data.draw(TYPES[rope_type])
    parameters = {"rope_type": rope_type, "rope_theta": data.draw(floats(10.0, 1e7))} | drawn
    if rope_type != "proportional" and data.draw(st.booleans()):
        parameters["partial_rotary_factor"] = 0.5
        for key in ("short_factor", "long_factor"):
            if key in parameters:
                parameters[key] = parameters[key][:4]
    method = from_rope_parameters(parameters, head_dim=16)
    said = to_rope_parameters(method)
    assert said == parameters
    assert json.loads(json.dumps(said)) == said
    again = from_rope_parameters(said, head_dim=16)
    assert again == method
    np.testing.assert_array_equal(again.frequencies(16), method.frequencies(16))


def test_same_frequencies_under_another_name():
    """p-RoPE is the proportional type, another base is the base; frequencies stay to the bit."""
    for method, kind in (
        (RoPE(500.0, scaling=(PRoPE(0.3),)), "proportional"),
        (RoPE(500.0, scaling=(AdjustedBase(80_000.0),)), "default"),
        (RoPE(500.0, scaling=(AdjustedBase(80_000.0), Llama3(8.0, 512))), "llama3"),
        (RoPE(500.0, scaling=(AdjustedBase(80_000.0), YaRN(8.0, 512))), "yarn"),
    ):
        said = to_rope_parameters(method)
        assert said["rope_type"] == kind
        back = from_rope_parameters(said)
        np.testing.assert_allclose(back.frequencies(64), method.frequencies(64), rtol=1e-13)


def test_two_meanings_of_max_position_embeddings():
    """The same 8192 is the trained length of one type and the extended length of the other."""
    base = {"rope_theta": 10_000.0}
    dynamic = from_rope_parameters(
        base | {"rope_type": "dynamic", "factor": 2.0}, original_length=8192
    )
    assert dynamic.scaling == (DynamicNTK(2.0, 8192),)
    yarn = from_rope_parameters(
        base | {"rope_type": "yarn", ORIGINAL: 2048, "factor": None}, extended_length=8192
    )
    assert yarn.scaling == (YaRN(4.0, 2048),)
    phi = base | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longrope = from_rope_parameters(phi, original_length=4096, extended_length=131072)
    assert longrope.scaling == (LongRoPE((1.0,) * 4, (2.0,) * 4, 4096, factor=32.0),)
    linear = base | {"rope_type": "linear", "factor": 2.0}
    assert from_rope_parameters(linear, original_length=512, extended_length=1024).scaling == (
        PositionInterpolation(2.0),
    )


def test_older_rope_scaling():
    """The base and the share beside it, the type as ``type``, lists of NumPy numbers."""
    method = from_rope_parameters(
        {"type": "linear", "factor": np.float32(2.0)}, rope_theta=500.0, partial_rotary_factor=0.5
    )
    assert method == RoPE(500.0, partial_rotary_factor=0.5, scaling=(PositionInterpolation(2.0),))
    assert isinstance(method.scaling[0].factor, float)
    both = {"type": "default", "rope_type": "default", "rope_theta": 500}
    assert from_rope_parameters(both, rope_theta=500.0) == RoPE(500.0)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, ORIGINAL: 2048}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    ORIGINAL: 2048,
}
LLAMA = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    ORIGINAL: 2048,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def without(parameters, key):
    return {name: value for name, value in parameters.items() if name != key}


READING = {
    "no type": (without(LINEAR, "rope_type"), {}, "'rope_type' is missing.*'default'"),
    "unknown type": (LINEAR | {"rope_type": "yearn"}, {}, "'yearn'.*mean 'yarn'.*Known: default"),
    "two types": (LINEAR | {"type": "yarn"}, {}, "'rope_type' is 'linear', 'type' is 'yarn'"),
    "type that is no number": (LINEAR | {"rope_type": float("nan")}, {}, "'rope_type' is nan"),
    "unknown key": (YARN | {"beta_fats": 32}, {}, "'beta_fats' of rope_type='yarn'.*'beta_fast'"),
    "key of another type": (LINEAR | {"beta_fast": 32}, {}, "'beta_fast' of rope_type='linear'"),
    "no base": (without(LINEAR, "rope_theta"), {}, "'rope_theta' is missing.*pass rope_theta"),
    "two bases": (LINEAR, {"rope_theta": 5e5}, "'rope_theta' is 10000, rope_theta=500000"),
    "base": (LINEAR | {"rope_theta": -1.0}, {}, "theta=-1.0.*above 0"),
    "base in words": (LINEAR | {"rope_theta": "10k"}, {}, "'rope_theta' is '10k'.*finite number"),
    "no factor": (without(LINEAR, "factor"), {}, "'factor' is missing.*'linear' needs it"),
    "no factor of yarn": (without(YARN, "factor"), {}, "'factor' is missing.*extended_length"),
    "no factor of longrope": (without(LONG, "factor"), {}, "'factor' is missing.*extended_length"),
    "factor": (LINEAR | {"factor": 0.5}, {}, "factor=0.5.*1 or more"),
    "factor in words": (LINEAR | {"factor": "4"}, {}, "'factor' is '4'.*finite number"),
    "factor is a flag": (LINEAR | {"factor": True}, {}, "'factor' is True.*finite number"),
    "factor not finite": (LINEAR | {"factor": float("nan")}, {}, "'factor' is nan.*finite number"),
    "contradicting factor of yarn": (
        YARN | {"factor": 40.0},
        {"extended_length": 8192},
        "'factor' is 40, extended_length=8192 over 2048 trained tokens is 4.*leave one out",
    ),
    "contradicting factor of longrope": (LONG, {"extended_length": 4096}, "'factor' is 4, ext"),
    "contradicting factor of linear": (
        LINEAR,
        {"original_length": 512, "extended_length": 1024},
        "'factor' is 4, extended_length=1024 over 512 trained tokens is 2",
    ),
    "extended length of dynamic": (
        DYNAMIC,
        {"original_length": 512, "extended_length": 1024},
        "extended_length=1024: rope_type='dynamic'.*pass original_length",
    ),
    "no trained length": (DYNAMIC, {}, f"'{ORIGINAL}' is missing.*pass original_length"),
    "no trained length of llama3": (without(LLAMA, ORIGINAL), {}, f"'{ORIGINAL}' is missing"),
    "two trained lengths": (YARN, {"original_length": 4096}, f"'{ORIGINAL}' is 2048, original_le"),
    "trained length": (YARN | {ORIGINAL: 0}, {}, f"'{ORIGINAL}' is 0.*1 or more"),
    "half a token": (DYNAMIC, {"original_length": 512.5}, "'original_length' is 512.5.*whole"),
    "extended length": (YARN, {"extended_length": "8k"}, "'extended_length' is '8k'.*number"),
    "llama3 that is not extended": (LLAMA, {"extended_length": 2048}, "extended_length=2048.*2048"),
    "no low_freq_factor": (without(LLAMA, "low_freq_factor"), {}, "'low_freq_factor' is missing"),
    "turns of llama3": (LLAMA | {"low_freq_factor": 9.0}, {}, "low_freq_factor=9.0, high_freq_f"),
    "no long_factor": (without(LONG, "long_factor"), {}, "'long_factor' is missing"),
    "long_factor": (LONG | {"long_factor": 2.0}, {}, "'long_factor' is 2.0.*list of numbers"),
    "in long_factor": (LONG | {"long_factor": [1, "2"]}, {}, r"'long_factor\[1\]' is '2'"),
    "length of long_factor": (
        LONG | {"long_factor": [1.0]},
        {"head_dim": 16},
        "long_factor has 1 entries: 8",
    ),
    "truncate": (YARN | {"truncate": "no"}, {}, "'truncate' is 'no'.*True or False"),
    "two ways to the attention factor": (
        YARN | {"attention_factor": 1.1, "mscale": 1.0, "mscale_all_dim": 0.5},
        {},
        "attention_factor=1.1, mscale=1.0.*give one",
    ),
    "half of mscale": (YARN | {"mscale": 1.0}, {}, "mscale=1.0, mscale_all_dim=None.*both or none"),
    "share": (LINEAR | {"partial_rotary_factor": 1.5}, {}, "partial_rotary_factor=1.5"),
    "share that does not fit": (
        LINEAR | {"partial_rotary_factor": 0.3},
        {"head_dim": 64},
        "partial_rotary_factor=0.3: 19.2 of head_dim=64",
    ),
    "nothing": (None, {}, "rope_parameters = None: expected a mapping; a model without scaling"),
    "nested": ({"full_attention": LINEAR, "sliding_attention": YARN}, {}, "nested by 'full_att"),
    "FoPE": (LINEAR | {"fope_sep_head": True}, {}, "'fope_sep_head' is a key of FoPE"),
}


@pytest.mark.parametrize("name", READING)
def test_reading_raises(name):
    parameters, arguments, message = READING[name]
    with pytest.raises(ValueError, match=message):
        from_rope_parameters(parameters, **arguments)


def test_attn_factor_is_passed_over_with_a_warning_and_is_no_attention_factor(caplog):
    """DeepSeek-R1-0528-Qwen3-8B: transformers computes with 1.139, engines with the product, 1."""
    keys = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, ORIGINAL: 32768}
    plain = from_rope_parameters(keys, head_dim=128)
    assert from_rope_parameters(keys | {"attn_factor": 1}, head_dim=128) == plain
    assert not caplog.text
    given = from_rope_parameters(keys | {"attn_factor": 0.8782488562869419}, head_dim=128)
    assert given == plain and given.attention_factor(128) == pytest.approx(1.138629436)
    assert "'attn_factor' is 0.878249: ignored, as Hugging Face" in caplog.text
    assert "'attention_factor': 1 they grow" in caplog.text
    for kind, other in (("longrope", LONG), ("llama3", LLAMA)):
        with pytest.raises(ValueError, match=f"'attn_factor' of rope_type='{kind}'") as caught:
            from_rope_parameters(other | {"attn_factor": 0.5})
        assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "same"),
    [
        (LINEAR | {"truncate": False, "attention_factor": 1.0, ORIGINAL: 512}, LINEAR),
        (LLAMA | {"truncate": True, "finetuned": True}, LLAMA),
        (YARN | {"finetuned": False, "extrapolation_factor": 1.0}, YARN),
        (without(LONG, "rope_type") | {"type": "su"}, LONG),
        (LONG | {"type": "su", "truncate": False}, LONG),
        (LINEAR | {"use_fope": False, "fope_sep_head": True, "num_inv_freq": None}, LINEAR),
        (LINEAR | {"fope_init_factor": None, "fope_sep_head": None, "mrope_section": None}, LINEAR),
        (
            {"rope_type": "default", "rope_theta": 1e4, "factor": 1.0, ORIGINAL: 2048},
            {"rope_type": "default", "rope_theta": 1e4},
        ),
    ],
    ids=str,
)
def test_what_changes_no_number_is_passed_over(parameters, same):
    assert from_rope_parameters(parameters, head_dim=16) == from_rope_parameters(same, head_dim=16)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        (LINEAR | {"attention_factor": 1.2, "alpha": 8}, ["'attention_factor'", "1.2", "'alpha'"]),
        (LLAMA | {"extrapolation_factor": 0.5}, ["'extrapolation_factor'", "0.5"]),
        (YARN | {"short_mscale": 1.1, "beta_fats": 8}, ["1.1", "8 (did you mean 'beta_fast'?)"]),
        ({"rope_type": "default", "rope_theta": 1e4, "factor": 4.0}, ["'factor' of", "4.0"]),
        (YARN | {"truncate": None, "low_freq_factor": 1.0}, ["'low_freq_factor'"]),
    ],
    ids=str,
)
def test_all_keys_that_may_change_numbers_are_named_with_their_values(parameters, named):
    with pytest.raises(ValueError) as caught:
        from_rope_parameters(parameters)
    assert all(part in str(caught.value) for part in named)
    assert str(caught.value).count("did you mean") == sum("did you" in part for part in named)


def by_transformers_formula(keys, head_dim, length=None):
    """Frequencies and attention factor, from the formulas of ``ROPE_INIT_FUNCTIONS`` in NumPy."""
    kind = keys["rope_type"]
    dims = int(head_dim * keys.get("partial_rotary_factor", 1.0))
    grid = keys["rope_theta"] ** (-np.arange(0, dims, 2) / dims)
    factor, original = keys.get("factor", 1.0), keys.get(ORIGINAL)
    if kind == "linear":
        return grid / factor, 1.0
    if kind == "dynamic":
        stretch = factor * max(length, original) / original - (factor - 1)
        base = keys["rope_theta"] * stretch ** (dims / (dims - 2))
        return base ** (-np.arange(0, dims, 2) / dims), 1.0
    if kind == "longrope":
        divisors = keys["long_factor" if length > original else "short_factor"]
        scale = np.sqrt(1 + np.log(factor) / np.log(original)) if factor > 1 else 1.0
        return grid / np.array(divisors), keys.get("attention_factor", scale)
    if kind == "llama3":
        low, high = original / keys["low_freq_factor"], original / keys["high_freq_factor"]
        wave = 2 * np.pi / grid
        with np.errstate(all="ignore"):
            smooth = (original / wave - keys["low_freq_factor"]) / (
                keys["high_freq_factor"] - keys["low_freq_factor"]
            )
            smoothed = (1 - smooth) * grid / factor + smooth * grid
        scaled = np.where(wave > low, grid / factor, grid)
        middle = ~(wave < high) & ~(wave > low)
        return np.where(middle, smoothed, scaled), 1.0
    if kind == "yarn":
        turns = np.array([keys.get("beta_fast", 32), keys.get("beta_slow", 1)])
        ends = dims * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(keys["rope_theta"]))
        if keys.get("truncate", True):
            ends = np.array([np.floor(ends[0]), np.ceil(ends[1])])
        low, high = max(ends[0], 0), min(ends[1], dims - 1)
        ramp = np.clip((np.arange(dims // 2) - low) / (high - low + 0.001 * (low == high)), 0, 1)
        growth = 0.1 * np.log(factor) + 1.0
        return grid / factor * ramp + grid * (1 - ramp), keys.get("attention_factor", growth)
    return grid, 1.0


def test_random_parameters_give_what_the_formulas_of_transformers_give():
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(500):
        head_dim, length, keys = random_parameters(rng)
        notes = {"truncate": False} if keys["rope_type"] != "yarn" else {"finetuned": True}
        method = from_rope_parameters(keys | notes, head_dim=head_dim)
        if inverted_ramp_message(method, head_dim):
            continue
        kinds.add(keys["rope_type"])
        if keys["rope_type"] in ("dynamic", "longrope"):
            method = at_length(method, length)
        expected, factor = by_transformers_formula(keys, head_dim, length)
        np.testing.assert_allclose(
            method.frequencies(head_dim), expected, rtol=1e-9, atol=0, err_msg=str(keys)
        )
        assert method.attention_factor(head_dim) == pytest.approx(factor, rel=1e-12), keys
    assert kinds == set(ROPE_TYPES) - {"proportional"}


WRITING = {
    "another method": (ALiBi(), "ALiBi.*RoPE only"),
    "FoPE": (FoPE(512), "FoPE.*use fope_to_rope_parameters"),
    "interleaved": (RoPE(interleaved=True), "interleaved=True.*cannot say it"),
    "learnable": (RoPE(learnable=True), "learnable=True.*cannot say it"),
    "floor": (RoPE(scaling=(ClipFloor(512),)), r"scaling=ClipFloor\(.*cannot say it"),
    "cycles": (RoPE(scaling=(SnapToCycles(512),)), r"scaling=SnapToCycles\(.*cannot say it"),
    "ntk": (RoPE(scaling=(NTKAware(4.0),)), r"scaling=NTKAware\(.*theta \* 4 \*\* \(H / \(H - 2"),
    "two": (RoPE(scaling=(ClipFloor(512), YaRN(4.0, 512))), "scaling holds ClipFloor, YaRN.*one"),
    "length": (RoPE(scaling=(DynamicNTK(2.0, 512, length=600),)), "length=600: .*fix the length"),
    "two shares": (
        RoPE(partial_rotary_factor=0.5, scaling=(Proportional(0.5),)),
        "partial_rotary_factor=0.5: with rope_type='proportional'",
    ),
}


@pytest.mark.parametrize("name", WRITING)
def test_writing_raises(name):
    method, message = WRITING[name]
    with pytest.raises(ValueError, match=message):
        to_rope_parameters(method)


def test_ntk_advice_is_right():
    """The message on NTK gives a base: its frequencies are the same."""
    shape = ModelShape(64, 1, 1, 1, 64)
    RoPE().check(shape)
    ntk = RoPE(500.0, scaling=(NTKAware(4.0),)).frequencies(64)
    np.testing.assert_allclose(RoPE(500.0 * 4 ** (64 / 62)).frequencies(64), ntk, rtol=1e-13)
