"""Descriptions of TPU slices that are not there, from the compiler that knows them."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from fope_jax.tpu.chips import CHIPS, Chip

# The compiler looks for a machine around it unless it is told that there is none, and lets only
# one process load it unless it is told that several may.
COMPILER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
INSTALL_COMMAND = "pip install 'fope-jax[tpu-compiler]'"
_EXAMPLES = {2: "4x4", 3: "4x4x4"}


class TopologyError(ValueError):
    """A slice that is unknown, or a compiler that is missing."""


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the chips along each axis of a slice such as "v5e:4x4".

    Raises:
      TopologyError: naming what is known.

    >>> parse_topology("v5e:4x4")[1]
    (4, 4)
    """
    version, _, shape = name.partition(":")
    known = ", ".join(f"{c.name}:{_EXAMPLES[c.grid]}" for c in CHIPS.values())
    if version not in CHIPS:
        raise TopologyError(f"topology {name!r}: unknown TPU version {version!r}; such as {known}")
    chip = CHIPS[version]
    if (
        not re.fullmatch(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})*", shape)
        or shape.count("x") != chip.grid - 1
    ):
        raise TopologyError(
            f"topology {name!r}: a slice of {version} has {chip.grid} axes of chips, such as "
            f"{version}:{_EXAMPLES[chip.grid]}"
        )
    return chip, tuple(int(size) for size in shape.split("x"))


def num_devices(name: str) -> int:
    """Devices of a slice: its chips, times the devices that each is.

    >>> num_devices("v4:2x2x1"), num_devices("v5p:2x2x1"), num_devices("tpu7x:2x2x1")
    (4, 4, 8)
    """
    chip, shape = parse_topology(name)
    return math.prod(shape) * chip.cores


def libtpu_version() -> str:
    """The version of the TPU compiler.

    Raises:
      TopologyError: it is not installed; the message has the pip line.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("libtpu")
    except PackageNotFoundError:
        raise TopologyError(
            f"the TPU compiler is not installed: {INSTALL_COMMAND} (no TPU is needed)"
        ) from None


def topology_devices(name: str) -> list[Any]:
    """The devices of a slice, as descriptions that a program can be compiled for.

    Must run in a process whose environment has had ``COMPILER_ENVIRONMENT`` since jax was imported.

    Raises:
      TopologyError: an unknown slice, or one that the compiler refuses.
    """
    chip, shape = parse_topology(name)
    libtpu_version()
    missing = [key for key in COMPILER_ENVIRONMENT if key not in os.environ]
    if missing:
        raise TopologyError(f"{', '.join(missing)} must be set before jax is imported")
    from jax.experimental import topologies

    options = {"chip_config_name": chip.config} if chip.config else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        ).devices
    except Exception as error:
        raise TopologyError(
            f"topology {name!r}: the compiler does not know this slice: {error}"
        ) from error
    if len(devices) != math.prod(shape) * chip.cores:
        raise TopologyError(
            f"topology {name!r}: the compiler lists {len(devices)} devices, expected "
            f"{math.prod(shape) * chip.cores}"
        )
    return list(devices)
