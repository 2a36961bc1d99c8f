"""Bytes that a compiled program moves: over the network by kind, and to and from memory.

XLA's text of the program has one computation for each loop body. Each is counted as often as its
loop runs, which is read from the loop's condition.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Names for a value, or work that is counted where it is done.
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
    bytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    """One instruction: its name, the arrays it makes, what it does, and the rest of its text.

    ``root`` is set where its value is that of the computation.
    """

    name: str
    arrays: list[Buffer]
    op: str
    rest: str
    root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names between the parentheses."""
        depth = 1
        for end, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return _OPERAND.findall(self.rest[:end])
        return _OPERAND.findall(self.rest)

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


class Traffic(NamedTuple):
    """Bytes of one execution on one device.

    Attributes:
      collectives: sent over the network, by kind.
      hbm: read from and written to memory by each instruction; what stays in on-chip memory, and
        the part of an array that a slice leaves out, do not count.
    """

    collectives: dict[str, float]
    hbm: float


def measure_traffic(text: str, dynamic_trips: float) -> Traffic:
    """What a program moves, with every loop counted as often as it runs.

    Args:
      text: ``compiled.as_text()``.
      dynamic_trips: for loops whose count is only known at run time, see ``program_flops``.
    """
    computations, entry = parse_program(text)
    executions = _executions(computations, entry, dynamic_trips)
    collectives: dict[str, float] = defaultdict(float)
    hbm = 0.0
    fused: dict[str, tuple[float, str, float]] = {}
    for name, times in executions.items():
        lines = computations[name]
        made = {line.name: line for line in lines}
        for line in lines:
            kind = line.op.removesuffix("-start")
            if kind in COLLECTIVES:
                collectives[kind] += times * _sent(kind, line)
            if line.op not in _FREE and not line.op.endswith("-done"):
                hbm += times * _moved(line, made, computations)
            if line.op == "fusion":
                for inside in computations.get(line.attribute("calls") or "", []):
                    if inside.op in COLLECTIVES:
                        _keep_least(fused, inside, times)
    for times, kind, size in fused.values():
        collectives[kind] += times * size
    return Traffic(dict(collectives), hbm)


def _keep_least(
    fused: dict[str, tuple[float, str, float]], line: Instruction, times: float
) -> None:
    """Notes a collective inside a fusion.

    The compiler spreads one over several fusions that begin it, go on with it beside other work and
    end it; they have its channel in common. It runs as often as the fusion that runs least.
    """
    found = re.search(r"channel_id=(\d+)", line.rest)
    channel = found[1] if found else line.name
    if channel not in fused or times < fused[channel][0]:
        fused[channel] = times, line.op, _sent(line.op, line)


def parse_program(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and which one is the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for row in text.splitlines():
        if row == "}":
            current = None
        elif row and not row[0].isspace():
            # Other lines that start here are a kernel's notes, in the middle of a computation.
            if header := _HEADER.match(row):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif current is not None and (found := _LINE.match(row)):
            root, name, shapes, op, rest = found.groups()
            current.append(Instruction(name, _arrays(shapes), op, rest, bool(root)))
    if not entry:
        raise ValueError("no ENTRY computation in the program's text")
    return computations, entry


def _arrays(text: str) -> list[Buffer]:
    found = []
    for kind, sizes, layout in _ARRAY.findall(text):
        width = _BYTES.get(kind)
        if width is None:
            bits = re.search(r"\d+", kind)
            width = int(bits[0]) / 8 if bits else 0
        count = math.prod(int(size) for size in sizes.split(",") if size)
        found.append(Buffer(math.ceil(count * width), "S(1)" not in layout))
    return found


def _executions(computations, entry: str, dynamic_trips: float) -> dict[str, float]:
    """How often each computation runs that is not part of a fusion or of a reduction."""
    times: dict[str, float] = defaultdict(float)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for line in computations[name]:
            if line.op == "while":
                body, condition = line.attribute("body"), line.attribute("condition")
                trips = _trips(line, computations[condition], dynamic_trips)
                visit(body, count * trips)
            elif line.op == "call":
                visit(line.attribute("to_apply"), count)
            elif line.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
                names = _OPERAND.findall(branches[1]) if branches else []
                sides = (line.attribute(f"{side}_computation") for side in ("true", "false"))
                names = names or [name for name in sides if name]
                for branch in names:
                    visit(branch, count / len(names))

    visit(entry, 1.0)
    return times


def _trips(line: Instruction, condition: list[Instruction], dynamic_trips: float) -> float:
    stated = re.search(r'known_trip_count[^}]*?"?n"?\s*[:=]\s*"?(\d+)', line.rest)
    if stated:
        return float(stated[1])
    constants = {
        x.name: int(x.rest.split(")")[0])
        for x in condition
        if x.op == "constant" and re.match(r"-?\d+\)", x.rest)
    }
    compares = [x for x in condition if x.op == "compare" and "direction=LT" in x.rest]
    bounds = [constants[n] for x in compares for n in x.operands if n in constants]
    if not compares and len(constants) == 1:  # the comparison lies in a fusion
        bounds = list(constants.values())
    return float(bounds[0]) if len(bounds) == 1 else dynamic_trips


def _group(line: Instruction) -> int:
    """How many devices take part in one group of a collective."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line.rest)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", line.rest)
    if tiled:
        return int(tiled[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line.rest)
    return len(listed[1].split(",")) if listed else 1


def _sent(kind: str, line: Instruction) -> float:
    """Bytes that a device sends: of the ring algorithm, which is the least there can be."""
    group = _group(line)
    sizes = [array.bytes for array in line.arrays]
    if kind == "collective-permute":
        return float(sizes[0])
    if line.op.endswith("-start") and len(sizes) > 1 and kind in ("all-gather", "reduce-scatter"):
        sizes = sizes[len(sizes) // 2 :]  # (what goes in, what comes out)
    size = sum(sizes)
    share = (group - 1) / group
    return size * {"all-reduce": 2 * share, "reduce-scatter": float(group - 1)}.get(kind, share)


def _moved(line: Instruction, made: dict[str, Instruction], computations) -> float:
    """Bytes that an instruction reads and writes in memory."""
    if line.op in ("dynamic-slice", "slice", "gather"):
        return 2.0 * sum(x.bytes for x in line.arrays if x.in_hbm)
    if line.op == "dynamic-update-slice":
        update = made.get(line.operands[1])
        return 2.0 * sum(x.bytes for x in update.arrays) if update else 0.0
    inside = computations.get(line.attribute("calls") or "", [])
    total = _written(line, inside)
    for index, name in enumerate(line.operands):
        source = made.get(name)
        if source is None or not source.arrays or not source.arrays[0].in_hbm:
            continue
        whole = sum(x.bytes for x in source.arrays)
        total += min(whole, _taken(inside, index, whole))
    return total


def _taken(inside: list[Instruction], index: int, whole: float) -> float:
    """How much of its operand a fusion reads: slices of it, where it does nothing else with it."""
    parameter = next(
        (x for x in inside if x.op == "parameter" and x.rest.startswith(f"{index})")), None
    )
    if parameter is None:
        return whole
    taken = 0.0
    for user in (x for x in inside if parameter.name in x.operands):
        if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
            taken += sum(x.bytes for x in user.arrays)
        elif user.op == "tuple" or (
            user.op == "dynamic-update-slice" and user.operands[0] == parameter.name
        ):
            continue  # handed on, or written into
        else:
            return whole
    return taken


def _written(line: Instruction, inside: list[Instruction]) -> float:
    """Bytes of its results, and of those that update an array in place the new part only."""
    root = next((x for x in inside if x.root), None)
    if root is None:
        return float(sum(x.bytes for x in line.arrays if x.in_hbm))
    made = {x.name: x for x in inside}
    sources = [made.get(name) for name in root.operands] if root.op == "tuple" else [root]
    if len(sources) != len(line.arrays):
        return float(sum(x.bytes for x in line.arrays if x.in_hbm))
    total = 0.0
    for array, source in zip(line.arrays, sources, strict=True):
        while source is not None and source.op == "bitcast":
            source = made.get(source.operands[0])
        if not array.in_hbm or (source is not None and source.op == "parameter"):
            continue
        update = None
        if source is not None and source.op == "dynamic-update-slice":
            update = made.get(source.operands[1])
        total += sum(x.bytes for x in update.arrays) if update else array.bytes
    return total
