"""The report: one self-contained HTML page, with every figure as PNG and SVG beside it."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from fope_jax.report import plots, protocols, ranking, validation
from fope_jax.report.comparison import PARTS, Comparison, comparisons, run_labels
from fope_jax.report.correlation import (
    correlation_figure,
    correlation_table,
    run_table,
    spectrum_points,
)
from fope_jax.report.goodput import goodput_table
from fope_jax.report.length_buckets import bucket_tables
from fope_jax.report.lineage import lineage_sentences, lineage_table
from fope_jax.report.provenance import config_tables, provenance_table, run_titles
from fope_jax.report.rows import ReportError, Run, read_runs
from fope_jax.report.sums import add_up
from fope_jax.report.tables import (
    EMPTY,
    Table,
    as_html,
    depth_table,
    document_table,
    number,
    perplexity_tables,
    position_tables,
    reset_table,
    retrieval_names,
    retrieval_tables,
    three,
)

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 60rem; margin: 0 auto; padding: 0 1rem 3rem; overflow-wrap: break-word; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption, small, .note { color: #444; font-size: .9rem; }
.scroll, .picture { overflow-x: auto; } .scroll { margin: 1rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem;
        font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
caption small { display: block; font-weight: 400; } td small { font-size: .85em; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; vertical-align: top; }
th[scope=row] { text-align: left; } thead th { border-bottom: 2px solid #888; }
.texts td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; font-size: .85rem; }
summary { cursor: pointer; padding: .3rem 0; }
nav ul { padding-left: 1.2rem; columns: 22rem; } nav li { padding: .15rem 0; }
a { color: #004a99; }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid #004a99; outline-offset: 2px; }
.skip { position: absolute; left: -99rem; background: #fff; padding: .5rem; }
.skip:focus { left: .5rem; top: .5rem; }
@media (max-width: 40rem) {
  h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; }
  .picture img { max-width: none; width: 34rem; }
  .scroll caption { max-width: calc(100vw - 2rem); }
  th[scope=row], thead th:first-child { position: sticky; left: 0; background: #fff; }
}
@media print { nav, .skip { display: none; } }
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the numbers</a>
<h1>$title</h1>
$contents
<main id="main">
$body
</main>
</body>
</html>
""")


def write_report(
    runs: Iterable[str | Path], out: str | Path, *, buckets: Sequence[int] = ()
) -> Path:
    """Writes the report of ``runs`` into the directory ``out``.

    Args:
      runs: run directories; runs of one name and training length are seeds of one variant.
      out: made where it does not exist; figures of the same names are replaced.
      buckets: lengths between which scores are also shown together, see ``length_buckets``.

    Returns:
      The path of index.html.

    Raises:
      ReportError: a directory that is no run, or a malformed row, with file and line.
    """
    loaded = read_runs(runs)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot write the report to {out}: {error.strerror}") from error
    styles = plots.line_styles(run_labels(loaded).values())
    perplexities = comparisons(loaded, "perplexity")
    answered = [*comparisons(loaded, "passkey"), *comparisons(loaded, "retrieval")]
    sections = [
        *_lineage(loaded),
        *_during(loaded, styles, out),
        *(_perplexity(*c, perplexities, styles, out) for c in _places(perplexities)),
        *(
            _ranking(*c, loaded, out)
            for c in _places(perplexities)
            if c[0].protocol == "same-tokens" and ranking.is_ranked(c[0])
        ),
        *(_positions(*c, styles, out) for c in _places(comparisons(loaded, "position"))),
        *(_retrieval(*c, loaded, styles, out) for c in _places(answered)),
        *(_ranking(*c, loaded, out) for c in _places(answered) if ranking.is_ranked(c[0])),
        *_length_buckets(loaded, buckets),
        *_spectra(loaded, styles, out),
        _training(loaded, styles, out),
        *_time(loaded),
        _runs(loaded),
    ]
    names = list(dict.fromkeys(run_labels(loaded).values()))
    title = f"Length generalization: {', '.join(names)}"
    return write_page(out, title, _introduction(loaded, names), *sections)


def write_page(out: Path, title: str, *parts: str) -> Path:
    """Writes the pieces as ``out/index.html``; returns its path."""
    page = out / "index.html"
    body = "\n".join(parts)
    text = PAGE.substitute(title=html.escape(title), contents=contents(body), body=body)
    page.write_text(text, encoding="utf-8")
    return page


def contents(body: str) -> str:
    """Links to the sections of a page; nothing where there are fewer than three."""
    found = re.findall(r'<section id="([^"]+)">\n<h2>(.*?)</h2>', body)
    if len(found) < 3:
        return ""
    links = "\n".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in found)
    return f'<nav aria-label="Sections">\n<ul>\n{links}\n</ul>\n</nav>'


# ---------------------------------------------------------------------------- pieces of a page


def paragraph(text: str, css: str = "") -> str:
    return f"<p{f' class={css}' if css else ''}>{html.escape(text)}</p>"


def details(summary: str, content: str) -> str:
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def section(title: str, *parts: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    head = f'<section id="{name}">\n<h2>{html.escape(title)}</h2>'
    return "\n".join([head, *parts, "</section>"])


def embedded_figure(figure: Any, out: Path, stem: str, alt: str, caption: str) -> str:
    """Saves a figure and shows its SVG inline, so that the page is complete by itself."""
    png, svg = plots.save(figure, out, stem)
    data = base64.b64encode(svg.read_bytes()).decode()
    return (
        '<figure>\n<div class="picture" role="region" tabindex="0" aria-label="Figure">'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt)}"></div>\n'
        f"<figcaption>{html.escape(caption)} "
        f'(<a href="{png.name}">PNG</a>, <a href="{svg.name}">SVG</a>)</figcaption>\n</figure>'
    )


def _texts(table: Table) -> str:
    """A table of texts: aligned left, and its cells wrap."""
    return as_html(table).replace("<table>", '<table class="texts">', 1)


class Place(NamedTuple):
    """Where a comparison goes: the end of its file names, and of its headings."""

    stem: str
    heading: str


def _places(found: Sequence[Comparison]) -> list[tuple[Comparison, Place]]:
    """A place for each comparison; those of one protocol and split are numbered and name variants.

    Runs that were scored on different things land in different comparisons of one name.
    """
    names = [(comparison.protocol, comparison.name) for comparison in found]
    places = []
    for index, comparison in enumerate(found):
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in comparison.name)
        if comparison.protocol not in ("same-tokens", "long-window", comparison.kind):
            stem = f"{comparison.protocol}-{stem}"
        heading, number = comparison.name, names[: index + 1].count(names[index])
        if names.count(names[index]) > 1:
            stem += f"-{number}"
            heading += f": {', '.join(comparison.curves)}"
        places.append((comparison, Place(stem, heading)))
    return places


# ---------------------------------------------------------------------------- sections


def _length_buckets(runs: Sequence[Run], edges: Sequence[int]) -> list[str]:
    tables = bucket_tables(runs, edges) if edges else []
    return [section("Ranges of length", *map(as_html, tables))] if tables else []


def _introduction(runs: Sequence[Run], names: Sequence[str]) -> str:
    text = (
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {len(names)} "
        f"{'variant' if len(names) == 1 else 'variants'}. "
        "Numbers are computed from the sums and counts in each run's metrics.jsonl; nothing is "
        "clipped or left out."
    )
    parts = [paragraph(text)]
    if len(runs) > len(names):
        parts.append(
            paragraph("Several seeds of a variant: mean ± sample standard deviation over seeds.")
        )
    for run in runs:
        if run.step is None:
            parts.append(paragraph(f"{run.path} is not evaluated yet (`fope evaluate` does it)."))
    return "\n".join(parts)


def _lineage(runs: Sequence[Run]) -> list[str]:
    table = lineage_table(runs)
    if not table.rows:
        return []
    told = [paragraph(line) for line in lineage_sentences(runs)]
    return [section("Lineage", *told, details(table.title, _texts(table)))]


def _during(runs: Sequence[Run], styles: dict[str, plots.Style], out: Path) -> list[str]:
    sections = []
    for index, (scored, shown) in enumerate(validation.validation_groups(runs).items(), start=1):
        text = (
            f"Measured inside training, on the parameters as they were: {scored.tokens:,} tokens "
            f"of the {scored.split} split, the same at every context length and every step. "
            "The evaluation after training scores more, so that its loss is another number."
        )
        if scored.bos_token:
            text += f" Every window begins with {scored.bos_token}."
        figure = embedded_figure(
            validation.validation_figure(shown, styles),
            out,
            f"during-{index}",
            validation.alt_text(shown),
            "Loss of the same tokens against tokens seen (k: thousand, M: million, G: billion), "
            "those of a parent included. A dashed line: where a run goes on from another, changed "
            "but not yet trained.",
        )
        table = details("Every loss", as_html(validation.validation_table(shown)))
        sections.append(
            section(f"Loss during training ({scored.split})", paragraph(text), figure, table)
        )
    return sections


def _perplexity(
    comparison: Comparison,
    place: Place,
    others: Sequence[Comparison],
    styles: dict[str, plots.Style],
    out: Path,
) -> str:
    title, brief = (
        protocols.words(comparison).title,
        protocols.protocol_caption(comparison, "bands"),
    )
    protocol, sure = f"Protocol {comparison.protocol}", protocols.interval_note(comparison)
    figures = [
        embedded_figure(
            plots.perplexity_figure(comparison, styles),
            out,
            f"perplexity-{place.stem}",
            plots.alt_text(comparison, title),
            f"{title}. {protocol}: {brief}. {sure}",
        )
    ]
    if any(len(values) > 1 for values in comparison.ratios(lambda s: s.perplexity).values()):
        figures.append(
            embedded_figure(
                plots.ratio_figure(comparison, styles),
                out,
                f"perplexity-ratio-{place.stem}",
                f"{title}, relative to that at the training length; every number is in the "
                "second table below.",
                f"Perplexity over that of the same seed and documents at the training length. "
                f"{protocol}: {brief}.",
            )
        )
    infinite = [
        f"{label} at {context:,} tokens"
        for label, values in comparison.numbers(lambda sums: sums.perplexity).items()
        for context, value in values.items()
        if not math.isfinite(value.mean)
    ]
    note = paragraph(f"Not finite and so not drawn: {', '.join(infinite)}.") if infinite else ""
    return section(
        f"{title} ({place.heading})",
        paragraph(protocols.protocol_paragraph(comparison)),
        *figures,
        note,
        *map(as_html, [*perplexity_tables(comparison), *_resets(comparison, others)]),
        details("Every row: documents, sums and counts", as_html(document_table(comparison))),
    )


def _resets(comparison: Comparison, others: Sequence[Comparison]) -> list[Table]:
    """What resets change, where the same tokens were scored without them."""
    if comparison.protocol != "document-resets":
        return []
    return [
        reset_table(comparison, other)
        for other in others
        if (other.protocol, other.name) == ("no-resets", comparison.name)
        and other.curves.keys() == comparison.curves.keys()
        and add_up(other.first)[1:3] == add_up(comparison.first)[1:3]  # tokens and bytes
    ]


def _ranking(comparison: Comparison, place: Place, runs: Sequence[Run], out: Path) -> str:
    names, name = run_labels(runs), ranking.measure_of(comparison).name
    own = [run for run in runs if names[run.path] in comparison.curves]
    parts = [paragraph(ranking.matched_note(own)), as_html(ranking.ranking_table(comparison))]
    for contexts in ranking.shown_contexts(comparison):
        ends = dict.fromkeys((min(contexts), max(contexts)))
        figure = embedded_figure(
            ranking.difference_figure(comparison, contexts),
            out,
            f"differences-{place.stem}-{'-'.join(map(str, ends))}",
            f"Differences of {name} at {ranking.at(contexts)}; every number is in the table below.",
            f"{name.capitalize()} of the row minus that of the column; a star where the "
            "difference is resolved.",
        )
        table = as_html(ranking.difference_table(comparison, contexts))
        parts += [paragraph(ranking.ranking_summary(comparison, contexts)), figure, table]
    what = place.heading.replace("_", " ")
    return section(f"Which differences are resolved ({what})", *parts)


def _positions(
    comparison: Comparison, place: Place, styles: dict[str, plots.Style], out: Path
) -> str:
    title, sure = protocols.words(comparison).title, protocols.interval_note(comparison)
    brief = f"Protocol {comparison.protocol}: {protocols.protocol_caption(comparison, 'bands')}."
    figure = embedded_figure(
        plots.position_figure(comparison, styles),
        out,
        f"position-{place.stem}",
        plots.alt_text(comparison, title),
        f"{title}, {max(comparison.contexts):,} tokens. {brief} {sure}",
    )
    tables = "\n".join(map(as_html, position_tables(comparison)))
    return section(
        f"{title} ({place.heading})",
        paragraph(protocols.protocol_paragraph(comparison)),
        figure,
        details("Loss and bits per byte in each bucket", tables),
    )


def _retrieval(
    comparison: Comparison,
    place: Place,
    runs: Sequence[Run],
    styles: dict[str, plots.Style],
    out: Path,
) -> str:
    counted, _ = retrieval_names(comparison)
    passkey, by_depth = comparison.kind == "passkey", plots.has_depths(comparison)
    figures = [
        embedded_figure(
            plots.accuracy_figure(comparison, styles),
            out,
            f"{comparison.kind}-{place.stem}",
            plots.alt_text(comparison, f"{counted.capitalize()} against context length"),
            f"Share of {counted}{', over all depths,' if by_depth else ''} against context length.",
        )
    ]
    if by_depth:
        figures.append(
            embedded_figure(
                plots.depth_figure(comparison),
                out,
                f"{comparison.kind}-depth-{place.stem}",
                f"Share of {counted} by length and depth; every number is in the table below.",
                f"Share of {counted} (%) by context length and depth of what is asked for.",
            )
        )
    words = passkey_in_words if passkey else retrieval_in_words
    return section(
        f"{'Passkey retrieval' if passkey else 'Retrieval'} ({place.heading.replace('_', ' ')})",
        paragraph(words(comparison, runs)),
        *figures,
        *map(as_html, retrieval_tables(comparison)),
        details("Every row: length and depth", as_html(depth_table(comparison))),
    )


def passkey_in_words(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The protocol as it was run, with the template's texts where the runs state them."""
    text = f"A random five-digit key is hidden in filler. {_trials_in_words(comparison)}"
    for row in _protocol_rows(comparison, runs):
        texts = row["settings"].get("texts")
        if texts:
            whole = "".join(texts[k] for k in ("intro", "filler", "needle", "filler"))
            return f"{text} The prompt: “{whole}{texts['question']}” (filler repeated)."
    return text


def _spectra(runs: Sequence[Run], styles: dict[str, plots.Style], out: Path) -> list[str]:
    found = spectrum_points(runs)
    if not found:
        return []
    text = (
        "Leakage ratio: the share of a signal's energy that is not at the method's own "
        "frequencies; of the logits that of their mean at each distance, of q and k that of each "
        "pair of dimensions over position. Undertrained energy: the share of the logits' squared "
        "Fourier coefficients between 0 and 2 pi / L, L the training length. All are means over "
        "layers and heads; for the logits' leakage and the energy under the floor a head weighs as "
        "much as distance moves its logits. `fope spectrum RUN` writes the rows, and a page of "
        "each run."
    )
    figure = embedded_figure(
        correlation_figure(found, styles),
        out,
        "spectra-correlation",
        "Generalization gap against numbers of the spectrum; every point is in the table below.",
        "A point is a run: what its loss at the longest context has over that at the training "
        "length, against numbers of its spectrum.",
    )
    tables = (correlation_table(found), run_table(found))
    return [
        section("Spectra and length generalization", paragraph(text), figure, *map(as_html, tables))
    ]


ASKED = {
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


def retrieval_in_words(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The protocol as it was run."""
    text = f"{ASKED.get(comparison.name, '')} {_trials_in_words(comparison)}".strip()
    for row in _protocol_rows(comparison, runs):
        haystack = row["settings"].get("haystack")
        if haystack and comparison.name != "common_words":
            source = "repeated sentences" if haystack == "noise" else f"the {haystack} text"
            return f"{text} The haystack is {source}."
    return text


def _protocol_rows(comparison: Comparison, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows that state the protocol of a comparison of retrieval."""
    part = PARTS[comparison.kind]
    stated = [row for run in runs for row in run.of("protocol")]
    return [row for row in stated if row.get(part) == comparison.name]


def _trials_in_words(comparison: Comparison) -> str:
    rows = next(iter(comparison.curves.values()))[0]
    depths = {row["depth"] for row in rows}
    place = "" if None in depths else f" and each of {len(depths)} depths"
    return (
        f"It is asked for at the end of the window: {rows[0]['total']:,} trials at each length"
        f"{place}, the same at every length and for every variant. A trial is right when greedy "
        "decoding writes the whole answer. The window, answer included, has exactly the number of "
        "tokens shown."
    )


def _training(runs: Sequence[Run], styles: dict[str, plots.Style], out: Path) -> str:
    columns = [
        "seed",
        "updates",
        "tokens seen",
        "last loss (nats/token)",
        "tokens/s",
        "waiting for data",
        "hours",
    ]
    table = Table("Training, at the last row of each run", "variant", columns)
    names = run_labels(runs)
    for run in runs:
        rows = run.of("train")
        if rows:
            last = rows[-1]
            wait = last.get("data_wait_fraction")
            cells = [
                run.seed,
                f"{last['step']:,}",
                f"{last['tokens_seen']:,}",
                three(last["loss"]),
                f"{last['tokens_per_second']:,.0f}" if "tokens_per_second" in last else EMPTY,
                EMPTY if wait is None else f"{wait:.1%}",
                number(last["seconds"] / 3600) if "seconds" in last else EMPTY,
            ]
            table.rows.append((names[run.path], [str(cell) for cell in cells]))
    if not table.rows:
        return section("Training", paragraph("The runs have no training rows."))
    last = "; ".join(f"{label}: {cells[3]} nats per token" for label, cells in table.rows)
    figure = embedded_figure(
        plots.training_figure(runs, styles),
        out,
        "training",
        f"Training loss against tokens seen. At the end: {last}.",
        "Training loss against tokens seen, both as logged; a run that goes on from another begins "
        "with the tokens that its parent saw.",
    )
    return section("Training", figure, as_html(table))


def _time(runs: Sequence[Run]) -> list[str]:
    table = goodput_table(runs)
    return [section("Time", as_html(table))] if table.rows else []


def _runs(runs: Sequence[Run]) -> str:
    differing, shared = config_tables(runs)
    parts = [_texts(differing)] if differing.rows else []
    if len(runs) > 1 and not differing.rows:
        parts.append(paragraph("The runs have the same configuration."))
    parts.append(details(f"{len(shared.rows)} keys that all runs share", _texts(shared)))
    for run, title in zip(runs, run_titles(runs), strict=True):
        text = html.escape(json.dumps(run.config, indent=2))
        parts.append(details(f"Whole configuration of {title}", f"<pre>{text}</pre>"))
    return "\n".join(
        [
            section("Configurations", *parts),
            section("Where the numbers come from", _texts(provenance_table(runs))),
        ]
    )
