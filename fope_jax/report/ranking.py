"""The section of a report that says which variant is better, and which differences are resolved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fope_jax.extras import require
from fope_jax.report.differences import (
    LEVEL,
    Difference,
    all_differences,
    by_seed,
    holm,
    ranks,
    unmatched,
)
from fope_jax.report.rows import Comparison, Run, Sums, spread
from fope_jax.report.tables import EMPTY, Table, three

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Mapping[str, Mapping[int, float]]


def loss(sums: Sums) -> float:
    """Nats a token: differences of it are ratios of perplexities."""
    return sums.loss


def is_ranked(comparison: Comparison) -> bool:
    """Whether two variants share two seeds, without which nothing can be resolved."""
    numbers = by_seed(comparison, loss, shown_contexts(comparison)[0])
    return any(difference.seeds > 1 for difference in all_differences(numbers).values())


def shown_contexts(comparison: Comparison) -> list[int]:
    """The longest and the shortest context at which all variants were scored.

    Where there is none, the longest context alone.
    """
    whole = [
        context
        for context in comparison.contexts
        if len(by_seed(comparison, loss, context)) == len(comparison.curves)
    ]
    return sorted({max(whole), min(whole)}, reverse=True) if whole else comparison.contexts[-1:]


def ranking_table(comparison: Comparison) -> Table:
    """Mean loss with its standard error, and rank, at every context; best at the longest first."""
    contexts = comparison.contexts
    numbers = {context: by_seed(comparison, loss, context) for context in contexts}
    places = {context: ranks(own) for context, own in numbers.items()}
    rows = []
    for label in ordered(numbers[max(contexts)]):
        cells = []
        for context in contexts:
            own = numbers[context].get(label)
            place = places[context].get(label, math.nan)
            rank = "" if math.isnan(place) else f" ({place:.1f})"
            cells.append(EMPTY if own is None else with_error(list(own.values())) + rank)
        rows.append((label, [str(len(numbers[max(contexts)][label])), *cells]))
    return Table(
        f"Loss in nats per token ({comparison.name} split), mean ± standard error over seeds, "
        "and mean rank in brackets",
        "context (tokens)", ["seeds", *(f"{context:,}" for context in contexts)], rows,
        "rank 1 is the lowest loss of a seed",
    )  # fmt: skip


def with_error(values: Sequence[float]) -> str:
    """``mean ± standard error``; the mean alone of one value.

    >>> with_error([1.0, 2.0, 3.0])
    '2.000 ± 0.577'
    """
    mean, deviation, count = spread(values)
    return three(mean) if count == 1 else f"{three(mean)} ± {deviation / math.sqrt(count):.3f}"


def ordered(numbers: Numbers) -> list[str]:
    """Labels by their mean, the smallest first."""
    return sorted(numbers, key=lambda label: spread(list(numbers[label].values())).mean)


def compared(
    comparison: Comparison, context: int
) -> tuple[list[str], dict[tuple[str, str], Difference]]:
    """Labels, best first at one context, and the paired difference of every two of them."""
    numbers = by_seed(comparison, loss, context)
    order = ordered(numbers)
    return order, all_differences({label: numbers[label] for label in order})


def difference_table(comparison: Comparison, context: int) -> Table:
    """Row minus column at one context, for every two variants, best first."""
    order, found = compared(comparison, context)
    together = holm(found)
    rows = [
        (one, [_cell(found, together, one, other) for other in order[:-1]]) for one in order[1:]
    ]
    return Table(
        f"Paired differences of loss at {context:,} tokens ({comparison.name} split, row minus "
        "column, nats per token)",
        "variant", order[:-1], rows,
        f"mean ± half width of the {LEVEL:.0%} interval over seeds; * resolved: the interval "
        "leaves out 0; ** also with all pairs taken together (Holm)",
    )  # fmt: skip


def _cell(found: Mapping[tuple[str, str], Difference], together: set, one: str, other: str) -> str:
    if (other, one) not in found:
        return ""
    reverse = found[other, one]
    turned = Difference(-reverse.mean, reverse.half_width, reverse.p, reverse.seeds)
    return f"{turned}{'*' if (other, one) in together else ''}"


def in_words(comparison: Comparison, context: int) -> str:
    """How many pairs are resolved at ``context``, and which neighbours in the ranking are not."""
    order, found = compared(comparison, context)
    resolved = [pair for pair, difference in found.items() if difference.resolved]
    open_pairs = [
        f"{one} and {other}"
        for one, other in zip(order, order[1:], strict=False)
        if (one, other) in found and not found[one, other].resolved
    ]
    text = (
        f"At {context:,} tokens {len(resolved)} of {len(found)} differences between two variants "
        f"are resolved, {len(holm(found))} with all pairs taken together."
    )
    if open_pairs:
        text += f" Neighbours in the ranking that are not told apart: {'; '.join(open_pairs)}."
    return text


def matched_in_words(runs: Sequence[Run]) -> str:
    """Whether the runs of one seed differ in their position embedding alone."""
    found = unmatched(runs)
    if not found:
        return (
            "Runs of one seed read the same batches in the same order and do the same number of "
            "updates; they differ in their position embedding alone."
        )
    told = "; ".join(f"{key} ({', '.join(values)})" for key, values in found.items())
    return f"Runs of one seed differ in more than their position embedding: {told}."


def difference_figure(comparison: Comparison, context: int) -> Figure:
    """Every pair as a square of a matrix, with its number, starred where it is resolved."""
    order, found = compared(comparison, context)
    values = np.full((len(order) - 1, len(order) - 1), np.nan)
    for (better, worse), difference in found.items():
        values[order.index(worse) - 1, order.index(better)] = -difference.mean
    side = 2.6 + 0.4 * len(order)
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(side + 1.2, side), layout="constrained"
    )
    axes = figure.subplots()
    # one variant that fails must not leave all other squares in one colour
    largest, usual = np.nanmax(values), 3 * np.nanmedian(values)
    image = axes.imshow(values, cmap="cividis_r", vmin=0, vmax=min(largest, usual) or 1e-3)
    for (better, worse), difference in found.items():
        row, column = order.index(worse) - 1, order.index(better)
        axes.text(
            column,
            row,
            f"{-difference.mean:.2f}{'*' if difference.resolved else ''}",
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if values[row, column] > 0.5 * image.get_clim()[1] else "black",
            fontweight="bold" if difference.resolved else "normal",
        )
    axes.set_xticks(range(len(order) - 1), order[:-1], rotation=90, fontsize=8)
    axes.set_yticks(range(len(order) - 1), order[1:], fontsize=8)
    axes.spines[:].set_visible(False)
    figure.colorbar(
        image,
        ax=axes,
        label="loss, row minus column (nats per token)",
        shrink=0.8,
        extend="max" if largest > usual > 0 else "neither",
    )
    axes.set_title(
        f"Differences at {context:,} tokens, {comparison.name}\n*: resolved", fontsize=10
    )
    return figure
