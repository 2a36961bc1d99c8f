"""MaxText's training step of a model of ours, compiled ahead of time, for `benchmarks.tpu_step`.

Needs an environment with MaxText (0.2.5 was tried; Python 3.12 and later).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fope_jax.config import Experiment
from fope_jax.tpu.topology import parse_topology


def settings(experiment: Experiment, topology: str) -> dict[str, Any]:
    """What of MaxText's base.yml is changed: the model, the batch, the slice, and splash attention.

    The rest is its own choice, such as recomputing all layers in the backward pass.
    """
    model, train = experiment.model, experiment.train
    slice_ = parse_topology(topology)
    # Its names count the two cores of a v4 or v5p chip.
    size = slice_.num_devices * (2 if slice_.chip.name in ("v4", "v5p") else 1)
    return {
        "run_name": "tpu_step",
        "compile_topology": f"{slice_.chip.name}-{size}",
        "compile_topology_num_slices": 1,
        "decoder_block": "llama2",
        "base_emb_dim": model.d_model,
        "base_num_query_heads": model.num_heads,
        "base_num_kv_heads": model.num_heads,
        "head_dim": model.d_model // model.num_heads,
        "base_mlp_dim": model.mlp_dim,
        "base_num_decoder_layers": model.num_layers,
        "vocab_size": model.vocab_size,
        "max_target_length": train.length,
        "per_device_batch_size": train.batch_size / slice_.num_devices,
        "attention": "flash",
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
    }


def compile_maxtext(experiment: Experiment, topology: str) -> Any:
    """The compiled step, as MaxText's ``train_compile`` makes it."""
    import maxtext
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding

    base = Path(maxtext.__file__).parent / "configs/base.yml"
    given = settings(experiment, topology).items()
    config = pyconfig.initialize(["", str(base), *(f"{name}={value}" for name, value in given)])
    mesh = train_compile.get_topology_mesh(config)
    arguments, named, state, _, model = train_compile.get_shaped_inputs(mesh, config)
    params, state = sharding.maybe_update_params_sharding_with_opt(config, state)
    state = sharding.build_zero1_input_state_mesh_shardings(config, state, params)
    rows = sharding.get_input_data_sharding(config, mesh)
    function, *signature = maxtext_utils.get_functional_train_with_signature(
        train.train_step, rows, state, model, config, params
    )
    return train_compile.jit_and_compile(
        function,
        arguments,
        named,
        mesh,
        *signature,
        config,
        logical_axis_rules(config.logical_axis_rules),
    )
