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

from fope_jax.report import plots, protocols
from fope_jax.report.lineage import lineage_lines, lineage_table
from fope_jax.report.provenance import config_tables, provenance_table, run_titles
from fope_jax.report.rows import (
    Comparison,
    ReportError,
    Run,
    add_up,
    comparisons,
    labels,
    read_runs,
)
from fope_jax.report.tables import (
    EMPTY,
    Table,
    as_html,
    depth_table,
    document_table,
    number,
    passkey_tables,
    perplexity_tables,
    position_tables,
    reset_table,
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


def write_report(runs: Iterable[str | Path], out: str | Path) -> Path:
    """Writes the report of ``runs`` into the directory ``out``.

    Args:
      runs: run directories; runs of one name and training length are seeds of one variant.
      out: made where it does not exist; figures of the same names are replaced.

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
    looks = plots.styles(labels(loaded).values())
    perplexities = comparisons(loaded, "perplexity")
    sections = [
        *_lineage(loaded),
        *(_perplexity(*c, perplexities, looks, out) for c in _places(perplexities)),
        *(_positions(*c, looks, out) for c in _places(comparisons(loaded, "position"))),
        *(_passkey(*c, loaded, looks, out) for c in _places(comparisons(loaded, "passkey"))),
        _training(loaded, looks, out),
        _runs(loaded),
    ]
    names = list(dict.fromkeys(labels(loaded).values()))
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
        if comparison.protocol not in ("same-tokens", "long-window", "passkey"):
            stem = f"{comparison.protocol}-{stem}"
        heading, number = comparison.name, names[: index + 1].count(names[index])
        if names.count(names[index]) > 1:
            stem += f"-{number}"
            heading += f": {', '.join(comparison.curves)}"
        places.append((comparison, Place(stem, heading)))
    return places


# ---------------------------------------------------------------------------- sections


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
    told = [paragraph(line) for line in lineage_lines(runs)]
    return [section("Lineage", *told, details(table.title, _texts(table)))]


def _perplexity(
    comparison: Comparison,
    place: Place,
    others: Sequence[Comparison],
    looks: dict[str, plots.Style],
    out: Path,
) -> str:
    title, brief = protocols.words(comparison).title, protocols.in_brief(comparison, "bands")
    protocol, sure = f"Protocol {comparison.protocol}", protocols.how_sure(comparison)
    figures = [
        embedded_figure(
            plots.perplexity_figure(comparison, looks),
            out,
            f"perplexity-{place.stem}",
            plots.in_words(comparison, title),
            f"{title}. {protocol}: {brief}. {sure}",
        )
    ]
    if any(len(values) > 1 for values in comparison.ratios(lambda s: s.perplexity).values()):
        figures.append(
            embedded_figure(
                plots.ratio_figure(comparison, looks),
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
        paragraph(protocols.how_scored(comparison)),
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


def _positions(
    comparison: Comparison, place: Place, looks: dict[str, plots.Style], out: Path
) -> str:
    title, sure = protocols.words(comparison).title, protocols.how_sure(comparison)
    brief = f"Protocol {comparison.protocol}: {protocols.in_brief(comparison, 'bands')}."
    figure = embedded_figure(
        plots.position_figure(comparison, looks),
        out,
        f"position-{place.stem}",
        plots.in_words(comparison, title),
        f"{title}, {max(comparison.contexts):,} tokens. {brief} {sure}",
    )
    tables = "\n".join(map(as_html, position_tables(comparison)))
    return section(
        f"{title} ({place.heading})",
        paragraph(protocols.how_scored(comparison)),
        figure,
        details("Loss and bits per byte in each bucket", tables),
    )


def _passkey(
    comparison: Comparison,
    place: Place,
    runs: Sequence[Run],
    looks: dict[str, plots.Style],
    out: Path,
) -> str:
    curves = embedded_figure(
        plots.passkey_figure(comparison, looks),
        out,
        f"passkey-{place.stem}",
        plots.in_words(comparison, "Passkeys found against context length"),
        "Share of passkeys found, over all depths, against context length.",
    )
    depths = embedded_figure(
        plots.depth_figure(comparison),
        out,
        f"passkey-depth-{place.stem}",
        "Share of passkeys found by length and depth; every number is in the table below.",
        "Share of passkeys found (%) by context length and depth of the key.",
    )
    return section(
        f"Passkey retrieval ({place.heading})",
        paragraph(passkey_in_words(comparison, runs)),
        curves,
        depths,
        *map(as_html, passkey_tables(comparison)),
        details("Every row: length and depth", as_html(depth_table(comparison))),
    )


def passkey_in_words(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The protocol as it was run, with the template's texts where the runs state them."""
    rows = next(iter(comparison.curves.values()))[0]
    depths = sorted({row["depth"] for row in rows})
    text = (
        f"A random five-digit key is hidden in filler and asked for at the end of the window: "
        f"{rows[0]['total']:,} trials at each length and each of {len(depths)} depths, the same "
        "keys at every length and for every variant. A trial is right when greedy decoding writes "
        "the whole key. The window, answer included, has exactly the number of tokens shown."
    )
    for run in runs:
        for row in run.of("protocol"):
            texts = row["settings"].get("texts")
            if row.get("template") == comparison.name and texts:
                whole = "".join(texts[k] for k in ("intro", "filler", "needle", "filler"))
                return f"{text} The prompt: “{whole}{texts['question']}” (filler repeated)."
    return text


def _training(runs: Sequence[Run], looks: dict[str, plots.Style], out: Path) -> str:
    columns = [
        "seed", "updates", "tokens seen", "last loss (nats/token)", "tokens/s",
        "waiting for data", "hours",
    ]  # fmt: skip
    table = Table("Training, at the last row of each run", "variant", columns)
    names = labels(runs)
    for run in runs:
        rows = run.of("train")
        if rows:
            last = rows[-1]
            wait = last.get("data_wait_fraction")
            cells = [
                run.seed, f"{last['step']:,}", f"{last['tokens_seen']:,}", three(last["loss"]),
                f"{last['tokens_per_second']:,.0f}" if "tokens_per_second" in last else EMPTY,
                EMPTY if wait is None else f"{wait:.1%}",
                number(last["seconds"] / 3600) if "seconds" in last else EMPTY,
            ]  # fmt: skip
            table.rows.append((names[run.path], [str(cell) for cell in cells]))
    if not table.rows:
        return section("Training", paragraph("The runs have no training rows."))
    last = "; ".join(f"{label}: {cells[3]} nats per token" for label, cells in table.rows)
    figure = embedded_figure(
        plots.training_figure(runs, looks), out, "training",
        f"Training loss against tokens seen. At the end: {last}.",
        "Training loss against tokens seen, both as logged; a run that goes on from another begins "
        "with the tokens that its parent saw.",
    )  # fmt: skip
    return section("Training", figure, as_html(table))


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
