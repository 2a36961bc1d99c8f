"""The tasks that `fope evaluate RUN --tasks` names, as protocols of one run."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.config import Experiment
from fope_jax.data.retrieval.registry import WITH_HAYSTACK
from fope_jax.evaluate.downstream.harness_tasks import (
    PAPER_TASKS,
    HarnessTask,
    load_harness_tasks,
    score_harness_task,
)
from fope_jax.evaluate.downstream.items import ItemTask, read_file
from fope_jax.evaluate.downstream.longbench import LONGBENCH, read_longbench
from fope_jax.evaluate.downstream.scores import check_room, score_items
from fope_jax.evaluate.harness import TextModelPlan, plan_text_model
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.progress import Progress
from fope_jax.evaluate.protocol_plan import plan_protocols
from fope_jax.evaluate.protocols import Protocol
from fope_jax.evaluate.run_data import RunData
from fope_jax.evaluate.text_model import RowPrograms
from fope_jax.evaluate.variants import AS, Variant
from fope_jax.processes.collectives import is_main_process
from fope_jax.report.tasks import LM_EVAL
from fope_jax.spelling import likely
from fope_jax.storage.files import write_text
from fope_jax.storage.paths import as_path
from fope_jax.storage.protocol_names import RETRIEVAL

log = logging.getLogger(__name__)

KIND = "task"  # of rows
RULER, PAPER = "ruler", "paper"
RULER_TASKS = tuple(WITH_HAYSTACK)  # those after RULER
LONGBENCH_DIRECTORY = "data_cache/longbench"
ANSWERS = "answers"  # directory of a run, with what was written

Task = ItemTask | HarnessTask


class TaskRequest(NamedTuple):
    """What --tasks and its options say.

    Attributes:
      names: "longbench", "longbench=DIRECTORY", "ruler", "paper", or files of JSON lines.
      max_items: number of items of each task, from the first on; None takes all. For "ruler", of
        trials at each length and depth, of ``evaluate.passkey_trials``.
      max_length: most tokens of a prompt and what is written after it; None for as many as the
        position embedding is defined for. "ruler" leaves longer ``evaluate.passkey_lengths`` out.
      max_new_tokens: most tokens to write for an item of a file.
    """

    names: Sequence[str] = ()
    max_items: int | None = None
    max_length: int | None = None
    max_new_tokens: int = 32


def read_tasks(request: TaskRequest) -> list[Task]:
    """The named tasks with their items; those of "ruler" are made later, see `task_protocols`.

    Raises:
      ValueError: an unknown name, a number that is not 1 or more, two tasks of one name, or a file
        that is not as it should be.
      ImportError: a library is missing; the message holds the pip line.
    """
    for option, value in zip(
        ("--max-items", "--max-length", "--max-new-tokens"), request[1:], strict=True
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}; accepted: 1 or more")
    tasks: list[Task] = []
    for name in request.names:
        benchmark, _, directory = name.partition("=")
        if benchmark == LONGBENCH:
            tasks += read_longbench(as_path(directory or LONGBENCH_DIRECTORY), request.max_items)
        elif name == PAPER:
            tasks += load_harness_tasks(PAPER_TASKS, request.max_items)
        elif name != RULER:
            tasks.append(_read_named_file(name, request))
    identities = [tuple(_identity(task).values()) for task in tasks]
    for identity in identities:
        if identities.count(identity) > 1:
            raise ValueError(
                f"--tasks names two tasks {identity[1]!r}, and the rows of one would replace those "
                "of the other; name each once, and files differently"
            )
    return tasks


def _read_named_file(name: str, request: TaskRequest) -> ItemTask:
    path = as_path(name)
    if path.is_file():
        return read_file(path, request.max_new_tokens, request.max_items)
    names = (LONGBENCH, RULER, PAPER)
    near = likely(name, names)
    what = "no such file" + (f"; did you mean {near!r}?" if near else "")
    raise ValueError(
        f"--tasks {name}: {what}; accepted: {', '.join(names)}, {LONGBENCH}=DIR, or a file of "
        'lines {"prompt": .., "answers": [..]}'
    )


def task_protocols(
    tasks: Sequence[Task],
    request: TaskRequest,
    experiment: Experiment,
    data: RunData,
    unstated: Collection[str],
    variant: Variant,
    workdir: Path,
    step: int,
) -> list[Protocol]:
    """A protocol for each task of `read_tasks`, and the retrieval tasks of "ruler".

    Those are at ``evaluate.passkey_lengths``; ``unstated`` is as for `plan_protocols`.

    Raises:
      ValueError: prompts do not fit the model, or the run's tokenizer does not.
    """
    protocols = []
    if tasks:
        plan = plan_text_model(workdir, experiment, max_length=request.max_length)
        answers = workdir / ANSWERS / _file_name(variant, str(step))
        protocols += [
            _task_protocol(task, plan, experiment.train.length, answers) for task in tasks
        ]
    if RULER in request.names:
        changed = _ruler_experiment(experiment, request)
        protocols += plan_protocols(changed, data, (RETRIEVAL,), unstated)
    return protocols


def _ruler_experiment(experiment: Experiment, request: TaskRequest) -> Experiment:
    """The experiment with the retrieval tasks after RULER, within the numbers of a request."""
    evaluate, length = experiment.evaluate, experiment.train.length
    if not (evaluate.passkey_trials and evaluate.passkey_depths):
        raise ValueError(
            "--tasks ruler: evaluate.passkey_trials or evaluate.passkey_depths is empty; set "
            "them for this call, as --config.evaluate.passkey_trials=20"
        )
    trials, lengths = evaluate.passkey_trials, evaluate.passkey_lengths
    if request.max_items is not None:
        trials = min(trials, request.max_items)
    if (most := request.max_length) is not None:
        lengths = tuple(multiple for multiple in lengths if multiple * length <= most)
        beyond = [f"{m * length:,.0f}" for m in sorted({*evaluate.passkey_lengths} - {*lengths})]
        if beyond and not lengths:
            raise ValueError(
                f"--max-length {most}: the shortest of --tasks ruler is of {beyond[0]} tokens "
                f"(evaluate.passkey_lengths = {evaluate.passkey_lengths}, times train.length = "
                f"{length}); accepted: that or more, or --config.evaluate.passkey_lengths=.. "
                "for this call"
            )
        if beyond:
            log.warning(
                "--tasks ruler: %s tokens are left out, longer than --max-length %d",
                ", ".join(beyond),
                most,
            )
    changed = dataclasses.replace(
        evaluate, retrieval_tasks=RULER_TASKS, passkey_trials=trials, passkey_lengths=lengths
    )
    return dataclasses.replace(experiment, evaluate=changed)


def without_repeats(protocols: Sequence[Protocol]) -> list[Protocol]:
    """Protocols of which --protocols retrieval and --tasks ruler may name the same task, each once.

    Raises ValueError where the two would be asked differently: rows of one would replace the other.
    """
    kept: dict[str, Protocol] = {}
    for protocol in protocols:
        other = kept.setdefault(protocol.label, protocol)
        if other.settings != protocol.settings:
            changes = ", ".join(
                f"{name} {value} and {protocol.settings.get(name)}"
                for name, value in other.settings.items()
                if value != protocol.settings.get(name)
            )
            raise ValueError(
                f"{protocol.label} is asked for by --protocols and by --tasks {RULER}, with "
                f"{changes}: leave one of them out, or --max-items and --max-length, and set "
                "--config.evaluate.passkey_trials and passkey_lengths for both"
            )
    return [*kept.values()]


def _identity(task: Task) -> dict[str, str]:
    benchmark = task.benchmark if isinstance(task, ItemTask) else LM_EVAL
    return {"protocol": benchmark, "task": task.name}


def _task_protocol(
    task: Task, plan: TextModelPlan, training_length: int, answers: Path
) -> Protocol:
    identity = _identity(task)
    settings = task.settings | {
        "max_length": plan.max_length,
        "tokenizer": plan.tokenizer.fingerprint,
    }
    if isinstance(task, ItemTask):
        check_room(task, plan.max_length)

    def run(programs: RowPrograms, progress: Progress) -> tuple[list[Row], None]:
        model = plan.of(programs)
        if isinstance(task, HarnessTask):
            return score_harness_task(model, task), None
        rows, records = score_items(model, task, training_length, progress)
        if is_main_process():
            _write_answers(answers / f"{'-'.join(identity.values())}.jsonl", records)
        return rows, None

    protocol = Protocol(KIND, identity, settings, run, reads_texts=True)
    return protocol.with_bos(plan.bos if plan.add_bos else None, "every prompt begins with {}")


def _write_answers(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _file_name(variant: Variant, step: str) -> str:
    """The directory of a step's answers, which names the variant."""
    if not variant.label:
        return step
    return f"{step} {AS} {re.sub(r'[^A-Za-z0-9_.,=:+-]', '_', variant.label)}"
