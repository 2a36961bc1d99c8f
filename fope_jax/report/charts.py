"""Curves of a report as data: `plots` draws them as pictures, `interactive` as live charts.

At most ``MOST_CURVES`` of a chart are in colour, the baseline and the best; the others are grey.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fope_jax.report.bootstrap import Interval, intervals
from fope_jax.report.comparison import (
    BASELINE,
    Comparison,
    check_comparable,
    context_of,
    document_sums,
    run_labels,
)
from fope_jax.report.differences import (
    LEVEL,
    SEEDS_FOR_INTERVAL,
    SEEDS_FOR_SIGNIFICANCE,
    metric_by_seed,
    paired_difference,
)
from fope_jax.report.lineage import tokens_before
from fope_jax.report.protocols import describe
from fope_jax.report.rows import Row, Run
from fope_jax.report.sums import Spread, Sums, spread
from fope_jax.report.tables import (
    Format,
    format_loss,
    format_number,
    format_percent,
    retrieval_names,
)

MOST_CURVES = 9  # in colour
MOST_BANDS = 4  # more of them hide each other
MOST_POINTS = 200  # of a training curve


class Curve(NamedTuple):
    """Points of a label; ``whiskers`` and ``band`` are the interval at each of them."""

    x: list[float]
    y: list[float]
    whiskers: list[Interval] | None = None
    band: list[Interval] | None = None


@dataclass(frozen=True)
class Chart:
    """Curves by label, and what is on the axes.

    Attributes:
      ticks: marks of the x axis, which is logarithmic; empty for marks at powers of ten.
      is_linear: the x axis is linear all the same.
      lengths: training lengths, marked.
      level: a horizontal line, such as the ratio 1.
      limits: of the y axis; None: what the curves need.
      outside: labels that would flatten all others, with their largest y; left out of the picture.
      show: a y value as text.
      note: what the points, error bars and bands are.
    """

    title: str
    subtitle: str
    x_label: str
    y_label: str
    curves: dict[str, Curve]
    coloured: list[str]
    ticks: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    is_linear: bool = False
    level: float | None = None
    is_log: bool = False
    limits: tuple[float, float] | None = None
    outside: dict[str, float] = field(default_factory=dict)
    show: Format = format_number
    note: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether points lie too close for a marker each."""
        return max((len(curve.x) for curve in self.curves.values()), default=0) > 24


def baseline_of(labels: Iterable[str]) -> str:
    """RoPE, or else the first label.

    >>> baseline_of(["alibi", "rope (trained on 128)"]), baseline_of(["fope", "alibi"])
    ('rope (trained on 128)', 'fope')
    """
    labels = list(labels)
    matches = (name for name in labels if name == BASELINE or name.startswith(f"{BASELINE} ("))
    return next(matches, labels[0])


def curves_in_colour(curves: Mapping[str, Curve], higher_is_better: bool = False) -> list[str]:
    """At most ``MOST_CURVES`` labels: the baseline, and those best on average over the points."""
    if len(curves) <= MOST_CURVES:
        return list(curves)
    sign = -1 if higher_is_better else 1
    best = sorted(curves, key=lambda label: sign * float(np.mean(curves[label].y)))
    baseline = baseline_of(curves)
    chosen = {baseline, *[label for label in best if label != baseline][: MOST_CURVES - 1]}
    return [label for label in curves if label in chosen]


# ---------------------------------------------------------------------------- evaluation


def perplexity_chart(comparison: Comparison, relative: bool = False) -> Chart:
    """Perplexity by context; ``relative``: over that of the same seed at the training length."""
    check_comparable(comparison)
    spreads = comparison.spreads(Sums.perplexity, relative=relative)
    spreads = {label: values for label, values in spreads.items() if values}
    bands = useful_bands(comparison.intervals(Sums.perplexity, relative=relative))
    losses = comparison.spreads(Sums.loss)
    curves = {label: _curve(values, bands.get(label)) for label, values in spreads.items()}
    outside = off_the_chart(spreads)
    if _perplexity_axis(curves, outside)[0]:  # on a logarithmic axis there is room for more
        outside = off_the_chart(spreads, 100.0)
    for label in outside:
        curves[label] = curves[label]._replace(whiskers=None)
    description = describe(comparison)
    title = "Perplexity relative to the training length" if relative else description.title
    ratio = "perplexity / that at the training length"
    is_log, limits = _perplexity_axis(curves, outside)
    return Chart(
        title=f"{title}, {comparison.name} split",
        subtitle=_subtitle(comparison),
        x_label=description.x,
        y_label=ratio if relative else "perplexity (per token)",
        curves=curves,
        coloured=curves_in_colour({label: _curve(losses[label]) for label in curves}),
        ticks=comparison.contexts,
        lengths=_training_lengths(comparison),
        level=1.0 if relative else None,
        is_log=is_log,
        limits=limits,
        outside=outside,
        note=interval_note(curves, comparison),
    )


def difference_chart(comparison: Comparison) -> Chart | None:
    """Loss minus the baseline's, paired by seed, by context; None where no seed is shared.

    The whiskers are the 95% interval over seeds, from three seeds on; with fewer seeds that over
    documents, if there are enough.
    """
    check_comparable(comparison)
    baseline = baseline_of(comparison.curves)
    numbers = {c: metric_by_seed(comparison, Sums.loss, [c]) for c in comparison.contexts}
    curves, seeds, kinds = {}, set(), set()
    for label in comparison.curves:
        pairs = {
            context: paired_difference(by_seed[label], by_seed[baseline])
            for context, by_seed in numbers.items()
            if label != baseline and label in by_seed and baseline in by_seed
        }
        known = {context: pair for context, pair in pairs.items() if pair is not None}
        if not known:
            continue
        whiskers, kind = document_differences(comparison, label, baseline), "documents"
        if all(pair.has_interval for pair in known.values()):
            kind = "seeds"
            whiskers = {
                context: Interval(pair.mean - pair.half_width, pair.mean + pair.half_width)
                for context, pair in known.items()
            }
        ends = [whiskers[context] for context in known] if known.keys() <= whiskers.keys() else None
        curves[label] = Curve(list(known), [pair.mean for pair in known.values()], ends)
        seeds |= {pair.seeds for pair in known.values()}
        kinds |= {kind} if ends else set()
    if not curves:
        return None
    losses = comparison.spreads(Sums.loss)
    in_colour = curves_in_colour({label: _curve(values) for label, values in losses.items()})
    tops = {label: [spread([y]) for y in map(abs, curve.y)] for label, curve in curves.items()}
    outside = off_the_chart({label: dict(enumerate(top)) for label, top in tops.items()})
    return Chart(
        title=f"Loss minus that of {baseline}, {comparison.name} split",
        subtitle=_subtitle(comparison),
        x_label=describe(comparison).x,
        y_label=f"loss - loss of {baseline} (nats per token)",
        curves=curves,
        coloured=[label for label in in_colour if label in curves],
        ticks=comparison.contexts,
        lengths=_training_lengths(comparison),
        level=0.0,
        limits=_limits_without({k: c for k, c in curves.items() if k not in outside}, outside),
        outside=outside,
        show=lambda value: f"{value:+.3f}",
        note=difference_note(seeds, kinds),
    )


def interval_note(curves: Mapping[str, Curve], comparison: Comparison) -> str:
    """What the points, error bars and bands of the curves are."""
    bars = any(curve.whiskers is not None for curve in curves.values())
    note = f"Mean over {_seeds(comparison)}{', error bars ± standard deviation' if bars else ''}."
    if comparison.num_seeds == 1:
        note = "1 seed."
    if any(curve.band is not None for curve in curves.values()):
        note += f" Bands: {LEVEL:.0%} interval over documents."
    return note


def difference_note(seeds: Collection[int], kinds: Collection[str]) -> str:
    """What the points and error bars of `difference_chart` are.

    Args:
      seeds: the numbers of seeds that the differences are means over.
      kinds: what the error bars are intervals over: "seeds", "documents", both or none.

    >>> difference_note({1}, {"documents"})
    '1 seed, error bars: 95% interval over documents, which tells nothing of seeds.'
    >>> difference_note({1, 5}, {"seeds"})
    'Mean over 1 to 5 seeds, error bars, where there are some: 95% interval over seeds.'
    """
    least, most = min(seeds), max(seeds)
    count = f"{least} to {most}" if least < most else str(most)
    over = "1 seed" if most == 1 else f"Mean over {count} seeds"
    if not kinds:
        return f"{over}: the differences as they are, no statement about them."
    few = ""
    if SEEDS_FOR_INTERVAL <= most < SEEDS_FOR_SIGNIFICANCE:
        few = f"; with fewer than {SEEDS_FOR_SIGNIFICANCE} seeds none is called significant"
    alone = " (of few seeds over documents, which tells nothing of seeds)"
    of = {
        ("documents",): "documents, which tells nothing of seeds",
        ("seeds",): f"seeds{few}",
        ("documents", "seeds"): f"seeds{alone}{few}",
    }[tuple(sorted(kinds))]
    where = ", where there are some" if least < SEEDS_FOR_INTERVAL <= most else ""
    return f"{over}, error bars{where}: {LEVEL:.0%} interval over {of}."


def document_differences(comparison: Comparison, label: str, baseline: str) -> dict[int, Interval]:
    """``{context: interval over documents of the loss minus the baseline's, mean over seeds}``.

    Over the seeds that both have. Empty where documents are too few or not the same.
    """
    both_seeds = [
        {rows[0]["seed"]: rows for rows in comparison.curves[name]} for name in (label, baseline)
    ]
    shared = sorted(set.intersection(*map(set, both_seeds)))
    ours, theirs = (
        document_sums([of_seed[seed] for seed in shared], context_of) for of_seed in both_seeds
    )
    pairs = {context: (ours[context], theirs[context]) for context in ours.keys() & theirs.keys()}
    if any(len(one) != len(other) for one, other in pairs.values()):
        return {}

    def mean_losses(sums: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
        losses = {key: Sums(*np.moveaxis(x, -1, 0)).loss().mean(axis=1) for key, x in sums.items()}
        return {c: losses["ours", c] - losses["theirs", c] for c in pairs}

    both = {("ours", c): one for c, (one, _) in pairs.items()}
    return intervals(both | {("theirs", c): other for c, (_, other) in pairs.items()}, mean_losses)


def position_chart(comparison: Comparison) -> Chart:
    """Loss against position in a long window, or since the document's start."""
    check_comparable(comparison)
    bands = useful_bands(comparison.intervals(Sums.loss, bucket_centre))
    spreads = comparison.spreads(Sums.loss, bucket_centre)
    is_calm = len(spreads) < 3  # whiskers of more curves at many points hide each other
    curves = {label: _curve(v, bands.get(label), is_calm) for label, v in spreads.items()}
    longest, description = max(comparison.contexts), describe(comparison)
    return Chart(
        title=f"{description.title}, window of {longest:,} tokens, {comparison.name} split",
        subtitle=_subtitle(comparison),
        x_label=description.x,
        y_label="loss (nats per token)",
        curves=curves,
        coloured=curves_in_colour(curves),
        ticks=[longest // 2**k for k in range(10, -1, -1) if longest // 2**k >= 1],
        lengths=_training_lengths(comparison),
        show=format_loss,
        note=interval_note(curves, comparison),
    )


def bucket_centre(row: Row) -> float:
    start, stop = row["bucket"]
    return math.sqrt(max(start, stop / 2) * stop)


def accuracy_chart(comparison: Comparison) -> Chart:
    check_comparable(comparison)
    counted, name = retrieval_names(comparison)
    spreads = comparison.spreads(Sums.accuracy)
    curves = {label: _within_percent(_curve(values)) for label, values in spreads.items()}
    what = "Passkey retrieval" if comparison.kind == "passkey" else "Retrieval"
    return Chart(
        title=f"{what} against context length, {name}",
        subtitle="",
        x_label="context length (tokens)",
        y_label=f"{counted} (%)",
        curves=curves,
        coloured=curves_in_colour(curves, higher_is_better=True),
        ticks=comparison.contexts,
        lengths=_training_lengths(comparison),
        limits=(-4.0, 104.0),
        show=format_percent,
        note=interval_note(curves, comparison),
    )


def _within_percent(curve: Curve) -> Curve:
    """The curve with its error bars cut off below 0 and above 100."""
    ends = curve.whiskers and [Interval(max(0, x.low), min(100, x.high)) for x in curve.whiskers]
    return curve._replace(whiskers=ends)


def training_chart(runs: Sequence[Run]) -> Chart:
    """Training loss against tokens seen, the parent's included; the mean over seeds."""
    labels = run_labels(runs)
    losses: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for row in run.of("train"):
            if row["loss"] is None:  # no token of its steps was scored
                continue
            seen = losses.setdefault(labels[run.path], {})
            seen.setdefault(tokens_before(run) + row["tokens_seen"], []).append(row["loss"])
    curves = {}
    for label, by_tokens in losses.items():
        points = [(x, sum(y) / len(y)) for x, y in sorted(by_tokens.items())]
        thinned = points[:: -max(1, len(points) // MOST_POINTS)][::-1]  # keeps the last
        curves[label] = Curve([x for x, _ in thinned], [y for _, y in thinned])
    ends = {label: Curve(curve.x[-1:], curve.y[-1:]) for label, curve in curves.items()}
    return Chart(
        title="Training loss",
        subtitle="mean over seeds" if len(runs) > len(curves) else "",
        x_label="tokens seen (k: thousand, M: million, G: billion)",
        y_label="training loss (nats per token)",
        curves=curves,
        coloured=curves_in_colour(ends),
        show=format_loss,
    )


# ---------------------------------------------------------------------------- parts of charts


def _curve(
    values: Mapping[Any, Spread],
    band: Mapping[Any, Interval] | None = None,
    with_whiskers: bool = True,
) -> Curve:
    whiskers = None
    if with_whiskers and not any(math.isnan(value.deviation) for value in values.values()):
        whiskers = [Interval(v.mean - v.deviation, v.mean + v.deviation) for v in values.values()]
    ends = [band[x] for x in values] if band and values.keys() <= band.keys() else None
    return Curve(list(values), [value.mean for value in values.values()], whiskers, ends)


def useful_bands(bands: Mapping[str, Mapping[Any, Interval]]) -> dict[str, dict[Any, Interval]]:
    """The bands of ``{label: {x: interval}}``; none where they are many or all overlap all.

    >>> one, other = Interval(1.0, 3.0), Interval(2.0, 4.0)
    >>> useful_bands({"a": {128: one}, "b": {128: other}})
    {}
    >>> list(useful_bands({"a": {128: one}, "b": {128: Interval(3.5, 4.0)}}))
    ['a', 'b']
    """
    drawn = {label: dict(band) for label, band in bands.items() if band}
    if len(drawn) < 2:
        return drawn
    for x in set.intersection(*(set(band) for band in drawn.values())):
        if max(band[x].low for band in drawn.values()) > min(
            band[x].high for band in drawn.values()
        ):
            return drawn if len(drawn) <= MOST_BANDS else {}
    return {}


def off_the_chart(
    spreads: Mapping[str, Mapping[Any, Spread]], factor: float = 5.0
) -> dict[str, float]:
    """Labels, with their largest mean, whose curves would flatten all others at the bottom.

    Those above ``factor`` times the median of the largest means.

    >>> curve = lambda top: {128: Spread(90.0, 1.0, 3), 2048: Spread(top, 1.0, 3)}
    >>> off_the_chart({"a": curve(90.0), "b": curve(99.0), "c": curve(120.0), "d": curve(9000.0)})
    {'d': 9000.0}
    >>> off_the_chart({"a": curve(90.0), "d": curve(9000.0)})  # of two, both are looked at
    {}
    """
    tops = {label: max(v.mean for v in values.values()) for label, values in spreads.items()}
    finite = [top for top in tops.values() if math.isfinite(top)]
    limit = factor * float(np.median(finite)) if len(finite) > 3 else math.inf
    return {label: top for label, top in tops.items() if top > limit}


def _perplexity_axis(
    curves: Mapping[str, Curve], outside: Mapping[str, float]
) -> tuple[bool, tuple[float, float] | None]:
    """Whether it is logarithmic (beyond a factor of 3), and its limits.

    It spans a tenth at least, so that noise looks small.
    """
    inside = {label: curve for label, curve in curves.items() if label not in outside}
    means = [y for curve in inside.values() for y in curve.y if math.isfinite(y)]
    if not means:
        return False, None
    bands = [end for curve in inside.values() for band in curve.band or () for end in band]
    low, high = min(drawn := [*means, *filter(math.isfinite, bands)]), max(drawn)
    widths = [
        (end.high - end.low) / 2 / y
        for curve in inside.values()
        for y, end in zip(curve.y, curve.whiskers or (), strict=False)
    ]
    if outside:
        return high > 3 * low, (low / 1.05, 1.08 * high)
    if high < 1.1 * low and not any(width > 0.04 for width in widths):
        middle = (low + high) / 2
        return False, (0.94 * middle, 1.06 * middle)
    return high > 3 * low, None


def _limits_without(
    curves: Mapping[str, Curve], outside: Mapping[str, float]
) -> tuple[float, float] | None:
    """Limits of a linear axis around ``curves`` where others lie outside."""
    if not outside:
        return None
    values = [y for curve in curves.values() for y in curve.y]
    room = 0.08 * ((max(values) - min(values)) or 1.0)
    return min(values) - room, max(values) + room


def _training_lengths(comparison: Comparison) -> list[int]:
    return sorted(set(comparison.training_lengths.values()))


def _seeds(comparison: Comparison) -> str:
    """Such as "5 seeds", or "5 to 8 seeds" where some labels have fewer."""
    fewest, most = min(map(len, comparison.curves.values())), comparison.num_seeds
    text = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"{text} seed{'' if most == 1 else 's'}"


def _subtitle(comparison: Comparison) -> str:
    """What a figure that is copied out of the page still says of its numbers."""
    tokens = comparison.sums_by_context[comparison.contexts[0]].tokens
    return f"protocol {comparison.protocol}, {tokens:,.0f} tokens"


def alt_text(chart: Chart) -> str:
    """The ends of every curve in words."""
    texts = []
    for label, curve in chart.curves.items():
        (first, low), *_, (last, high) = [*zip(curve.x, curve.y, strict=True)] * 2
        ends = f"{chart.show(low)} at {first:,.0f} tokens, {chart.show(high)} at {last:,.0f}"
        texts.append(f"{label}: {ends}")
    return f"{chart.title}. {'; '.join(texts)}."
