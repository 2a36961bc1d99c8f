"""Figures of TPU chips, in one table with their source."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """What one chip has; a roofline divides by these.

    Attributes:
      name: as in topology names, "v5e".
      kind: the compiler's name, ``device_kind``.
      flops: bfloat16 operations a second.
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second over all links of the chip to its neighbours.
      cores: devices that the compiler lists for a chip; each has that part of the figures.
      grid: axes of a topology name.
      config: what the compiler calls the way in which the machines set the chip up; "" is its
        default. That of v4 lists each of the two cores as a device, but its machines join them
        into one ("megacore"), which has the memory of both. v5p is joined by default.
    """

    name: str
    kind: str
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    cores: int
    grid: int
    config: str = ""


# Google Cloud documentation, "TPU architecture", the pages of each version: peak compute per chip
# (bf16), HBM bandwidth per chip, and inter-chip interconnect bandwidth per chip (there in Gbit/s
# for most). Memory is not here: how much of it a program may use, the compiler itself says.
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
