"""Loss at each context length while a model was being trained: rows of kind ``validation``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fope_jax.extras import require
from fope_jax.report.comparison import run_labels
from fope_jax.report.lineage import tokens_before
from fope_jax.report.plots import WIDTH, Style, legend_below
from fope_jax.report.rows import Row, Run
from fope_jax.report.sums import group
from fope_jax.report.tables import EMPTY, Table, three

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Scored(NamedTuple):
    """What runs that may share axes were scored on: the same tokens, in windows of some lengths,
    which begin with the BOS token or with none."""

    split: str
    scored_per_window: int
    tokens: int
    bytes: int
    bos_token: str | None = None


def validation_groups(runs: Sequence[Run]) -> dict[Scored, list[tuple[Run, list[Row]]]]:
    """Runs with their rows, by what was scored; a run that changed it is in several."""
    found: dict[Scored, list[tuple[Run, list[Row]]]] = {}
    for run in runs:
        scored = group(
            run.of("validation"),
            lambda row: Scored(**{key: row[key] for key in Scored._fields if key in row}),
        )
        for key, rows in scored.items():
            found.setdefault(key, []).append((run, rows))
    return found


def validation_figure(shown: Sequence[tuple[Run, list[Row]]], styles: dict[str, Style]) -> Figure:
    """Loss against tokens seen, one panel a context length, parent and child on one axis.

    Where a run goes on from another, the axis begins twice its length before it: the rest of the
    parent's training would leave no room for the child's.
    """
    contexts = sorted({row["context"] for _, rows in shown for row in rows})
    names = run_labels([run for run, _ in shown])
    columns = min(3, len(contexts))
    lines = math.ceil(len(contexts) / columns)
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(WIDTH, 1.1 + 2.1 * lines), layout="constrained"
    )
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    first, drawn = _first_drawn(shown), {}
    for panel, context in zip(panels, contexts, strict=False):
        for run, rows in shown:
            points = [
                (_seen(run, row), row["nats"] / row["tokens"])
                for row in rows
                if row["context"] == context and _seen(run, row) >= first
            ]
            label = names[run.path]
            drawn[label] = (
                panel.plot(
                    *zip(*points, strict=True),
                    linewidth=1.3,
                    markersize=4,
                    **styles[label]._asdict(),
                )[0]
                if points
                else drawn.get(label)
            )
            if run.lineage:
                panel.axvline(
                    tokens_before(run), color="#555555", linewidth=1, linestyle=(0, (2, 2))
                )
        _dress(panel, f"context {context:,}")
    for panel in panels[len(contexts) :]:
        panel.axis("off")
    found = {label: line for label, line in drawn.items() if line is not None}
    legend_below(figure, list(found.values()), list(found))
    figure.supylabel("loss (nats per token)", fontsize=10)
    figure.suptitle("Loss at each context length during training", fontsize=11)
    return figure


def _seen(run: Run, row: Row) -> int:
    return tokens_before(run) + row["tokens_seen"]


def _first_drawn(shown: Sequence[tuple[Run, list[Row]]]) -> int:
    """Tokens seen where the axis begins."""
    children = [(run, rows) for run, rows in shown if run.lineage]
    if not children:
        return 0
    longest = max(row["tokens_seen"] for _, rows in children for row in rows)
    return max(0, min(tokens_before(run) for run, _ in children) - 2 * longest)


def _dress(panel: Axes, title: str) -> None:
    ticker = require("matplotlib.ticker", "train")
    panel.grid(True, color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("tokens seen", fontsize=9)
    panel.xaxis.set_major_locator(ticker.MaxNLocator(4))
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    panel.tick_params(labelsize=8, labelbottom=True)


def validation_table(shown: Sequence[tuple[Run, list[Row]]]) -> Table:
    """Every loss: a row for each run and step, a column for each context."""
    contexts = sorted({row["context"] for _, rows in shown for row in rows})
    columns = ["updates", "tokens seen", *(f"{context:,}" for context in contexts)]
    table = Table("Loss during training (nats/token), by context (tokens)", "variant", columns)
    names = run_labels([run for run, _ in shown])
    for run, rows in shown:
        for step, own in group(rows, lambda row: row["step"]).items():
            losses = {row["context"]: three(row["nats"] / row["tokens"]) for row in own}
            cells = [f"{step:,}", f"{_seen(run, own[0]):,}"]
            cells += [losses.get(context, EMPTY) for context in contexts]
            table.rows.append((names[run.path], cells))
    return table


def alt_text(shown: Sequence[tuple[Run, list[Row]]]) -> str:
    """The first and the last loss of each run at its shortest and its longest context."""
    names, parts = run_labels([run for run, _ in shown]), []
    for run, rows in shown:
        contexts = sorted({row["context"] for row in rows})
        for context in dict.fromkeys((contexts[0], contexts[-1])):
            first, *_, last = [row for row in rows if row["context"] == context] * 2
            parts.append(
                f"{names[run.path]} at {context:,} tokens: {three(first['nats'] / first['tokens'])}"
                f", then {three(last['nats'] / last['tokens'])}"
            )
    return f"Loss during training. {'; '.join(parts)}."
