"""Which position embedding still finds what it read beyond 512 tokens, at the paper's head_dim?

    python -m experiments.paper_scale run --minutes 8      what is not done yet, as far as it fits
    python -m experiments.paper_scale list                 what is done and what is to come
    python -m experiments.paper_scale tables               of the rows that are there
    python -m experiments.paper_scale figures              into experiments/paper_scale/figures

One accelerator, no network, no text. A run is a method and a seed; its file in
experiments/paper_scale/results is written when it ends, and it is not trained again. The page:
`fope report experiments/paper_scale/results/*.jsonl -o runs/paper_scale/page`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.paper_scale.units import PAPER, SMALL, Scale, Unit, all_units

RESULTS = Path(__file__).parent / "results"
UPDATES = 3000


def result_file(unit: Unit, results: Path) -> Path:
    return results / f"{unit.name}.jsonl"


def run_all(
    units: Sequence[Unit],
    minutes: float,
    results: Path,
    run: Callable[[Unit], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Unit]:
    """Runs what is not done, in order, until the next run might not end in time.

    A run is taken to last as long as the longest so far; the first is always begun.

    Args:
      minutes: for all.
      run: trains and tests one unit and writes its file.
      clock: seconds.

    Returns:
      The units that are left.
    """
    began, longest = clock(), 0.0
    waiting = [unit for unit in units if not result_file(unit, results).exists()]
    while waiting:
        start = clock()
        if longest and start - began + longest > 60 * minutes:
            break
        run(waiting[0])
        longest = max(longest, clock() - start)
        unit = waiting.pop(0)
        print(
            f"{unit.name}: done in {clock() - start:.0f} s; {clock() - began:.0f} s of "
            f"{60 * minutes:.0f} s; {len(waiting)} to come",
            file=sys.stderr,
            flush=True,
        )
    return waiting


class Runner:
    """Runs units one by one; keeps a method's programs for its seeds, and a seed's data."""

    def __init__(self, scale: Scale, results: Path, processes: int) -> None:
        import jax

        self.scale, self.results, self.processes = scale, results, processes
        self.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self.programs, self.data, self.of_data = {}, None, None

    def __call__(self, unit: Unit) -> None:
        from experiments.paper_scale.data import SeedData
        from experiments.paper_scale.training import make_programs, run_unit
        from experiments.paper_scale.units import unit_experiment
        from fope_jax.report.results import write_results

        experiment = unit_experiment(unit, self.scale, self.dtype)
        if self.of_data != (unit.seed, unit.updates):
            self.close()
            self.data = SeedData(experiment, self.scale.contexts, self.processes)
            self.of_data = (unit.seed, unit.updates)
        assert self.data
        if unit.method not in self.programs:
            self.programs[unit.method] = make_programs(experiment)
        path, contexts = result_file(unit, self.results), self.scale.contexts
        run = run_unit(experiment, self.programs[unit.method], self.data, contexts, path)
        write_results(run, path)

    def close(self) -> None:
        if self.data:
            self.data.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper_scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "list", "tables", "figures"])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all runs (8)")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"of a run ({UPDATES})")
    parser.add_argument("--seeds", type=int, default=5, help="at most so many (5)")
    parser.add_argument(
        "--processes", type=int, help="that draw windows (all cores but one, at most 8)"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see it run on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    for name in ("minutes", "updates", "seeds"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} {getattr(arguments, name)}: expected a number above 0")
    if arguments.small and arguments.results == RESULTS:
        parser.error("--small: give --results, so that its rows do not stand among the others")
    units = all_units(arguments.updates, arguments.seeds)
    if arguments.command in ("tables", "figures"):
        from experiments.paper_scale.figures import write_figures
        from experiments.paper_scale.tables import all_tables, read_results

        try:
            runs = read_results(arguments.results)
        except ValueError as error:
            parser.error(str(error))
        if arguments.command == "tables":
            print(all_tables(runs))
        else:
            for path in write_figures(runs, arguments.results.parent / "figures"):
                print(path)
    elif arguments.command == "list":
        for unit in units:
            is_done = result_file(unit, arguments.results).exists()
            print("done" if is_done else "-   ", unit.name)
    else:
        processes = arguments.processes
        if processes is None:
            processes = min(8, len(os.sched_getaffinity(0)) - 1)
        runner = Runner(SMALL if arguments.small else PAPER, arguments.results, processes)
        try:
            left = run_all(units, arguments.minutes, arguments.results, runner)
        finally:
            runner.close()
        if left:
            print(f"{len(left)} runs are left; the same command goes on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
