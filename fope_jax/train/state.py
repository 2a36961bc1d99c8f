"""The state of training on a mesh: what it looks like, where it lies, and a new one.

A state is described before it is made, so that each device makes its own part of it only, and so
that a step can be compiled for machines that are not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from fope_jax.config import Experiment, Stage
from fope_jax.model.backends import BackendChoice, choose_backend, gpu_compute_capability
from fope_jax.model.sharding import batch_sharding, device_put_sharded, make_mesh, tree_shardings
from fope_jax.model.transformer import Transformer, position_variables, split
from fope_jax.position import PositionVariables
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.train.guard import Guard, make_guard
from fope_jax.train.optim import make_optimizer
from fope_jax.train.step import TrainState, state_shardings, train_step
from fope_jax.typing import Batch


class StatePlan(NamedTuple):
    """Shapes and places of everything that a step reads, without an array.

    Attributes:
      graphdef: the model without its arrays.
      optimizer: of the experiment.
      state: ShapeDtypeStructs with the sharding of each leaf.
      constants: the same for the position constants.
      mesh: the devices.
      attention: the backend of its program, and why.
      guard: what keeps bad steps out; None where nothing does.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState
    constants: Any
    mesh: Mesh
    attention: BackendChoice
    guard: Guard | None


def plan_state(experiment: Experiment, devices: Sequence[Any] | None = None) -> StatePlan:
    """Describes the state of ``experiment`` on ``devices`` (all there are, by default).

    Raises:
      ValueError: the mesh does not fit the devices, or the model or the batch not the mesh.
    """
    count = len(jax.devices() if devices is None else devices)
    check_mesh(experiment, count)
    mesh = make_mesh(experiment.mesh, devices)
    attention = _choose_attention(experiment, mesh)
    changed = dataclasses.replace(experiment.model, attention=attention.name)
    experiment = dataclasses.replace(experiment, model=changed)
    model = nnx.eval_shape(lambda: _new_model(experiment))
    graphdef, params, constants = split(model)
    optimizer, guard = make_optimizer(experiment.train), make_guard(experiment.train)
    state = TrainState(
        params, jax.eval_shape(optimizer.init, params), guard.state() if guard else ()
    )
    return StatePlan(
        graphdef,
        optimizer,
        _at(state, state_shardings(optimizer, state, experiment.position, mesh)),
        _at(constants, tree_shardings(constants, experiment.position, mesh)),
        mesh,
        attention,
        guard,
    )


def experiment_at_stage(experiment: Experiment, stage: Stage) -> Experiment:
    """``experiment`` as if all of it had the sequences of one stage."""
    sizes = {"length": stage.length, "batch_size": stage.batch_size, "first_lengths": ()}
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **sizes))


def _choose_attention(experiment: Experiment, mesh: Mesh) -> BackendChoice:
    device = mesh.devices.flat[0]
    return choose_backend(
        experiment.model.attention,
        platform=device.platform,
        methods=[layer.method for layer in experiment.position.layers()],
        length=experiment.train.length,
        head_dim=experiment.model.shape.head_dim,
        dtype=experiment.model.dtype,
        context=mesh.shape["context"],
        compute_capability=gpu_compute_capability(device),
        derivatives=experiment.model.derivatives,
    )


def check_mesh(experiment: Experiment, num_devices: int) -> None:
    """Raises ValueError where model or batch cannot be cut over the mesh, naming the field."""
    sizes = experiment.mesh.axis_sizes(num_devices)
    config, train, shape = experiment.model, experiment.train, experiment.model.shape
    rows, tokens = ("data", "fsdp"), ("context",)
    check_multiples(
        sizes,
        {
            "train.batch_size / train.accumulate": (train.batch_size // train.accumulate, rows),
            "train.length": (train.length, tokens),
            "model.num_heads": (shape.num_heads, ("tensor",)),
            "model.num_kv_heads": (shape.num_kv_heads, ("tensor",)),
            "model.mlp_dim": (config.mlp_dim, ("tensor",)),
            "model.vocab_size": (config.vocab_size, ("tensor",)),
            "model.d_model": (config.d_model, ("fsdp", "context")),
        },
    )


def check_multiples(
    mesh_sizes: dict[str, int], numbers: dict[str, tuple[int, tuple[str, ...]]]
) -> None:
    """Raises ValueError where a number is not a multiple of the mesh axes it is cut over.

    Args:
      mesh_sizes: from ``MeshConfig.axis_sizes``.
      numbers: a field's name to its number and its mesh axes.

    >>> check_multiples({"tensor": 4}, {"model.num_heads": (6, ("tensor",))})
    Traceback (most recent call last):
        ...
    ValueError: model.num_heads = 6: expected a multiple of mesh.tensor = 4
    """
    for field, (number, axes) in numbers.items():
        count = int(np.prod([mesh_sizes[axis] for axis in axes]))
        if number % count:
            names = " * ".join(f"mesh.{axis}" for axis in axes)
            raise ValueError(f"{field} = {number}: expected a multiple of {names} = {count}")


def init_constants(experiment: Experiment) -> Any:
    """The position constants on the host, drawn on one device: the same bits on every mesh."""
    return jax.tree.map(np.asarray, jax.jit(lambda: split(_new_model(experiment))[2])())


def init_position_arrays(experiment: Experiment) -> PositionVariables:
    """All arrays of a new model's position embedding, on the host; no other array is made."""
    drawn = jax.jit(lambda: position_variables(*split(_new_model(experiment))[1:]))()
    return jax.tree.map(np.asarray, drawn)


def init_train_state(experiment: Experiment, plan: StatePlan) -> TrainState:
    """The state before the first step, each device making its own part."""
    state = plan.state
    params = jax.jit(
        lambda: split(_new_model(experiment))[1], out_shardings=_shardings(state.params)
    )()
    optimizer = jax.jit(plan.optimizer.init, out_shardings=_shardings(state.optimizer))(params)
    return TrainState(params, optimizer, init_guard_state(None, plan))


def restore_arrays(
    store: CheckpointStore, step: int, plan: StatePlan, with_optimizer: bool = True
) -> dict[str, Any]:
    """Parameters, constants and optimizer state of a checkpoint, laid out as ``plan`` says.

    Checkpoints of bfloat16 parameters once had bfloat16 moments; they are read as they are and
    widened, which changes no number.

    Raises:
      CheckpointError: see ``CheckpointStore.restore``.
    """
    items = {"params": plan.state.params, "constants": plan.constants}
    if not with_optimizer:
        return store.restore(step, items)
    wanted = plan.state.optimizer
    stored = store.with_stored_dtypes(step, "optimizer", wanted)
    narrow = jax.tree.map(
        lambda old, new: old if (old.dtype, new.dtype) == _NARROW else new, stored, wanted
    )
    restored = store.restore(step, items | {"optimizer": narrow})
    restored["optimizer"] = jax.tree.map(
        lambda x, leaf: x.astype(leaf.dtype), restored["optimizer"], wanted
    )
    return restored


_NARROW = (jnp.dtype("bfloat16"), jnp.dtype("float32"))


def init_guard_state(values: Sequence[float] | None, plan: StatePlan) -> Any:
    """The guard's state over the devices, new or with the ``values`` of a checkpoint."""
    if plan.guard is None:
        return ()
    state = plan.guard.state(values) if values else plan.guard.state()
    return jax.tree.map(device_put_sharded, state, _shardings(plan.state.guard))


def shard_constants(constants: Any, plan: StatePlan) -> Any:
    """Position constants of the host over the devices of the plan."""
    return jax.tree.map(device_put_sharded, constants, _shardings(plan.constants))


def trace_step(experiment: Experiment, devices: Sequence[Any] | None = None) -> Any:
    """The training step of ``experiment``, traced for ``devices``, which may be descriptions.

    Returns:
      ``jax.stages.Traced``: its ``jaxpr``, and with ``lower().compile()`` the program that
      ``train`` runs.

    Raises:
      ValueError: see ``plan_state``.
    """
    plan = plan_state(experiment, devices)
    train, shared = experiment.train, experiment.data.packing == "windows"
    rows = (train.batch_size, train.length)

    def leaf(dtype: Any, shape: tuple[int, int] = rows) -> jax.ShapeDtypeStruct:
        x = jax.ShapeDtypeStruct(shape, dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(x, plan.mesh))

    positions = leaf(np.int32, (1, train.length) if shared else rows)
    batch = Batch(leaf(np.int32), leaf(np.int32), positions, leaf(np.int32), leaf(np.float32))
    return _trace(plan, batch, train.accumulate)


def lower_step(plan: StatePlan, batch: Batch, accumulate: int) -> Any:
    """``train_step`` lowered for the shapes and places of ``plan`` and ``batch``."""
    return _trace(plan, batch, accumulate).lower()


def _trace(plan: StatePlan, batch: Batch, accumulate: int) -> Any:
    with jax.set_mesh(plan.mesh):
        return train_step.trace(
            plan.graphdef,
            plan.optimizer,
            plan.state,
            plan.constants,
            batch,
            accumulate=accumulate,
            guard=plan.guard,
        )


def _new_model(experiment: Experiment) -> Transformer:
    return Transformer(experiment.model, experiment.position, rngs=nnx.Rngs(experiment.seed))


def _at(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
