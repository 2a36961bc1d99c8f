"""Patterns of layers by their names, in configurations."""

import pytest
from ml_collections import ConfigDict

from fope_jax.config.experiment import build_experiment
from fope_jax.config.fields import ConfigError
from fope_jax.config.files import apply_overrides
from fope_jax.position import LogitScaling, NoPE, RoPE, SlidingWindow


def values(**position):
    return {
        "name": "it",
        "seed": 0,
        "position": {"method": "by_layer"} | position,
        "model": {"vocab_size": 8, "d_model": 8, "num_layers": 8, "num_heads": 2, "mlp_dim": 8},
        "data": {"corpus": "text", "train_files": ["x"], "validation_files": ["x"]},
        "train": {"steps": 1, "batch_size": 1, "length": 128},
    }


def test_a_configuration_fills_in_layers_and_length():
    gemma = build_experiment(values(preset="gemma3", window=16)).position
    assert len(gemma.methods) == 8 and gemma.methods[0] == SlidingWindow(RoPE(), 16)
    swan = build_experiment(values(preset="swan", window=16)).position
    assert swan.methods[0] == LogitScaling(NoPE(), training_length=128) and len(swan.methods) == 4


def test_overrides_have_the_types_of_the_presets_knobs():
    config = ConfigDict(values(preset="olmo3"))
    apply_overrides(config, ["position.window=32", "position.factor=2", "position.theta=100"])
    pattern = build_experiment(config).position
    assert [layer.window for layer in pattern.layers()] == [32, 32, 32, None]
    assert pattern.methods[3].scaling[0].factor == 2.0 and pattern.methods[0].inner.theta == 100.0
    with pytest.raises(ConfigError, match="position.window"):
        apply_overrides(config, ["position.window=a few"])
