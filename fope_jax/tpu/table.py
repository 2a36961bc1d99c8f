"""The rows of a plan as Markdown for the terminal and as an HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fope_jax.report.markdown import markdown_table

Row = dict[str, Any]
HEADINGS = [
    "slice",
    "size",
    "method",
    "T",
    "mesh",
    "program",
    "GB",
    "TFLOP (model)",
    "HBM GB",
    "compute, HBM, net ms",
    "MFU",
]
NOTE = (
    "Per device and step. Program: the attention, layers in a scan or a row, number of compiler "
    "options. GB: memory that it needs. TFLOP: its products; in brackets the share that the model "
    "asks for, the rest is computed again or for keys that are masked. HBM GB: read and written. "
    "Milliseconds at the chip's peak; the longest bounds the step from below, and so the "
    "model-flops utilisation (MFU) from above. DCN: the network between slices."
)
_STYLE = (
    "body{font:1rem/1.5 system-ui,sans-serif;margin:2rem}div{overflow-x:auto}"
    "table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}"
    "th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:nth-child(-n+3){text-align:left}.no{background:#eee;font-weight:600}"
)


def format_row(row: Row) -> list[str]:
    """The cells of one row under ``HEADINGS``; fewer if it failed or does not fit."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in row.get("mesh", {}).items() if size > 1)
    cells = [row["topology"], row["size"], row["method"], f"{row['length']:,}", mesh or "1"]
    if "error" in row:
        return [*cells, f"not possible: {row['error']}"]
    options = row.get("compiler_options", ())
    cells.append(f"{row['attention']} {_layers(row)} +{len(options)}")
    flops = f"{row['flops'] / 1e12:.2f} ({row['model_flops'] / row['flops']:.0%})"
    if not row["fits"]:
        needed, over = row["needed_bytes"] / 1e9, (row["needed_bytes"] - row["limit_bytes"]) / 1e9
        text = f"{needed:.1f}: DOES NOT FIT, {over:.1f} too much. {row.get('advice', '')}"
        return [*cells, text.strip(), flops]
    seconds = row["seconds"]
    times = ", ".join(f"{1e3 * seconds[name]:.1f}" for name in ("compute", "hbm", "ici"))
    if "dcn_bytes" in row:
        times += f", DCN {1e3 * seconds['dcn']:.1f}" if "dcn" in seconds else ", DCN unknown"
    cells += [f"{row['needed_bytes'] / 1e9:.2f}", flops, f"{row['hbm_bytes'] / 1e9:.1f}", times]
    return [*cells, f"{row['mfu_bound']:.0%}"]


def compare_methods(rows: Sequence[Row], method: str = "fope", base: str = "rope") -> list[str]:
    """Lines with the extra cost of ``method`` over ``base`` in the same case."""
    fitting = _fitting(rows)
    return [
        f"{_case(row)}: {method} beside {base} {_difference(row, fitting[*case, base, options])}"
        for (*case, name, options), row in fitting.items()
        if name == method and (*case, base, options) in fitting
    ]


def compare_options(rows: Sequence[Row]) -> list[str]:
    """Lines with what compiler options change, where a case was compiled without them as well."""
    fitting = _fitting(rows)
    return [
        f"{_case(row)} {row['method']}, {_layers(row)}: {', '.join(options)} "
        f"{_difference(row, fitting[*case, ()])}"
        for (*case, options), row in fitting.items()
        if options and (*case, ()) in fitting
    ]


def _fitting(rows: Sequence[Row]) -> dict[tuple, Row]:
    keys = ("topology", "size", "length", "scan_layers", "method")
    return {
        (*(row[key] for key in keys), tuple(row["compiler_options"])): row
        for row in rows
        if row.get("fits")
    }


def _case(row: Row) -> str:
    return f"{row['topology']} {row['size']} T = {row['length']:,}"


def _layers(row: Row) -> str:
    return "scan" if row["scan_layers"] else "row"


def _difference(row: Row, other: Row) -> str:
    flops, moved, memory = (
        f"{row[key] / other[key] - 1:+.2%}" for key in ("flops", "hbm_bytes", "needed_bytes")
    )
    return f"{flops} flops, {moved} bytes of HBM, {memory} memory"


def _options_of(rows: Sequence[Row]) -> str:
    used = sorted({", ".join(row["compiler_options"]) or "none" for row in rows if row.get("fits")})
    return f"Compiler options: {'; or '.join(used)}." if used else ""


def _compiled_with(rows: Sequence[Row]) -> str:
    versions = sorted({f"{n} {v}" for row in rows for n, v in row["versions"].items()})
    return f"Compiled with {', '.join(versions)}."


def to_markdown(rows: Sequence[Row]) -> str:
    cells = map(format_row, rows)
    filled = [[*line, *[""] * (len(HEADINGS) - len(line))] for line in cells]
    table = markdown_table(HEADINGS, filled)
    lines = [table, "", NOTE, "", *compare_methods(rows), *compare_options(rows), ""]
    return "\n".join([*lines, f"{_options_of(rows)} {_compiled_with(rows)}".strip()])


def write_page(rows: Sequence[Row], path: Path) -> None:
    """The table as a self-contained HTML page."""
    body = []
    for row in rows:
        *cells, last = map(html.escape, format_row(row))
        columns = len(HEADINGS) - len(cells)
        fits = "" if row.get("fits") else ' class="no"'
        filled = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f"<tr{fits}>{filled}<td colspan={columns}>{last}</td></tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS)
    lines = [*compare_methods(rows), *compare_options(rows), _options_of(rows)]
    comparison = "".join(f"<li>{html.escape(line)}</li>" for line in lines if line)
    path.write_text(
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>fope plan</title>'
        f"<style>{_STYLE}</style><h1>fope plan</h1><div><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div><p>{html.escape(NOTE)}</p>"
        f"<ul>{comparison}</ul><p>{html.escape(_compiled_with(rows))}</p></html>\n"
    )
