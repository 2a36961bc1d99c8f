"""Bytes that a compiled program sends over the network and moves to and from memory.

Each loop body is a computation in XLA's text of the program. It counts as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = ("dynamic-slice", "slice", "gather")
_IDS_OF_A_SLICE = 100_000  # the compiler numbers the devices of slice 2 from 200,000 on
# Of the bytes that a device hands over, how often they are sent, by the slices that take part.
_BETWEEN_SLICES: dict[str, Callable[[int], float]] = {
    "ALL_REDUCE": lambda slices: 2 * (slices - 1) / slices,
    "REDUCE_SCATTER": lambda slices: (slices - 1) / slices,
    "ALL_TO_ALL": lambda slices: (slices - 1) / slices,
    "ALL_GATHER": lambda slices: slices - 1,
    "ONE_TO_ONE": lambda slices: 1,
}
# Views of values, or work that is counted elsewhere.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "add-dependency",
}


class Buffer(NamedTuple):
    bytes: float
    is_in_hbm: bool


class Instruction(NamedTuple):
    """One line of a computation; ``text`` is the rest of the line after the operation ``op``."""

    name: str
    buffers: list[Buffer]
    op: str
    operands: list[str]
    text: str
    is_root: bool

    def attribute(self, name: str) -> str:
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return match[1] if match else ""

    @property
    def hbm_bytes(self) -> float:
        return sum(buffer.bytes for buffer in self.buffers if buffer.is_in_hbm)


Computations = dict[str, list[Instruction]]


class Traffic(NamedTuple):
    """Bytes of one execution on one device.

    Attributes:
      collectives: sent to devices of the same slice, by kind.
      hbm: read and written by each instruction, without on-chip memory and the unused rest of a
        sliced array.
      between_slices: sent through the hosts to devices of other slices.
    """

    collectives: dict[str, float]
    hbm: float
    between_slices: float


def measure_traffic(text: str, dynamic_trips: Callable[[str], float]) -> Traffic:
    """Traffic of a program, ``compiled.as_text()``; for ``dynamic_trips`` see ``program_flops``."""
    computations, entry = parse_program(text)
    collectives: dict[str, float] = defaultdict(float)
    hbm = between_slices = 0.0
    # The compiler can split a collective over several fusions, to overlap it with other work. They
    # share its channel, so it is counted once, as often as the fusion that runs least.
    fused: dict[str, tuple[float, str, float]] = {}
    for name, runs in _count_runs(computations, entry, dynamic_trips).items():
        sources = {x.name: x for x in computations[name]}
        for instruction in computations[name]:
            kind = instruction.op.removesuffix("-start")
            if kind in COLLECTIVES:
                collectives[kind] += runs * _bytes_sent(kind, instruction)
            if kind == "send":
                between_slices += runs * _bytes_between_slices(instruction)
            if instruction.op not in _FREE and not instruction.op.endswith("-done"):
                hbm += runs * _bytes_moved(instruction, sources, computations)
            inside = computations.get(instruction.attribute("calls"), [])
            for x in inside if instruction.op == "fusion" else []:
                if x.op in COLLECTIVES:
                    match = re.search(r"channel_id=(\d+)", x.text)
                    channel = match[1] if match else x.name
                    if channel not in fused or runs < fused[channel][0]:
                        fused[channel] = runs, x.op, _bytes_sent(x.op, x)
    for runs, kind, size in fused.values():
        collectives[kind] += runs * size
    return Traffic(dict(collectives), hbm, between_slices)


def parse_program(text: str) -> tuple[Computations, str]:
    """The computations of a program by name, and the name of the entry; ValueError without one."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if line == "}":
            current = None
        elif line and not line[0].isspace():
            # Other unindented lines are a kernel's notes, in the middle of a computation.
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, shapes, op, rest = match.groups()
            operands = _NAME.findall(rest[: _end_of_operands(rest)])
            current.append(Instruction(name, _buffers(shapes), op, operands, rest, bool(root)))
    if not entry:
        raise ValueError("no ENTRY computation in the program's text")
    return computations, entry


def _end_of_operands(text: str) -> int:
    depth = 1
    for end, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return end
    return len(text)


def _buffers(text: str) -> list[Buffer]:
    buffers = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        bits = re.search(r"\d+", dtype)
        width = _BYTES.get(dtype, int(bits[0]) / 8 if bits else 0)
        count = math.prod(_stored_sizes([int(size) for size in sizes.split(",") if size], layout))
        buffers.append(Buffer(math.ceil(count * width), "S(" not in layout))
    return buffers


def _stored_sizes(sizes: list[int], layout: str) -> list[int]:
    """The sizes of an array in memory, where a layout such as ``1,0:T(8,128)`` fills up tiles.

    The axes before the colon are in order of memory, the fastest first; the tile's last size is
    that of the fastest axis.

    >>> _stored_sizes([512, 64], "1,0:T(8,128)(2,1)"), _stored_sizes([512, 64], "0,1:T(8,128)")
    ([512, 128], [512, 64])
    """
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if not tile or not sizes:
        return sizes
    sizes = list(sizes)
    for axis, block in zip(order.split(","), reversed(tile[1].split(",")), strict=False):
        sizes[int(axis)] = math.ceil(sizes[int(axis)] / int(block)) * int(block)
    return sizes


def _count_runs(
    computations: Computations, entry: str, dynamic_trips: Callable[[str], float]
) -> dict[str, float]:
    """How often each computation runs, those inside fusions and reductions left out."""
    runs: dict[str, float] = defaultdict(float)

    def visit(name: str, count: float) -> None:
        runs[name] += count
        for x in computations[name]:
            if x.op == "while":
                condition = computations[x.attribute("condition")]
                visit(x.attribute("body"), count * _trips(x, condition, dynamic_trips))
            elif x.op == "call":
                visit(x.attribute("to_apply"), count)
            elif x.op == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", x.text)
                sides = (x.attribute(f"{side}_computation") for side in ("true", "false"))
                branches = _NAME.findall(listed[1]) if listed else [side for side in sides if side]
                for branch in branches:
                    visit(branch, count / len(branches))

    visit(entry, 1.0)
    return runs


def _trips(
    loop: Instruction, condition: list[Instruction], dynamic_trips: Callable[[str], float]
) -> float:
    """Trips of a loop: as stated, or the constant of its condition, or those of its name stack."""
    if stated := re.search(r'known_trip_count[^}]*?"?n"?\s*[:=]\s*"?(\d+)', loop.text):
        return float(stated[1])
    constants = {
        x.name: float(match[1])
        for x in condition
        if x.op == "constant" and (match := re.match(r"(-?\d+)\)", x.text))
    }
    compares = [x for x in condition if x.op == "compare" and "direction=LT" in x.text]
    bounds = [constants[n] for x in compares for n in x.operands if n in constants]
    if not compares and len(constants) == 1:  # the comparison is inside a fusion
        bounds = list(constants.values())
    if len(bounds) == 1:
        return bounds[0]
    names = re.search(r'op_name="([^"]*)"', loop.text)
    return dynamic_trips(names[1] if names else "")


def _bytes_sent(kind: str, collective: Instruction) -> float:
    """Bytes that a device sends with the ring algorithm, the least possible."""
    sizes = [buffer.bytes for buffer in collective.buffers]
    if kind == "collective-permute":
        return float(sizes[0])
    is_async = collective.op.endswith("-start") and len(sizes) > 1
    if is_async and kind in ("all-gather", "reduce-scatter"):
        sizes = sizes[len(sizes) // 2 :]  # inputs, then outputs
    group = _group_size(collective.text)
    share = (group - 1) / group
    factors = {"all-reduce": 2 * share, "reduce-scatter": float(group - 1)}
    return sum(sizes) * factors.get(kind, share)


def _bytes_between_slices(send: Instruction) -> float:
    """Bytes that a device's host sends to other slices for it, with the ring algorithm.

    The compiler hands each collective between slices to the hosts, as a ``send`` and a ``recv``.
    """
    kind = re.search(r'_xla_megascale_transfer_type="([^"]*)"', send.text)
    if not kind:  # to the host itself
        return 0.0
    count = _count_slices(send.text)
    if kind[1] not in _BETWEEN_SLICES or not count:
        raise ValueError(
            f"transfer between slices {kind[1]!r}: expected one of {', '.join(_BETWEEN_SLICES)} "
            "with a target such as {1,2}x{0:15} or {{100000,200000},{300000,400000}}"
        )
    return send.buffers[0].bytes * _BETWEEN_SLICES[kind[1]](count)


def _count_slices(text: str) -> int:
    """Slices that take part in a transfer; 0 where its target cannot be read."""
    # Slices 1 and 2, devices 0 to 15 of each: "{1,2}x{0:15}".
    if product := re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', text):
        ranges = (part.split(":") for part in product[1].split(","))
        return sum(int(found[-1]) - int(found[0]) + 1 for found in ranges)
    # Slices 1 and 2, and apart from them 3 and 4, one device of each: {{100000,200000},{300000,...
    # From slice 1 to 2, and back: {{100000->200004},{200000->100004}}.
    if groups := re.search(r"_xla_megascale_target=\{\{([\d,>-]+)\}", text):
        devices = re.findall(r"\d+", groups[1])
        return len({int(device) // _IDS_OF_A_SLICE for device in devices})
    return 0


def _group_size(text: str) -> int:
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(tiled[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(listed[1].split(",")) if listed else 1


def _bytes_moved(
    x: Instruction, sources: dict[str, Instruction], computations: Computations
) -> float:
    if x.op in SLICES:
        return 2.0 * x.hbm_bytes
    if x.op == "send":  # its result is its operand
        return x.hbm_bytes
    if x.op.endswith("-start"):
        return _bytes_started(x, sources)
    if x.op == "dynamic-update-slice":
        return 2.0 * _update_bytes(x, sources, default=0.0)
    fused = computations.get(x.attribute("calls"), [])
    total = _bytes_written(x, fused)
    for index, name in enumerate(x.operands):
        source = sources.get(name)
        if source and source.buffers and source.buffers[0].is_in_hbm:
            size = sum(buffer.bytes for buffer in source.buffers)
            total += min(size, _bytes_read(fused, index, size))
    return total


def _bytes_started(x: Instruction, sources: dict[str, Instruction]) -> float:
    """Bytes that an asynchronous copy, slice or collective moves.

    Its result lists its operands as well, then what is written: ``((operands), results, state)``;
    of a copy ``(result, operand, state)``.
    """
    operands = [sources[name] for name in x.operands if name in sources]
    read = sum(operand.hbm_bytes for operand in operands)
    if x.op == "copy-start":
        return (x.buffers[0].bytes if x.buffers[0].is_in_hbm else 0.0) + read
    results = x.buffers[len(x.operands) :]
    written = sum(buffer.bytes for buffer in results if buffer.is_in_hbm)
    if x.op.removesuffix("-start") in SLICES:  # it reads no more than it gives
        read = min(read, results[0].bytes)
    return written + read


def _update_bytes(x: Instruction, sources: dict[str, Instruction], default: float) -> float:
    update = sources.get(x.operands[1])
    return sum(buffer.bytes for buffer in update.buffers) if update else default


def _bytes_read(fused: list[Instruction], index: int, size: float) -> float:
    """Bytes of operand ``index`` that a fusion reads: only its slices if it uses nothing else."""
    parameters = [x for x in fused if x.op == "parameter" and x.text.startswith(f"{index})")]
    if not parameters:
        return size
    name, total = parameters[0].name, 0.0
    for user in (x for x in fused if name in x.operands):
        is_first = user.operands[0] == name
        if user.op in SLICES and is_first:
            total += sum(buffer.bytes for buffer in user.buffers)
        elif user.op != "tuple" and not (user.op == "dynamic-update-slice" and is_first):
            return size  # it reads the whole operand
    return total


def _bytes_written(x: Instruction, fused: list[Instruction]) -> float:
    """Bytes of its results; of an in-place update only the new part."""
    sources = {y.name: y for y in fused}
    roots = [y for y in fused if y.is_root]
    if roots and roots[0].op == "tuple":
        roots = [sources.get(name) for name in roots[0].operands]
    if len(roots) != len(x.buffers):
        return x.hbm_bytes
    total = 0.0
    for buffer, root in zip(x.buffers, roots, strict=True):
        while root and root.op == "bitcast":
            root = sources.get(root.operands[0])
        if not buffer.is_in_hbm or (root and root.op == "parameter"):
            continue
        if root and root.op == "dynamic-update-slice":
            total += _update_bytes(root, sources, buffer.bytes)
        else:
            total += buffer.bytes
    return total
