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
      dcn_bandwidth: bytes per second over the data center's network, the chip's share of its
        machine's; None where it is not published.
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
    dcn_bandwidth: float | None
    config: str = ""


# Google Cloud documentation, "TPU architecture", the page of each version: per chip, peak compute
# in bf16, HBM bandwidth, bandwidth of the inter-chip interconnect and of the data center network
# (mostly given in Gbit/s; v5e's network by its pod of 256 chips). The compiler states how much
# memory a program may use.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 1228e9, 300e9, 1, 3, None, "megacore"),
        Chip("v5e", "TPU v5 lite", 197e12, 819e9, 200e9, 1, 2, 25e9 / 8),
        Chip("v5p", "TPU v5", 459e12, 2765e9, 600e9, 1, 3, 50e9 / 8),
        Chip("v6e", "TPU v6 lite", 918e12, 1640e9, 448e9, 1, 2, 100e9 / 8),
        Chip("tpu7x", "TPU7x", 2307e12, 7380e9, 1200e9, 2, 3, 100e9 / 8),
    )
}


class TopologyError(ValueError):
    """A slice is unknown, or the compiler is missing."""


class Topology(NamedTuple):
    """``num_slices`` equal slices of ``shape`` chips each."""

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int

    @property
    def num_devices(self) -> int:
        """Devices of all slices: their chips times the devices per chip."""
        return self.num_slices * math.prod(self.shape) * self.chip.cores


def parse_topology(name: str) -> Topology:
    """The slice or slices of a name; TopologyError with examples if unknown.

    >>> parse_topology("v5e:4x4").shape, parse_topology("2xv5e:4x4").num_slices
    ((4, 4), 2)
    """
    several = re.match(r"([1-9][0-9]{0,3})x", name)
    version, _, shape = name[several.end() if several else 0 :].partition(":")
    if version not in CHIPS:
        known = ", ".join(f"{c.name}:{_EXAMPLES[c.num_axes]}" for c in CHIPS.values())
        raise TopologyError(
            f"topology {name!r}: unknown TPU version {version!r}; such as {known}; 2xv5e:4x4 is "
            "two slices"
        )
    chip = CHIPS[version]
    sizes = shape.split("x")
    if len(sizes) != chip.num_axes or not all(re.fullmatch("[1-9][0-9]{0,5}", n) for n in sizes):
        raise TopologyError(
            f"topology {name!r}: a slice of {version} has {chip.num_axes} axes of chips, such as "
            f"{version}:{_EXAMPLES[chip.num_axes]}"
        )
    return Topology(chip, tuple(int(size) for size in sizes), int(several[1]) if several else 1)


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
    chip, _, num_slices = topology = parse_topology(name)
    libtpu_version()
    if missing := COMPILER_ENVIRONMENT.keys() - os.environ.keys():
        raise TopologyError(f"{', '.join(sorted(missing))} must be set before jax is imported")
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": chip.config} if chip.config else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=name[name.index(chip.name) :], **options
        )
    except Exception as error:
        raise TopologyError(
            f"topology {name!r}: the compiler does not know this slice: {error}"
        ) from error
    if len(description.devices) != topology.num_devices:
        raise TopologyError(
            f"topology {name!r}: the compiler lists {len(description.devices)} devices, expected "
            f"{topology.num_devices}"
        )
    return list(description.devices)
