"""Sharding rules: the mesh axes over which each logical axis of an array is split.

The mesh is the one set with ``jax.set_mesh``. Without one, or with a single device, these functions
leave arrays as they are.

  data     copies of the model, with different rows of the batch
  fsdp     rows of the batch; parameters are sharded and gathered layer by layer
  context  the tokens of a row; parameters are sharded along it too
  tensor   heads, the MLP's hidden width, and the vocabulary

Several TPU slices make one mesh. Within a slice chips are joined by their own links, between slices
by the data center's network (DCN), some fifty times slower. So "data" and "fsdp" alone run over
slices, as their outer part: ``MeshConfig.dcn_data`` and ``dcn_fsdp``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fope_jax.position.base import PositionEmbedding
from fope_jax.typing import Array

MESH_AXES = ("data", "fsdp", "context", "tensor")
SLICE_AXES = ("dcn_data", "dcn_fsdp")

Axes = tuple[str | None, ...]

AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# "embed" is d_model as an axis of a parameter. Activations are not split along d_model.
PARAMETER_AXES: dict[str, Axes] = {
    "embedding": ("vocab", "embed"),
    "unembedding": ("embed", "vocab"),
    "final_norm": (None,),
}
LAYER_PARAMETER_AXES: dict[str, Axes] = {
    "attention_norm": (None,),
    "query": ("embed", "heads", None),
    "key": ("embed", "heads", None),
    "value": ("embed", "heads", None),
    "out": ("heads", None, "embed"),
    "query_bias": ("heads", None),
    "key_bias": ("heads", None),
    "value_bias": ("heads", None),
    "query_norm": (None,),
    "key_norm": (None,),
    "sinks": ("heads",),
    "mlp_norm": (None,),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices of a slice along each mesh axis, and slices; one of each may be -1, the rest.

    A slice is a TPU slice, or the GPUs that NVLink joins: the devices of one ``slice_index``.

    Attributes:
      data: copies of the model, with different rows of the batch.
      fsdp: devices that share rows of the batch and keep parts of the parameters.
      context: devices that share the tokens of a row.
      tensor: devices that share heads, the MLP's hidden width and the vocabulary.
      dcn_data: slices with copies of the model; gradients alone cross the slow network.
      dcn_fsdp: slices that share one copy; parameters cross the slow network as well.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    dcn_data: int = -1
    dcn_fsdp: int = 1

    def __post_init__(self) -> None:
        for axes, all_of in ((MESH_AXES, "devices"), (SLICE_AXES, "slices")):
            sizes = {name: getattr(self, name) for name in axes}
            for name, size in sizes.items():
                if size != -1 and size < 1:
                    raise ValueError(
                        f"mesh.{name}={size}: expected 1 or more, or -1 for all {all_of} that are "
                        "left"
                    )
            open_axes = [f"mesh.{name}=-1" for name, size in sizes.items() if size == -1]
            if len(open_axes) > 1:
                raise ValueError(f"{' and '.join(open_axes)}: only one axis may be -1")

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Parses ``text``, axes left out keep their defaults; ValueError if it cannot be read.

        >>> MeshConfig.parse("context=8,tensor=2")
        MeshConfig(data=1, fsdp=-1, context=8, tensor=2, dcn_data=-1, dcn_fsdp=1)
        """
        sizes = {}
        for part in text.split(","):
            name, _, size = part.strip().partition("=")
            number = re.fullmatch(r"-?[0-9]{1,9}", size)
            if name in ("dcn_context", "dcn_tensor"):
                raise ValueError(
                    f"mesh {text!r}: {name}: tokens of a row and heads are exchanged in every "
                    f"layer, too often for the network between slices; it takes "
                    f"{' and '.join(SLICE_AXES)}"
                )
            if name not in MESH_AXES + SLICE_AXES or name in sizes or not number:
                raise ValueError(
                    f"mesh {text!r}: cannot read {part!r}; expected AXIS=SIZE with an axis of "
                    f"{', '.join(MESH_AXES + SLICE_AXES)}, once each"
                )
            sizes[name] = int(size)
        return cls(**sizes)

    def axis_sizes(self, num_devices: int, num_slices: int = 1) -> dict[str, int]:
        """Devices of all slices along each axis; ValueError unless all are used.

        >>> MeshConfig(tensor=2).axis_sizes(8)
        {'data': 1, 'fsdp': 4, 'context': 1, 'tensor': 2}
        >>> MeshConfig(tensor=2).axis_sizes(8, num_slices=2)
        {'data': 2, 'fsdp': 2, 'context': 1, 'tensor': 2}
        """
        slices = self.slice_sizes(num_slices)
        return {
            name: size * slices[name]
            for name, size in self.sizes_within_a_slice(num_devices, num_slices).items()
        }

    def sizes_within_a_slice(self, num_devices: int, num_slices: int = 1) -> dict[str, int]:
        """Devices of one slice along each axis; ValueError unless all are used."""
        there_are = f"there are {num_devices // num_slices}"
        if num_slices > 1:
            there_are += f" in each of {num_slices} slices"
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        return _fill(sizes, num_devices // num_slices, "devices", there_are)

    def slice_sizes(self, num_slices: int) -> dict[str, int]:
        """Slices along each mesh axis; ValueError unless all are used.

        >>> MeshConfig(dcn_fsdp=2).slice_sizes(4)
        {'data': 2, 'fsdp': 2, 'context': 1, 'tensor': 1}
        """
        sizes = {name: getattr(self, name) for name in SLICE_AXES}
        filled = _fill(sizes, num_slices, "slices", f"there are {num_slices}")
        return dict.fromkeys(MESH_AXES, 1) | {
            name.removeprefix("dcn_"): size for name, size in filled.items()
        }


def _fill(sizes: dict[str, int], count: int, unit: str, there_are: str) -> dict[str, int]:
    """``sizes`` with the rest of ``count`` in place of -1; ValueError unless all are used."""
    given = math.prod(size for size in sizes.values() if size != -1)
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if -1 not in sizes.values() and given != count:
        raise ValueError(f"mesh: {text}: needs {given} {unit}, {there_are}")
    if count % given:
        raise ValueError(
            f"mesh: {text}: the sizes that are given need a multiple of {given} {unit}, {there_are}"
        )
    return {name: count // given if size == -1 else size for name, size in sizes.items()}


def devices_by_slice(devices: Sequence[Any]) -> list[list[Any]]:
    """Groups of devices that fast links join: TPU slices, or GPUs with NVLink; one on CPU.

    ValueError unless all have as many.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        # Newer GPU plugins call a slice a partition.
        index = getattr(device, "slice_index", getattr(device, "partition_index", 0))
        slices.setdefault(index, []).append(device)
    if len({len(found) for found in slices.values()}) > 1:
        listed = ", ".join(f"slice {index} has {len(slices[index])}" for index in sorted(slices))
        raise ValueError(f"mesh: {listed} devices; all slices need as many")
    return [slices[index] for index in sorted(slices)]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of ``devices`` (default ``jax.devices()``); ValueError as for ``axis_sizes``.

    A mesh axis that is not a product of physical axes, such as 2 on a slice of 4 x 4, shares one
    with another mesh axis; ``jax.make_mesh`` refuses that on most chips.
    """
    slices = devices_by_slice(jax.devices() if devices is None else devices)
    over = tuple(config.slice_sizes(len(slices)).values())
    sizes = config.sizes_within_a_slice(len(slices) * len(slices[0]), len(slices)).values()
    blocks = np.empty(over, object)
    for place, found in zip(np.ndindex(over), slices, strict=True):
        blocks[place] = create_device_mesh(tuple(sizes), found, allow_split_physical_axes=True)
    grid = np.block(blocks.tolist())
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def active_mesh() -> Any:
    """The abstract mesh that is set; None without one or if it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    missing = [name for name in MESH_AXES if name not in mesh.shape]
    if missing:
        raise ValueError(f"mesh with axes {mesh.axis_names}: expected {MESH_AXES}")
    return mesh


def axis_size(mesh: Any, axis: str) -> int:
    """Devices that a logical axis is split over.

    >>> axis_size(jax.sharding.AbstractMesh((2, 4, 1, 1), MESH_AXES), "batch")
    8
    """
    return math.prod(mesh.shape[name] for name in AXIS_RULES[axis])


def partition_spec(axes: Axes) -> P:
    """The PartitionSpec of an array with these logical axes.

    >>> tuple(partition_spec(("batch", "length", None)))
    (('data', 'fsdp'), 'context', None)
    """
    names = [AXIS_RULES[axis] if axis else (None,) for axis in axes]
    return P(*(name[0] if len(name) == 1 else name for name in names))


def constrain(x: Array, axes: Axes) -> Array:
    """Shards ``x`` over the active mesh by ``axes``; an axis of size 1 stays whole."""
    if active_mesh() is None:
        return x
    axes = tuple(None if size == 1 else axis for size, axis in zip(x.shape, axes, strict=True))
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def constrain_gathered(weight: Array, axes: Axes) -> Array:
    """Gathers a parameter along "embed", as a matrix product needs it."""
    return constrain(weight, tuple(None if axis == "embed" else axis for axis in axes))


def parameter_axes(path: tuple[str, ...], position: PositionEmbedding) -> Axes:
    """Logical axes of the weight or position variable at ``path`` in the tree from ``split``.

    The path decides, not the name alone: a method may name its variables "gate" or "query" too.

    >>> from fope_jax.position import ALiBi
    >>> parameter_axes(("layers", "query"), ALiBi())
    (None, 'embed', 'heads', None)
    >>> parameter_axes(("position_model", "slopes"), ALiBi())
    ('heads',)
    """
    match path:
        case ("layers", name):
            return (None, *LAYER_PARAMETER_AXES[name])
        case ("position_layers", name):
            return (None, *position.variable_axes(name))
        case ("position_model", name):
            return position.variable_axes(name)
        case (name,):
            return PARAMETER_AXES[name]
    raise ValueError(f"no array of a Transformer lies at {'.'.join(path)}")


def tree_shardings(tree: Any, position: PositionEmbedding, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of ``split``; ValueError if an axis does not divide."""

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = parameter_axes(tuple(entry.key for entry in path), position)
        axes = axes + (None,) * (len(leaf.shape) - len(axes))
        for size, axis in zip(leaf.shape, axes, strict=True):
            if axis is not None and size % axis_size(mesh, axis):
                raise ValueError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.shape}: its "
                    f"axis {axis!r} of {size} is not a multiple of mesh "
                    f"{' * '.join(AXIS_RULES[axis])} = {axis_size(mesh, axis)}"
                )
        return NamedSharding(mesh, partition_spec(axes))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def batch_sharding(x: Any, mesh: Mesh) -> NamedSharding:
    """The sharding of a batch array ``[B, T]`` or ``[1, T]``."""
    return NamedSharding(mesh, batch_partition(x))


def batch_partition(x: Any) -> P:
    """The PartitionSpec of ``[B, T]``, or of ``[1, T]`` that is shared by all rows."""
    return partition_spec(("batch" if x.shape[0] > 1 else None, "length"))


def device_put_sharded(x: Any, sharding: NamedSharding) -> Array:
    """Shards a host array, which every process holds whole, over the devices of all processes."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
