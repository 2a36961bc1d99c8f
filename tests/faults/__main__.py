"""The fault table: `python -m tests.faults [--trials N] [--match TEXT] [--short | --broken]`.

Breaks runs in every way that is promised to be survived, and prints how often it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults import data_faults, setups, steps, stops, storage
from tests.faults.broken import BREAKS, finds
from tests.faults.fault import Fault


def faults() -> list[Fault]:
    """All faults, those of a run first."""
    modules = (stops, storage, steps, setups, data_faults)
    return [fault for module in modules for fault in module.FAULTS]


def survived(fault: Fault, trials: int) -> int:
    """Runs the first trials of a fault; says why where one is lost."""
    count = 0
    for seed in range(trials):
        with tempfile.TemporaryDirectory(prefix="fope-fault-") as directory:
            try:
                fault.trial(Path(directory), seed)
                count += 1
            except Exception:
                print(f"{fault.name}, trial {seed}:\n{traceback.format_exc()}", file=sys.stderr)
    return count


def try_the_trials(match: str) -> int:
    """Prints what each trial says of a promise that is broken; returns 1 where it says nothing."""
    chosen = {name: one for name, one in BREAKS.items() if match in one.fault}
    missed = 0
    for name, broken in chosen.items():
        said = finds(broken, faults())
        missed += said is None
        print(f"{name:32}  {broken.fault}: {said or 'NOT FOUND'}", flush=True)
    print(f"{len(chosen)} promises broken, {len(chosen) - missed} found")
    return 1 if missed else 0


def main() -> int:
    """Prints the table; returns 1 where a trial was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, help="at most so many of each fault")
    parser.add_argument("--match", default="", help="only faults with this in their name")
    parser.add_argument("--short", action="store_true", help="the trials of the fast suite")
    parser.add_argument(
        "--broken",
        action="store_true",
        help="try the trials: break each promise on purpose and see that its trial finds it",
    )
    arguments = parser.parse_args()
    if arguments.broken:
        return try_the_trials(arguments.match)
    chosen = [fault for fault in faults() if arguments.match in fault.name]
    width = max((len(fault.name) for fault in chosen), default=5)
    print(f"{'fault':{width}}  trials  survived  lost  seconds")
    all_lost = 0
    for fault in chosen:
        trials = fault.short if arguments.short else fault.trials
        trials = trials if arguments.trials is None else min(trials, arguments.trials)
        began = time.monotonic()
        count = survived(fault, trials)
        seconds, lost = time.monotonic() - began, trials - count
        print(f"{fault.name:{width}}  {trials:6}  {count:8}  {lost:4}  {seconds:7.1f}", flush=True)
        all_lost += lost
    return 1 if all_lost else 0


if __name__ == "__main__":
    sys.exit(main())
