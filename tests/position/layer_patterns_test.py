"""Patterns by name: each layer as transformers' configuration of that model says."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fope_jax.position import (
    LAYER_PATTERNS,
    ByLayer,
    LogitScaling,
    ModelShape,
    NoPE,
    RoPE,
    fill_layers,
    from_spec,
    llama4_scale,
    log_n_scale,
    make,
    to_spec,
)

GOLDENS = Path(__file__).parents[1] / "goldens/layer_patterns.json"
PAIRS = [0, 1, 8, 15, 16, 20, 24, 31]  # of 32, a head of 64 dimensions


@cache
def transformers():
    return json.loads(GOLDENS.read_text())


@pytest.mark.parametrize("name", [name for name in LAYER_PATTERNS if name != "swan"])
def test_each_layer_is_that_of_transformers(name):
    """The goldens hold numbers of layers that no pattern has as a multiple, too: Gemma 3's 26."""
    golden = transformers()[name]
    count = len(golden["layers"])
    layers = make("by_layer", preset=name, num_layers=count).layers()
    assert count % len(layers) == 0
    for index, expected in enumerate(golden["layers"]):
        layer = layers[index % len(layers)]
        assert (layer.window, layer.chunk) == (expected["window"], expected["chunk"])
        frequencies = layer.method.frequencies(64)
        assert (frequencies is not None) == expected["rotates"]
        if frequencies is not None:
            of_layer = golden["frequencies"][expected["frequencies"]]
            np.testing.assert_allclose(frequencies[PAIRS], of_layer["inv_freq"], rtol=2e-6)
            factor = layer.method.attention_factor(64)
            np.testing.assert_allclose(factor, of_layer["attention_factor"], rtol=1e-6)


def test_the_temperature_of_llama_4_is_in_its_full_layers_alone():
    golden = transformers()["llama4"]["logit_scale"]
    positions = np.array([golden["positions"]], np.int32)
    *local, full = make("by_layer", preset="llama4").layers()
    assert [layer.logit_scale for layer in local] == [None] * 3
    np.testing.assert_allclose(full.logit_scale(positions)[0], golden["values"], rtol=1e-6)
    np.testing.assert_array_equal(full.logit_scale(positions), llama4_scale(positions, 8192))
    assert LogitScaling(NoPE(), form="llama4", training_length=8).limits.needs_causal_mask


def test_swan_scales_the_logits_of_its_full_layers():
    pattern = make("by_layer", preset="swan", training_length=64, window=16)
    full, *local = pattern.layers()
    assert full.window is None and [layer.window for layer in local] == [16] * 3
    positions = np.arange(300)[None]
    np.testing.assert_array_equal(full.logit_scale(positions), log_n_scale(positions, 64))
    assert {layer.logit_scale for layer in local} == {None}


@pytest.mark.parametrize("name", LAYER_PATTERNS)
def test_knobs_change_what_they_name(name):
    given = {"training_length": 64, "window": 16} if name == "swan" else {}
    default = make("by_layer", preset=name, **given)
    changed = make("by_layer", preset=name, **given | {"theta": 77.0})
    thetas = [method.inner if hasattr(method, "inner") else method for method in changed.methods]
    assert 77.0 in {rope.theta for rope in thetas if isinstance(rope, RoPE)}
    assert len(changed.methods) == len(default.methods) and changed != default
    assert from_spec(json.loads(json.dumps(to_spec(default)))) == default


def test_without_the_factor_no_frequency_changes():
    for name, theta in (("gemma3", 1e6), ("olmo3", 5e5)):
        full = make("by_layer", preset=name, factor=1.0).methods[-1]
        assert full == RoPE(theta=theta)


def test_a_pattern_is_cut_after_the_last_layer():
    shape = ModelShape(64, 26, 4, 4, 16)
    with pytest.raises(ValueError, match=r"6 entries: num_layers=26 .* preset does with num_layer"):
        make("by_layer", preset="gemma3").check(shape)
    whole = make("by_layer", preset="gemma3", num_layers=26)
    whole.check(shape)
    windows = [layer.window for layer in whole.layers()]
    assert windows == [1024 if (layer + 1) % 6 else None for layer in range(26)]
    assert fill_layers((RoPE(), NoPE()), 1) == ByLayer((RoPE(),))
    with pytest.raises(ValueError, match="num_layers=0: layers of the model must be 1 or more"):
        fill_layers((RoPE(), NoPE()), 0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"preset": "olmo33"}, "unknown preset 'olmo33' of by_layer.*Known: gemma2, gemma3, ol"),
        ({"preset": "gemma3", "windw": 4}, "unknown knob 'windw' of by_layer with preset 'gemma3'"),
        ({"preset": "swan", "window": 4}, "by_layer with preset 'swan' needs the knob 'training_l"),
        ({"preset": "gemma2", "window": 0}, "window=0: tokens that a query sees"),
        ({}, "by_layer needs the knob 'methods'"),
    ],
)
def test_errors(knobs, message):
    with pytest.raises(ValueError, match=message):
        make("by_layer", **knobs)


def test_patterns_are_frozen_and_go_into_jit():
    assert dataclasses.replace(make("by_layer", preset="llama4")) in {
        make("by_layer", preset="llama4")
    }
