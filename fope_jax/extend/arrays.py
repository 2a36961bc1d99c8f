"""The initial arrays of an extended model: weights, position arrays, optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from fope_jax.config import Experiment
from fope_jax.extend.coefficients import CarriedArrays, carry_variables
from fope_jax.extend.parent import Parent
from fope_jax.model.sharding import device_put_sharded
from fope_jax.model.transformer import position_variables
from fope_jax.processes.collectives import gather_to_host
from fope_jax.train.state import StatePlan, init_position_arrays
from fope_jax.train.step import TrainState

POSITION_GROUPS = ("position_model", "position_layers")


def carry_position(
    parent: Parent, before: Experiment, arrays: Mapping[str, Any], child: Experiment, match: str
) -> CarriedArrays:
    """The position arrays of the child; ``arrays`` and ``before`` are the parent's."""
    trained = position_variables(arrays["params"], arrays["constants"])
    return carry_variables(
        before.position,
        jax.tree.map(gather_to_host, trained),
        child.position,
        init_position_arrays(child),
        child.model.shape.head_dim,
        from_length=parent.table_rows,
        match=match,
    )


def carry_train_state(
    parent: Mapping[str, Any], carried: CarriedArrays, plan: StatePlan, optimizer: str
) -> tuple[TrainState, Any]:
    """State and position constants of the child before its first update.

    With ``optimizer`` "keep" Adam's count and moments are the parent's, for position arrays only if
    they are unchanged. The schedule's count restarts; ``train.schedule_start`` continues it.
    "reset-moments" and "reset" both start from zero.
    """
    arrays = carried.variables
    params = with_position(
        parent["params"], arrays.model_params, arrays.layer_params, plan.state.params
    )
    constants = with_position({}, arrays.model_constants, arrays.layer_constants, plan.constants)
    shardings = jax.tree.map(lambda x: x.sharding, plan.state.optimizer)
    moments = jax.jit(plan.optimizer.init, out_shardings=shardings)(params)
    if optimizer == "keep":
        moments = _keep_moments(moments, parent["optimizer"], carried.names)
    return TrainState(params, moments), constants


def with_position(
    tree: Mapping[str, Any], model: Mapping[str, Any], layers: Mapping[str, Any], wanted: Any
) -> dict[str, Any]:
    """``tree`` with the position arrays of the child, sharded as in ``wanted``."""
    result = {name: leaves for name, leaves in tree.items() if name not in POSITION_GROUPS}
    for name, arrays in zip(POSITION_GROUPS, (model, layers), strict=True):
        if name in wanted:
            result[name] = {
                key: device_put_sharded(np.asarray(arrays[key]), leaf.sharding)
                for key, leaf in wanted[name].items()
            }
    return result


def _keep_moments(fresh: Any, old: Any, carried: frozenset[str]) -> Any:
    """``fresh`` with the leaves of ``old``, except schedule counts and changed position arrays."""

    def keep(new: Any, trained: Any) -> Any:
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        leaves = dict(jax.tree_util.tree_flatten_with_path(trained)[0])

        def choose(path: tuple[Any, ...], leaf: Any) -> Any:
            keys = [getattr(entry, "key", None) for entry in path]
            is_position = any(name in POSITION_GROUPS for name in keys)
            return leaf if is_position and keys[-1] not in carried else leaves[path]

        return jax.tree_util.tree_map_with_path(choose, new)

    return tuple(keep(new, trained) for new, trained in zip(fresh, old, strict=True))
