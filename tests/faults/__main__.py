"""The fault table: `python -m tests.faults [--trials N] [--match TEXT] [--short]`.

Breaks runs in every way that is promised to be survived, and prints how often it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults import data_faults, run_faults
from tests.faults.fault import Fault


def faults() -> list[Fault]:
    """The faults of both tables."""
    return [*run_faults.FAULTS, *data_faults.FAULTS]


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


def main() -> int:
    """Prints the table; returns 1 where a trial was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, help="at most so many of each fault")
    parser.add_argument("--match", default="", help="only faults with this in their name")
    parser.add_argument("--short", action="store_true", help="the trials of the fast suite")
    arguments = parser.parse_args()
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
