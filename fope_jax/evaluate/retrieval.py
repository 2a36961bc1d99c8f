"""Retrieval: windows that end in an answer, which the model writes.

A trial is correct when greedy decoding after the prompt writes the answer's tokens; what follows is
ignored. For an answer of several texts, those written are also counted, in any order.

A model may find an answer likely long before it writes it, so the answer is ranked by its
log-likelihood, summed over tokens, among ``NUM_DISTRACTORS`` wrong answers of the task. Rank 1 is
best, chance gives (NUM_DISTRACTORS + 2) / 2, and a tie counts against the answer. A trial with a
likelihood that is not finite has the last rank and NaN nats.

Trial i of a depth is drawn from (seed, depth's index, i), so all variants and lengths have the same
questions. Items are of the test half, which is never trained on (`fope_jax.data.retrieval.base`).

A task that asks for every depth after one window (``Task.depths``) is read once for all of them,
and its trial i is drawn from (seed, i). The trials of a depth are of different windows; those of
one window are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.random_positions import PositionDraw
from fope_jax.data.retrieval.base import NUM_DISTRACTORS, Task, Trial
from fope_jax.evaluate.generation import Answerer, answer_room
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.progress import Progress, no_progress
from fope_jax.evaluate.scoring import positions_of_rows


class ContextTooShortError(ValueError):
    """A context has no room for a trial; longer ones may have."""


class ContextTooLongError(ValueError):
    """A wrong answer ends beyond the position embedding; in a shorter context it may not."""


class TrialGrid(NamedTuple):
    """The trials of a task.

    Attributes:
      contexts: tokens of a window, answer included.
      depths: relative positions of the answer in the prompt, 0 to 1.
      trials: number at each length and depth; a task without depths has as many in all, one with
        ``Task.depths`` as many windows.
      bos: first token of a window, one of its ``context`` tokens; None adds none.
    """

    contexts: Sequence[int]
    depths: Sequence[float]
    trials: int
    seed: int
    bos: int | None = None

    def draw(self, task: Task, number: int, context: int) -> Trial:
        """One of the ``count`` trials of a context."""
        depth = self.depths[number // self.trials]
        before = [] if self.bos is None else [np.int32(self.bos)]
        rng = self.generator(task, number)
        trial = task.draw_trial(rng, context - len(before), depth, "test")
        return trial._replace(tokens=np.concatenate([before, trial.tokens]).astype(np.int32))

    def generator(self, task: Task, number: int) -> np.random.Generator:
        depth, index = divmod(number, self.trials)
        of_depth = [depth] if task.depths is None else []
        return np.random.default_rng([self.seed, *of_depth, index])

    def windows(self, task: Task) -> list[list[int]]:
        """Numbers of the trials that share a window."""
        step = self.count if task.depths is None else self.trials
        return [list(range(first, self.count, step)) for first in range(step)]

    @property
    def count(self) -> int:
        return len(self.depths) * self.trials


DEFINED = "the position embedding is defined for at most"


def check_trials(
    task: Task, grid: TrialGrid, limit: int | None = None, limited: str = DEFINED
) -> None:
    """Raises ContextTooShortError or ContextTooLongError, with the length that fits; ValueError for
    no trials, and for a depth or a context that is given twice.

    ``limit`` is the most tokens that can be read, None any number, and ``limited`` says why. All
    candidates of a task are read in the room of the longest, which ends beyond the context where it
    is longer than the answer.
    """
    if grid.trials < 1:
        raise ValueError(f"passkey_trials is {grid.trials}; accepted: 1 or more")
    # Rows are kept by depth: one of two equal ones would lose its trials.
    for name, values in (("passkey_depths", grid.depths), ("passkey_lengths", grid.contexts)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} gives {', '.join(map(str, values))}; accepted: each once")
    generators = [grid.generator(task, number) for number in range(grid.count)]
    trials = [task.lengths(generator, "test") for generator in generators]
    minimum = max(trial.window for trial in trials) + (grid.bos is not None)
    if min(grid.contexts) < minimum:
        raise ContextTooShortError(
            f"passkey_lengths gives a context of {min(grid.contexts)} tokens, too short for "
            f"{task.name!r}, which takes at least {minimum} with this tokenizer; give longer ones "
            "in evaluate.passkey_lengths, or leave the task out where it is named in "
            "evaluate.passkey_templates or evaluate.retrieval_tasks"
        )
    room = answer_room(max(trial.longest for trial in trials))
    beyond, context = room - min(trial.answer for trial in trials), max(grid.contexts)
    if limit is not None and context + beyond > limit:
        raise ContextTooLongError(
            f"passkey_lengths gives a context of {context} tokens, and with wrong answers of "
            f"{task.name!r} {context + beyond} are read: {limited} {limit}; evaluate contexts of "
            f"up to {limit - beyond} or leave it out"
        )


def answers_at_random_positions(answerer: Answerer, draw: PositionDraw) -> Answerer:
    """``answerer`` at positions drawn for each window from the tokens of its prompt.

    A question and its answers, right and wrong ones, stand at the same positions after it.
    """

    def answer(prompts: np.ndarray, answers: np.ndarray, questions: np.ndarray | None = None):
        asked = 0 if questions is None else questions.shape[2]
        read = prompts.shape[1] + asked + answers.shape[-1] - 1
        positions = positions_of_rows(draw, prompts, np.ones((len(prompts), read), np.int32))
        return answerer(prompts, answers, questions, positions)

    return answer


def score_task(
    answerer: Answerer,
    task: Task,
    tokenizer: Any,
    grid: TrialGrid,
    *,
    batch_tokens: int,
    progress: Progress = no_progress,
) -> list[Row]:
    """Runs the trials of a task, in batches of at most ``batch_tokens`` tokens or one window.

    Returns:
      A row for each context and depth (None without depths): ``context, depth, correct, total``;
      ``found, asked``, texts of answers; ``first, rank_sum, candidates``, of the rank; ``nats,
      tokens``, sums over answer tokens; ``windows``, if those of all depths are the same.

    Raises:
      ValueError: a context is shorter than a trial; names the shortest that fits.
    """
    check_trials(task, grid)
    rows = []
    for context in sorted(grid.contexts):
        trials = [grid.draw(task, number, context) for number in range(grid.count)]
        # Prompts of a batch have one length; all batches have one shape.
        windows = grid.windows(task)
        size = min(len(windows), max(1, batch_tokens // context))
        length = longest_answer(trials)
        batches = []
        for answer in sorted({trial.answer_length for trial in trials}):
            alike = [each for each in windows if trials[each[0]].answer_length == answer]
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        scores: list[dict[str, Any]] = [{}] * len(trials)
        for index in progress(range(len(batches)), desc=f"{task.name}, context {context}"):
            chosen = [[trials[number] for number in window] for window in batches[index]]
            batch = score_windows_of_trials(answerer, tokenizer, chosen, size, length)
            for window, of_window in zip(batches[index], batch, strict=True):
                for number, score in zip(window, of_window, strict=True):
                    scores[number] = score
        groups: dict[float | None, list[dict[str, Any]]] = {None: scores}
        if task.has_depth:
            n = grid.trials
            groups = {float(d): scores[i * n : i * n + n] for i, d in enumerate(grid.depths)}
        for depth, group in groups.items():
            total = {name: sum(score[name] for score in group) for name in group[0]}
            fixed = {"total": len(group), "candidates": 1 + NUM_DISTRACTORS}
            if task.depths is not None:
                fixed["windows"] = grid.trials  # the same ones at every depth
            rows.append({"context": int(context), "depth": depth, **fixed, **total})
    return rows


def longest_answer(trials: Sequence[Trial]) -> int:
    """Tokens of the longest answer or distractor."""
    return max(max(trial.answer_length, *map(len, trial.distractors)) for trial in trials)


def score_windows_of_trials(
    answerer: Answerer, tokenizer: Any, windows: Sequence[Sequence[Trial]], size: int, length: int
) -> list[list[dict[str, Any]]]:
    """Scores of the trials of each window, from one call of the answerer.

    Args:
      windows: trials that share a window, and differ in question and answer; or one trial each. All
        have answers of one length.
      size: rows of the call, filled with copies.
      length: tokens that answers are filled to, see ``longest_answer``.
    """
    answers = [
        [[trial.tokens[-trial.answer_length :], *trial.distractors] for trial in window]
        for window in windows
    ]
    filled = np.array(
        [
            [[np.resize(answer, length) for answer in candidates] for candidates in of_window]
            for of_window in answers
        ],
        np.int32,
    )  # [B, Q, R, A]
    first = windows[0][0]
    stop = -first.answer_length
    start = stop - first.question_length
    prompts = np.stack([window[0].tokens[:start] for window in windows])
    rows = np.resize(np.arange(len(windows)), size)
    if first.question_length:
        questions = np.stack([[t.tokens[start:stop] for t in window] for window in windows])
        written, nats = answerer(prompts[rows], filled[rows], questions[rows])
        written, nats = np.asarray(written), np.asarray(nats)
    else:
        written, nats = (np.asarray(x)[:, None] for x in answerer(prompts[rows], filled[rows, 0]))
    return [
        [
            _score_trial(tokenizer, *asked)
            for asked in zip(window, of_window, written[index], nats[index], strict=True)
        ]
        for index, (window, of_window) in enumerate(zip(windows, answers, strict=True))
    ]


def _score_trial(
    tokenizer: Any,
    trial: Trial,
    candidates: Sequence[np.ndarray],
    written: np.ndarray,
    nats: np.ndarray,
) -> dict[str, Any]:
    """Counts of one trial: ``written [A]`` tokens, ``nats [R, A]`` of the candidates."""
    lengths = np.array([len(answer) for answer in candidates])
    is_inside = np.arange(nats.shape[-1]) < lengths[:, None]
    loss = np.where(is_inside, nats, 0).sum(axis=-1, dtype=np.float64)  # [R]
    tokens = written[: trial.answer_length]
    has_tokens = bool((tokens >= 0).all())  # -1 where logits are not finite
    is_finite = bool(np.isfinite(loss).all()) and has_tokens
    text = tokenizer.decode(tokens) if trial.answer_texts and has_tokens else ""
    # Ties count against the answer.
    rank = 1 + int((~(loss[1:] > loss[0])).sum()) if is_finite else len(loss)
    return {
        "correct": int(is_finite and (tokens == candidates[0]).all()),
        "found": sum(part in text for part in trial.answer_texts),
        "asked": len(trial.answer_texts),
        "first": int(rank == 1),
        "rank_sum": rank,
        "nats": float(loss[0]) if is_finite else math.nan,
        "tokens": trial.answer_length,
    }
