"""`fope data`, `train`, `extend` and `sweep`."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from fope_jax.command_line.common import (
    add_verb,
    join_processes,
    load_experiment,
    local_path,
    print_once,
)
from fope_jax.storage.directories import check_output
from fope_jax.storage.paths import check_bucket
from fope_jax.train.options import add_config, add_extend_options, add_processes, add_train_options

TRAIN_EXAMPLES = """\
examples:
  fope train --config configs/quickstart.py --workdir runs/fope
  fope train --config configs/quickstart.py:position=rope,seed=1 --workdir runs/rope_1
  fope train --config configs/quickstart.py --workdir runs/long --config.train.length=256

The same command again goes on from the newest checkpoint. Any value of the configuration can be
given as --config.SECTION.KEY=VALUE.

exit codes:
  0     done
  2     an error that is told in one message; what was trained up to the newest checkpoint is kept
  143   SIGTERM, and likewise 130 Ctrl-C and 129 SIGHUP: the step under way was ended and saved; a
        second Ctrl-C ends at once
  137   SIGKILL, -9: what came after the newest checkpoint is trained again

In each case the same command goes on, with the bits of a run that was never interrupted.
"""
EXTEND_EXAMPLES = """\
examples:
  fope extend --from runs/rope --method yarn --length 256 --workdir runs/rope_yarn
  fope extend --from runs/rope/500 --method fope --length 256 --workdir runs/rope_fope
  fope extend --from runs/fope --method yarn --length 256 --workdir runs/fope_yarn \\
      --config.position.scaling_order=after_clip --config.position.factor=16
  fope extend --from runs/alibi --method same --length 256 --workdir runs/alibi_256 \\
      --config.train.steps=100
  fope extend --from hf:models/SmolLM-1.7B --method fope --length 4096 --workdir runs/smollm \\
      --config configs/paper/smollm_4096.py:weights=models/SmolLM-1.7B

METHOD is "same", the name of a method (`fope methods`), or that of a scaling (yarn, pi, ntk,
llama3, longrope, clip, ...) for a model with frequencies. The same command again goes on from the
newest checkpoint.
"""
SWEEP_EXAMPLES = """\
examples:
  fope sweep experiments/extrapolation/sweep.py --workdir runs/extrapolation
  fope sweep experiments/extrapolation/sweep.py:seeds=1 --workdir runs/one_seed --jobs 2

The same command again leaves out what is done and goes on with the rest. Each run writes a log,
DIR/NAME.log; the report of all of them is DIR/report/index.html.
"""


def add_data(verbs: Any) -> None:
    data = verbs.add_parser("data", help="build or inspect the token cache", allow_abbrev=False)
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    verb = add_verb(actions, build, "tokenise the corpus once, into the token cache")
    add_config(verb)
    beam = verb.add_argument_group("on many machines, with Apache Beam; the same cache")
    beam.add_argument("--runner", metavar="NAME", help="such as DirectRunner or DataflowRunner")
    beam.add_argument("--runner-option", action="append", default=[], metavar="KEY=VALUE")
    beam.add_argument("--runner-parts", default="", metavar="DIR", help="where workers leave parts")
    add_config(add_verb(actions, inspect, "show sizes, samples and document lengths"))


def build(arguments: argparse.Namespace) -> None:
    experiment = load_experiment(arguments)
    from fope_jax.data.beam import Runner
    from fope_jax.data.build import build

    options = tuple(arguments.runner_option)
    runner = Runner(arguments.runner, options, arguments.runner_parts) if arguments.runner else None
    build(experiment.data, runner)


def inspect(arguments: argparse.Namespace) -> None:
    experiment = load_experiment(arguments)
    from fope_jax.data.build import inspect

    print(inspect(experiment.data))


def add_train(verbs: Any) -> None:
    verb = add_verb(verbs, train, "train, or go on training", TRAIN_EXAMPLES)
    add_train_options(verb)
    add_processes(verb)


def train(arguments: argparse.Namespace) -> None:
    join_processes(arguments)  # first, so that whoever refuses tells the others
    from fope_jax.processes.agreement import fail_together

    with fail_together():
        check_bucket(arguments.workdir)
        experiment = load_experiment(arguments)
    from fope_jax.train.goodput import process_age
    from fope_jax.train.loop import train

    train(experiment, arguments.workdir, arguments.accept_position, seconds_before=process_age())
    print_once(f"run in {arguments.workdir}")


def add_extend(verbs: Any) -> None:
    verb = add_verb(verbs, extend, "go on from a trained run at a longer length", EXTEND_EXAMPLES)
    add_extend_options(verb)
    add_processes(verb)


def extend(arguments: argparse.Namespace) -> None:
    join_processes(arguments)
    from fope_jax.config import load_config
    from fope_jax.extend.run import extend
    from fope_jax.processes.agreement import fail_together

    with fail_together():
        for directory in (arguments.parent, arguments.workdir):
            if not isinstance(directory, str):
                check_bucket(directory)
        config = load_config(arguments.config) if arguments.config else None
    extend(
        arguments.parent,
        arguments.method,
        arguments.length,
        arguments.workdir,
        optimizer=arguments.optimizer,
        match=arguments.match,
        warn_above=arguments.warn_above,
        overrides=arguments.overrides,
        config=config,
        accept_position=arguments.accept_position,
        should_evaluate=not arguments.no_evaluate,
    )
    print_once(f"run in {arguments.workdir}")


def add_sweep(verbs: Any) -> None:
    verb = add_verb(verbs, sweep, "train, extend and evaluate many runs", SWEEP_EXAMPLES)
    add = verb.add_argument
    add("sweep", metavar="SWEEP.py[:ARG]", help="a file with get_sweep(arg)")
    add(
        "--workdir",
        type=local_path,
        required=True,
        metavar="DIR",
        help="a directory a run goes here",
    )
    add("--jobs", type=int, default=1, help="runs at once; they share the cores (1)")
    add(
        "--results",
        type=local_path,
        metavar="DIR",
        help="also keep each run's rows as DIR/NAME.jsonl",
    )
    add("--dry-run", action="store_true", help="print the commands and do nothing")


def sweep(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require
    from fope_jax.report.page import write_report
    from fope_jax.report.results import write_results
    from fope_jax.report.rows import read_run
    from fope_jax.report.tables import text_tables
    from fope_jax.sweep.queue import run_sweep
    from fope_jax.sweep.runs import load_sweep

    planned, workdir = load_sweep(arguments.sweep), arguments.workdir
    if arguments.dry_run:
        for run in planned:
            print(shlex.join(["fope", *run.command(workdir)]))
        return
    require("matplotlib", "train")  # for the report, after hours
    check_output(workdir / "report", "the report")
    if arguments.results:
        check_output(arguments.results, "the rows of the runs")
    run_sweep(planned, workdir, jobs=arguments.jobs)
    directories = [workdir / run.name for run in planned]
    runs = [read_run(directory) for directory in directories]
    if arguments.results:
        for run in runs:
            write_results(run, arguments.results / f"{run.path.name}.jsonl")
    print(text_tables(runs))
    print(f"report in {write_report(directories, workdir / 'report')}")
