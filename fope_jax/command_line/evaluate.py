"""`fope evaluate` and `spectrum`: what a trained run can do, and which frequencies it uses."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fope_jax.command_line.common import (
    STEP,
    group,
    join_processes,
    local_path,
    option,
    out,
    run_and_step,
    run_argument,
    split_commas,
    verb,
    whole_numbers,
)
from fope_jax.command_line.report import runs_text
from fope_jax.extras import require
from fope_jax.storage.directories import check_output
from fope_jax.storage.paths import is_in_bucket
from fope_jax.train.options import add_accept_position, add_processes

if TYPE_CHECKING:
    from fope_jax.evaluate.downstream.plan import TaskRequest
    from fope_jax.evaluate.variants import Variant


@verb(
    run_argument(),
    lambda parser: parser.set_defaults(config=None),  # accepts --config.evaluate.KEY=VALUE
    STEP,
    option(
        "--protocols",
        metavar="NAME,...",
        help="what to measure, or all (evaluate.protocols of the run)",
    ),
    option(
        "--as",
        dest="variants",
        action="append",
        default=[],
        metavar="METHOD[:KNOB=VALUE,...]",
        help="read the checkpoint with another position embedding, without training; may be given "
        "several times; same is the run's own",
    ),
    option(
        "--tasks",
        metavar="TASK,...",
        help="downstream tasks in place of protocols: longbench[=DIR], ruler, paper, or FILE.jsonl",
    ),
    option(
        "--max-items",
        type=int,
        metavar="N",
        help="take the first N items of each task (all); of ruler, N trials at each length and "
        "depth, at most evaluate.passkey_trials",
    ),
    option(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="most tokens of a task's prompt and its answer together (no limit); longer prompts "
        "lose their middle, longer evaluate.passkey_lengths of ruler are left out",
    ),
    option(
        "--max-new-tokens",
        type=int,
        metavar="TOKENS",
        help="most tokens to write for an item of FILE.jsonl (32)",
    ),
    option(
        "--report", type=local_path, metavar="DIR", help="write the page of `fope report` there"
    ),
    option(
        "--mesh",
        metavar="AXIS=N,...",
        help="how several devices share the work, such as context=8 (windows are split)",
    ),
    add_processes,
    option("--force", action="store_true", help="score again what has been scored"),
    add_accept_position,
)
def evaluate(arguments: argparse.Namespace) -> None:
    """measure a trained run against context length

    examples:
      fope evaluate runs/fope
      fope evaluate runs/fope/500
      fope evaluate runs/fope --protocols all --report runs/fope/report
      fope evaluate runs/fope --protocols sliding-window,chunks
      fope evaluate runs/rope --as yarn:factor=4 --as pi:factor=4 --as nope
      fope evaluate runs/rope --as self_extend:window=64,group=8 --as logit_scaling --as clip
      fope evaluate runs/smollm2 --tasks longbench=LongBench --max-items 20
      fope evaluate runs/smollm2 --tasks questions.jsonl --as same --as yarn:factor=2
      fope evaluate runs/fope --config.evaluate.texts=web,news
      fope evaluate runs/fope --config.evaluate.texts=mails=letters/*.txt

    protocols (without --protocols those of evaluate.protocols: same-tokens, long-window, passkey
    and retrieval unless the configuration says otherwise, about half the time of all):
      same-tokens      the same tokens at every length, with ever more text before them
      sliding-window   every token of a stretch, by a window that moves by evaluate.stride
      chunks           joined documents cut every so many tokens, as the paper's code does
      document-resets  joined documents whose positions begin anew at each document
      no-resets        the same tokens, with positions and attention that go on
      long-window      loss by position in the longest window
      from-start       loss by distance since the document's start
      passkey          a key hidden in filler
      retrieval        the tasks of evaluate.retrieval_tasks; all that fit where it names none

    tasks (--tasks; what was written stands in RUN/answers/STEP):
      longbench   GovReport, MultiNews, TREC, TriviaQA, SAMSum from the benchmark's own files in DIR
                  (data_cache/longbench), by length in words and in training lengths
      ruler       the retrieval tasks after RULER, at evaluate.passkey_lengths
      paper       the tasks of the FoPE paper's Tables 4 and 6, by lm-evaluation-harness
      FILE.jsonl  lines {"prompt": .., "answers": [..]}: writes; does the first line contain an
                  answer, F1, exact match; with "choices": [..], which is the most likely

    --as takes what `fope extend --method` takes for the run's position embedding, and refuses the
    rest; a method of your own is MODULE:CLASS or MODULE:CLASS:KNOB=VALUE. Its rows stand in the
    run's metrics.jsonl as those of a variant, "RUN as METHOD", beside the run's own, in the report
    and in the verdict.

    Rows that exist for the same checkpoint and settings are kept; --force scores them again. Any
    value of the run's evaluate section can be changed for one call, as above; config.json stays as
    it is. A protocol that is asked again with other lengths, trials or windows replaces its earlier
    rows of that checkpoint; those of other protocols, texts and variants stay.
    """
    if arguments.report:
        require("matplotlib", "train")
    join_processes(arguments)
    from fope_jax.evaluate.run import evaluate
    from fope_jax.model.sharding import MeshConfig
    from fope_jax.processes.agreement import fail_together
    from fope_jax.processes.collectives import is_main_process
    from fope_jax.report.rows import read_with_variants

    with fail_together():
        run, step = run_and_step(arguments)
        variants = _variants(run, step, arguments.variants)
        tasks = _tasks(arguments)
        mesh = MeshConfig.parse(arguments.mesh) if arguments.mesh else None
        if arguments.report and is_main_process():
            check_output(arguments.report, "the report")
    rows = evaluate(
        run,
        step,
        protocols=None if arguments.protocols is None else split_commas(arguments.protocols),
        mesh=mesh,
        force=arguments.force,
        accept_position=arguments.accept_position,
        overrides=arguments.overrides,
        variants=variants,
        tasks=tasks,
    )
    if is_main_process():
        print(f"{len(rows)} rows in {run / 'metrics.jsonl'}")
        measured = read_with_variants(run, next((row["step"] for row in rows), step))
        if text := runs_text(measured):  # what was measured before included
            print(f"\n{text}")
        named = run if step is None else run / str(step)
        if arguments.report:
            from fope_jax.report.page import write_report

            print(f"\nreport in {write_report([named], arguments.report)}")
        else:
            command = shlex.join(["fope", "report", str(named)])
            print(f"\nnext: {command}  (with other runs, to compare them)")


def _variants(run: Path, step: int | None, texts: Sequence[str]) -> list[Variant]:
    """What --as names; the run and its step are read only where there is any."""
    if not texts:
        return []
    from fope_jax.extend.variants import make_variants

    return make_variants(run, step, texts)


def _tasks(arguments: argparse.Namespace) -> TaskRequest | None:
    """What --tasks and its options say; None without --tasks."""
    names = ("max_items", "max_length", "max_new_tokens")
    values = {name: getattr(arguments, name) for name in names}
    stated = {name: value for name, value in values.items() if value is not None}
    if arguments.tasks is None:
        for name, value in stated.items():
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value} is of --tasks, which names the tasks; add it")
        return None
    from fope_jax.evaluate.downstream.plan import TaskRequest

    return TaskRequest(split_commas(arguments.tasks), **stated)


@verb(
    run_argument(nargs="?"),
    group(
        "",
        STEP,
        option("--untrained", action="store_true", help="the parameters that training began with"),
        option(
            "--demo", action="store_true", help="the theory on signals made for it, without a run"
        ),
    ),
    option(
        "--lengths",
        default="1,2,4,8",
        metavar="N,...",
        help="multiples of the training length (1,2,4,8)",
    ),
    option("--windows", type=int, default=8, help="number of windows of each length (8)"),
    option(
        "--text",
        metavar="NAME=GLOB",
        help="files to read in place of the run's validation split, or web or news, as in "
        "evaluate.texts; no token cache is needed",
    ),
    out("directory of the page (RUN/spectrum)", required=False),
    needs=("matplotlib",),
)
def spectrum(arguments: argparse.Namespace) -> None:
    """the frequencies that a trained run uses

    examples:
      fope spectrum runs/fope --untrained        before training
      fope spectrum runs/fope                    and after: both on one page, runs/fope/spectrum
      fope spectrum runs/smollm2 --text mine=book.txt   an import, which has no token cache
      fope report runs/* -o runs/report          what they say about generalization, over all runs
      fope spectrum --demo -o runs/theory
    """
    from fope_jax.spectrum.tables import check_spectra, write_demo, write_spectrum

    out = arguments.out
    if arguments.demo:
        if arguments.run:
            raise ValueError(f"{arguments.run}: --demo needs no run; leave one of the two out")
        if not out:
            raise ValueError("--demo needs -o, the directory of its page")
        check_output(out, "the demo")
        from fope_jax.spectrum.demo import demo

        print(f"demo in {write_demo(demo(), out)}")
        return
    if not arguments.run:
        raise ValueError("name a run, or --demo")
    require("flax", "train")
    if not out and is_in_bucket(arguments.run):
        raise ValueError(f"{arguments.run} is in a bucket: give -o, a directory of this machine")
    run, step = run_and_step(arguments)
    if arguments.untrained and step is not None:
        raise ValueError(f"{run}/{step}: --untrained is of step 0; leave one of the two out")
    out = out or run / "spectrum"
    check_output(out, "the spectra")
    from fope_jax.evaluate.restore import read_experiment
    from fope_jax.spectrum.run import measure_run

    multiples = whole_numbers("--lengths", arguments.lengths)
    experiment = read_experiment(run)
    check_spectra(out, experiment.name, experiment.seed)

    measured = measure_run(
        run,
        step,
        untrained=arguments.untrained,
        multiples=multiples,
        windows=arguments.windows,
        text=arguments.text,
    )
    print(f"{len(measured['rows'])} rows in {run / 'metrics.jsonl'}")
    print(f"spectra in {write_spectrum(measured, out)}")
