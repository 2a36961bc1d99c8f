"""Batches that mix rows of text and of retrieval tasks: batch = f(seed, step).

Rows of text come first, then a fixed number of each task. Task row ``r`` of step ``s`` is drawn
from (seed, s, r), or, where that trial is too long for a row, from (seed, s, r, attempt). The text
loader makes batches of the remaining rows, so no window is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.config import DataConfig
from fope_jax.data.loader import Loader, iterate_batches
from fope_jax.data.retrieval.base import Task, TrialTooLong
from fope_jax.data.retrieval.registry import make_task
from fope_jax.typing import Batch

ATTEMPTS = 64  # to draw a trial that fits into a row


class MixtureLoader:
    """Batches ``[B, T]`` of text and tasks.

    Args:
      text: loader of the rows of text, or None.
      tasks: tasks with their rows per batch.
      length: tokens of a row T.
      answers_only: whether only answers have weight 1, or every token.
      rows: numbers of the rows that this process needs, see `Loader`; None means all.
    """

    def __init__(
        self,
        text: Loader | None,
        tasks: Sequence[tuple[Task, int]],
        *,
        length: int,
        seed: int,
        answers_only: bool,
        rows: np.ndarray | None = None,
    ):
        self._text, self._length, self._seed = text, length, seed
        self._answers_only = answers_only
        self._rows = [task for task, count in tasks for _ in range(count)]
        self._num_text_rows = text.batch_size if text else 0
        self._own_rows = np.arange(self._num_text_rows + len(self._rows)) if rows is None else rows
        counts = ", ".join(f"{count} of {task.name}" for task, count in tasks)
        self.summary = f"{f'{text.summary} of its rows; ' if text else ''}rows of tasks: {counts}"

    def batch(self, step: int, whole: bool = False) -> Batch:
        """The batch of a step, see `Loader.batch`."""
        own = self._own_rows[self._own_rows >= self._num_text_rows] - self._num_text_rows
        of_tasks = self._task_rows(step, np.arange(len(self._rows)) if whole else own)
        if self._text is None:
            return of_tasks
        text = self._text.batch(step, whole)
        return Batch(*(np.concatenate(pair) for pair in zip(text, of_tasks, strict=True)))

    def _task_rows(self, step: int, rows: np.ndarray) -> Batch:
        """The rows of tasks; those that are not in ``rows`` stay zero, but for their positions."""
        size = self._length + 1  # the row and the target of its last token
        shape = (len(self._rows), self._length)
        windows, answers = np.zeros((2, len(self._rows), size), np.int64)
        for row in rows.tolist():
            windows[row], answers[row] = self._draw_window(step, row, size)
        made = np.isin(np.arange(len(self._rows)), rows)[:, None]
        scored = answers[:, 1:] if self._answers_only else made
        return Batch(
            tokens=windows[:, :-1].astype(np.int32),
            targets=windows[:, 1:].astype(np.int32),
            positions=np.broadcast_to(np.arange(self._length, dtype=np.int32), shape),
            segments=np.broadcast_to(made, shape).astype(np.int32),
            weights=np.broadcast_to(scored, shape).astype(np.float32),
        )

    def _draw_window(self, step: int, row: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A window of the row's task; trials that are too long are drawn again."""
        task = self._rows[row]
        for attempt in range(ATTEMPTS):
            key = [self._seed, step, row] + [attempt] * (attempt > 0)
            try:
                return task.draw_training_window(np.random.default_rng(key), size)
            except TrialTooLong as error:
                too_long = error
        raise ValueError(
            f"data.tasks: none of {ATTEMPTS} trials of {task.name} fits into row {row} of step "
            f"{step}; raise train.length, {self._length}. The last one: {too_long}"
        )

    def iterate(self, start_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Batches of ``num_steps`` steps from ``start_step``, see `Loader.iterate`."""
        return iterate_batches(self.batch, start_step, num_steps)

    def row_sources(self, step: int) -> list[dict[str, Any]]:
        """The source of each row, see `Loader.row_sources`, or its task."""
        text = self._text.row_sources(step) if self._text else []
        return [*text, *({"task": task.name} for task in self._rows)]


class BatchLoader(Protocol):
    """What `Loader` and `MixtureLoader` have in common; see there."""

    @property
    def summary(self) -> str: ...

    def batch(self, step: int, whole: bool = False) -> Batch: ...

    def iterate(self, start_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]: ...

    def row_sources(self, step: int) -> list[dict[str, Any]]: ...


def make_stage_loaders(
    config: DataConfig,
    cache: TokenCache,
    stages: Sequence[tuple[int, int, int, int]],
    *,
    seed: int,
    data_start: int = 0,
    rows_of: Callable[[int], np.ndarray] = np.arange,
) -> list[BatchLoader]:
    """The training batches of each stage of a run; stages continue one stream of windows.

    The windows have the last stage's length and earlier stages cut them up, so that each token of
    an epoch is an input once. Batch ``data_start + n`` of a loader is that of update ``n``, from 0.

    Args:
      config, cache: of the data, and its training split.
      stages: ``TrainConfig.stages``: first update, last update, tokens of a row, rows.
      data_start: batches of the last stage's size to skip.
      rows_of: of a batch size, the numbers of the rows that this process needs, see `Loader`.

    Raises:
      ValueError: a task's share gives it no row, or it does not fit into a row.
    """
    *_, window, last_size = stages[-1]
    last_rows = share_rows(config.task_shares, last_size)
    tokens_read = data_start * (last_size - sum(last_rows)) * window  # of text
    tasks = [make_task(name, cache.tokenizer) for name, _ in config.task_shares]
    loaders: list[BatchLoader] = []
    for start, stop, length, size in stages:
        if window % length == 0:  # rows in proportion leave whole windows for the text
            rows = [count * (window // length) for count in last_rows]
        else:
            rows = share_rows(config.task_shares, size)
        text, text_rows, own = None, size - sum(rows), rows_of(size)
        batch_tokens = text_rows * length
        if text_rows:
            text = Loader(
                cache,
                length=length,
                batch_size=text_rows,
                seed=seed,
                packing=config.packing,
                window=window,
                max_repeats=config.max_repeats,
                repeat_tokens=config.repeat_tokens,
                first_token=tokens_read - (data_start + start) * batch_tokens,
                rows=own[own < text_rows],
            )
        tokens_read += (stop - start) * batch_tokens
        if text is not None and not tasks:
            loaders.append(text)
            continue
        for task in tasks:
            shortest = max(task.min_length(np.random.default_rng(i), "training") for i in range(16))
            if length + 1 < shortest:
                raise ValueError(
                    f"data.tasks: a window of {task.name} takes {shortest} tokens or more; "
                    f"train.length = {length} gives {length + 1}"
                )
        counted, only = list(zip(tasks, rows, strict=True)), config.task_targets == "answers"
        loaders.append(
            MixtureLoader(text, counted, length=length, seed=seed, answers_only=only, rows=own)
        )
    return loaders


def share_rows(shares: Sequence[tuple[str, float]], batch_size: int) -> list[int]:
    """Rows of each task, near the total share; ValueError if a task would have none.

    >>> share_rows([("recall", 0.25), ("copy", 0.5)], 16)
    [4, 8]
    """
    edges = np.round(np.cumsum([0.0, *(share for _, share in shares)]) * batch_size).astype(int)
    rows = np.diff(edges).tolist()
    for (name, share), count in zip(shares, rows, strict=True):
        if not count:
            raise ValueError(
                f"data.tasks: a share of {share:g} for {name!r} is no row of a batch of "
                f"{batch_size}; raise the share or train.batch_size"
            )
    return rows
