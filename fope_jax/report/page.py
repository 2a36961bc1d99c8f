"""The report of runs: one self-contained HTML page, with every figure also as PNG and SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fope_jax.report import (
    correlation,
    lineage,
    plots,
    protocols,
    provenance,
    ranking,
    tables,
    validation,
)
from fope_jax.report.comparison import TASK_FIELD, Comparison, comparisons, run_labels
from fope_jax.report.goodput import goodput_table
from fope_jax.report.html import (
    Details,
    Listing,
    Part,
    Picture,
    Section,
    file_stem,
    make_output,
    write_page,
)
from fope_jax.report.length_buckets import bucket_tables
from fope_jax.report.plots import Style
from fope_jax.report.rows import Row, Run, read_runs
from fope_jax.report.sums import Sums, add_up
from fope_jax.report.tables import EMPTY

Styles = dict[str, Style]


def write_report(
    runs: Iterable[str | Path], out: str | Path, *, buckets: Sequence[int] = ()
) -> Path:
    """Writes the report of ``runs`` into ``out``; returns the path of index.html.

    Args:
      runs: run directories or results files.
      out: made if missing; files of the same names are replaced.
      buckets: edges of length ranges, tokens, see `length_buckets`.

    Raises:
      ReportError: a path is no run, or a row is malformed; names file and line.
    """
    loaded = read_runs(runs)
    out = make_output(out, "the report")
    labels = list(dict.fromkeys(run_labels(loaded).values()))
    styles = plots.line_styles(labels)
    perplexities = name_comparisons(comparisons(loaded, "perplexity"))
    positions = name_comparisons(comparisons(loaded, "position"))
    answered = name_comparisons(
        [*comparisons(loaded, "passkey"), *comparisons(loaded, "retrieval")]
    )
    parts = [
        *_introduction(loaded, labels),
        *_lineage(loaded),
        *_validation(loaded, styles),
        *(_perplexity(named, perplexities, styles) for named in perplexities),
        *(_ranking(n, loaded) for n in perplexities if n.comparison.protocol == "same-tokens"),
        *(_positions(named, styles) for named in positions),
        *(_retrieval(named, loaded, styles) for named in answered),
        *(_ranking(named, loaded) for named in answered),
        _length_buckets(loaded, buckets),
        _spectra(loaded, styles),
        _training(loaded, styles),
        _time(loaded),
        *_provenance(loaded),
    ]
    title = f"Length generalization: {', '.join(labels)}"
    return write_page(out, title, [part for part in parts if part is not None])


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


def _introduction(runs: Sequence[Run], labels: Sequence[str]) -> list[Part]:
    parts: list[Part] = [
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {len(labels)} "
        f"{'variant' if len(labels) == 1 else 'variants'}. "
        "Numbers are computed from the sums and counts in each run's metrics.jsonl; nothing is "
        "clipped or left out."
    ]
    if len(runs) > len(labels):
        parts.append("Several seeds of a variant: mean ± sample standard deviation over seeds.")
    return parts + [
        f"{run.path} is not evaluated yet (`fope evaluate` does it)."
        for run in runs
        if run.step is None
    ]


def _lineage(runs: Sequence[Run]) -> list[Part]:
    table = lineage.lineage_table(runs)
    if not table.rows:
        return []
    return [Section("Lineage", [*lineage.lineage_sentences(runs), Details(table.title, [table])])]


def _validation(runs: Sequence[Run], styles: Styles) -> list[Part]:
    sections: list[Part] = []
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
            f"during-{len(sections) + 1}",
            validation.alt_text(run_rows),
            "Loss of the same tokens against tokens seen (k: thousand, M: million, G: billion), "
            "those of a parent included. A dashed line: where a run goes on from another, changed "
            "but not yet trained.",
        )
        table = Details("Every loss", [validation.validation_table(run_rows)])
        title = f"Loss during training ({scored.split})"
        sections.append(Section(title, [text, picture, table]))
    return sections


def _perplexity(named: Named, others: Sequence[Named], styles: Styles) -> Section:
    comparison, stem, heading = named
    title, protocol = protocols.describe(comparison).title, f"Protocol {comparison.protocol}"
    caption = f"{protocol}: {protocols.protocol_caption(comparison, 'bands')}."
    parts: list[Part] = [
        protocols.protocol_paragraph(comparison),
        Picture(
            plots.perplexity_figure(comparison, styles),
            f"perplexity-{stem}",
            plots.alt_text(comparison, title),
            f"{title}. {caption} {protocols.interval_note(comparison)}",
        ),
    ]
    ratios = comparison.numbers(Sums.perplexity, relative=True)
    if any(len(by_context) > 1 for seeds in ratios.values() for by_context in seeds):
        alt = f"{title}, relative to that at the training length; every number is in the second "
        text = "Perplexity over that of the same seed and documents at the training length. "
        figure = plots.perplexity_figure(comparison, styles, relative=True)
        stem = f"perplexity-ratio-{stem}"
        parts.append(Picture(figure, stem, alt + "table below.", text + caption))
    infinite = [
        f"{label} at {context:,} tokens"
        for label, values in comparison.spreads(Sums.perplexity).items()
        for context, value in values.items()
        if not math.isfinite(value.mean)
    ]
    if infinite:
        parts.append(f"Not finite and so not drawn: {', '.join(infinite)}.")
    parts += tables.perplexity_tables(comparison)
    if comparison.protocol == "document-resets":
        parts += [
            tables.reset_table(comparison, other)
            for other, *_ in others
            if (other.protocol, other.name) == ("no-resets", comparison.name)
            and other.curves.keys() == comparison.curves.keys()
            and add_up(other.first_rows)[1:3] == add_up(comparison.first_rows)[1:3]  # tokens, bytes
        ]
    rows = Details("Every row: documents, sums and counts", [tables.document_table(comparison)])
    return Section(f"{title} ({heading})", [*parts, rows])


def _ranking(named: Named, runs: Sequence[Run]) -> Section | None:
    comparison, stem, heading = named
    if not ranking.is_ranked(comparison):
        return None
    name, labels = ranking.measure_of(comparison).name, run_labels(runs)
    compared = [run for run in runs if labels[run.path] in comparison.curves]
    parts: list[Part] = [ranking.matched_note(compared), ranking.ranking_table(comparison)]
    for contexts in ranking.shown_contexts(comparison):
        ends = dict.fromkeys((min(contexts), max(contexts)))
        where = ranking.contexts_text(contexts)
        picture = Picture(
            ranking.difference_figure(comparison, contexts),
            f"differences-{stem}-{'-'.join(map(str, ends))}",
            f"Differences of {name} at {where}; every number is in the table below.",
            f"{name.capitalize()} of the row minus that of the column; a star where the "
            "difference is significant: its 95% interval over seeds leaves out 0.",
        )
        table = ranking.difference_table(comparison, contexts)
        parts += [ranking.ranking_summary(comparison, contexts), picture, table]
    title = f"Which differences are significant ({heading.replace('_', ' ')})"
    return Section(title, parts)


def _positions(named: Named, styles: Styles) -> Section:
    comparison, title = named.comparison, protocols.describe(named.comparison).title
    caption = f"Protocol {comparison.protocol}: {protocols.protocol_caption(comparison, 'bands')}."
    longest = max(comparison.contexts)
    picture = Picture(
        plots.position_figure(comparison, styles),
        f"position-{named.stem}",
        plots.alt_text(comparison, title),
        f"{title}, {longest:,} tokens. {caption} {protocols.interval_note(comparison)}",
    )
    numbers = Details("Loss and bits per byte in each bucket", tables.position_tables(comparison))
    paragraph = protocols.protocol_paragraph(comparison)
    return Section(f"{title} ({named.heading})", [paragraph, picture, numbers])


def _retrieval(named: Named, runs: Sequence[Run], styles: Styles) -> Section:
    comparison, (counted, _) = named.comparison, tables.retrieval_names(named.comparison)
    by_depth = plots.has_depths(comparison)
    parts: list[Part] = [
        _retrieval_paragraph(comparison, runs),
        Picture(
            plots.accuracy_figure(comparison, styles),
            f"{comparison.kind}-{named.stem}",
            plots.alt_text(comparison, f"{counted.capitalize()} against context length"),
            f"Share of {counted}{', over all depths,' if by_depth else ''} against context length.",
        ),
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
    parts += tables.retrieval_tables(comparison)
    parts.append(Details("Every row: length and depth", [tables.depth_table(comparison)]))
    title = f"{plots.retrieval_title(comparison)} ({named.heading.replace('_', ' ')})"
    return Section(title, parts)


TASKS = {
    "recall": "Pairs of a key and a value, all of one dictionary; at the end one key is given "
    "that stands once before, and its value is asked for. All are token ids.",
    "copy": "A text of random token ids is followed by its copy, which the model has to go on "
    "with for some tokens; the depth is the share of the text copied before.",
    "multi_key": "Several words have a number each, hidden in a haystack; one is asked for.",
    "multi_value": "One word has several numbers, hidden in a haystack; all are asked for.",
    "multi_query": "Several words have a number each, hidden in a haystack; all are asked for.",
    "variable_tracking": "Two chains of assignments are hidden in a haystack; all variables of "
    "one value are asked for.",
    "common_words": "In a long list some words are more common than all others; they are asked "
    "for.",
}


def _retrieval_paragraph(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The protocol, with the prompt's texts or the haystack where a run states them."""
    is_passkey, rows = comparison.kind == "passkey", comparison.first_rows
    task = "A random five-digit key is hidden in filler."
    if not is_passkey:
        task = TASKS.get(comparison.name, "")
    depths = {row["depth"] for row in rows}
    by_depth = "" if None in depths else f" and each of {len(depths)} depths"
    text = (
        f"{task} It is asked for at the end of the window: {rows[0]['total']:,} trials at each "
        f"length{by_depth}, the same at every length and for every variant. A trial is right when "
        "greedy decoding writes the whole answer. The window, answer included, has exactly the "
        "number of tokens shown."
    ).strip()
    field = TASK_FIELD[comparison.kind]
    protocol_rows = [row for run in runs for row in run.of("protocol")]
    for settings in (r["settings"] for r in protocol_rows if r.get(field) == comparison.name):
        texts, haystack = settings.get("texts"), settings.get("haystack")
        if is_passkey and texts:
            prompt = "".join(texts[k] for k in ("intro", "filler", "needle", "filler", "question"))
            return f"{text} The prompt: “{prompt}” (filler repeated)."
        if not is_passkey and haystack and comparison.name != "common_words":
            source = "repeated sentences" if haystack == "noise" else f"the {haystack} text"
            return f"{text} The haystack is {source}."
    return text


def _length_buckets(runs: Sequence[Run], edges: Sequence[int]) -> Section | None:
    parts = bucket_tables(runs, edges) if edges else []
    return Section("Ranges of length", parts) if parts else None


def _spectra(runs: Sequence[Run], styles: Styles) -> Section | None:
    points = correlation.spectrum_points(runs)
    if not points:
        return None
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
    numbers = [correlation.correlation_table(points), correlation.run_table(points)]
    return Section("Spectra and length generalization", [text, picture, *numbers])


def _training(runs: Sequence[Run], styles: Styles) -> Section:
    def record(run: Run, last: Row) -> dict[str, object]:
        speed, wait = last.get("tokens_per_second"), last.get("data_wait_fraction")
        return {
            "seed": run.seed,
            "updates": f"{last['step']:,}",
            "tokens seen": f"{last['tokens_seen']:,}",
            "last loss (nats/token)": tables.format_loss(last["loss"]),
            "tokens/s": EMPTY if speed is None else f"{speed:,.0f}",
            "waiting for data": EMPTY if wait is None else f"{wait:.1%}",
            "hours": tables.format_number(last["seconds"] / 3600) if "seconds" in last else EMPTY,
        }

    labels = run_labels(runs)
    last_rows = [(run, run.of("train")[-1]) for run in runs if run.of("train")]
    if not last_rows:
        return Section("Training", ["The runs have no training rows."])
    losses = (f"{labels[run.path]}: {row['loss']:.3f} nats per token" for run, row in last_rows)
    picture = Picture(
        plots.training_figure(runs, styles),
        "training",
        f"Training loss against tokens seen. At the end: {'; '.join(losses)}.",
        "Training loss against tokens seen, both as logged; a run that goes on from another begins "
        "with the tokens that its parent saw.",
    )
    records = [(labels[run.path], record(run, row)) for run, row in last_rows]
    title = "Training, at the last row of each run"
    return Section("Training", [picture, tables.table_of_records(title, "variant", records)])


def _time(runs: Sequence[Run]) -> Section | None:
    table = goodput_table(runs)
    return Section("Time", [table]) if table.rows else None


def _provenance(runs: Sequence[Run]) -> list[Part]:
    differing, shared = provenance.config_tables(runs)
    parts: list[Part] = [differing] if differing.rows else []
    if len(runs) > 1 and not differing.rows:
        parts.append("The runs have the same configuration.")
    parts.append(Details(f"{len(shared.rows)} keys that all runs share", [shared]))
    for run, title in zip(runs, provenance.run_titles(runs), strict=True):
        listing = Listing(json.dumps(run.config, indent=2))
        parts.append(Details(f"Whole configuration of {title}", [listing]))
    sources = Section("Where the numbers come from", [provenance.provenance_table(runs)])
    return [Section("Configurations", parts), sources]
