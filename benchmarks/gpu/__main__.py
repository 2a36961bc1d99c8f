"""What an NVIDIA GPU computes and how fast: one command, at most so many minutes, one JSON.

    python -m benchmarks.gpu --minutes 8 --json runs/gpu.json

Installs nothing and needs no network. Parts come in the order of their worth: correctness of every
attention program and every method against the reference (odd lengths, packed rows, windows,
bfloat16); a training step of 60m, 180m and 1200m at 512, 4,096 and 32,768 tokens with its memory;
FoPE and ALiBi beside RoPE; attention alone; the same steps in PyTorch where that is installed. Each
result is written as soon as it is known. What fails, out of memory for one, is kept with its error,
and what did not fit into the time is listed as not run. `--small` runs each kind in small, on a CPU
too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.tables import render
from benchmarks.gpu.units import KINDS, METHOD_GROUPS, OURS, TORCH, Unit, all_units, small_units
from benchmarks.worker import Worker
from fope_jax.storage.files import write_json

MEMORY_FRACTION = "0.92"  # of the GPU for jax, which takes 0.75 by default
NO_TORCH = "torch is not installed"

MakeSide = Callable[[str], Worker]


def measure(
    units: Sequence[Unit],
    make_side: MakeSide,
    minutes: float,
    write: Callable[[dict[str, Any]], None],
    missing: dict[str, str],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Runs the units that fit into the time, one process at a time.

    Args:
      units: in the order of their worth.
      make_side: starts the process of a side.
      minutes: for all; a unit whose estimate is longer than what is left is not begun.
      write: called with the result after each unit.
      missing: sides that cannot run, and why.
      clock: seconds.

    Returns:
      ``rows``, one a unit that was begun, with its ``result`` or ``error``; ``not_run``, each
      unit's name with the ``reason``; ``seconds`` in all.
    """
    began = clock()
    result: dict[str, Any] = {"minutes": minutes, "seconds": 0.0, "rows": [], "not_run": []}
    side: Worker | None = None
    try:
        for unit in units:
            start = clock()
            left = 60 * minutes - (start - began)
            reason = missing.get(unit.side, "")
            if not reason and unit.seconds > left:
                reason = f"it takes about {unit.seconds:.0f} s, and {max(0, left):.0f} s are left"
            if reason:
                result["not_run"].append({"unit": unit.name, "reason": reason})
                continue
            if side is None or side.name != unit.side:
                if side:
                    side.stop()
                side = make_side(unit.side)
            row = {"unit": unit.name, **unit._asdict()}
            del row["seconds"]
            try:
                row |= side.ask(*unit, seconds=min(left, 60 + 4 * unit.seconds))
            except (SystemExit, TimeoutError) as error:  # crashed or hangs: the next gets a new one
                side.stop()
                side = None
                row["error"] = str(error)
            row["unit_seconds"] = round(clock() - start, 1)
            result["rows"].append(row)
            result["seconds"] = round(clock() - began, 1)
            print(
                f"{clock() - began:5.0f} s  {unit.name}: {row.get('error', 'done')}",
                file=sys.stderr,
                flush=True,
            )
            write(result)
    finally:
        if side:
            side.stop()
    result["seconds"] = round(clock() - began, 1)
    write(result)
    return result


def run_unit(unit: Unit) -> dict[str, Any]:
    """``result`` of a unit, in the process of its side."""
    if unit.side == TORCH:
        from benchmarks.gpu import torch_side

        return {"result": torch_side.training_row(unit)}
    from benchmarks.gpu import correctness, speed

    if unit.kind == "machine":
        return {"result": speed.machine_row()}
    if unit.kind == "paths":
        return {"result": correctness.path_rows(unit.batch, unit.length, unit.cases)}
    if unit.kind == "methods":
        rows = correctness.method_rows(
            unit.group, METHOD_GROUPS, unit.batch, unit.length, unit.methods
        )
        return {"result": rows}
    kinds = {
        "training": speed.training_row,
        "cost": speed.cost_row,
        "attention": speed.attention_row,
    }
    return {"result": kinds[unit.kind](unit)}


def serve() -> None:
    """The process of a side: reads units from stdin and answers in JSON, line by line."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms:
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # the reference is computed there
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    for line in sys.stdin:
        unit = Unit(*json.loads(line))
        try:
            answer = run_unit(unit)
        except Exception as error:  # out of memory: its arrays are freed, the next unit goes on
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        print(json.dumps(answer), file=answers, flush=True)


def make_side(name: str, python: str) -> Worker:
    """Starts the process of a side."""
    command = [python if name == TORCH else sys.executable, "-m", "benchmarks.gpu", "--worker"]
    return Worker(name, command, "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (8)")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="(runs/gpu.json)")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these kinds of parts alone")
    parser.add_argument("--small", action="store_true", help="each kind in small, also on a CPU")
    parser.add_argument("--peak", type=float, help="of the device, 1e12 operations a second")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        serve()
        return 0
    if not arguments.minutes > 0:
        parser.error(f"--minutes {arguments.minutes}: expected a number above 0")
    units = small_units() if arguments.small else all_units()
    if arguments.only:
        units = [unit for unit in units if unit.kind in ("machine", *arguments.only)]
    has_torch = arguments.python != sys.executable or importlib.util.find_spec("torch")
    facts = {"command": shlex.join(["python", "-m", "benchmarks.gpu", *(argv or sys.argv[1:])])}
    facts |= {"date": time.strftime("%Y-%m-%d"), "peak": arguments.peak}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    result = measure(
        units,
        lambda name: make_side(name, arguments.python),
        arguments.minutes,
        lambda result: write_json(arguments.json, facts | result),
        {} if has_torch else {TORCH: NO_TORCH},
    )
    print(render(facts | result))
    print(f"\nwritten to {arguments.json}")
    ours = [row for row in result["rows"] if row["side"] == OURS]
    return 0 if ours and not any(map(_is_wrong, ours)) else 1


def _is_wrong(row: dict[str, Any]) -> bool:
    """Whether a program computed something else than the reference, or failed."""
    if "error" in row:
        return row["kind"] in ("machine", "paths", "methods")
    return row["kind"] in ("paths", "methods") and any(
        not check.get("ok", True) for check in row["result"]
    )


if __name__ == "__main__":
    sys.exit(main())
