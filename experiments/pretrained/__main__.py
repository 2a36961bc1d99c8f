"""What SmolLM2-135M does beyond its 8,192 tokens, and what a short training buys.

    python -m experiments.pretrained run        what is not done yet, unit by unit: about five hours
                                                of two cores; with --all, --windows, --seeds,
                                                --updates more
    python -m experiments.pretrained list       what is done, what is to come, and the hours of two
                                                cores up to there
    python -m experiments.pretrained tables     of the rows that are there
    python -m experiments.pretrained figures    into experiments/pretrained/figures

The model is the run that `fope data download smollm2`, `fope import` and `fope data build` made,
see README.md. Rows are kept in experiments/pretrained/results; a unit whose row is there is not
measured again, so that a stopped run goes on where it was, also on another machine.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from experiments.pretrained.figures import write_figures
from experiments.pretrained.heads import measure_heads
from experiments.pretrained.measure import Text, measure_keys, measure_loss
from experiments.pretrained.tables import Results, all_tables
from experiments.pretrained.trainings import WARMUP, load_model, train_child, training_row
from experiments.pretrained.units import (
    PLACES,
    UPDATES,
    Unit,
    all_units,
    core_seconds,
    main_units,
    variant_text,
)
from fope_jax.evaluate.generation import model_answerer
from fope_jax.evaluate.metrics import read_rows, replace_rows
from fope_jax.evaluate.restore import read_experiment
from fope_jax.evaluate.run_data import find_run_data
from fope_jax.evaluate.scoring import model_scorer
from fope_jax.extend.variants import make_variants
from fope_jax.position import to_spec
from fope_jax.train.workdir import git_commit

RESULTS = Path(__file__).parent / "results"


def is_done(unit: Unit, results: Path) -> bool:
    """Whether the unit's row is kept."""
    rows = read_rows(results / f"{unit.kind}.jsonl")
    return any(unit.key.items() <= row.items() for row in rows)


class Subject:
    """The model, as it was published or after a training, under one variant at a time."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.held: tuple[Any, ...] = ()
        self.texts: dict[str, Any] = {}

    def load(self, unit: Unit) -> None:
        """Makes ``model`` what the unit measures, and trains it where that is to come first."""
        made_of = unit.method if unit.updates else variant_text(unit.method, unit.context)
        wanted = made_of, unit.updates, unit.seed
        if wanted == self.held:
            return
        self.model, self.position = load_model(self.run, unit)
        self.data = find_run_data(self.run, read_experiment(self.run).data)
        self.held = wanted

    def measure(self, unit: Unit) -> dict[str, Any]:
        """The row of a unit without its key."""
        if unit.kind == "training":
            return training_row(train_child(self.run, unit))
        self.load(unit)
        books = self.data.open("validation")
        if unit.kind == "heads":
            row = measure_heads(self.model, books, unit.context, unit.window)
        elif unit.kind == "every_key":
            answerer = model_answerer(self.model)
            row = measure_keys(answerer, books, unit.text, unit.context, unit.window)
        else:
            if unit.text not in self.texts:
                self.texts[unit.text] = Text(unit.text, self.data)
            scorer, text = model_scorer(self.model), self.texts[unit.text]
            row = measure_loss(scorer, text, unit.context, unit.window)
        return row | {"position": to_spec(self.position)}


def run(units: list[Unit], subject: Subject, results: Path, commit: str | None) -> None:
    """Measures what is not done yet; each row is written as soon as it is known."""
    results.mkdir(parents=True, exist_ok=True)
    for index, unit in enumerate(units):
        if is_done(unit, results):
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        row = unit.key | subject.measure(unit)
        row |= {
            "seconds": round(time.perf_counter() - wall, 1),
            "core_seconds": round(time.process_time() - cpu, 1),
            "commit": commit,
            "command": shlex.join(["python", "-m", "experiments.pretrained", *sys.argv[1:]]),
        }
        replace_rows(results / f"{unit.kind}.jsonl", lambda old: False, [row])
        print(
            f"{index + 1} of {len(units)}: {' '.join(map(str, unit))}", row["seconds"], flush=True
        )


def _budget(text: str) -> int:
    """The updates of a training."""
    if not text.isdecimal() or int(text) <= WARMUP:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a training warms up for {WARMUP} updates; accepted: a larger number"
        )
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "list", "tables", "figures"])
    parser.add_argument("--run", type=Path, default=Path("runs/pretrained/smollm2"))
    parser.add_argument("--all", action="store_true", help="also what stands after the five hours")
    parser.add_argument(
        "--windows",
        type=int,
        default=1,
        choices=range(1, PLACES + 1),
        metavar=f"1..{PLACES}",
        help="of each text; more than 1 asks for --all (1)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        choices=range(1, 100),
        metavar="N",
        help="of the short trainings; more than 1 asks for --all (1)",
    )
    parser.add_argument(
        "--updates",
        type=_budget,
        nargs="+",
        default=[],
        metavar="N",
        help=f"also trainings of so many updates, not of {UPDATES} alone; asks for --all",
    )
    arguments = parser.parse_args()
    is_more = max(arguments.windows, arguments.seeds) > 1 or arguments.updates
    if is_more and not arguments.all:
        parser.error(
            "--windows and --seeds beyond 1, and --updates, take many hours more; give --all with "
            "them"
        )
    if arguments.command == "tables":
        print(all_tables(Results(RESULTS)))
        return
    if arguments.command == "figures":
        for path in write_figures(Results(RESULTS), RESULTS.parent / "figures"):
            print(path)
        return
    units = main_units()
    if arguments.all:
        units = all_units(arguments.windows, arguments.seeds, arguments.updates)
    if arguments.command == "list":
        hours = 0.0
        for unit in units:
            hours += core_seconds(unit) / 7200
            print(f"{'done' if is_done(unit, RESULTS) else '-':5} {hours:5.2f} h ", *unit)
        return
    if not (arguments.run / "config.json").exists():
        parser.error(f"--run {arguments.run} is no run; `fope import` makes it, see README.md")
    untrained = [unit for unit in units if not unit.updates]
    texts = {variant_text(unit.method, unit.context) for unit in untrained}
    make_variants(arguments.run, None, sorted(texts))  # a variant that is refused, before any work
    subject = Subject(arguments.run)
    run(units, subject, RESULTS, git_commit(Path(__file__).parent))


if __name__ == "__main__":
    main()
