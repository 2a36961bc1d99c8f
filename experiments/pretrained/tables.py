"""Tables of the rows, in Markdown: `python -m experiments.pretrained tables`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pretrained.units import LENGTH, METHODS, TRAININGS, UPDATES
from fope_jax.evaluate.metrics import read_rows
from fope_jax.report.markdown import markdown_table
from fope_jax.report.multiples import wilson

SAME = 2048  # tokens at the end of a window that all contexts are compared on
CONTEXTS = (2048, 4096, LENGTH, LENGTH * 3 // 2, 2 * LENGTH, 4 * LENGTH)

Row = dict[str, Any]


class Results:
    """The rows that are there, by what they measure."""

    def __init__(self, directory: Path) -> None:
        self.rows = [row for path in sorted(directory.glob("*.jsonl")) for row in read_rows(path)]

    def of(self, kind: str, **fields: Any) -> list[Row]:
        """Rows of a kind with these fields, by window and seed."""
        wanted = {"kind": kind} | fields
        rows = [row for row in self.rows if wanted.items() <= row.items()]
        return sorted(rows, key=lambda row: (row["seed"], row["window"]))


def last_loss(row: Row, tokens: int) -> float:
    """Nats a token of the last ``tokens`` targets of a window."""
    blocks = tokens // row["block"]
    return sum(row["nats"][-blocks:]) / sum(row["tokens"][-blocks:])


def loss_by_position(row: Row, tokens: int) -> np.ndarray:
    """Nats a token of each stretch of ``tokens`` targets."""
    size = tokens // row["block"]
    nats, count = (np.reshape(row[name], (-1, size)).sum(axis=1) for name in ("nats", "tokens"))
    return nats / count


def found_interval(windows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The 95% interval of the share that is found, in percent; ``windows`` of 0 or 1 a question.

    Questions of one window share its haystack. With two windows and more, the number of trials is
    divided by Kish's design effect 1 + (n - 1) r, r the correlation of answers within a window
    (by analysis of variance, at least 0), and Wilson's interval is that of what is left. With one
    window r is unknown and taken for 0: then it is the interval of other questions after that
    window, and says nothing of other windows.

    >>> [round(end) for end in found_interval([[1] * 5 + [0] * 5])]
    [24, 76]
    >>> [round(end) for end in found_interval([[1] * 10, [0] * 10])]
    [9, 91]
    """
    answers = np.asarray(windows, dtype=float)
    count, size = answers.shape
    effect = 1.0
    if count > 1 and 0 < answers.mean() < 1:
        between = size * answers.mean(axis=1).var(ddof=1)
        within = answers.var(axis=1, ddof=1).mean()
        correlation = (between - within) / (between + (size - 1) * within)
        effect = 1 + (size - 1) * max(0.0, correlation)
    trials = max(1, round(answers.size / effect))
    return wilson(round(answers.mean() * trials), trials)


def loss_table(results: Results, text: str) -> str:
    """Loss of the same tokens by context, without training; the mean over windows."""
    contexts = [c for c in CONTEXTS if results.of("loss", text=text, context=c, updates=0)]
    rows = []
    for method in METHODS:
        cells = [
            results.of("loss", method=method, text=text, context=c, updates=0) for c in contexts
        ]
        if any(cells):
            rows.append(
                [method, *(_mean([last_loss(row, SAME) for row in cell]) for cell in cells)]
            )
    return markdown_table(["method", *(f"{context:,}" for context in contexts)], rows)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    suffix = f" ({len(values)})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.2f}{suffix}"


def key_table(results: Results, haystack: str, **fields: Any) -> str:
    """Keys found by context, with intervals; before a training where ``fields`` say so."""
    fields = {"text": haystack} | fields
    contexts = [c for c in CONTEXTS if results.of("every_key", context=c, **fields)]
    names = dict.fromkeys([*METHODS, *TRAININGS])
    rows = []
    for method in names:
        cells = [results.of("every_key", method=method, context=c, **fields) for c in contexts]
        if any(cells):
            rows.append([method, *map(_found, cells)])
    return markdown_table(["method", *(f"{context:,}" for context in contexts)], rows)


def _found(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    windows = [row["correct"] for row in rows]
    low, high = found_interval(windows)
    rank, nats = (np.mean([row[name] for row in rows]) for name in ("rank", "nats"))
    total = sum(map(len, windows))
    return f"{sum(map(sum, windows))}/{total} [{low:.0f}, {high:.0f}], {rank:.1f}, {nats:.0f}"


def training_table(results: Results) -> str:
    """Loss on held-out text before, during and after the trainings, and at 2,048 to 16,384."""
    rows = []
    for method in TRAININGS:
        for row in results.of("training", method=method):
            losses = [loss for _, loss in row["held_out_loss"]]
            shown = [losses[0], losses[len(losses) // 2], losses[-1]]
            after = results.of(
                "loss", method=method, context=2 * LENGTH, updates=row["updates"], seed=row["seed"]
            )
            before = results.of("loss", method=method, context=2 * LENGTH, updates=0, text="books")
            cells = [
                " ".join(f"{x:.2f}" for x in loss_by_position(each[0], SAME)) if each else ""
                for each in (before, after)
            ]
            label = f"{method}, seed {row['seed']}"
            label += f", {row['updates']} updates" if row["updates"] != UPDATES else ""
            rows.append([label, *(f"{loss:.2f}" for loss in shown), *cells])
    header = ["training", "before", "half", "after", "by 2,048 before", "by 2,048 after"]
    return markdown_table(header, rows)


def head_table(results: Results) -> str:
    """Means over all heads of what attention does, by method and context."""
    rows = []
    for row in results.of("heads"):
        needle = np.asarray(row["needle"])
        heads = needle.mean(axis=-1).ravel()
        strong = np.sort(heads)[::-1]
        cells = [
            f"{np.mean(row['first']):.2f}",
            f"{np.mean(row['recent']):.2f}",
            f"{np.mean(row['distance']):,.0f}",
            f"{int((heads > 0.1).sum())} of {heads.size}",
            " ".join(f"{share:.2f}" for share in strong[:5]),
        ]
        label = f"{row['method']} at {row['context']:,} tokens"
        label += f", {row['updates']} updates" if row["updates"] else ""
        rows.append([label, *cells])
    header = ["method", "on the first token", "on the last 64", "mean distance, tokens"]
    return markdown_table([*header, "heads with over 0.1 on the needle", "the five highest"], rows)


def all_tables(results: Results) -> str:
    """Everything, under headings."""
    parts = {
        "Loss on books, nats a token": loss_table(results, "books"),
        "Loss on joined news": loss_table(results, "news"),
        "Keys found in noise, of ten; interval; mean rank; mean nats of the number": key_table(
            results, "noise", updates=0
        ),
        "Keys found in books": key_table(results, "corpus", updates=0),
        "Short trainings": training_table(results),
        "Keys in noise after training": key_table(results, "noise", updates=UPDATES),
        "Keys in books after training": key_table(results, "corpus", updates=UPDATES),
        "Heads": head_table(results),
    }
    filled = {title: table for title, table in parts.items() if table.count("\n") > 1}
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in filled.items())
