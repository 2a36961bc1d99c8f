"""TPU chips with their peak figures, and slices as the TPU compiler describes them."""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

from fope_jax.extras import install_command

# Without these the compiler looks for a TPU machine, and only one process may load it.
COMPILER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
INSTALL_COMMAND = install_command("tpu-compiler")
_EXAMPLES = {2: "4x4", 3: "4x4x4"}


class Chip(NamedTuple):
    """Peak figures of one chip, for rooflines.

    Attributes:
      name: as in topology names, "v5e".
      kind: the compiler's name, ``device_kind``.
      flops: bfloat16 operations per second.
      hbm_bandwidth: bytes per second.
      ici_bandwidth: bytes per second over all links of the chip to its neighbours.
      cores: devices per chip; each has an equal share of the figures.
      num_axes: axes of the chip grid in a topology name.
      config: ``chip_config_name``. By default the compiler has two devices for a v4 chip, but
        machines join them into one with the memory of both ("megacore"). v5p is joined by default.
    """

    name: str
    kind: str
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    cores: int
    num_axes: int
    config: str = ""


# Google Cloud documentation, "TPU architecture", the page of each version: per chip, peak compute
# in bf16, HBM bandwidth and inter-chip interconnect bandwidth (mostly given in Gbit/s). The
# compiler states how much memory a program may use.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 1228e9, 300e9, 1, 3, "megacore"),
        Chip("v5e", "TPU v5 lite", 197e12, 819e9, 200e9, 1, 2),
        Chip("v5p", "TPU v5", 459e12, 2765e9, 600e9, 1, 3),
        Chip("v6e", "TPU v6 lite", 918e12, 1640e9, 448e9, 1, 2),
        Chip("tpu7x", "TPU7x", 2307e12, 7380e9, 1200e9, 2, 3),
    )
}


class TopologyError(ValueError):
    """A slice is unknown, or the compiler is missing."""


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and its count along each axis of a slice; TopologyError with examples if unknown.

    >>> parse_topology("v5e:4x4")[1]
    (4, 4)
    """
    version, _, shape = name.partition(":")
    if version not in CHIPS:
        known = ", ".join(f"{c.name}:{_EXAMPLES[c.num_axes]}" for c in CHIPS.values())
        raise TopologyError(f"topology {name!r}: unknown TPU version {version!r}; such as {known}")
    chip = CHIPS[version]
    sizes = shape.split("x")
    if len(sizes) != chip.num_axes or not all(re.fullmatch("[1-9][0-9]{0,5}", n) for n in sizes):
        raise TopologyError(
            f"topology {name!r}: a slice of {version} has {chip.num_axes} axes of chips, such as "
            f"{version}:{_EXAMPLES[chip.num_axes]}"
        )
    return chip, tuple(int(size) for size in sizes)


def num_devices(name: str) -> int:
    """Devices of a slice: its chips times the devices per chip.

    >>> num_devices("v4:2x2x1"), num_devices("v5p:2x2x1"), num_devices("tpu7x:2x2x1")
    (4, 4, 8)
    """
    chip, shape = parse_topology(name)
    return math.prod(shape) * chip.cores


def libtpu_version() -> str:
    """The version of the TPU compiler; TopologyError with the pip command if not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("libtpu")
    except PackageNotFoundError:
        raise TopologyError(
            f"the TPU compiler is not installed: {INSTALL_COMMAND} (no TPU is needed)"
        ) from None


def topology_devices(name: str) -> list[Any]:
    """Descriptions of a slice's devices; TopologyError if the compiler refuses the slice.

    ``COMPILER_ENVIRONMENT`` must have been set before jax was imported.
    """
    chip, _ = parse_topology(name)
    libtpu_version()
    if missing := COMPILER_ENVIRONMENT.keys() - os.environ.keys():
        raise TopologyError(f"{', '.join(sorted(missing))} must be set before jax is imported")
    from jax.experimental import topologies

    options = {"chip_config_name": chip.config} if chip.config else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise TopologyError(
            f"topology {name!r}: the compiler does not know this slice: {error}"
        ) from error
    if len(description.devices) != num_devices(name):
        raise TopologyError(
            f"topology {name!r}: the compiler lists {len(description.devices)} devices, expected "
            f"{num_devices(name)}"
        )
    return list(description.devices)
