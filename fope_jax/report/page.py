"""The report of runs: one self-contained HTML page, with every figure also as PNG and SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fope_jax.report import (
    charts,
    correlation,
    lineage,
    plots,
    protocols,
    provenance,
    ranking,
    tables,
    validation,
)
from fope_jax.report.comparison import Comparison, comparisons, run_labels
from fope_jax.report.goodput import goodput_table
from fope_jax.report.html import (
    Bullets,
    Details,
    Listing,
    Part,
    Picture,
    Section,
    chart_picture,
    file_stem,
    live_by_context,
    make_output,
    write_page,
)
from fope_jax.report.length_buckets import bucket_tables
from fope_jax.report.retrieval_protocol import retrieval_paragraph
from fope_jax.report.rows import Row, Run, read_runs
from fope_jax.report.styles import Style, method_styles
from fope_jax.report.sums import Sums, add_up
from fope_jax.report.tables import EMPTY
from fope_jax.report.tasks import task_tables
from fope_jax.report.verdict import verdict

Styles = dict[str, Style]
LEAD_SENTENCES, LEAD_ROWS = 10, 16  # of the verdict; more are folded away


class Topic(NamedTuple):
    """What the page shows of one thing: its figures, and further down its tables."""

    figures: Section | None = None
    numbers: Section | None = None


def _topic(title: str, figures: Sequence[Part], numbers: Sequence[Part]) -> Topic:
    return Topic(Section(title, figures), Section(f"{title}: numbers", numbers))


def write_report(
    runs: Iterable[str | Path],
    out: str | Path,
    *,
    buckets: Sequence[int] = (),
    styles: Sequence[str] = (),
) -> Path:
    """Writes the report of ``runs`` into ``out``; returns the path of index.html.

    The verdict stands first, then figures, then tables; where the numbers come from is folded away.

    Args:
      runs: run directories or results files.
      out: made if missing; files of the same names are replaced.
      buckets: edges of length ranges, tokens, see `length_buckets`.
      styles: names of variants, which look the same in all reports with these, see `method_styles`.

    Raises:
      ReportError: a path is no run, or a row is malformed; names file and line.
    """
    loaded = read_runs(runs)
    out = make_output(out, "the report")
    variants = list(dict.fromkeys(run.variant for run in loaded))
    looks = method_styles([*variants, *run_labels(loaded).values()], styles)
    topics = _topics(loaded, looks, buckets)
    parts = [
        *_introduction(loaded),
        *_lineage(loaded),
        *(topic.figures for topic in topics if topic.figures),
        Section("Numbers", [topic.numbers for topic in topics if topic.numbers]),
        _provenance(loaded),
    ]
    few = len(variants) <= charts.MOST_CURVES
    names = ", ".join(variants) if few else f"{len(variants)} methods"
    return write_page(out, f"Length generalization: {names}", parts, _verdict(loaded))


def _topics(runs: Sequence[Run], styles: Styles, buckets: Sequence[int]) -> list[Topic]:
    perplexities = name_comparisons(comparisons(runs, "perplexity"))
    positions = name_comparisons(comparisons(runs, "position"))
    answered = name_comparisons([*comparisons(runs, "passkey"), *comparisons(runs, "retrieval")])
    solved = [named for named in answered if not tables.is_unsolved(named.comparison)]
    unsolved = [n.comparison for n in answered if tables.is_unsolved(n.comparison)]
    return [
        *(_retrieval(named, runs, styles) for named in solved),
        _unsolved(unsolved),
        *(_perplexity(named, perplexities, styles) for named in perplexities),
        *(_positions(named, styles) for named in positions),
        _tasks(runs),
        *(_ranking(n, runs) for n in perplexities if n.comparison.protocol == "same-tokens"),
        *(_ranking(named, runs) for named in solved),
        *_validation(runs, styles),
        _training(runs, styles),
        _spectra(runs, styles),
        _length_buckets(runs, buckets),
    ]


class Named(NamedTuple):
    comparison: Comparison
    stem: str
    heading: str


def name_comparisons(listed: Sequence[Comparison]) -> list[Named]:
    """Names each comparison; those of one protocol and split get a number and their variants."""
    keys = [(comparison.protocol, comparison.name) for comparison in listed]
    named = []
    for index, comparison in enumerate(listed):
        stem, heading = file_stem(comparison.name), comparison.name
        if comparison.protocol not in ("same-tokens", "long-window", comparison.kind):
            stem = f"{comparison.protocol}-{stem}"
        if keys.count(keys[index]) > 1:
            stem += f"-{keys[: index + 1].count(keys[index])}"
            heading += f": {', '.join(comparison.curves)}"
        named.append(Named(comparison, stem, heading))
    return named


# ---------------------------------------------------------------------------- sections


def _verdict(runs: Sequence[Run]) -> list[Part]:
    """The sentences and the table; what would fill more than a screen is folded away."""
    sentences, table = verdict(runs)
    few = sentences if len(sentences) <= LEAD_SENTENCES else sentences[: charts.MOST_CURVES]
    parts: list[Part] = [Bullets(few)] if few else []
    if rest := sentences[len(few) :]:
        parts.append(Details("The other methods, and which differences hold", [Bullets(rest)]))
    if table and table.rows:
        is_long = len(table.rows) > LEAD_ROWS
        parts.append(Details("Every method at every length", [table]) if is_long else table)
    return [Section("Verdict", parts)] if parts else []


def _introduction(runs: Sequence[Run]) -> list[Part]:
    labels, variants = set(run_labels(runs).values()), {run.variant for run in runs}
    text = (
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {len(variants)} "
        f"{'variant' if len(variants) == 1 else 'variants'}. "
        "Numbers are computed from the sums and counts in each run's metrics.jsonl; nothing is "
        "clipped or left out."
    )
    if len(runs) > len(labels):
        text += " Several seeds of a variant: mean ± sample standard deviation over seeds."
    if len(variants) > charts.MOST_CURVES:
        text += (
            f" Figures show at most {charts.MOST_CURVES} curves at first, the baseline and the "
            "best; the others can be switched on."
        )
    scored = [c for kind in ("perplexity", "position") for c in comparisons(runs, kind)]
    notes: list[Part] = [text, *protocols.random_positions_notes(runs)]
    if few := protocols.few_documents_note(scored):
        notes.append(few)
    return notes + [
        f"{run.path} is not evaluated yet (`fope evaluate` does it)."
        for run in runs
        if run.step is None
    ]


def _lineage(runs: Sequence[Run]) -> list[Part]:
    table, sentences = lineage.lineage_table(runs), lineage.lineage_sentences(runs)
    if not (table.rows or any("as" in run.info for run in runs)):
        return []
    details = [Details(table.title, [table])] if table.rows else []
    return [Section("Lineage", [*sentences, *details])]


def _validation(runs: Sequence[Run], styles: Styles) -> list[Topic]:
    topics = []
    for scored, run_rows in validation.validation_groups(runs).items():
        text = (
            f"Measured inside training, on the parameters as they were: {scored.tokens:,} tokens "
            f"of the {scored.split} split, the same at every context length and every step. "
            "The evaluation after training scores more, so that its loss is another number."
        )
        if scored.bos_token:
            text += f" Every window begins with {scored.bos_token}."
        picture = Picture(
            validation.validation_figure(run_rows, styles),
            f"during-{len(topics) + 1}",
            validation.alt_text(run_rows),
            "Loss of the same tokens against tokens seen (k: thousand, M: million, G: billion), "
            "those of a parent included. A dashed line: where a run goes on from another, changed "
            "but not yet trained.",
            live_by_context(validation.validation_charts(run_rows), styles),
        )
        title = f"Loss during training ({scored.split})"
        table = Details("Every loss", [validation.validation_table(run_rows)])
        topics.append(_topic(title, [text, picture], [table]))
    return topics


def _chart(chart: charts.Chart, styles: Styles, stem: str, caption: str) -> Picture:
    return chart_picture(chart, styles, stem, charts.alt_text(chart), caption)


def _perplexity(named: Named, others: Sequence[Named], styles: Styles) -> Topic:
    comparison, stem, heading = named
    chart = charts.perplexity_chart(comparison)
    text = f"Perplexity. {chart.note}"
    parts: list[Part] = [
        protocols.protocol_paragraph(comparison),
        _chart(chart, styles, f"perplexity-{stem}", text),
    ]
    ratios = comparison.numbers(Sums.perplexity, relative=True)
    if any(len(by_context) > 1 for seeds in ratios.values() for by_context in seeds.values()):
        chart = charts.perplexity_chart(comparison, relative=True)
        text = (
            "Perplexity over that of the same seed and documents at the training length. "
            f"{chart.note}"
        )
        parts.append(_chart(chart, styles, f"perplexity-ratio-{stem}", text))
    if differences := charts.difference_chart(comparison):
        baseline = charts.baseline_of(comparison.curves)
        text = (
            f"Loss minus that of {baseline} with the same seed on the same tokens; below 0 is "
            f"better than {baseline}. {differences.note}"
        )
        parts.append(_chart(differences, styles, f"perplexity-difference-{stem}", text))
    infinite = [
        f"{label} at {context:,} tokens"
        for label, values in comparison.spreads(Sums.perplexity).items()
        for context, value in values.items()
        if not math.isfinite(value.mean)
    ]
    if infinite:
        parts.append(f"Not finite and so not drawn: {', '.join(infinite)}.")
    title = f"{protocols.describe(comparison).title} ({heading})"
    return _topic(title, parts, _perplexity_numbers(comparison, others))


def _perplexity_numbers(comparison: Comparison, others: Sequence[Named]) -> list[Part]:
    parts: list[Part] = [*tables.perplexity_tables(comparison)]
    if comparison.protocol == "document-resets":
        parts += [
            tables.reset_table(comparison, other)
            for other, *_ in others
            if (other.protocol, other.name) == ("no-resets", comparison.name)
            and other.curves.keys() == comparison.curves.keys()
            and add_up(other.first_rows)[1:3] == add_up(comparison.first_rows)[1:3]  # tokens, bytes
        ]
    every_row = [tables.document_table(comparison)]
    return [*parts, Details("Every row: documents, sums and counts", every_row)]


def _ranking(named: Named, runs: Sequence[Run]) -> Topic:
    comparison, stem, heading = named
    if not ranking.is_ranked(comparison):
        return Topic()
    name = ranking.measure_of(comparison).name
    compared = [run for run in runs if run.path in comparison.paths]
    parts: list[Part] = [ranking.matched_note(compared)]
    numbers: list[Part] = [ranking.ranking_table(comparison)]
    for contexts in ranking.shown_contexts(comparison):
        parts.append(ranking.ranking_summary(comparison, contexts))
        if not ranking.has_statements(comparison, contexts):
            continue
        table = ranking.difference_table(comparison, contexts)
        if not ranking.is_heatmap(comparison):
            parts.append(table)
            continue
        ends = dict.fromkeys((min(contexts), max(contexts)))
        picture = Picture(
            ranking.difference_figure(comparison, contexts),
            f"differences-{stem}-{'-'.join(map(str, ends))}",
            f"Differences of {name} at {ranking.contexts_text(contexts)}; every number is in the "
            "table below.",
            f"{name.capitalize()} of the row minus that of the column.",
        )
        parts.append(picture)
        numbers.append(table)
    title = f"Differences between variants ({heading.replace('_', ' ')})"
    return _topic(title, parts, numbers)


def _positions(named: Named, styles: Styles) -> Topic:
    comparison, description = named.comparison, protocols.describe(named.comparison)
    chart = charts.position_chart(comparison)
    text = protocols.protocol_paragraph(comparison)
    caption = f"{description.title}. {chart.note}"
    picture = _chart(chart, styles, f"position-{named.stem}", caption)
    title = f"{description.title} ({named.heading})"
    summary, numbers = "Loss and bits per byte in each bucket", tables.position_tables(comparison)
    return _topic(title, [text, picture], [Details(summary, numbers)])


def _retrieval(named: Named, runs: Sequence[Run], styles: Styles) -> Topic:
    comparison, (counted, _) = named.comparison, tables.retrieval_names(named.comparison)
    by_depth = plots.has_depths(comparison)
    chart, stem = charts.accuracy_chart(comparison), f"{comparison.kind}-{named.stem}"
    depths = ", over all depths," if by_depth else ""
    caption = f"Share of {counted}{depths} by context length. {chart.note}"
    parts: list[Part] = [
        retrieval_paragraph(comparison, runs),
        _chart(chart, styles, stem, caption),
    ]
    if by_depth:
        parts.append(
            Picture(
                plots.depth_figure(comparison),
                f"{comparison.kind}-depth-{named.stem}",
                f"Share of {counted} by length and depth; every number is in the table below.",
                f"Share of {counted} (%) by context length and depth of what is asked for.",
            )
        )
    every_row = Details("Every row: length and depth", [tables.depth_table(comparison)])
    title = f"{plots.retrieval_title(comparison)} ({named.heading.replace('_', ' ')})"
    numbers = [*tables.retrieval_tables(comparison), every_row]
    return _topic(title, parts, numbers)


def _unsolved(unsolved: Sequence[Comparison]) -> Topic:
    """A line for each task that is all zeros; how far its answers are off, in tables."""
    if not unsolved:
        return Topic()
    title = "Tasks that no variant solves"
    found = [table for comparison in unsolved for table in tables.retrieval_tables(comparison)]
    numbers = Details("Right answers, ranks and losses of these tasks", found)
    return _topic(title, [tables.unsolved_sentence(c) for c in unsolved], [numbers])


def _tasks(runs: Sequence[Run]) -> Topic:
    found = task_tables(runs)
    if not found:
        return Topic()
    text = (
        "Downstream tasks, without examples but those in the prompt itself and without a chat "
        "template: the model goes on with the prompt as it stands, greedily, or choices are ranked "
        "by log-likelihood."
    )
    return Topic(Section("Downstream tasks", [text, *found]))


def _length_buckets(runs: Sequence[Run], edges: Sequence[int]) -> Topic:
    parts = bucket_tables(runs, edges) if edges else []
    return Topic(numbers=Section("Ranges of length", parts) if parts else None)


def _spectra(runs: Sequence[Run], styles: Styles) -> Topic:
    points = correlation.spectrum_points(runs)
    if not points:
        return Topic()
    text = (
        "Leakage ratio: the share of a signal's energy that is not at the method's own "
        "frequencies; of the logits that of their mean at each distance, of q and k that of each "
        "pair of dimensions over position. Undertrained energy: the share of the logits' squared "
        "Fourier coefficients between 0 and 2 pi / L, L the training length. All are means over "
        "layers and heads; for the logits' leakage and the energy under the floor a head weighs as "
        "much as distance moves its logits. `fope spectrum RUN` writes the rows, and a page of "
        "each run."
    )
    picture = Picture(
        correlation.correlation_figure(points, styles),
        "spectra-correlation",
        "Generalization gap against numbers of the spectrum; every point is in the table below.",
        "A point is a run: what its loss at the longest context has over that at the training "
        "length, against numbers of its spectrum.",
    )
    title = "Spectra and length generalization"
    numbers = [correlation.correlation_table(points), correlation.run_table(points)]
    return _topic(title, [text, picture], numbers)


def _training(runs: Sequence[Run], styles: Styles) -> Topic:
    def record(run: Run, last: Row) -> dict[str, object]:
        speed, wait = last.get("tokens_per_second"), last.get("data_wait_fraction")
        return {
            "seed": run.seed,
            "updates": f"{last['step']:,}",
            "tokens seen": f"{last['tokens_seen']:,}",
            "last loss (nats/token)": (
                EMPTY if last["loss"] is None else tables.format_loss(last["loss"])
            ),
            "tokens/s": EMPTY if speed is None else f"{speed:,.0f}",
            "waiting for data": EMPTY if wait is None else f"{wait:.1%}",
            "hours": tables.format_number(last["seconds"] / 3600) if "seconds" in last else EMPTY,
        }

    labels = run_labels(runs)
    last_rows = [(run, run.of("train")[-1]) for run in runs if run.of("train")]
    if not last_rows:
        return Topic(Section("Training", ["The runs have no training rows."]))
    picture = _chart(
        charts.training_chart(runs),
        styles,
        "training",
        "Training loss against tokens seen, both as logged; a run that goes on from another begins "
        "with the tokens that its parent saw.",
    )
    records = [(labels[run.path], record(run, row)) for run, row in last_rows]
    table = tables.table_of_records("Training, at the last row of each run", "variant", records)
    return _topic("Training", [picture], [table])


def _provenance(runs: Sequence[Run]) -> Section:
    """Configurations, commits, versions, machines and times, folded away."""
    differing, shared = provenance.config_tables(runs)
    parts: list[Part] = []
    if differing.rows:
        parts.append(Details(f"{len(differing.rows)} keys in which the runs differ", [differing]))
    elif len(runs) > 1:
        parts.append("The runs have the same configuration.")
    parts.append(Details(f"{len(shared.rows)} keys that all runs share", [shared]))
    whole = [
        Details(title, [Listing(json.dumps(run.config, indent=2))])
        for run, title in zip(runs, provenance.run_titles(runs), strict=True)
    ]
    parts.append(Details("Whole configurations", whole))
    sources = provenance.provenance_table(runs)
    parts.append(Details(sources.title, [sources]))
    times = goodput_table(runs)
    if times.rows:
        parts.append(Details(times.title, [times]))
    return Section("Where the numbers come from", parts)
