"""What does another position embedding cost SmolLM2-135M on questions far below its length?

    python -m experiments.short_tasks items --sets DIR    questions, into runs/short_tasks/items
    python -m experiments.short_tasks run                 what is not asked yet
    python -m experiments.short_tasks tables              of the rows that are there

The model is that of experiments/pretrained, whose trainings are made where they are missing; its
README has the commands that import it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from experiments.pretrained.trainings import load_model
from experiments.pretrained.units import LENGTH, TRAINED_AT, UPDATES, Unit
from experiments.short_tasks.items import SETS, write_items
from experiments.short_tasks.tables import RESULTS, all_tables
from fope_jax.evaluate.downstream.items import read_file
from fope_jax.evaluate.downstream.scores import score_items
from fope_jax.evaluate.harness import plan_text_model
from fope_jax.evaluate.metrics import read_rows, replace_rows
from fope_jax.evaluate.progress import progress_bar
from fope_jax.evaluate.restore import read_experiment
from fope_jax.evaluate.text_model import row_programs
from fope_jax.position import to_spec
from fope_jax.train.workdir import git_commit

ITEMS = 250  # of each set
# In the order of their worth; updates of the short training before the questions, 0 for none.
MODELS = (("rope", 0), ("fope", 0), ("yarn", 0), ("fope-2048", UPDATES), ("rope", UPDATES))
MODELS += (("clip", 0), ("clip-2048", UPDATES))


def ask(run: Path, items: Path, method: str, updates: int, commit: str | None) -> None:
    """Asks one model what it was not asked yet; each set is a row of the results."""
    done = [
        row["set"]
        for row in read_rows(RESULTS / "answers.jsonl")
        if (row["method"], row["updates"]) == (method, updates)
    ]
    missing = [name for name in SETS if name not in done]
    if not missing:
        return
    unit = Unit("training", method, "books", TRAINED_AT, updates=updates)
    model, position = load_model(run, unit)
    text = plan_text_model(run, read_experiment(run)).of(row_programs(model))
    for name in missing:
        task = read_file(items / f"{name}.jsonl", count=1)
        start = time.perf_counter()
        _, records = score_items(text, task, LENGTH, progress_bar)
        row = {
            "method": method,
            "updates": updates,
            "set": name,
            "file": task.settings["file"],
            **{
                metric: "".join(str(int(record["scores"][metric])) for record in records)
                for metric in ("acc", "acc_norm")
            },
            "seconds": round(time.perf_counter() - start, 1),
            "position": to_spec(position),
            "commit": commit,
            "command": shlex.join(["python", "-m", "experiments.short_tasks", *sys.argv[1:]]),
        }
        replace_rows(RESULTS / "answers.jsonl", lambda old: False, [row])
        print(f"{method}, {updates} updates, {name}: {row['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.short_tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["items", "run", "tables"])
    parser.add_argument("--sets", type=Path, help="of items: the sets' files, see README.md")
    parser.add_argument("--items", type=Path, default=Path("runs/short_tasks/items"))
    parser.add_argument("--run", type=Path, default=Path("runs/pretrained/smollm2"))
    arguments = parser.parse_args()
    if arguments.command == "tables":
        print(all_tables())
    elif arguments.command == "items":
        if arguments.sets is None or not arguments.sets.is_dir():
            parser.error(f"--sets {arguments.sets}: accepted: the directory of the sets' files")
        write_items(arguments.sets, arguments.items, ITEMS)
    else:
        if not (arguments.run / "config.json").exists():
            parser.error(f"--run {arguments.run} is no run; `fope import` makes it, see README.md")
        RESULTS.mkdir(exist_ok=True)
        commit = git_commit(Path(__file__).parent)
        for method, updates in MODELS:
            ask(arguments.run, arguments.items, method, updates, commit)


if __name__ == "__main__":
    main()
