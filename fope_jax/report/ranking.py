"""Ranking of variants and what their differences rest on: tables, sentences and figures."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fope_jax.report.comparison import TASK_FIELD, Comparison
from fope_jax.report.differences import (
    LEVEL,
    SEEDS_FOR_SIGNIFICANCE,
    Difference,
    all_differences,
    config_differences,
    holm,
    metric_by_seed,
    ranks,
)
from fope_jax.report.plots import new_figure
from fope_jax.report.rows import Run
from fope_jax.report.sums import Metric, Sums, spread
from fope_jax.report.tables import EMPTY, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measure(NamedTuple):
    """What variants are ranked by; lower is better."""

    name: str
    unit: str
    metric: Metric
    digits: int  # decimals shown


LOSS = Measure("loss", "nats per token", Sums.loss, 3)  # exp(difference) is a ratio of perplexities
ERRORS = Measure("wrong answers", "% of trials", Sums.error_rate, 1)


class Pairs(NamedTuple):
    """Labels, best first, and the paired difference of every two."""

    labels: list[str]
    differences: dict[tuple[str, str], Difference]


def measure_of(comparison: Comparison) -> Measure:
    return ERRORS if comparison.kind in TASK_FIELD else LOSS


def compare_pairs(comparison: Comparison, contexts: Sequence[int]) -> Pairs:
    numbers = metric_by_seed(comparison, measure_of(comparison).metric, contexts)
    shared = set.intersection(*map(set, numbers.values())) if numbers else set()

    def mean(label: str) -> float:
        """Over the seeds that all have, so that an easier seed of one decides no order."""
        by_seed = numbers[label]
        return spread([by_seed[seed] for seed in shared or by_seed]).mean

    labels = sorted(numbers, key=mean)
    return Pairs(labels, all_differences({label: numbers[label] for label in labels}))


def is_ranked(comparison: Comparison) -> bool:
    """Whether two variants share two seeds and differ; otherwise there is nothing to rank."""
    pairs = compare_pairs(comparison, shown_contexts(comparison)[0])
    return any(pair.seeds > 1 and pair.mean for pair in pairs.differences.values())


def is_heatmap(comparison: Comparison) -> bool:
    """Whether the differences are more than a small table shows at a glance."""
    return len(comparison.curves) > 4


def has_statements(comparison: Comparison, contexts: Sequence[int]) -> bool:
    """Whether two variants share enough seeds for an interval of their difference."""
    pairs = compare_pairs(comparison, contexts)
    return any(pair.has_interval for pair in pairs.differences.values())


def shown_contexts(comparison: Comparison) -> list[tuple[int, ...]]:
    """Groups of contexts to compare at; rows of a group are pooled.

    The loss: the longest and the shortest context that all labels have, else the longest. Answers:
    all contexts beyond the training length together, as each alone is near all or none right.
    """
    measure, contexts = measure_of(comparison), comparison.contexts
    shared = [
        context
        for context in contexts
        if len(metric_by_seed(comparison, measure.metric, [context])) == len(comparison.curves)
    ] or contexts[-1:]
    if measure is LOSS:
        return sorted({(max(shared),), (min(shared),)}, reverse=True)
    beyond = [c for c in shared if c > max(comparison.training_lengths.values())]
    return [tuple(beyond or shared)]


def contexts_text(contexts: Sequence[int]) -> str:
    """Contexts in words.

    >>> contexts_text([2048]), contexts_text([128, 256, 512])
    ('2,048 tokens', '128 to 512 tokens together')
    """
    if len(contexts) == 1:
        return f"{contexts[0]:,} tokens"
    return f"{min(contexts):,} to {max(contexts):,} tokens together"


def ranking_table(comparison: Comparison) -> Table:
    """Mean, standard error and rank at every context, sorted at the first of `shown_contexts`."""
    measure, contexts = measure_of(comparison), comparison.contexts
    numbers = {c: metric_by_seed(comparison, measure.metric, [c]) for c in contexts}
    rank_at = {context: ranks(by_seed) for context, by_seed in numbers.items()}
    compared = shown_contexts(comparison)[0]
    seeds = metric_by_seed(comparison, measure.metric, compared)
    rows = []
    for label in compare_pairs(comparison, compared).labels:
        cells = [str(len(seeds[label]))]
        for context in contexts:
            if label not in numbers[context]:
                cells.append(EMPTY)
                continue
            mean, deviation, count = spread(list(numbers[context][label].values()))
            cell = f"{mean:.{measure.digits}f}"
            if count > 1:
                cell += f" ± {deviation / math.sqrt(count):.{measure.digits}f}"
            rank = rank_at[context][label]
            cells.append(cell if math.isnan(rank) else f"{cell} ({rank:.1f})")
        rows.append((label, cells))
    return Table(
        f"{measure.name.capitalize()} in {measure.unit} ({comparison.name}), mean ± standard "
        "error over seeds, and mean rank in brackets",
        "context (tokens)",
        ["seeds", *(f"{context:,}" for context in contexts)],
        rows,
        f"rank 1 has the least {measure.name} of a seed",
    )


def difference_table(comparison: Comparison, contexts: Sequence[int]) -> Table:
    """Row minus column for every two variants, best first."""
    measure = measure_of(comparison)
    labels, differences = compare_pairs(comparison, contexts)
    together = holm(differences)

    def cell(worse: str, better: str) -> str:
        difference = differences.get((better, worse))
        if difference is None:
            return ""
        row_minus_column = dataclasses.replace(difference, mean=-difference.mean)
        return row_minus_column.text(measure.digits) + "*" * ((better, worse) in together)

    return Table(
        f"Paired differences of {measure.name} at {contexts_text(contexts)} ({comparison.name}, "
        f"row minus column, {measure.unit})",
        "variant",
        labels[:-1],
        [(worse, [cell(worse, better) for better in labels[:-1]]) for worse in labels[1:]],
        f"mean ± half width of the {LEVEL:.0%} interval over seeds; {mark_note(differences)}",
    )


def mark_note(differences: Mapping[tuple[str, str], Difference]) -> str:
    """What the marks of these differences mean."""
    seeds = [difference.seeds for difference in differences.values()]
    notes = []
    if min(seeds) < SEEDS_FOR_SIGNIFICANCE:
        notes.append(
            "° the interval leaves out 0, but rests on fewer than "
            f"{SEEDS_FOR_SIGNIFICANCE} seeds and is not called significant"
        )
    if max(seeds) >= SEEDS_FOR_SIGNIFICANCE:
        notes.append(
            "* significant: the interval leaves out 0; ** also with all pairs taken together (Holm)"
        )
    return "; ".join(notes)


def ranking_summary(comparison: Comparison, contexts: Sequence[int]) -> str:
    """How many pairs differ, on how many seeds that rests, and which neighbours do not differ."""
    labels, differences = compare_pairs(comparison, contexts)
    where, pairs = contexts_text(contexts), differences.values()
    seeds = sorted({pair.seeds for pair in pairs})
    over = f"{' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''}"
    if not has_statements(comparison, contexts):
        return f"At {where}: {over}, so no statement about differences."
    out = sum(pair.leaves_out_zero for pair in pairs)
    if seeds[-1] < SEEDS_FOR_SIGNIFICANCE:
        text = (
            f"At {where} the {LEVEL:.0%} interval over {over} leaves out 0 for {out} of "
            f"{len(pairs)} differences between two variants. That is little to rest on: with fewer "
            f"than {SEEDS_FOR_SIGNIFICANCE} seeds none is called significant."
        )
    else:
        significant = sum(pair.is_significant for pair in pairs)
        text = (
            f"At {where} {significant} of {len(pairs)} differences between two variants are "
            f"significant at {LEVEL:.0%} over {over}, {len(holm(differences))} with all pairs "
            "taken together."
        )
    similar = [
        f"{one} and {other}"
        for one, other in itertools.pairwise(labels)
        if (one, other) in differences and not differences[one, other].leaves_out_zero
    ]
    if similar:
        text += (
            " Neighbours in the ranking whose difference is not resolved (the interval holds 0): "
            f"{'; '.join(similar)}."
        )
    return text


def matched_note(runs: Sequence[Run]) -> str:
    """Whether runs of one seed differ only in their position embedding."""
    differing = config_differences(runs)
    if not differing:
        return (
            "Runs of one seed read the same batches in the same order and do the same number of "
            "updates; they differ in their position embedding alone."
        )
    keys = "; ".join(f"{key} ({', '.join(values)})" for key, values in differing.items())
    return f"Runs of one seed differ in more than their position embedding: {keys}."


def difference_figure(comparison: Comparison, contexts: Sequence[int]) -> Figure:
    measure = measure_of(comparison)
    labels, differences = compare_pairs(comparison, contexts)
    values = np.full((len(labels) - 1, len(labels) - 1), np.nan)
    for (better, worse), difference in differences.items():
        values[labels.index(worse) - 1, labels.index(better)] = -difference.mean
    side, digits = 2.6 + 0.4 * len(labels), measure.digits - 1
    figure, (axes,) = new_figure(side + 1.2, side)
    axes.grid(False)
    # Without a limit one failed variant leaves all other squares in one colour.
    largest, usual = np.nanmax(values), 3 * np.nanmedian(values)
    image = axes.imshow(values, cmap="cividis_r", vmin=0, vmax=min(largest, usual) or 1e-3)
    for (better, worse), difference in differences.items():
        row, column = labels.index(worse) - 1, labels.index(better)
        text = f"{round(-difference.mean, digits) + 0.0:.{digits}f}"  # + 0.0: never "-0"
        axes.text(
            column,
            row,
            text + difference.mark,
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if values[row, column] > 0.5 * image.get_clim()[1] else "black",
            fontweight="bold" if difference.leaves_out_zero else "normal",
        )
    axes.set_xticks(range(len(labels) - 1), labels[:-1], rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels) - 1), labels[1:], fontsize=8)
    axes.spines[:].set_visible(False)
    figure.colorbar(
        image,
        ax=axes,
        label=f"{measure.name}, row minus column ({measure.unit})",
        shrink=0.8,
        extend="max" if largest > usual > 0 else "neither",
    )
    title = f"Differences at {contexts_text(contexts)}, {comparison.name}"
    axes.set_title(f"{title}\n{textwrap.fill(mark_note(differences), 60)}", fontsize=9)
    return figure
