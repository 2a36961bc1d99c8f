"""What each verb of `fope` does with its options.

Each imports what it needs: `fope report` starts without jax, `fope train` without TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys

from fope_jax.storage.directories import check_output
from fope_jax.storage.paths import check_bucket, is_in_bucket, user_cache_dir


def _experiment(arguments: argparse.Namespace):
    from fope_jax.extras import require

    require("ml_collections", "train")
    require("flax", "train")
    from fope_jax.config import build_experiment, load_config

    return build_experiment(load_config(arguments.config, arguments.overrides))


def _join(arguments: argparse.Namespace) -> None:
    """Joins the other processes of the run, where there are any."""
    from fope_jax.processes.start import initialize

    initialize(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        arguments.distributed_timeout,
    )
    from fope_jax.processes.collectives import is_main_process
    from fope_jax.processes.ending import watch_for_failures

    watch_for_failures()
    if not is_main_process():  # one of them tells what all do; warnings and errors come from each
        logging.getLogger("fope_jax").setLevel(logging.WARNING)


def _say(line: str) -> None:
    """Prints what all processes would print, once."""
    from fope_jax.processes.collectives import is_main_process

    if is_main_process():
        print(line)


def data_build(arguments: argparse.Namespace) -> None:
    experiment = _experiment(arguments)
    from fope_jax.data.beam import Runner
    from fope_jax.data.build import build

    options = tuple(arguments.runner_option)
    runner = Runner(arguments.runner, options, arguments.runner_parts) if arguments.runner else None
    build(experiment.data, runner)


def data_inspect(arguments: argparse.Namespace) -> None:
    experiment = _experiment(arguments)
    from fope_jax.data.build import inspect

    print(inspect(experiment.data))


def train(arguments: argparse.Namespace) -> None:
    _join(arguments)  # first, so that whoever refuses tells the others
    from fope_jax.processes.agreement import fail_together

    with fail_together():
        check_bucket(arguments.workdir)
        experiment = _experiment(arguments)
    from fope_jax.train.goodput import process_age
    from fope_jax.train.loop import train

    train(experiment, arguments.workdir, arguments.accept_position, seconds_before=process_age())
    _say(f"run in {arguments.workdir}")


def extend(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("flax", "train")
    _join(arguments)
    from fope_jax.config import load_config
    from fope_jax.extend.run import extend
    from fope_jax.processes.agreement import fail_together

    with fail_together():
        for place in (arguments.parent, arguments.workdir):
            if not isinstance(place, str):
                check_bucket(place)
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
    _say(f"run in {arguments.workdir}")


def evaluate(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("flax", "train")
    if arguments.report:
        require("matplotlib", "train")
    _join(arguments)
    from fope_jax.evaluate.run import evaluate
    from fope_jax.model.sharding import MeshConfig
    from fope_jax.processes.agreement import fail_together
    from fope_jax.processes.collectives import is_main_process

    with fail_together():
        check_bucket(arguments.run)
        mesh = MeshConfig.parse(arguments.mesh) if arguments.mesh else None
        if arguments.report and is_main_process():
            check_output(arguments.report, "the report")
    names = None
    if arguments.protocols is not None:
        names = [name.strip() for name in arguments.protocols.split(",")]
    rows = evaluate(
        arguments.run,
        arguments.step,
        protocols=names,
        mesh=mesh,
        force=arguments.force,
        accept_position=arguments.accept_position,
        overrides=arguments.overrides,
    )
    _say(f"{len(rows)} rows in {arguments.run / 'metrics.jsonl'}")
    if arguments.report and is_main_process():
        from fope_jax.report.page import write_report

        print(f"report in {write_report([arguments.run], arguments.report)}")


def sweep(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("ml_collections", "train")
    require("flax", "train")
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


def import_(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("ml_collections", "train")
    require("flax", "train")
    from fope_jax.interop.runs import import_run

    print(import_run(arguments.source, arguments.workdir, arguments.overrides))
    print(f"run in {arguments.workdir}")


def export(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("flax", "train")
    from fope_jax.interop.runs import export_run

    accept = arguments.accept_position
    print(export_run(arguments.run, arguments.out, arguments.step, arguments.dtype, accept))
    print(f"checkpoint in {arguments.out}")


def plan(arguments: argparse.Namespace) -> None:
    # Here and in every compilation: with the TPU compiler installed, jax would look for a TPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    experiment = _experiment(arguments)
    from fope_jax.model.sharding import MeshConfig
    from fope_jax.tpu import plan, table

    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}; accepted: 1 or more")

    def listed(text: str | None) -> list[str]:
        return [part.strip() for part in text.split(",")] if text else []

    cases = plan.make_cases(
        experiment,
        topologies=arguments.topology,
        methods=listed(arguments.method),
        lengths=_whole_numbers("--length", arguments.length) if arguments.length else [],
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
            f"{row['length']} tokens, {state}",
            file=sys.stderr,
        )

    if arguments.out:
        check_output(arguments.out, "the plan")
    cache = None if arguments.no_cache else user_cache_dir()
    rows = plan.plan(cases, cache=cache, jobs=arguments.jobs, done=done)
    print(table.to_markdown(rows))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / "plan.jsonl").write_text(lines)
        (arguments.out / "plan.md").write_text(table.to_markdown(rows) + "\n")
        table.write_page(rows, arguments.out / "plan.html")


def spectrum(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("matplotlib", "train")
    from fope_jax.spectrum.tables import write_demo, write_spectrum

    if arguments.demo:
        if arguments.run or not arguments.out:
            raise ValueError("--demo takes no run, and -o for the directory of its page")
        check_output(arguments.out, "the demo")
        from fope_jax.spectrum.demo import demo

        print(f"demo in {write_demo(demo(), arguments.out)}")
        return
    if not arguments.run:
        raise ValueError("name a run, or --demo")
    require("flax", "train")
    if not arguments.out and is_in_bucket(arguments.run):
        raise ValueError(f"{arguments.run} is in a bucket: give -o, a directory of this machine")
    check_bucket(arguments.run)
    check_output(arguments.out or arguments.run / "spectrum", "the spectra")
    from fope_jax.spectrum.run import measure_run

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


def report(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("matplotlib", "train")
    from fope_jax.report.length_buckets import bucket_tables, parse_edges
    from fope_jax.report.lineage import lineage_sentences
    from fope_jax.report.page import write_report
    from fope_jax.report.rows import read_runs
    from fope_jax.report.tables import as_text, text_tables

    for run in arguments.runs:
        check_bucket(run)
    runs = read_runs(arguments.runs)
    buckets = parse_edges(arguments.buckets) if arguments.buckets else ()
    check_output(arguments.out, "the report")
    for line in lineage_sentences(runs):
        print(line)
    print(text_tables(runs))
    for table in bucket_tables(runs, buckets) if buckets else ():
        print(f"\n{as_text(table)}")
    print(f"report in {write_report(arguments.runs, arguments.out, buckets=buckets)}")


def doctor(arguments: argparse.Namespace) -> int:
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
        print(json.dumps(shown) if shown else doctor.as_text(run, checks))
        worst = max(worst, doctor.exit_code(checks))
    return worst


def methods(arguments: argparse.Namespace) -> None:
    from fope_jax.gallery.catalogue import method_entries, scaling_entries
    from fope_jax.gallery.methods import methods_markdown, methods_text, write_between_markers

    entries = method_entries(), scaling_entries()
    if arguments.write is not None:
        changed = write_between_markers(arguments.write, methods_markdown(*entries))
        print(f"{arguments.write} {'is up to date now' if changed else 'was up to date'}")
    else:
        print((methods_markdown if arguments.markdown else methods_text)(*entries))


def gallery(arguments: argparse.Namespace) -> None:
    from fope_jax.extras import require

    require("matplotlib", "train")
    from fope_jax.gallery.curves import gallery_rows
    from fope_jax.gallery.page import write_gallery

    check_output(arguments.out, "the gallery")
    print(f"gallery in {write_gallery(gallery_rows(arguments.methods), arguments.out)}")
