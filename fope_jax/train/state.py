"""The training state on a mesh: shapes and shardings, initialization, and the traced step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from fope_jax.config import Experiment, Stage
from fope_jax.model.backends import BackendChoice, choose_backend, gpu_compute_capability
from fope_jax.model.layer_pattern import layer_pattern
from fope_jax.model.sharding import (
    batch_sharding,
    device_put_sharded,
    devices_by_slice,
    make_mesh,
    tree_shardings,
)
from fope_jax.model.transformer import Transformer, position_variables, split
from fope_jax.position import PositionVariables
from fope_jax.train.bad_steps import Guard, make_guard
from fope_jax.train.optim import make_optimizer
from fope_jax.train.step import TrainState, state_shardings, train_step
from fope_jax.typing import Batch


class StatePlan(NamedTuple):
    """All inputs of a step without arrays: leaves are ShapeDtypeStructs with a sharding.

    So each device creates only its shards, and a step compiles for devices that are not present.
    """

    experiment: Experiment
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState
    constants: Any
    mesh: Mesh
    attention: BackendChoice
    guard: Guard | None


def plan_state(experiment: Experiment, devices: Sequence[Any] | None = None) -> StatePlan:
    """The plan for ``devices`` (default: all); raises ValueError if the mesh does not fit."""
    devices = jax.devices() if devices is None else devices
    check_mesh(experiment, len(devices), len(devices_by_slice(devices)))
    mesh, position, model = (
        make_mesh(experiment.mesh, devices),
        experiment.position,
        experiment.model,
    )
    device = mesh.devices.flat[0]
    attention = choose_backend(
        model.attention,
        platform=device.platform,
        layers=layer_pattern(model, position),
        length=experiment.train.length,
        shape=model.shape,
        dtype=model.dtype,
        sinks=model.attention_sinks,
        context=mesh.shape["context"],
        compute_capability=gpu_compute_capability(device),
        derivatives=model.derivatives,
    )
    model = dataclasses.replace(model, attention=attention.name)
    graphdef, params, constants = split(
        nnx.eval_shape(lambda: _new_model(dataclasses.replace(experiment, model=model)))
    )
    optimizer, guard = make_optimizer(experiment.train), make_guard(experiment.train)
    moments = jax.eval_shape(optimizer.init, params)
    state = TrainState(params, moments, guard.state() if guard else ())

    def with_shardings(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            shardings,
        )

    state = with_shardings(state, state_shardings(optimizer, state, position, mesh))
    constants = with_shardings(constants, tree_shardings(constants, position, mesh))
    return StatePlan(experiment, graphdef, optimizer, state, constants, mesh, attention, guard)


def experiment_at_stage(experiment: Experiment, stage: Stage) -> Experiment:
    """``experiment`` with the length and batch size of one stage throughout."""
    sizes = {"length": stage.length, "batch_size": stage.batch_size, "first_lengths": ()}
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **sizes))


def check_mesh(experiment: Experiment, num_devices: int, num_slices: int = 1) -> None:
    """Raises ValueError, naming the field, if the mesh does not divide model or batch."""
    sizes = experiment.mesh.axis_sizes(num_devices, num_slices)
    config, train, shape = experiment.model, experiment.train, experiment.model.shape
    for field, number, axes in (
        ("train.batch_size / train.accumulate", train.batch_size // train.accumulate, "data fsdp"),
        ("train.length", train.length, "context"),
        ("model.num_heads", shape.num_heads, "tensor"),
        ("model.num_kv_heads", shape.num_kv_heads, "tensor"),
        ("model.mlp_dim", config.mlp_dim, "tensor"),
        ("model.vocab_size", config.vocab_size, "tensor"),
        ("model.d_model", config.d_model, "fsdp context"),
    ):
        count = math.prod(sizes[axis] for axis in axes.split())
        if number % count:
            names = " * ".join(f"mesh.{axis}" for axis in axes.split())
            over = f" over {num_slices} slices" if num_slices > 1 else ""
            raise ValueError(f"{field} = {number}: expected a multiple of {names}{over} = {count}")


# ---------------------------------------------------------------------------- arrays


def init_train_state(plan: StatePlan) -> TrainState:
    """The state before the first step; each device creates only its shards."""
    params = jax.jit(
        lambda: split(_new_model(plan.experiment))[1], out_shardings=_shardings(plan.state.params)
    )()
    moments = jax.jit(plan.optimizer.init, out_shardings=_shardings(plan.state.optimizer))(params)
    return TrainState(params, moments, init_guard_state(plan))


def init_constants(plan: StatePlan) -> Any:
    """The position constants, drawn on one device so that every mesh gets the same bits."""
    constants = jax.jit(lambda: split(_new_model(plan.experiment))[2])()
    return jax.tree.map(
        lambda x, sharding: device_put_sharded(np.asarray(x), sharding),
        constants,
        _shardings(plan.constants),
    )


def init_position_arrays(experiment: Experiment) -> PositionVariables:
    """The position arrays of a new model, on the host; no other array is created."""
    drawn = jax.jit(lambda: position_variables(*split(_new_model(experiment))[1:]))()
    return jax.tree.map(np.asarray, drawn)


def init_guard_state(plan: StatePlan, values: Sequence[float] | None = None) -> Any:
    """The guard's state on the mesh, new or with the ``values`` from a checkpoint."""
    if plan.guard is None:
        return ()
    state = plan.guard.state(values) if values else plan.guard.state()
    return jax.tree.map(device_put_sharded, state, _shardings(plan.state.guard))


def _new_model(experiment: Experiment) -> Transformer:
    return Transformer(experiment.model, experiment.position, rngs=nnx.Rngs(experiment.seed))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


# ---------------------------------------------------------------------------- batches and the step


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Numbers of the rows of a batch that the devices of this process hold, ascending."""
    rows = np.broadcast_to(np.int32(0), (batch_size, mesh.size))  # any length
    indices = batch_sharding(rows, mesh).addressable_devices_indices_map(rows.shape).values()
    held = np.zeros(batch_size, bool)
    for index in indices:
        held[index[0] if index else slice(None)] = True
    return np.flatnonzero(held)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on the devices; of a process's arrays only the rows of `own_rows` are read."""
    return jax.tree.map(lambda x: device_put_sharded(x, batch_sharding(x, mesh)), batch)


def shares_positions(experiment: Experiment) -> bool:
    """Whether all rows of a training batch have the same positions."""
    return experiment.data.packing == "windows" and experiment.train.position_range is None


def share_positions(batch: Batch, experiment: Experiment) -> Batch:
    """Positions as ``[1, T]`` if all rows have the same, to compute phases once a batch."""
    is_shared = shares_positions(experiment)
    return batch._replace(positions=batch.positions[:1]) if is_shared else batch


def abstract_batch(plan: StatePlan) -> Batch:
    """Shapes, dtypes and shardings of the batches of ``plan.experiment``."""
    train = plan.experiment.train
    rows = (train.batch_size, train.length)
    ids, weights = (jax.ShapeDtypeStruct(rows, dtype) for dtype in (np.int32, np.float32))
    positions = weights if train.position_draw == "float" else ids
    if shares_positions(plan.experiment):
        positions = jax.ShapeDtypeStruct((1, train.length), np.int32)
    batch = Batch(ids, ids, positions, ids, weights)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(x, plan.mesh)),
        batch,
    )


def trace_step(plan: StatePlan, batch: Batch | None = None) -> jax.stages.Traced:
    """``train_step`` traced for ``plan``; ``batch`` defaults to `abstract_batch`."""
    with jax.set_mesh(plan.mesh):
        return train_step.trace(
            plan.graphdef,
            plan.optimizer,
            plan.state,
            plan.constants,
            abstract_batch(plan) if batch is None else batch,
            accumulate=plan.experiment.train.accumulate,
            guard=plan.guard,
        )
