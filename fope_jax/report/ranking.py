"""The section of a report that says which variant is better, and which differences are resolved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fope_jax.extras import require
from fope_jax.report.comparison import PARTS, Comparison
from fope_jax.report.differences import (
    LEVEL,
    Difference,
    all_differences,
    by_seed,
    config_differences,
    holm,
    ranks,
)
from fope_jax.report.rows import Run
from fope_jax.report.sums import Sums, spread
from fope_jax.report.tables import EMPTY, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Mapping[str, Mapping[int, float]]


class Measure(NamedTuple):
    """What variants are ranked by; less of it is better.

    Attributes:
      name: in words.
      unit: of the number.
      number: of pooled rows.
      digits: decimals that are shown.
    """

    name: str
    unit: str
    number: Callable[[Sums], float]
    digits: int


# Differences of the loss are ratios of perplexities.
LOSS = Measure("loss", "nats per token", lambda sums: sums.loss, 3)
WRONG = Measure("wrong answers", "% of trials", lambda sums: 100 * (1 - sums.accuracy), 1)


def measure_of(comparison: Comparison) -> Measure:
    """Wrong answers where answers are counted, else the loss."""
    return WRONG if comparison.kind in PARTS else LOSS


def is_ranked(comparison: Comparison) -> bool:
    """Whether two variants share two seeds and differ, without which nothing can be resolved."""
    _, found = compared(comparison, shown_contexts(comparison)[0])
    return any(difference.seeds > 1 and difference.mean for difference in found.values())


def shown_contexts(comparison: Comparison) -> list[tuple[int, ...]]:
    """Contexts whose rows are compared, those of a tuple together; all variants were scored there.

    Of the loss the longest and the shortest, the longest alone where there is none that all have.
    Of answers all beyond the training length together: each alone is near all or none.
    """
    number, contexts = measure_of(comparison).number, comparison.contexts
    whole = [
        context
        for context in contexts
        if len(by_seed(comparison, number, [context])) == len(comparison.curves)
    ] or contexts[-1:]
    if measure_of(comparison) is LOSS:
        return sorted({(max(whole),), (min(whole),)}, reverse=True)
    beyond = [c for c in whole if c > max(comparison.training_lengths.values())]
    return [tuple(beyond or whole)]


def at(contexts: Sequence[int]) -> str:
    """Contexts in words.

    >>> at([2048]), at([128, 256, 512])
    ('2,048 tokens', '128 to 512 tokens together')
    """
    if len(contexts) == 1:
        return f"{contexts[0]:,} tokens"
    return f"{min(contexts):,} to {max(contexts):,} tokens together"


def ranking_table(comparison: Comparison) -> Table:
    """The mean with its standard error, and rank, at every context; best first.

    The order is that at the longest context, of answers that at all shown ones together.
    """
    measure, contexts = measure_of(comparison), comparison.contexts
    numbers = {context: by_seed(comparison, measure.number, [context]) for context in contexts}
    places = {context: ranks(own) for context, own in numbers.items()}
    rows = []
    first = by_seed(comparison, measure.number, shown_contexts(comparison)[0])
    for label in ordered(first):
        cells = []
        for context in contexts:
            own = numbers[context].get(label)
            place = places[context].get(label, math.nan)
            rank = "" if math.isnan(place) else f" ({place:.1f})"
            shown = EMPTY if own is None else format_error(list(own.values()), measure.digits)
            cells.append(shown + rank)
        rows.append((label, [str(len(first[label])), *cells]))
    return Table(
        f"{measure.name.capitalize()} in {measure.unit} ({comparison.name}), mean ± standard "
        "error over seeds, and mean rank in brackets",
        "context (tokens)",
        ["seeds", *(f"{context:,}" for context in contexts)],
        rows,
        f"rank 1 has the least {measure.name} of a seed",
    )


def format_error(values: Sequence[float], digits: int = 3) -> str:
    """``mean ± standard error``; the mean alone of one value.

    >>> format_error([1.0, 2.0, 3.0])
    '2.000 ± 0.577'
    """
    mean, deviation, count = spread(values)
    if count == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {deviation / math.sqrt(count):.{digits}f}"


def ordered(numbers: Numbers) -> list[str]:
    """Labels by their mean, the smallest first."""
    return sorted(numbers, key=lambda label: spread(list(numbers[label].values())).mean)


def compared(
    comparison: Comparison, contexts: Sequence[int]
) -> tuple[list[str], dict[tuple[str, str], Difference]]:
    """Labels, best first at these contexts, and the paired difference of every two of them."""
    numbers = by_seed(comparison, measure_of(comparison).number, contexts)
    order = ordered(numbers)
    return order, all_differences({label: numbers[label] for label in order})


def difference_table(comparison: Comparison, contexts: Sequence[int]) -> Table:
    """Row minus column at these contexts, for every two variants, best first."""
    measure = measure_of(comparison)
    order, found = compared(comparison, contexts)
    together = holm(found)

    def cell(one: str, other: str) -> str:
        if (other, one) not in found:
            return ""
        better = found[other, one]
        turned = Difference(-better.mean, better.half_width, better.p, better.seeds)
        return turned.rounded(measure.digits) + ("*" if (other, one) in together else "")

    return Table(
        f"Paired differences of {measure.name} at {at(contexts)} ({comparison.name}, row minus "
        f"column, {measure.unit})",
        "variant",
        order[:-1],
        [(one, [cell(one, o) for o in order[:-1]]) for one in order[1:]],
        f"mean ± half width of the {LEVEL:.0%} interval over seeds; * resolved: the interval "
        "leaves out 0; ** also with all pairs taken together (Holm)",
    )


def ranking_summary(comparison: Comparison, contexts: Sequence[int]) -> str:
    """How many pairs are resolved there, and which neighbours in the ranking are not."""
    order, found = compared(comparison, contexts)
    resolved = [pair for pair, difference in found.items() if difference.resolved]
    open_pairs = [
        f"{one} and {other}"
        for one, other in zip(order, order[1:], strict=False)
        if (one, other) in found and not found[one, other].resolved
    ]
    text = (
        f"At {at(contexts)} {len(resolved)} of {len(found)} differences between two variants "
        f"are resolved, {len(holm(found))} with all pairs taken together."
    )
    if open_pairs:
        text += f" Neighbours in the ranking that are not told apart: {'; '.join(open_pairs)}."
    return text


def matched_note(runs: Sequence[Run]) -> str:
    """Whether the runs of one seed differ in their position embedding alone."""
    found = config_differences(runs)
    if not found:
        return (
            "Runs of one seed read the same batches in the same order and do the same number of "
            "updates; they differ in their position embedding alone."
        )
    told = "; ".join(f"{key} ({', '.join(values)})" for key, values in found.items())
    return f"Runs of one seed differ in more than their position embedding: {told}."


def difference_figure(comparison: Comparison, contexts: Sequence[int]) -> Figure:
    """Every pair as a square of a matrix, with its number, starred where it is resolved."""
    measure = measure_of(comparison)
    order, found = compared(comparison, contexts)
    values = np.full((len(order) - 1, len(order) - 1), np.nan)
    for (better, worse), difference in found.items():
        values[order.index(worse) - 1, order.index(better)] = -difference.mean
    side, digits = 2.6 + 0.4 * len(order), measure.digits - 1
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
            f"{round(-difference.mean, digits) + 0.0:.{digits}f}"  # never "-0"
            f"{'*' if difference.resolved else ''}",
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
        label=f"{measure.name}, row minus column ({measure.unit})",
        shrink=0.8,
        extend="max" if largest > usual > 0 else "neither",
    )
    axes.set_title(f"Differences at {at(contexts)}, {comparison.name}\n*: resolved", fontsize=10)
    return figure
