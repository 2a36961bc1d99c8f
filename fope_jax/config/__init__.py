"""Configurations: an ml_collections file and command-line overrides become one `Experiment`.

A configuration file is Python with a function ``get_config(arg)`` that returns a ``ConfigDict``:

    name, seed                      top-level keys
    model, data, train, evaluate,   the fields of TransformerConfig, DataConfig, TrainConfig,
    mesh                            EvaluateConfig, MeshConfig; a missing field has its default
    position                        ``method``, its knobs, and optionally ``preset``

The knob ``training_length`` defaults to ``train.length``. Methods and scalings nest:
``{"method": "rope", "scaling": [{"scaling": "ntk", "factor": 4.0}]}``.
"""

from fope_jax.config.evaluate import EvaluateConfig as EvaluateConfig
from fope_jax.config.experiment import Experiment as Experiment
from fope_jax.config.experiment import build_experiment as build_experiment
from fope_jax.config.experiment import check_vocabulary as check_vocabulary
from fope_jax.config.experiment import differing_values as differing_values
from fope_jax.config.experiment import experiment_to_dict as experiment_to_dict
from fope_jax.config.experiment import flat_values as flat_values
from fope_jax.config.experiment import incompatible_changes as incompatible_changes
from fope_jax.config.fields import ConfigError as ConfigError
from fope_jax.config.files import apply_overrides as apply_overrides
from fope_jax.config.files import call_in_file as call_in_file
from fope_jax.config.files import load_config as load_config
from fope_jax.config.files import parse_arg as parse_arg
from fope_jax.config.files import parse_knob as parse_knob
from fope_jax.config.files import split_override as split_override
from fope_jax.config.files import split_spec as split_spec
from fope_jax.config.train import Stage as Stage
from fope_jax.config.train import TrainConfig as TrainConfig
