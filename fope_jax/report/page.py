"""The report: one self-contained HTML page, with every figure as PNG and SVG beside it."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from fope_jax.report import during, plots
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
    position_table,
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
       max-width: 60rem; margin: 0 auto; padding: 0 1rem 3rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption, small, .note { color: #444; font-size: .9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
caption small { font-weight: 400; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th[scope=row] { text-align: left; } thead th { border-bottom: 2px solid #888; }
.texts td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; font-size: .85rem; }
summary { cursor: pointer; padding: .3rem 0; }
a { color: #004a99; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
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
    sections = [
        *_lineage(loaded),
        *_during(loaded, looks, out),
        *(_perplexity(*c, loaded, looks, out) for c in _places(comparisons(loaded, "perplexity"))),
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
    page.write_text(PAGE.substitute(title=html.escape(title), body=body), encoding="utf-8")
    return page


# ---------------------------------------------------------------------------- pieces of a page


def paragraph(text: str, css: str = "") -> str:
    return f"<p{f' class={css}' if css else ''}>{html.escape(text)}</p>"


def details(summary: str, content: str) -> str:
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{html.escape(title)}</h2>", *parts, "</section>"])


def embedded_figure(figure: Any, out: Path, stem: str, alt: str, caption: str) -> str:
    """Saves a figure and shows its SVG inline, so that the page is complete by itself."""
    png, svg = plots.save(figure, out, stem)
    data = base64.b64encode(svg.read_bytes()).decode()
    return (
        f'<figure>\n<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt)}">\n'
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
    """A place for each comparison; those of one split or template are numbered and name variants.

    Runs that were scored on different things land in different comparisons of one name.
    """
    names, places = [comparison.name for comparison in found], []
    for index, comparison in enumerate(found):
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in comparison.name)
        heading = comparison.name
        if names.count(comparison.name) > 1:
            stem += f"-{names[: index + 1].count(comparison.name)}"
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


def _during(runs: Sequence[Run], looks: dict[str, plots.Style], out: Path) -> list[str]:
    sections = []
    for index, (scored, shown) in enumerate(during.scored_during(runs).items(), start=1):
        text = (
            f"Measured inside training, on the parameters as they were: {scored.tokens:,} tokens "
            f"of the {scored.split} split, the same at every context length and every step. "
            "The evaluation after training scores more, so that its loss is another number."
        )
        figure = embedded_figure(
            during.during_figure(shown, looks), out, f"during-{index}", during.in_words(shown),
            "Loss of the same tokens against tokens seen (k: thousand, M: million, G: billion), "
            "those of a parent included. A dashed line: where a run goes on from another, changed "
            "but not yet trained.",
        )  # fmt: skip
        table = details("Every loss", as_html(during.during_table(shown)))
        sections.append(
            section(f"Loss during training ({scored.split})", paragraph(text), figure, table)
        )
    return sections


def _perplexity(
    comparison: Comparison,
    place: Place,
    runs: Sequence[Run],
    looks: dict[str, plots.Style],
    out: Path,
) -> str:
    figure = embedded_figure(
        plots.perplexity_figure(comparison, looks),
        out,
        f"perplexity-{place.stem}",
        plots.in_words(comparison, "Perplexity against context length"),
        "Perplexity of the same tokens against the length of their context.",
    )
    infinite = [
        f"{label} at {context:,} tokens"
        for label, values in comparison.numbers(lambda sums: sums.perplexity).items()
        for context, value in values.items()
        if not math.isfinite(value.mean)
    ]
    note = paragraph(f"Not finite and so not drawn: {', '.join(infinite)}.") if infinite else ""
    return section(
        f"Perplexity against context length ({place.heading})",
        paragraph(same_tokens_in_words(comparison, runs)),
        figure,
        note,
        *map(as_html, perplexity_tables(comparison)),
        details("Every row: documents, sums and counts", as_html(document_table(comparison))),
    )


def same_tokens_in_words(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The protocol as it was run: what was scored, out of what, and what was left."""
    rows = next(iter(comparison.curves.values()))[0]
    shortest = [row for row in rows if row["context"] == rows[0]["context"]]
    sums = add_up(shortest)
    windows = sum(row["windows"] for row in shortest)
    documents = sorted({str(row["document"]) for row in rows if row["document"] is not None})
    named = f": {', '.join(documents)}" if 0 < len(documents) <= 8 else ""
    text = (
        f"The last {rows[0]['scored_per_window']:,} tokens of {windows:,} windows are scored: "
        f"{sums.tokens:,.0f} tokens, {sums.bytes:,.0f} bytes of text, in {len(documents)} "
        f"held-out documents{named}. They are the same tokens at every context length; only the "
        "text before them grows. Each window lies inside one document, windows are spaced evenly "
        "over it, and no token is scored twice."
    )
    too_short = _too_short(comparison, runs)
    if too_short:
        text += f" Too short for the longest window, and so not scored: {too_short}."
    return text


def _too_short(comparison: Comparison, runs: Sequence[Run]) -> str:
    names = labels(runs)
    for run in runs:
        for row in run.of("protocol"):
            own = row["protocol"] == "same-tokens" and row.get("split") == comparison.name
            if own and names[run.path] in comparison.curves and row.get("too_short"):
                count, shown = row["too_short"], row.get("too_short_names", [])
                more = f" and {count - len(shown)} more" if count > len(shown) else ""
                return f"{', '.join(shown)}{more}"
    return ""


def _positions(
    comparison: Comparison, place: Place, looks: dict[str, plots.Style], out: Path
) -> str:
    longest = max(comparison.contexts)
    windows = next(iter(comparison.curves.values()))[0][0].get("windows")
    count = f"{windows:,} windows" if windows else "windows"
    text = (
        f"Every token of {count} of {longest:,} tokens is scored once, by the position of the "
        "token before it, in half-octave buckets. Buckets hold different tokens: compare variants "
        "at one position rather than positions of one variant."
    )
    figure = embedded_figure(
        plots.position_figure(comparison, looks),
        out,
        f"position-{place.stem}",
        plots.in_words(comparison, "Loss by position"),
        f"Loss by position in windows of {longest:,} tokens.",
    )
    table = details("Loss in each bucket", as_html(position_table(comparison)))
    return section(f"Loss by position ({place.heading})", paragraph(text), figure, table)


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
