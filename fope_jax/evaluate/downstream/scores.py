"""What a model writes or chooses for the items of a task, scored: rows, and a record of each item.

A prompt that is too long for the model loses its middle, as in LongBench: half of the tokens that
fit are its first ones and half its last, since instructions stand at both ends. Rows count how many
did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fope_jax.evaluate.downstream.items import Item, ItemTask
from fope_jax.evaluate.downstream.longbench import words_range
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.progress import Progress, no_progress
from fope_jax.evaluate.text_model import TextModel


class Score(NamedTuple):
    """Scores of one item, 0 to 1 by metric.

    Attributes:
      text: what was written or chosen.
      length: tokens of the prompt before it was cut.
      cut: how many of them the model did not read.
    """

    scores: dict[str, float]
    text: str
    length: int
    cut: int


def cut_middle(tokens: Sequence[int], most: int | None) -> list[int]:
    """All of at most ``most`` tokens, else the first and the last ``most // 2`` of them.

    >>> cut_middle([1, 2, 3, 4, 5, 6], 5), cut_middle([1, 2, 3], 3)
    ([1, 2, 5, 6], [1, 2, 3])
    """
    if most is None or len(tokens) <= most:
        return list(tokens)
    half = most // 2
    return [*tokens[:half], *tokens[len(tokens) - half :]]


def check_room(task: ItemTask, max_length: int | None) -> None:
    """Raises ValueError where ``max_length`` leaves no room for a prompt."""
    least = 2 + task.count
    if not task.items[0].choices and max_length is not None and max_length < least:
        raise ValueError(
            f"{task.benchmark} {task.name}: {task.count} tokens to write leave no room for a "
            f"prompt in max_length = {max_length}; accepted: {least} or more"
        )


def score_items(
    model: TextModel, task: ItemTask, training_length: int, progress: Progress = no_progress
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Scores all items of a task.

    Returns:
      Rows as `sum_scores` makes them; and for each item what LongBench's ``eval.py`` reads
      (``pred, answers, all_classes, length``), with its name, scores and tokens.

    Raises:
      ValueError: the model's logits are not finite, or a choice does not fit; names the item.
    """
    score = _score_choices if task.items[0].choices else _score_written
    scores = score(model, task, progress)
    records = [
        {
            "_id": item.name,
            "pred": result.text,
            "answers": list(item.answers),
            "all_classes": list(item.classes) or None,
            "length": item.words,
            "scores": result.scores,
            "tokens": result.length,
            "cut": result.cut,
        }
        for item, result in zip(task.items, scores, strict=True)
    ]
    return sum_scores(task.items, scores, training_length), records


def sum_scores(items: Iterable[Item], scores: Iterable[Score], training_length: int) -> list[Row]:
    """A row for each range of length: ``total, truncated, tokens, scores``, sums over its items.

    ``scores`` has by metric the sum of scores and of their squares; ``tokens`` are those of whole
    prompts. Ranges are ``multiples``, of whole prompts over the training length, and ``words``
    where the benchmark counts them; both as ``[from, to]``.
    """
    cells: dict[Any, list[Score]] = {}
    for item, score in zip(items, scores, strict=True):
        words = None if item.words is None else words_range(item.words)
        key = (words, multiples_range(score.length, training_length))
        cells.setdefault(key, []).append(score)
    rows = []
    for (words, multiples), group in sorted(cells.items()):
        row: Row = {} if words is None else {"words": list(words)}
        row |= {
            "multiples": list(multiples),
            "total": len(group),
            "truncated": sum(score.cut > 0 for score in group),
            "tokens": sum(score.length for score in group),
            "scores": {
                name: sum_and_squares([score.scores[name] for score in group])
                for name in group[0].scores
            },
        }
        rows.append(row)
    return rows


def multiples_range(tokens: int, training_length: int) -> tuple[int, int]:
    """The range of ``tokens`` in training lengths; the first includes the training length.

    >>> [multiples_range(tokens, 512) for tokens in (100, 512, 513, 2048, 2049)]
    [(0, 1), (0, 1), (1, 2), (2, 4), (4, 8)]
    """
    stop = 1
    while tokens > stop * training_length:
        stop *= 2
    return stop // 2, stop


def sum_and_squares(values: Sequence[float]) -> list[float]:
    """The sum, and that of the squares, from which a standard error is made.

    >>> sum_and_squares([1.0, 0.5])
    [1.5, 1.25]
    """
    return [math.fsum(values), math.fsum(value**2 for value in values)]


def _score_written(model: TextModel, task: ItemTask, progress: Progress) -> list[Score]:
    most = None if model.max_length is None else model.max_length - task.count
    whole = [model.prompt_tokens(item.prompt) for item in task.items]
    prompts = [cut_middle(tokens, most) for tokens in whole]
    breaks = (model.tokenizer.encode("\n")[-1],) if task.ends_at_line_break else ()
    written = model.write_after(
        prompts,
        task.count,
        [f"the prompt of item {item.name}" for item in task.items],
        stops=breaks,
        not_first=(model.tokenizer.eos_id, *breaks) if breaks else (),
        progress=progress,
        desc=f"{task.benchmark} {task.name}",
    )
    results = []
    for item, tokens, prompt, row in zip(task.items, whole, prompts, written, strict=True):
        text = model.tokenizer.decode(row)
        scored = text.lstrip("\n").split("\n")[0] if task.is_one_line else text
        scores = {
            name: max(metric(scored, answer) for answer in item.answers)
            for name, metric in task.metrics(item).items()
        }
        results.append(Score(scores, text, len(tokens), len(tokens) - len(prompt)))
    return results


def _score_choices(model: TextModel, task: ItemTask, progress: Progress) -> list[Score]:
    rows, lengths, results = [], [], []
    for item in task.items:
        for choice in item.choices:
            where = f"{task.benchmark} {task.name}, item {item.name}, choice {choice!r:.60}"
            context, target = model.encode_pair(item.prompt, spaced(item.prompt, choice), where)
            most = None if model.max_length is None else model.max_length + 1 - len(target)
            if most is not None and most < 2 <= len(context):
                raise ValueError(
                    f"{where}: {len(target)} tokens leave no room for a prompt in max_length = "
                    f"{model.max_length}"
                )
            rows.append((cut_middle(context, most), target))
            lengths.append(len(context))
    desc = f"{task.benchmark} {task.name}"
    found = iter(zip(lengths, rows, model.score_rows(rows, progress, desc), strict=True))
    for item in task.items:
        of_item = [next(found) for _ in item.choices]
        totals = [total for _, _, (total, _) in of_item]
        if not all(map(math.isfinite, totals)):
            raise ValueError(
                f"{desc}, item {item.name}: log-likelihoods of its choices are {totals}; the "
                "model's logits are not finite there"
            )
        per_character = [
            total / len(choice) for total, choice in zip(totals, item.choices, strict=True)
        ]
        scores = {"acc": _is_right(item, totals), "acc_norm": _is_right(item, per_character)}
        chosen = item.choices[max(range(len(totals)), key=totals.__getitem__)]
        cut = max(length - len(context) for length, (context, _), _ in of_item)
        longest = max(length for length, _, _ in of_item)
        results.append(Score(scores, chosen, longest, cut))
    return results


def spaced(prompt: str, choice: str) -> str:
    """The choice as it follows the prompt: after a space, unless either brings white space.

    >>> spaced("The sky is", "blue"), spaced("Answer: ", "blue"), spaced("Q", " a")
    (' blue', 'blue', ' a')
    """
    return choice if prompt[-1:].isspace() or choice[:1].isspace() else f" {choice}"


def _is_right(item: Item, values: Sequence[float]) -> float:
    """1 where an answer has a higher value than all wrong choices; a tie is wrong."""
    right, wrong = [], []
    for choice, value in zip(item.choices, values, strict=True):
        (right if choice in item.answers else wrong).append(value)
    return float(max(right) > max(wrong))
