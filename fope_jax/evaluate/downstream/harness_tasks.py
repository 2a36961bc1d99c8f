"""The tasks of the FoPE paper's Tables 4 and 6 under lm-evaluation-harness, without examples.

The harness has neither the paper's arithmetic (four choices, so that 25% is chance) nor the losses
of its Table 5 (natural_qs_open and trivia_qa_wiki): those are of OLMo's own evaluation and are left
out. Its prompts differ from OLMo's too: compare runs with each other, not with the paper's numbers.

Reference: Hua et al. 2025, "Fourier Position Embedding", Tables 4 to 6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fope_jax.evaluate.downstream.scores import sum_and_squares
from fope_jax.evaluate.harness import as_harness_model
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.text_model import TextModel
from fope_jax.extras import installed_version, require

PAPER_TASKS = (
    "social_iqa",
    "winogrande",
    "openbookqa",
    "sciq",
    "hellaswag",
    "piqa",
    "commonsense_qa",
    "arc_easy",
    "mmlu_stem",
    "mmlu_social_sciences",
    "mmlu_humanities",
    "mmlu_other",
)
METRICS = ("acc", "acc_norm")


class HarnessTask(NamedTuple):
    """A task or group of the harness.

    ``loaded`` is from ``TaskManager.load``; ``most`` the number of items of each of its tasks.
    """

    name: str
    loaded: Mapping[str, Any]
    most: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """What its scores depend on, as JSON values."""
        tasks = self.loaded["tasks"]
        return {
            "lm_eval": installed_version("lm-eval"),
            "versions": {name: str(task.VERSION) for name, task in sorted(tasks.items())},
            "items": {name: len(task.eval_docs) for name, task in sorted(tasks.items())},
            "most": self.most,
        }


def load_harness_tasks(
    names: Sequence[str], most: int | None = None, manager: Any = None
) -> list[HarnessTask]:
    """Loads tasks with their data sets, which the harness reads from the Hugging Face Hub's cache.

    Args:
      names: of tasks or groups.
      most: number of items of each task, from the first on; None takes all.
      manager: an ``lm_eval.tasks.TaskManager``; None takes one of the harness's own tasks.

    Raises:
      ImportError: the harness is not installed; the message holds the pip line.
      ValueError: a task or its data set cannot be read; names the task.
    """
    if manager is None:
        manager = require("lm_eval.tasks", "harness").TaskManager()
    tasks = []
    for name in names:
        try:
            tasks.append(HarnessTask(name, manager.load([name]), most))
        except Exception as error:  # of the harness, the datasets library or the network
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ValueError(
                f"lm-evaluation-harness cannot read its task {name!r}: {reason}. Data sets are "
                "read from the Hugging Face Hub or from its cache ($HF_HOME), where a machine "
                "with network can put them"
            ) from error
    return tasks


def score_harness_task(model: TextModel, task: HarnessTask) -> list[Row]:
    """One row: ``total, truncated, scores``, sums over the items of a task or group.

    ``truncated`` counts contexts, of which an item has one a choice, that lost their beginning.
    """
    cuts: list[int] = []

    def count_cuts(cut: int, count: int, length: int) -> None:
        cuts.append(cut)

    lm = as_harness_model(
        require("lm_eval.api.model", "harness").LM,
        dataclasses.replace(model, report_cuts=count_cuts),
    )
    evaluate: Callable[..., Any] = require("lm_eval.evaluator", "harness").evaluate
    results = evaluate(lm, task.loaded, limit=task.most, bootstrap_iters=0, log_samples=True)
    samples = [sample for of_task in results["samples"].values() for sample in of_task]
    scores = {}
    for metric in METRICS:
        values = [float(sample[metric]) for sample in samples if metric in sample]
        if len(values) == len(samples):  # some tasks of a group may lack it
            scores[metric] = sum_and_squares(values)
    if not scores:
        raise ValueError(
            f"lm-evaluation-harness gives {task.name!r} none of {', '.join(METRICS)}, which are "
            "reported; read its results through fope_jax.evaluate.harness.harness_model"
        )
    return [{"total": len(samples), "truncated": sum(cuts), "scores": scores}]
