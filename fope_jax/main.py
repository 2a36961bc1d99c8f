"""The command line: `fope data build|inspect` and `fope train|extend|evaluate|plan|report|...`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from fope_jax.files import as_path, check_bucket, in_bucket, user_cache

DESCRIPTION = """\
Train one transformer with any position embedding, and measure it beyond its training length.

  fope data build --config configs/quickstart.py
  fope train --config configs/quickstart.py:position=fope --workdir runs/fope
  fope evaluate --run runs/fope
  fope spectrum runs/fope          which frequencies attention uses, inside and beyond training
  fope report runs/fope runs/rope -o runs/report
  fope extend --from runs/rope --method yarn --length 256 --workdir runs/rope_yarn

  fope import --from DIR --workdir runs/x    weights of Llama, Qwen 3, OLMo 2, SmolLM
  fope export --run runs/fope -o DIR         and back

  fope plan --config configs/paper/c4_books.py --topology v5e:4x4 --method rope,fope

  fope sweep experiments/extrapolation/sweep.py --workdir runs/extrapolation
  fope doctor runs/fope            is a run sound, and what is to be done if not

  fope methods                     every position embedding, its knobs and its source
  fope gallery -o runs/gallery     a picture of each
"""
TRAIN_EXAMPLES = """\
examples:
  fope train --config configs/quickstart.py --workdir runs/fope
  fope train --config configs/quickstart.py:position=rope,seed=1 --workdir runs/rope_1
  fope train --config configs/quickstart.py --workdir runs/long --config.train.length=256

The same command again goes on from the newest checkpoint. Any value of the configuration can be
given as --config.SECTION.KEY=VALUE.
"""
EXIT_CODES = """\
exit codes:
  0     done
  2     an error that is told in one message; what was trained up to the newest checkpoint is kept
  130   Ctrl-C
  143   SIGTERM: the step under way was ended and saved
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
EVALUATE_EXAMPLES = """\
examples:
  fope evaluate --run runs/fope
  fope evaluate --run runs/fope --protocols all --report runs/fope/report
  fope evaluate --run runs/fope --protocols sliding-window,chunks
  fope evaluate --run runs/fope --config.evaluate.texts=web,news
  fope evaluate --run runs/fope --config.evaluate.texts=mails=letters/*.txt

protocols (without --protocols: same-tokens, long-window, passkey, about half the time of all):
  same-tokens      the same tokens at every length, with ever more text before them
  sliding-window   every token of a stretch, by a window that moves by evaluate.stride
  chunks           joined documents cut every so many tokens, as the paper's code does
  document-resets  joined documents whose positions begin anew at each document
  no-resets        the same tokens without
  long-window      loss by position in the longest window
  from-start       loss by distance since the document's start
  passkey          a key hidden in filler
  retrieval        the tasks of evaluate.retrieval_tasks; all that fit where it names none

Rows that exist for the same checkpoint and settings are kept; --force scores them again. Any value
of the run's evaluate section can be changed for one call, as above; config.json stays as it is.
"""
IMPORT_EXAMPLES = """\
examples:
  fope import --from models/SmolLM2-135M --workdir runs/smollm2 --config.train.length=2048
  fope data build --config runs/smollm2/config.json
  fope evaluate --run runs/smollm2

train.length is the length that evaluation counts in multiples of; without it the checkpoint's
max_position_embeddings. Any value but the model's own can be given as --config.SECTION.KEY=VALUE.
"""
SPECTRUM_EXAMPLES = """\
examples:
  fope spectrum runs/fope --untrained        before training
  fope spectrum runs/fope                    and after: both on one page, runs/fope/spectrum
  fope report runs/* -o runs/report          what they say about generalization, over all runs
  fope spectrum --demo -o runs/theory
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code, see ``EXIT_CODES``; 1 where `fope doctor` found any."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.overrides = [part for part in rest if part.startswith("--config.")]
    strangers = [part for part in rest if not part.startswith("--config.")]
    if strangers or (arguments.overrides and not hasattr(arguments, "config")):
        parser.error(
            f"unknown argument {(strangers or arguments.overrides)[0]!r}"
            " (a configuration value is given as --config.train.steps=100)"
        )
    try:
        with _messages():
            code = arguments.verb(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users(error):
            raise
        if arguments.traceback:
            traceback.print_exc()
        else:
            print(f"fope: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return code or 0


def _is_users(error: Exception) -> bool:
    """Whether a user can put it right; any other is a defect of ours and keeps its traceback."""
    ours = type(error).__module__.startswith(("fope_jax.", "gcsfs.", "aiohttp."))
    return ours or isinstance(error, (ValueError, OSError, ImportError))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets ``verb`` to the function that runs it."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fope", description=DESCRIPTION, formatter_class=formatter, allow_abbrev=False
    )
    parser.set_defaults(traceback=False)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(to, name: str, run: Callable, description: str, epilog: str = ""):
        verb = to.add_parser(
            name, help=description, description=description, epilog=epilog,
            formatter_class=formatter, allow_abbrev=False,
        )  # fmt: skip
        verb.set_defaults(verb=run)
        verb.add_argument("--traceback", action="store_true", help="show where an error arose")
        return verb

    data = verbs.add_parser("data", help="build or inspect the token cache", allow_abbrev=False)
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    build = add(actions, "build", _data_build, "tokenise the corpus once, into the token cache")
    inspect = add(actions, "inspect", _data_inspect, "show sizes, samples and document lengths")
    for verb in (build, inspect):
        _add_config(verb)

    beam = build.add_argument_group("on many machines, with Apache Beam; the same cache")
    beam.add_argument("--runner", metavar="NAME", help="such as DirectRunner or DataflowRunner")
    beam.add_argument("--runner-option", action="append", default=[], metavar="KEY=VALUE")
    beam.add_argument("--runner-parts", default="", metavar="DIR", help="where workers leave parts")

    train = add(
        verbs, "train", _train, "train, or go on training", f"{TRAIN_EXAMPLES}\n{EXIT_CODES}"
    )
    _add_config(train)
    _add_processes(train)
    train.add_argument(
        "--workdir", type=_directory, required=True, metavar="DIR",
        help="directory of this run, also in a bucket: gs://BUCKET/PATH",
    )  # fmt: skip

    extend = add(
        verbs, "extend", _extend, "go on from a trained run at a longer length", EXTEND_EXAMPLES
    )
    extend.add_argument(
        "--from", type=_parent, dest="parent", required=True, metavar="RUN[/STEP]|hf:DIR",
        help="the run to go on from, its newest checkpoint without a step; or the directory of a "
        "Hugging Face checkpoint",
    )  # fmt: skip
    extend.add_argument("--method", required=True, help="the position embedding to go on with")
    extend.add_argument("--length", type=int, required=True, help="tokens of a sequence")
    extend.add_argument(
        "--workdir", type=_directory, required=True, metavar="DIR", help="of the new run"
    )
    extend.add_argument(
        "--optimizer", choices=("keep", "reset-moments", "reset"), default="reset-moments",
        help="keep moments and schedule, or begin both anew (the default; with AdamW both resets "
        "are the same)",
    )  # fmt: skip
    extend.add_argument(
        "--match", choices=("frequency", "index"), default="frequency",
        help="how FoPE's coefficients find their place among more frequencies",
    )  # fmt: skip
    extend.add_argument(
        "--warn-above", type=float, default=1.2, metavar="RATIO",
        help="warn where the first loss is more than so many times the parent's (1.2)",
    )  # fmt: skip
    extend.add_argument(
        "--no-evaluate", action="store_true",
        help="leave out the whole evaluation at the end, `fope evaluate`",
    )  # fmt: skip
    extend.add_argument(
        "--config", metavar="FILE[:ARG]",
        help="a configuration of the new run; without it its values follow from the parent's. "
        "--config.SECTION.KEY=VALUE changes one",
    )  # fmt: skip
    _add_processes(extend)

    evaluate = add(
        verbs, "evaluate", _evaluate, "measure a trained run against context length",
        EVALUATE_EXAMPLES,
    )  # fmt: skip
    evaluate.add_argument(
        "--run",
        type=_directory,
        required=True,
        metavar="DIR",
        help="the --workdir of `fope train`",
    )
    evaluate.set_defaults(config=None)  # its section evaluate can be changed
    evaluate.add_argument("--step", type=int, help="checkpoint; the newest without it")
    evaluate.add_argument(
        "--protocols", metavar="NAME,...",
        help="what to measure, or all; what the run's evaluate.protocols says without it",
    )  # fmt: skip
    evaluate.add_argument(
        "--report", type=_local, metavar="DIR", help="write the page of `fope report` there as well"
    )
    evaluate.add_argument(
        "--mesh", metavar="AXIS=N,...",
        help="how several devices share the work, such as context=8; windows by default",
    )  # fmt: skip
    _add_processes(evaluate)
    evaluate.add_argument("--force", action="store_true", help="score again what has been scored")

    sweep = add(verbs, "sweep", _sweep, "train, extend and evaluate many runs", SWEEP_EXAMPLES)
    sweep.add_argument("sweep", metavar="SWEEP.py[:ARG]", help="a file with get_sweep(arg)")
    sweep.add_argument(
        "--workdir", type=_local, required=True, metavar="DIR", help="a directory a run goes here"
    )
    sweep.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores (1)")
    sweep.add_argument(
        "--results", type=_local, metavar="DIR", help="also keep each run's rows as DIR/NAME.jsonl"
    )
    sweep.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    spectrum = add(
        verbs, "spectrum", _spectrum, "the frequencies that a trained run uses", SPECTRUM_EXAMPLES
    )
    spectrum.add_argument("run", type=_directory, nargs="?", metavar="RUN", help="a --workdir")
    state = spectrum.add_mutually_exclusive_group()
    state.add_argument("--step", type=int, help="checkpoint; the newest without it")
    state.add_argument(
        "--untrained", action="store_true", help="the parameters that training began with"
    )
    state.add_argument(
        "--demo", action="store_true", help="the theory on signals made for it, without a run"
    )
    spectrum.add_argument(
        "--lengths", default="1,2,4,8", metavar="N,...", help="in training lengths (1,2,4,8)"
    )
    spectrum.add_argument("--windows", type=int, default=8, help="of each length (8)")
    spectrum.add_argument("-o", "--out", type=_local, help="directory of the page (RUN/spectrum)")

    plan = add(verbs, "plan", _plan, "memory, time and bounds of a TPU slice, without one")
    _add_config(plan)
    plan.add_argument(
        "--topology", nargs="+", action="extend", required=True, metavar="SLICE",
        help="such as v5e:4x4 v5p:4x4x4 v6e:16x16",
    )  # fmt: skip
    plan.add_argument("--method", metavar="LABEL,...", help="such as rope,fope; the config's own")
    plan.add_argument("--length", metavar="TOKENS,...", help="such as 512,4096; the config's own")
    plan.add_argument("--size", metavar="PRESET,...", help="such as 60m,1200m; the config's own")
    plan.add_argument("--mesh", metavar="AXIS=N,...", help="in place of the config's")
    plan.add_argument("--jobs", type=int, help="compilations at once; what the machine can take")
    plan.add_argument("--no-cache", action="store_true", help="compile what was compiled before")
    plan.add_argument("-o", "--out", type=_local, help="directory for plan.md, .jsonl and .html")

    fetch = add(
        verbs, "import", _import, "make a run of a Hugging Face checkpoint", IMPORT_EXAMPLES
    )
    fetch.set_defaults(config=None)  # its values can be changed as those of a file
    fetch.add_argument(
        "--from", type=Path, required=True, metavar="DIR", dest="source",
        help="directory with config.json and *.safetensors",
    )  # fmt: skip
    fetch.add_argument("--workdir", type=_directory, required=True, help="directory of the run")

    export = add(verbs, "export", _export, "write a run as a Hugging Face checkpoint")
    export.add_argument(
        "--run", type=_directory, required=True, metavar="RUN[/STEP]", help="a --workdir"
    )
    export.add_argument("--step", type=int, help="checkpoint; the newest without it")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the tensors; that of the import or of the parameters without it",
    )  # fmt: skip
    export.add_argument("-o", "--out", type=Path, required=True, help="directory that is made")

    for verb in (train, extend, evaluate, export):
        verb.add_argument(
            "--accept-position", metavar="HASH",
            help="take weights of another position embedding; the error message tells the hash",
        )  # fmt: skip

    report = add(verbs, "report", _report, "one HTML page about any number of runs")
    report.add_argument("runs", type=_directory, nargs="+", metavar="RUN", help="a --workdir")
    report.add_argument("-o", "--out", type=_local, required=True, help="directory of the page")
    report.add_argument(
        "--buckets", metavar="TOKENS,...",
        help="also show scores in ranges of length, as LongBench does: 4k,8k",
    )  # fmt: skip

    doctor = add(verbs, "doctor", _doctor, "check runs, and say what is wrong and what to do")
    doctor.add_argument("runs", type=_directory, nargs="+", metavar="RUN", help="a --workdir")
    doctor.add_argument(
        "--repair", action="store_true",
        help="move damaged checkpoints to checkpoints/quarantine, and write metrics.jsonl without "
        "damaged lines after copying it; deletes nothing",
    )  # fmt: skip
    doctor.add_argument("--json", action="store_true", help="for programs, one object a line")

    methods = add(verbs, "methods", _methods, "list the position embeddings and their knobs")
    form = methods.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the tables of the README")
    form.add_argument("--write", type=Path, metavar="FILE", help="bring them up to date in FILE")

    gallery = add(verbs, "gallery", _gallery, "one HTML page with a picture of each embedding")
    gallery.add_argument("-o", "--out", type=_local, required=True, help="directory of the page")
    gallery.add_argument(
        "--methods", nargs="+", metavar="LABEL", help="only these, such as rope fope rope+yarn"
    )
    return parser


def _directory(text: str) -> Path:
    """Of this machine or in a bucket."""
    try:
        return as_path(text)
    except (ValueError, ImportError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parent(text: str) -> Path | str:
    return text if text.startswith("hf:") else _directory(text)


def _local(text: str) -> Path:
    if "://" in text:  # a Path would make a directory "gs:" here
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a directory of this machine")
    return Path(text)


def _add_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--config", required=True, metavar="FILE[:ARG]",
        help="configuration file and its argument; --config.SECTION.KEY=VALUE changes a value",
    )  # fmt: skip


def _add_processes(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group(
        "several processes", "found by itself on a TPU slice; tpu_scripts/local.sh sets all of it"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (FOPE_COORDINATOR)")
    group.add_argument("--num-processes", type=int, help="how many (FOPE_NUM_PROCESSES)")
    group.add_argument("--process-id", type=int, help="which one this is (FOPE_PROCESS_ID)")
    group.add_argument(
        "--distributed-timeout", type=float, metavar="SECONDS",
        help="how long to wait for the others (FOPE_DISTRIBUTED_TIMEOUT)",
    )  # fmt: skip


@contextlib.contextmanager
def _messages():
    """Our own messages on stderr while a verb runs, without those of the libraries below us."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    ours, absl = logging.getLogger("fope_jax"), logging.getLogger("absl")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = ours.level, ours.propagate, absl.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # another library's handler at the root would print them again
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate, absl.level = before


# ---------------------------------------------------------------------------- verbs
# Each imports what it needs: `fope report` starts without jax, `fope train` without TensorFlow.


def _experiment(arguments: argparse.Namespace):
    from fope_jax.extras import require

    require("ml_collections", "train")
    require("flax", "train")
    from fope_jax.config import build_experiment, load_config

    return build_experiment(load_config(arguments.config, arguments.overrides))


def _join(arguments: argparse.Namespace) -> None:
    """Joins the other processes of the run, where there are any."""
    from fope_jax.distributed import initialize

    initialize(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        arguments.distributed_timeout,
    )
    from fope_jax.processes import is_first

    if not is_first():  # one of them tells what all do; warnings and errors come from each
        logging.getLogger("fope_jax").setLevel(logging.WARNING)


def _say(line: str) -> None:
    """Prints what all processes would print, once."""
    from fope_jax.processes import is_first

    if is_first():
        print(line)


def _data_build(arguments: argparse.Namespace) -> None:
    experiment = _experiment(arguments)
    from fope_jax.data.beam import Runner
    from fope_jax.data.build import build

    options = tuple(arguments.runner_option)
    runner = Runner(arguments.runner, options, arguments.runner_parts) if arguments.runner else None
    build(experiment.data, runner)


def _data_inspect(arguments: argparse.Namespace) -> None:
    experiment = _experiment(arguments)
    from fope_jax.data.build import inspect

    print(inspect(experiment.data))


def _train(arguments: argparse.Namespace) -> None:
    check_bucket(arguments.workdir)
    _join(arguments)
    experiment = _experiment(arguments)
    from fope_jax.train.account import process_age
    from fope_jax.train.loop import train

    train(experiment, arguments.workdir, arguments.accept_position, seconds_before=process_age())
    _say(f"run in {arguments.workdir}")


def _extend(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("flax", "train")
    if not isinstance(arguments.parent, str):
        check_bucket(arguments.parent)
    check_bucket(arguments.workdir)
    _join(arguments)
    from fope_jax.config import load_config
    from fope_jax.train.extend import extend

    extend(
        arguments.parent,
        arguments.method,
        arguments.length,
        arguments.workdir,
        optimizer=arguments.optimizer,
        match=arguments.match,
        warn_above=arguments.warn_above,
        overrides=arguments.overrides,
        config=load_config(arguments.config) if arguments.config else None,
        accept_position=arguments.accept_position,
        evaluates=not arguments.no_evaluate,
    )
    _say(f"run in {arguments.workdir}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("flax", "train")
    if arguments.report:
        require("matplotlib", "train")
    check_bucket(arguments.run)
    _join(arguments)
    from fope_jax.evaluate.run import evaluate
    from fope_jax.model.sharding import MeshConfig
    from fope_jax.processes import is_first

    mesh = MeshConfig.parse(arguments.mesh) if arguments.mesh else None
    names = None
    if arguments.protocols is not None:
        names = [name.strip() for name in arguments.protocols.split(",")]
    rows = evaluate(
        arguments.run, arguments.step, protocols=names, mesh=mesh, force=arguments.force,
        accept_position=arguments.accept_position, overrides=arguments.overrides,
    )  # fmt: skip
    _say(f"{len(rows)} rows in {arguments.run / 'metrics.jsonl'}")
    if arguments.report and is_first():
        from fope_jax.report.page import write_report

        print(f"report in {write_report([arguments.run], arguments.report)}")


def _sweep(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("ml_collections", "train")
    require("flax", "train")
    from fope_jax.report.page import write_report
    from fope_jax.report.results import write_results
    from fope_jax.report.rows import read_run
    from fope_jax.report.tables import text_tables
    from fope_jax.sweep.queue import run_sweep
    from fope_jax.sweep.spec import load_sweep

    planned, workdir = load_sweep(arguments.sweep), arguments.workdir
    if arguments.dry_run:
        for run in planned:
            print(shlex.join(["fope", *run.command(workdir)]))
        return
    run_sweep(planned, workdir, jobs=arguments.jobs)
    directories = [workdir / run.name for run in planned]
    runs = [read_run(directory) for directory in directories]
    if arguments.results:
        for run in runs:
            write_results(run, arguments.results / f"{run.path.name}.jsonl")
    print(text_tables(runs))
    print(f"report in {write_report(directories, workdir / 'report')}")


def _import(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("ml_collections", "train")
    require("flax", "train")
    from fope_jax.train.exchange import import_run

    print(import_run(arguments.source, arguments.workdir, arguments.overrides))
    print(f"run in {arguments.workdir}")


def _export(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("flax", "train")
    from fope_jax.train.exchange import export_run

    accept = arguments.accept_position
    print(export_run(arguments.run, arguments.out, arguments.step, arguments.dtype, accept))
    print(f"checkpoint in {arguments.out}")


def _plan(arguments: argparse.Namespace) -> None:
    # Here and in every compilation: with the TPU compiler installed, jax would look for a TPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    experiment = _experiment(arguments)
    from fope_jax.model.sharding import MeshConfig
    from fope_jax.tpu import plan, table

    def listed(text: str | None) -> list[str]:
        return [part.strip() for part in text.split(",")] if text else []

    cases = plan.make_cases(
        experiment,
        topologies=arguments.topology,
        methods=listed(arguments.method),
        lengths=[int(length) for length in listed(arguments.length)],
        sizes=listed(arguments.size),
        mesh=MeshConfig.parse(arguments.mesh) if arguments.mesh else None,
    )
    count = 0

    def done(case: plan.Case, row: plan.Row) -> None:
        nonlocal count
        count += 1
        state = "from the cache" if row.get("cached") else f"{row.get('compile_seconds', 0):.0f} s"
        print(
            f"{count} of {len(cases)}: {case.topology} {case.size} {case.method} "
            f"{row['length']} tokens, {state}", file=sys.stderr,
        )  # fmt: skip

    cache = None if arguments.no_cache else user_cache()
    rows = plan.plan(cases, cache=cache, jobs=arguments.jobs, done=done)
    print(table.markdown(rows))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / "plan.jsonl").write_text(lines)
        (arguments.out / "plan.md").write_text(table.markdown(rows) + "\n")
        table.write_page(rows, arguments.out / "plan.html")


def _spectrum(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("matplotlib", "train")
    from fope_jax.report.spectrum import write_demo, write_spectrum

    if arguments.demo:
        if arguments.run or not arguments.out:
            raise ValueError("--demo takes no run, and -o for the directory of its page")
        from fope_jax.evaluate.spectrum.demo import demo

        print(f"demo in {write_demo(demo(), arguments.out)}")
        return
    if not arguments.run:
        raise ValueError("name a run, or --demo")
    require("flax", "train")
    if not arguments.out and in_bucket(arguments.run):
        raise ValueError(f"{arguments.run} is in a bucket: give -o, a directory of this machine")
    check_bucket(arguments.run)
    from fope_jax.evaluate.spectrum.run import measure_run

    measured = measure_run(
        arguments.run,
        arguments.step,
        untrained=arguments.untrained,
        multiples=_whole_numbers("--lengths", arguments.lengths),
        windows=arguments.windows,
    )
    print(f"{len(measured['rows'])} rows in {arguments.run / 'metrics.jsonl'}")
    print(f"spectra in {write_spectrum(measured, arguments.out or arguments.run / 'spectrum')}")


def _whole_numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise ValueError(f"{option} {text}: {wrong[0]!r} is no whole number")
    return [int(part) for part in parts]


def _report(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("matplotlib", "train")
    from fope_jax.report.length_buckets import bucket_tables, parse_edges
    from fope_jax.report.lineage import lineage_lines
    from fope_jax.report.page import write_report
    from fope_jax.report.rows import read_runs
    from fope_jax.report.tables import as_text, text_tables

    for run in arguments.runs:
        check_bucket(run)
    runs = read_runs(arguments.runs)
    for line in lineage_lines(runs):
        print(line)
    print(text_tables(runs))
    buckets = parse_edges(arguments.buckets) if arguments.buckets else ()
    for table in bucket_tables(runs, buckets) if buckets else ():
        print(f"\n{as_text(table)}")
    print(f"report in {write_report(arguments.runs, arguments.out, buckets=buckets)}")


def _doctor(arguments: argparse.Namespace) -> int:
    from fope_jax.extras import require

    require("flax", "train")
    from fope_jax import doctor

    worst = 0
    for run in arguments.runs:
        check_bucket(run)
        if arguments.repair:
            for line in doctor.repair(run):
                print(line, file=sys.stderr)
        checks = doctor.examine(run)
        shown = doctor.as_json(run, checks) if arguments.json else None
        print(json.dumps(shown) if shown else doctor.table(run, checks))
        worst = max(worst, doctor.exit_code(checks))
    return worst


def _methods(arguments: argparse.Namespace) -> None:
    from fope_jax.position.catalogue import method_entries, scaling_entries
    from fope_jax.report.methods import methods_markdown, methods_text, write_between_markers

    entries = method_entries(), scaling_entries()
    if arguments.write is not None:
        changed = write_between_markers(arguments.write, methods_markdown(*entries))
        print(f"{arguments.write} {'is up to date now' if changed else 'was up to date'}")
    else:
        print((methods_markdown if arguments.markdown else methods_text)(*entries))


def _gallery(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("matplotlib", "train")
    from fope_jax.evaluate.curves import gallery_rows
    from fope_jax.report.gallery import write_gallery

    print(f"gallery in {write_gallery(gallery_rows(arguments.methods), arguments.out)}")


if __name__ == "__main__":
    sys.exit(main())
