"""`fope report`, `doctor`, `methods` and `gallery`: what is known of runs and of methods."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fope_jax.command_line.common import (
    RUNS_HELP,
    group,
    local_path,
    option,
    out,
    split_commas,
    verb,
)
from fope_jax.storage.directories import check_output
from fope_jax.storage.paths import check_bucket, is_in_bucket
from fope_jax.storage.run_paths import split_step
from fope_jax.train.options import directory

if TYPE_CHECKING:
    from fope_jax.report.rows import Run


@verb(
    option("runs", type=directory, nargs="+", metavar="RUN[/STEP]", help=RUNS_HELP),
    out("directory of the page (report, in RUN or beside several runs)", required=False),
    option(
        "--buckets",
        metavar="TOKENS,...",
        help="also show scores in ranges of length, as LongBench does: 4k,8k",
    ),
    option(
        "--styles",
        type=local_path,
        metavar="FILE",
        help="names of variants, one a line: each has the same colour, marker and line in every "
        "report with this file",
    ),
    needs=("matplotlib", "vl_convert"),
)
def report(arguments: argparse.Namespace) -> None:
    """one HTML page about any number of runs

    examples:
      fope report runs/fope                      writes runs/fope/report/index.html
      fope report runs/fope runs/rope            writes runs/report/index.html
      fope report runs/* -o pages/all --buckets 4k,8k
    """
    from fope_jax.report.length_buckets import bucket_tables, parse_edges
    from fope_jax.report.page import write_report
    from fope_jax.report.rows import read_runs
    from fope_jax.report.styles import read_names
    from fope_jax.report.tables import as_text

    paths = without_reports(arguments.runs)
    for run in paths:
        check_bucket(run)
    runs = read_runs(paths)
    buckets = parse_edges(arguments.buckets) if arguments.buckets is not None else ()
    styles = read_names(arguments.styles) if arguments.styles else ()
    page = arguments.out or default_page([split_step(path)[0] for path in paths])
    check_output(page, "the report")
    print(runs_text(runs))
    for table in bucket_tables(runs, buckets) if buckets else ():
        print(f"\n{as_text(table)}")
    print(f"report in {write_report(paths, page, buckets=buckets, styles=styles)}")


def runs_text(runs: Sequence[Run]) -> str:
    """What the terminal shows of runs: the verdict, what they went on from, and the tables."""
    from fope_jax.report.lineage import lineage_sentences
    from fope_jax.report.tables import as_text, text_tables
    from fope_jax.report.tasks import task_tables
    from fope_jax.report.verdict import verdict

    parts = [verdict(runs).text(), "\n".join(lineage_sentences(runs)), text_tables(runs)]
    parts += map(as_text, task_tables(runs))
    return "\n\n".join(filter(None, parts))


def without_reports(paths: Sequence[Path]) -> list[Path]:
    """The runs among ``paths``: a pattern such as ``runs/*`` also matches an earlier report."""
    reports = [path for path in paths if is_report(path)]
    for path in reports if len(reports) < len(paths) else ():
        print(f"{path} is a report, left out", file=sys.stderr)
    return [path for path in paths if path not in reports] or list(paths)


def is_report(path: Path) -> bool:
    """Whether `fope report` wrote the directory, which it does on this machine alone."""
    if is_in_bucket(path):
        return False
    return (path / "index.html").is_file() and not (path / "config.json").is_file()


def default_page(paths: Sequence[Path]) -> Path:
    """Where the page goes without ``-o``: in the only run, or beside runs of one directory.

    >>> str(default_page([Path("runs/fope")])), str(default_page([Path("runs/a"), Path("runs/b")]))
    ('runs/fope/report', 'runs/report')
    """
    if any(map(is_in_bucket, paths)):
        raise ValueError("runs in a bucket: give -o, a directory of this machine")
    parents = {path.parent for path in paths}
    if len(parents) > 1:
        shown = ", ".join(sorted(map(str, parents)))
        raise ValueError(f"the runs are in several directories ({shown}): give -o for the page")
    is_directory = len(paths) == 1 and not paths[0].is_file()
    return (paths[0] if is_directory else parents.pop()) / "report"


@verb(
    option("runs", type=directory, nargs="+", metavar="RUN[/STEP]", help=RUNS_HELP),
    group(
        "",
        option(
            "--repair",
            action="store_true",
            help="move damaged checkpoints to checkpoints/quarantine, and write metrics.jsonl "
            "without damaged lines after copying it; deletes nothing",
        ),
        option(
            "--progress",
            action="store_true",
            help="check nothing: one line of step, loss, speed and last checkpoint",
        ),
    ),
    option("--json", action="store_true", help="for programs, one object a line"),
)
def doctor(arguments: argparse.Namespace) -> int:
    """check runs, and say what is wrong and what to do

    examples:
      fope doctor runs/fope
      fope doctor runs/* --progress
    """
    from fope_jax import doctor

    worst = 0
    for run in without_reports(arguments.runs):
        check_bucket(run)
        if arguments.progress:
            progress = doctor.read_progress(run)
            print(json.dumps(progress._asdict()) if arguments.json else progress.text)
            continue
        if arguments.repair:
            for line in doctor.repair(run):
                print(line, file=sys.stderr)
        checks = doctor.examine(run)
        shown = doctor.as_json(run, checks) if arguments.json else None
        print(json.dumps(shown) if shown else doctor.as_text(run, checks))
        worst = max(worst, doctor.exit_code(checks))
    return worst


@verb(
    option("names", nargs="*", metavar="NAME", help="only these, with equations and knobs"),
    group(
        "",
        option("--markdown", action="store_true", help="print the tables as Markdown"),
        option("--write", type=local_path, metavar="FILE", help="bring them up to date in FILE"),
    ),
    needs=(),
)
def methods(arguments: argparse.Namespace) -> None:
    """list the position embeddings and their knobs

    examples:
      fope methods
      fope methods fope yarn
    """
    from fope_jax.gallery.catalogue import method_entries, scaling_entries
    from fope_jax.gallery.methods import (
        describe,
        methods_markdown,
        methods_text,
        write_between_markers,
    )

    if arguments.names:
        if arguments.markdown or arguments.write is not None:
            raise ValueError("NAME: --markdown and --write take the tables of all methods")
        print(describe(arguments.names))
        return
    entries = method_entries(), scaling_entries()
    if arguments.write is not None:
        changed = write_between_markers(arguments.write, methods_markdown(*entries))
        print(f"{arguments.write} {'is up to date now' if changed else 'was up to date'}")
    else:
        print((methods_markdown if arguments.markdown else methods_text)(*entries))


@verb(
    out("directory of the page"),
    option("--methods", nargs="+", metavar="LABEL", help="only these, such as rope fope rope+yarn"),
    needs=("matplotlib",),
)
def gallery(arguments: argparse.Namespace) -> None:
    """one HTML page with a picture of each embedding

    examples:
      fope gallery -o runs/gallery
      fope gallery -o runs/gallery --methods rope fope
    """
    from fope_jax.gallery.curves import gallery_rows
    from fope_jax.gallery.page import write_gallery

    check_output(arguments.out, "the gallery")
    labels = arguments.methods and [
        label for word in arguments.methods for label in split_commas(word)
    ]
    print(f"gallery in {write_gallery(gallery_rows(labels), arguments.out)}")
