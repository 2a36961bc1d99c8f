"""Options of XLA for the program of a training step.

They change how the program is scheduled, not what it computes. The defaults were chosen by what the
TPU compiler makes of the paper's models (experiments/tpu_plan).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import jax

from fope_jax.processes.agreement import FLAG_VARIABLES
from fope_jax.train.state import StatePlan

log = logging.getLogger(__name__)

# In a "windowed einsum" each product with a sharded weight is cut into as many pieces as there are
# devices, to hide the network behind them. Where memory is the limit and not the network, the
# pieces only read and write their partial sums again and again.
TPU_SHARDED_WEIGHTS = (
    "xla_tpu_enable_windowed_einsum_for_all_gather=false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter=false",
)


def step_compiler_options(plan: StatePlan) -> tuple[str, ...]:
    """The options of the step's program, each as "name=value".

    Those of ``train.compiler_options``; if it is None, on a TPU mesh that shards weights
    (``mesh.fsdp`` above 1) ``TPU_SHARDED_WEIGHTS``, but for options that $LIBTPU_INIT_ARGS or
    $XLA_FLAGS sets.
    """
    given = plan.experiment.train.compiler_options
    if given is not None:
        return given
    if plan.mesh.devices.flat[0].platform != "tpu" or plan.mesh.shape["fsdp"] == 1:
        return ()
    flags = " ".join(os.environ.get(name, "") for name in FLAG_VARIABLES)
    return tuple(option for option in TPU_SHARDED_WEIGHTS if option.partition("=")[0] not in flags)


def compile_step(plan: StatePlan, traced: jax.stages.Traced) -> tuple[Any, tuple[str, ...]]:
    """The compiled step, from ``trace_step``, and the options that were used.

    Raises ValueError for an option of the configuration that the compiler does not take. Defaults
    that an older or newer compiler does not know are left out, with a warning.
    """
    options = step_compiler_options(plan)
    lowered = traced.lower()
    try:
        return lowered.compile(compiler_options=_values(options)), options
    except jax.errors.JaxRuntimeError as error:
        if not any(option.partition("=")[0] in str(error) for option in options):
            raise
        if plan.experiment.train.compiler_options is not None:
            raise ValueError(
                f"train.compiler_options = {options}: {error}; accepted: options of XLA for this "
                "platform as 'name=value', () for none, or None for the tuned ones"
            ) from error
        log.warning("compiling without the tuned options %s: %s", ", ".join(options), error)
        return lowered.compile(), ()


def _values(options: Sequence[str]) -> dict[str, str | bool] | None:
    pairs = (option.partition("=") for option in options)
    truth = {"true": True, "false": False}
    return {name: truth.get(value.lower(), value) for name, _, value in pairs} or None
