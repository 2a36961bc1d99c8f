"""The verbs of `fope` and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fope_jax.command_line import texts, verbs
from fope_jax.train.options import (
    add_accept_position,
    add_config,
    add_extend_options,
    add_processes,
    add_train_options,
    check_named,
    directory,
)
from fope_jax.train.options import parse_arguments as parse_arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets ``verb`` to the function that runs it."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fope", description=texts.DESCRIPTION, formatter_class=formatter, allow_abbrev=False
    )
    parser.set_defaults(traceback=False)
    known = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(to, name: str, run: Callable, description: str, epilog: str = ""):
        verb = to.add_parser(
            name,
            help=description,
            description=description,
            epilog=epilog,
            formatter_class=formatter,
            allow_abbrev=False,
        )
        verb.set_defaults(verb=run)
        verb.add_argument("--traceback", action="store_true", help="show where an error arose")
        return verb

    data = known.add_parser("data", help="build or inspect the token cache", allow_abbrev=False)
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    build = add(
        actions, "build", verbs.data_build, "tokenise the corpus once, into the token cache"
    )
    inspect = add(
        actions, "inspect", verbs.data_inspect, "show sizes, samples and document lengths"
    )
    for verb in (build, inspect):
        add_config(verb)

    beam = build.add_argument_group("on many machines, with Apache Beam; the same cache")
    beam.add_argument("--runner", metavar="NAME", help="such as DirectRunner or DataflowRunner")
    beam.add_argument("--runner-option", action="append", default=[], metavar="KEY=VALUE")
    beam.add_argument("--runner-parts", default="", metavar="DIR", help="where workers leave parts")

    train = add(
        known,
        "train",
        verbs.train,
        "train, or go on training",
        f"{texts.TRAIN_EXAMPLES}\n{texts.EXIT_CODES}",
    )
    add_train_options(train)
    add_processes(train)

    extend = add(
        known,
        "extend",
        verbs.extend,
        "go on from a trained run at a longer length",
        texts.EXTEND_EXAMPLES,
    )
    add_extend_options(extend)
    add_processes(extend)

    evaluate = add(
        known,
        "evaluate",
        verbs.evaluate,
        "measure a trained run against context length",
        texts.EVALUATE_EXAMPLES,
    )
    evaluate.add_argument(
        "--run", type=directory, required=True, metavar="DIR", help="the --workdir of `fope train`"
    )
    evaluate.set_defaults(config=None)  # its section evaluate can be changed
    evaluate.add_argument("--step", type=int, help="checkpoint; the newest without it")
    evaluate.add_argument(
        "--protocols",
        metavar="NAME,...",
        help="what to measure, or all; what the run's evaluate.protocols says without it",
    )
    evaluate.add_argument(
        "--report", type=_local, metavar="DIR", help="write the page of `fope report` there as well"
    )
    evaluate.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="how several devices share the work, such as context=8; windows by default",
    )
    add_processes(evaluate)
    evaluate.add_argument("--force", action="store_true", help="score again what has been scored")

    sweep = add(
        known, "sweep", verbs.sweep, "train, extend and evaluate many runs", texts.SWEEP_EXAMPLES
    )
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
        known,
        "spectrum",
        verbs.spectrum,
        "the frequencies that a trained run uses",
        texts.SPECTRUM_EXAMPLES,
    )
    spectrum.add_argument("run", type=directory, nargs="?", metavar="RUN", help="a --workdir")
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

    plan = add(known, "plan", verbs.plan, "memory, time and bounds of a TPU slice, without one")
    add_config(plan)
    plan.add_argument(
        "--topology",
        nargs="+",
        action="extend",
        required=True,
        metavar="SLICE",
        help="such as v5e:4x4 v5p:4x4x4 v6e:16x16",
    )
    plan.add_argument("--method", metavar="LABEL,...", help="such as rope,fope; the config's own")
    plan.add_argument("--length", metavar="TOKENS,...", help="such as 512,4096; the config's own")
    plan.add_argument("--size", metavar="PRESET,...", help="such as 60m,1200m; the config's own")
    plan.add_argument("--mesh", metavar="AXIS=N,...", help="in place of the config's")
    plan.add_argument("--jobs", type=int, help="compilations at once; what the machine can take")
    plan.add_argument("--no-cache", action="store_true", help="compile what was compiled before")
    plan.add_argument("-o", "--out", type=_local, help="directory for plan.md, .jsonl and .html")

    fetch = add(
        known,
        "import",
        verbs.import_,
        "make a run of a Hugging Face checkpoint",
        texts.IMPORT_EXAMPLES,
    )
    fetch.set_defaults(config=None)  # its values can be changed as those of a file
    fetch.add_argument(
        "--from",
        type=_local,
        required=True,
        metavar="DIR",
        dest="source",
        help="directory with config.json and *.safetensors",
    )
    fetch.add_argument("--workdir", type=directory, required=True, help="directory of the run")

    export = add(known, "export", verbs.export, "write a run as a Hugging Face checkpoint")
    export.add_argument(
        "--run", type=directory, required=True, metavar="RUN[/STEP]", help="a --workdir"
    )
    export.add_argument("--step", type=int, help="checkpoint; the newest without it")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors; that of the import or of the parameters without it",
    )
    export.add_argument("-o", "--out", type=_local, required=True, help="directory that is made")

    for verb in (evaluate, export):
        add_accept_position(verb)

    report = add(known, "report", verbs.report, "one HTML page about any number of runs")
    report.add_argument("runs", type=directory, nargs="+", metavar="RUN", help="a --workdir")
    report.add_argument("-o", "--out", type=_local, required=True, help="directory of the page")
    report.add_argument(
        "--buckets",
        metavar="TOKENS,...",
        help="also show scores in ranges of length, as LongBench does: 4k,8k",
    )

    doctor = add(known, "doctor", verbs.doctor, "check runs, and say what is wrong and what to do")
    doctor.add_argument("runs", type=directory, nargs="+", metavar="RUN", help="a --workdir")
    doctor.add_argument(
        "--repair",
        action="store_true",
        help="move damaged checkpoints to checkpoints/quarantine, and write metrics.jsonl without "
        "damaged lines after copying it; deletes nothing",
    )
    doctor.add_argument("--json", action="store_true", help="for programs, one object a line")

    methods = add(known, "methods", verbs.methods, "list the position embeddings and their knobs")
    form = methods.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the tables of the README")
    form.add_argument("--write", type=_local, metavar="FILE", help="bring them up to date in FILE")

    gallery = add(known, "gallery", verbs.gallery, "one HTML page with a picture of each embedding")
    gallery.add_argument("-o", "--out", type=_local, required=True, help="directory of the page")
    gallery.add_argument(
        "--methods", nargs="+", metavar="LABEL", help="only these, such as rope fope rope+yarn"
    )
    return parser


def _local(text: str) -> Path:
    check_named(text)
    if "://" in text:  # a Path would make a directory "gs:" here
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a directory of this machine")
    return Path(text)
