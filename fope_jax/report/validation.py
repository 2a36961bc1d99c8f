"""Loss at each context length during training: rows of kind ``validation``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fope_jax.extras import require
from fope_jax.report.charts import Chart, Curve, curves_in_colour
from fope_jax.report.comparison import context_of, run_labels
from fope_jax.report.lineage import tokens_before
from fope_jax.report.plots import DASHES, GREY, PALE, WIDTH, legend_below, new_figure
from fope_jax.report.rows import Row, Run
from fope_jax.report.styles import Style
from fope_jax.report.sums import add_up, group
from fope_jax.report.tables import EMPTY, Table, format_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RunRows = Sequence[tuple[Run, list[Row]]]  # runs that share axes


class Scored(NamedTuple):
    """What was scored; runs that agree in it may share axes."""

    split: str
    scored_per_window: int
    tokens: int
    bytes: int
    bos_token: str = ""


def validation_groups(runs: Sequence[Run]) -> dict[Scored, list[tuple[Run, list[Row]]]]:
    """Runs with their rows, by what was scored; a run that changed it is in several groups."""
    groups: dict[Scored, list[tuple[Run, list[Row]]]] = {}
    for run in runs:
        pools = group(
            run.of("validation"),
            lambda row: Scored(**{key: row[key] for key in Scored._fields if key in row}),
        )
        for scored, rows in pools.items():
            groups.setdefault(scored, []).append((run, rows))
    return groups


def _contexts(run_rows: RunRows) -> list[int]:
    return sorted({row["context"] for _, rows in run_rows for row in rows})


def _tokens_seen(run: Run, row: Row) -> int:
    return tokens_before(run) + row["tokens_seen"]


def validation_figure(run_rows: RunRows, styles: dict[str, Style]) -> Figure:
    """Loss against tokens seen, one panel a context length, parent and child on one axis.

    The axis begins twice the child's tokens before it: all of the parent would squeeze the child.
    """
    contexts, labels = _contexts(run_rows), run_labels([run for run, _ in run_rows])
    start = _first_shown(run_rows)
    in_colour = _labels_in_colour(run_rows)
    columns = min(3, len(contexts))
    lines = math.ceil(len(contexts) / columns)
    size = (WIDTH, 1.1 + 2.1 * lines)
    figure, panels = new_figure(*size, lines, columns, sharex=True, sharey=True)
    ticker, handles = require("matplotlib.ticker", "train"), {}
    for axes, context in zip(panels, contexts, strict=False):
        for run, rows in run_rows:
            label = labels[run.path]
            points = [
                (_tokens_seen(run, row), add_up([row]).loss())
                for row in rows
                if row["context"] == context and _tokens_seen(run, row) >= start
            ]
            if points:
                x, y = zip(*points, strict=True)
                style, name = styles[label]._asdict(), label
                if label not in in_colour:
                    style, name = {"color": PALE, "zorder": 1}, "others"
                (handles[name],) = axes.plot(x, y, linewidth=1.3, markersize=4, **style)
            if run.lineage:
                axes.axvline(tokens_before(run), color=GREY, linewidth=1, linestyle=DASHES)
        axes.set_title(f"context {context:,}", fontsize=10)
        axes.set_xlabel("tokens seen", fontsize=9)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
        axes.tick_params(labelsize=8, labelbottom=True)
    for axes in panels[len(contexts) :]:
        axes.axis("off")
    legend_below(figure, list(handles.values()), list(handles))
    figure.supylabel("loss (nats per token)", fontsize=10)
    figure.suptitle("Loss at each context length during training", fontsize=11)
    return figure


def _first_shown(run_rows: RunRows) -> int:
    """Tokens seen from which on losses are shown."""
    children = [(run, rows) for run, rows in run_rows if run.lineage]
    if not children:
        return 0
    longest = max(row["tokens_seen"] for _, rows in children for row in rows)
    return max(0, min(tokens_before(run) for run, _ in children) - 2 * longest)


def validation_charts(run_rows: RunRows) -> dict[int, Chart]:
    """The panels of `validation_figure` as charts by context length; means over seeds."""
    labels, start = run_labels([run for run, _ in run_rows]), _first_shown(run_rows)
    charts = {}
    for context in _contexts(run_rows):
        losses: dict[str, dict[int, list[float]]] = {label: {} for label in labels.values()}
        for run, rows in run_rows:
            for row in rows:
                seen = _tokens_seen(run, row)
                if row["context"] == context and seen >= start:
                    losses[labels[run.path]].setdefault(seen, []).append(add_up([row]).loss())
        curves = {
            label: Curve(sorted(seen), [sum(seen[x]) / len(seen[x]) for x in sorted(seen)])
            for label, seen in losses.items()
        }
        charts[context] = Chart(
            title=f"Loss during training, context {context:,}",
            subtitle="",
            x_label="tokens seen (k: thousand, M: million, G: billion)",
            y_label="loss (nats per token)",
            curves=curves,
            coloured=_labels_in_colour(run_rows),
            is_linear=True,
            show=format_loss,
        )
    return charts


def _labels_in_colour(run_rows: RunRows) -> list[str]:
    """By the last loss at the longest context of each run."""
    labels = run_labels([run for run, _ in run_rows])
    last = {}
    for run, rows in run_rows:
        row = max(rows, key=lambda row: (row["context"], row["step"]))
        last[labels[run.path]] = Curve([row["step"]], [add_up([row]).loss()])
    return curves_in_colour(last)


def validation_table(run_rows: RunRows) -> Table:
    contexts, labels = _contexts(run_rows), run_labels([run for run, _ in run_rows])
    columns = ["updates", "tokens seen", *(f"{context:,}" for context in contexts)]
    table = Table("Loss during training (nats/token), by context (tokens)", "variant", columns)
    for run, rows in run_rows:
        for step, step_rows in group(rows, lambda row: row["step"]).items():
            losses = {row["context"]: format_loss(add_up([row]).loss()) for row in step_rows}
            cells = [f"{step:,}", f"{_tokens_seen(run, step_rows[0]):,}"]
            cells += [losses.get(context, EMPTY) for context in contexts]
            table.rows.append((labels[run.path], cells))
    return table


def alt_text(run_rows: RunRows) -> str:
    labels, texts = run_labels([run for run, _ in run_rows]), []
    for run, rows in run_rows:
        pools = group(rows, context_of)
        for context in dict.fromkeys((min(pools), max(pools))):
            first, *_, last = [format_loss(add_up([row]).loss()) for row in pools[context]] * 2
            texts.append(f"{labels[run.path]} at {context:,} tokens: {first}, then {last}")
    return f"Loss during training. {'; '.join(texts)}."
