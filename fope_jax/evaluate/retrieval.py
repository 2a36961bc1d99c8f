"""Retrieval: windows that end in an answer, which the model has to write by itself.

**Scoring.** A trial is right when greedy decoding from the prompt, with a key cache, writes the
answer's tokens. What the model would write after them is not looked at. Where an answer is made of
several texts, it is counted besides how many of them are in what was written, in any order.

**Rank.** Long before a model writes an answer it may hold it likely. The right answer is ranked by
its log-likelihood after the prompt, summed over its tokens, among ``NUM_DISTRACTORS`` wrong ones,
which each task names: rank 1 is the best, chance gives (NUM_DISTRACTORS + 2) / 2, and a tie counts
against it. A trial in which a likelihood is not finite has the last rank, and NaN nats. Answers of
other tokenizers may differ in their number of tokens; sums of nats compare what the texts' whole
probabilities are.

**Items.** Trial i of a depth is drawn from (seed, depth's index, i), so every variant is asked the
same at every length: only length and place differ. All of it is of the test half of items, none of
which is ever trained on (`fope_jax.data.retrieval.base`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.retrieval.base import NUM_DISTRACTORS, Task, Trial
from fope_jax.evaluate.generation import Answerer
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.scoring import Progress, no_progress


class TrialGrid(NamedTuple):
    """Which trials are made.

    Attributes:
      contexts: tokens of a window, answer included.
      depths: where what is asked for stands, 0 to 1.
      trials: at each length and depth. A task without a depth has as many in all.
      seed: of what is asked for.
      bos: token that a window begins with, one of its ``context`` tokens; None adds none.
    """

    contexts: Sequence[int]
    depths: Sequence[float]
    trials: int
    seed: int
    bos: int | None = None

    def draw(self, task: Task, number: int, context: int) -> Trial:
        """One of the ``len(depths) * trials`` trials of a context."""
        depth = self.depths[number // self.trials]
        before = [] if self.bos is None else [np.int32(self.bos)]
        trial = task.draw_trial(self.generator(number), context - len(before), depth, "test")
        return trial._replace(tokens=np.concatenate([before, trial.tokens]).astype(np.int32))

    def generator(self, number: int) -> np.random.Generator:
        """What trial ``number`` is drawn from."""
        return np.random.default_rng([self.seed, *divmod(number, self.trials)])

    @property
    def count(self) -> int:
        """Trials of a context."""
        return len(self.depths) * self.trials


def check_trials(task: Task, grid: TrialGrid) -> None:
    """Raises ValueError, naming the shortest length that fits, where a context is too short."""
    if grid.trials < 1:
        raise ValueError(f"passkey_trials is {grid.trials}; accepted: 1 or more")
    minimum = max(task.min_length(grid.generator(number), "test") for number in range(grid.count))
    minimum += grid.bos is not None
    if min(grid.contexts) < minimum:
        raise ValueError(
            f"passkey_lengths gives a context of {min(grid.contexts)} tokens, too short for "
            f"{task.name!r}, which takes at least {minimum} with this tokenizer; evaluate longer "
            "contexts or leave it out"
        )


def score_task(
    answerer: Answerer,
    task: Task,
    tokenizer: Any,
    grid: TrialGrid,
    *,
    batch_tokens: int,
    progress: Progress = no_progress,
) -> list[Row]:
    """Runs the trials of a task.

    Args:
      answerer: the model.
      task: what is asked.
      tokenizer: ``decode``, for answers that are made of texts.
      grid: lengths, depths, trials.
      batch_tokens: upper bound of tokens in one forward pass; one window is always allowed.
      progress: called as ``progress(batches, desc=...)``.

    Returns:
      One row for each context and depth (None where the task has none): ``context, depth, correct,
      total``; ``found, asked``, texts of the answers; ``first, rank_sum, candidates``, of the rank;
      ``nats, tokens``, sums over answer tokens.

    Raises:
      ValueError: a context is shorter than a trial, with the shortest that fits.
    """
    check_trials(task, grid)
    rows = []
    for context in sorted(grid.contexts):
        trials = [grid.draw(task, number, context) for number in range(grid.count)]
        # Batches of one shape, of trials whose prompts end together.
        size = min(len(trials), max(1, batch_tokens // context))
        length = max(max(trial.answer_length, *map(len, trial.distractors)) for trial in trials)
        batches = []
        for answer in sorted({trial.answer_length for trial in trials}):
            numbers = [i for i, trial in enumerate(trials) if trial.answer_length == answer]
            batches += [numbers[start : start + size] for start in range(0, len(numbers), size)]
        scores: list[dict[str, Any]] = [{}] * len(trials)
        for index in progress(range(len(batches)), desc=f"{task.name}, context {context}"):
            chosen = [trials[number] for number in batches[index]]
            batch = _score_batch(answerer, tokenizer, chosen, size, length)
            for number, score in zip(batches[index], batch, strict=True):
                scores[number] = score
        groups: dict[float | None, list[dict[str, Any]]] = {None: scores}
        if task.has_depth:
            n = grid.trials
            groups = {float(d): scores[i * n : i * n + n] for i, d in enumerate(grid.depths)}
        for depth, group in groups.items():
            total = {name: sum(score[name] for score in group) for name in group[0]}
            fixed = {"total": len(group), "candidates": 1 + NUM_DISTRACTORS}
            rows.append({"context": int(context), "depth": depth, **fixed, **total})
    return rows


def _score_batch(
    answerer: Answerer, tokenizer: Any, trials: Sequence[Trial], size: int, length: int
) -> list[dict[str, Any]]:
    """What is added up of each trial, from one call with ``size`` rows and ``length`` tokens.

    Rows are filled up with copies, and answers with their own tokens; neither is counted.
    """
    answers = [[trial.tokens[-trial.answer_length :], *trial.distractors] for trial in trials]
    lengths = np.array([[len(answer) for answer in candidates] for candidates in answers])
    filled = np.stack(
        [[np.resize(answer, length) for answer in candidates] for candidates in answers]
    )
    prompts = np.stack([trial.tokens[: -trial.answer_length] for trial in trials])
    rows = np.resize(np.arange(len(trials)), size)
    written, nats = (np.asarray(x) for x in answerer(prompts[rows], filled[rows].astype(np.int32)))
    is_inside = np.arange(length) < lengths[..., None]
    losses = np.where(is_inside, nats[: len(trials)], 0).sum(axis=-1, dtype=np.float64)  # [B, R]
    scores = []
    for trial, candidates, tokens, loss in zip(trials, answers, written, losses, strict=False):
        tokens = tokens[: trial.answer_length]
        has_tokens = bool((tokens >= 0).all())  # not where logits were not finite
        is_finite = bool(np.isfinite(loss).all()) and has_tokens
        text = tokenizer.decode(tokens) if trial.answer_texts and has_tokens else ""
        # A distractor that is not less likely stands before the answer.
        rank = 1 + int((~(loss[1:] > loss[0])).sum()) if is_finite else len(loss)
        scores.append(
            {
                "correct": int(is_finite and (tokens == candidates[0]).all()),
                "found": sum(part in text for part in trial.answer_texts),
                "asked": len(trial.answer_texts),
                "first": int(rank == 1),
                "rank_sum": rank,
                "nats": float(loss[0]) if is_finite else math.nan,
                "tokens": trial.answer_length,
            }
        )
    return scores
