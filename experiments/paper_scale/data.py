"""Windows of the tasks, drawn without end by processes of their own; no file, no network.

A process draws a batch in some milliseconds, an accelerator trains on it in as many, and all
methods of a seed read the same batches. So they are drawn once, ahead of the training, and kept.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fope_jax.config import Experiment
from fope_jax.data.config import DataConfig
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.task_mixture import MixtureLoader, share_rows
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.evaluate.retrieval import TrialGrid, check_trials
from fope_jax.typing import Batch

BATCHES = 50  # that a process draws at once


class Windows(NamedTuple):
    """Trials of one length, of all tasks.

    Attributes:
      tokens: ``[W, C]``, prompt and answer.
      answer: ``[W]``, tokens of the answer, at the end.
      task, depth: ``[W]``, numbers of the task and of the depth.
    """

    tokens: np.ndarray
    answer: np.ndarray
    task: np.ndarray
    depth: np.ndarray


class SeedData:
    """What all methods of a seed read: training batches and trials.

    Args:
      experiment: of any method.
      contexts: tokens of the windows of the test.
      processes: that draw; with fewer than 2 this one draws what is asked for, again each time.
    """

    def __init__(self, experiment: Experiment, contexts: list[int], processes: int) -> None:
        train, evaluate = experiment.train, experiment.evaluate
        self.pool = None
        submit = _later
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(processes, context)
            submit = self.pool.submit
        first = (experiment.data, train.batch_size, train.length, experiment.seed)
        self._batches = [
            submit(draw_batches, *first, start, min(BATCHES, train.steps - start))
            for start in range(0, train.steps, BATCHES)
        ]
        grid = (evaluate.passkey_depths, evaluate.passkey_trials, experiment.seed)
        self._trials = {c: submit(draw_trials, experiment.data, c, *grid) for c in contexts}

    def batches(self) -> Iterator[Batch]:
        """The training batches in order, each window with the same weight.

        A window of copying has hundreds of answer tokens, one of a passkey six. By tokens, passkeys
        would be a hundredth of the loss.
        """
        for drawn in self._batches:
            tokens, answers = drawn.result()
            length = answers.shape[-1]
            positions = np.arange(length, dtype=np.int32)[None]
            for windows, scored in zip(tokens.astype(np.int32), answers, strict=True):
                weights = scored.astype(np.float32)
                weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1)
                segments = np.ones(scored.shape, np.int32)
                yield Batch(windows[:, :-1], windows[:, 1:], positions, segments, weights)

    def trials(self, context: int) -> Windows:
        return self._trials[context].result()

    def close(self) -> None:
        """Ends the processes; what was not drawn yet is not drawn."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


class _Later(NamedTuple):
    """A call that is made when its result is asked for, in place of a process's ``Future``."""

    result: Callable[[], Any]


def _later(function: Callable[..., Any], *arguments: Any) -> _Later | Future[Any]:
    return _Later(functools.partial(function, *arguments))


def draw_batches(
    data: DataConfig, batch_size: int, length: int, seed: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Batches ``start`` to ``start + count - 1``: windows ``[count, B, T + 1]`` uint16, and whether
    each target is an answer, ``[count, B, T]``. Batch n is a function of (seed, n)."""
    names = [name for name, _ in data.task_shares]
    rows = share_rows(data.task_shares, batch_size)
    tasks = [(_make_task(name), of_task) for name, of_task in zip(names, rows, strict=True)]
    loader = MixtureLoader(None, tasks, length=length, seed=seed, answers_only=True)
    batches = [loader.batch(start + index) for index in range(count)]
    tokens = [np.concatenate([b.tokens, b.targets[:, -1:]], axis=1) for b in batches]
    answers = [batch.weights > 0 for batch in batches]
    return np.stack(tokens).astype(np.uint16), np.stack(answers)


def draw_trials(
    data: DataConfig, context: int, depths: tuple[float, ...], trials: int, seed: int
) -> Windows:
    """Trials of each task and depth, of the test half, other ones for each seed."""
    found = []
    for number, (name, _) in enumerate(data.task_shares):
        task = _make_task(name)
        grid = TrialGrid([context], depths, trials, seed)
        check_trials(task, grid)
        for index in range(grid.count):
            trial = grid.draw(task, index, context)
            found.append((trial.tokens, trial.answer_length, number, index // trials))
    tokens, answer, task_number, depth = (np.array(column) for column in zip(*found, strict=True))
    return Windows(tokens.astype(np.uint16), answer, task_number, depth)


@functools.cache
def _make_task(name: str) -> Any:
    return make_task(name, BytesTokenizer())
