"""Rows of a plan for people: Markdown in the terminal, and a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HEADINGS = (
    "slice",
    "size",
    "method",
    "T",
    "rows",
    "mesh",
    "attention",
    "memory GB",
    "TFLOP",
    "of the model",
    "HBM GB",
    "network GB",
    "compute ms",
    "HBM ms",
    "network ms",
    "bound",
    "MFU at most",
    "compiled s",
)
NOTE = (
    "Per device and step. Memory: what the program needs of a device. TFLOP: products of the "
    "program; of the model: the share that the model asks for, the rest is computed again or for "
    "keys that are masked. Milliseconds: at the chip's peak; the longest bounds the step from "
    "below, and so the model-flops utilisation (MFU) from above."
)


def format_row(row: Row) -> list[str]:
    """One row of the table, in the order of ``HEADINGS``."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in row.get("mesh", {}).items() if size > 1)
    names = [
        row["topology"],
        row["size"],
        row["method"],
        f"{row['length']:,}",
        f"{row['batch']:,}",
        mesh or "1",
        row.get("attention", ""),
    ]
    if "error" in row:
        return [*names, f"not possible: {row['error']}"]
    needed = row["needed_bytes"] / 1e9
    flops = f"{row['flops'] / 1e12:.2f}"
    share = f"{row['model_flops'] / row['flops']:.0%}"
    if not row["fits"]:
        over = (row["needed_bytes"] - row["limit_bytes"]) / 1e9
        text = f"{needed:.1f}: DOES NOT FIT, {over:.1f} too much. {row.get('advice', '')}"
        return [*names, text.strip(), flops, share]
    seconds, network = row["seconds"], sum(row["collective_bytes"].values())
    times = [f"{1e3 * seconds[name]:.1f}" for name in ("compute", "hbm", "ici")]
    return [
        *names,
        f"{needed:.2f}",
        flops,
        share,
        f"{row['hbm_bytes'] / 1e9:.1f}",
        f"{network / 1e9:.2f}",
        *times,
        row["bound"],
        f"{row['mfu_bound']:.0%}",
        f"{row['compile_seconds']:.0f}",
    ]


def compare_methods(rows: Sequence[Row], method: str = "fope", base: str = "rope") -> list[str]:
    """Lines saying how much more ``method`` takes than ``base`` in the same case."""
    found = {(r["topology"], r["size"], r["length"], r["method"]): r for r in rows}
    lines = []
    for (topology, size, length, name), row in found.items():
        other = found.get((topology, size, length, base))
        if name != method or not other or not (row.get("fits") and other.get("fits")):
            continue
        more = {key: row[key] / other[key] - 1 for key in ("flops", "hbm_bytes", "needed_bytes")}
        lines.append(
            f"{topology} {size} T = {length:,}: {method} beside {base} "
            f"{more['flops']:+.2%} flops, {more['hbm_bytes']:+.2%} bytes of HBM, "
            f"{more['needed_bytes']:+.2%} memory"
        )
    return lines


def to_markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in rows:
        own = format_row(row)
        lines.append("| " + " | ".join(own + [""] * (len(HEADINGS) - len(own))) + " |")
    versions = sorted({f"{n} {v}" for row in rows for n, v in row["versions"].items()})
    text = ["", NOTE, "", *compare_methods(rows), "", f"Compiled with {', '.join(versions)}."]
    return "\n".join(lines + text)


def write_page(rows: Sequence[Row], path: Path) -> None:
    """The table as a self-contained HTML page."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS)
    body = []
    for row in rows:
        own = format_row(row)
        last = f' colspan="{len(HEADINGS) - len(own) + 1}"' if len(own) < len(HEADINGS) else ""
        filled = "".join(f"<td>{html.escape(cell)}</td>" for cell in own[:-1])
        fits = "" if row.get("fits") else ' class="no"'
        body.append(f"<tr{fits}>{filled}<td{last}>{html.escape(own[-1])}</td></tr>")
    versions = sorted({f"{n} {v}" for row in rows for n, v in row["versions"].items()})
    more = "".join(f"<li>{html.escape(line)}</li>" for line in compare_methods(rows))
    path.write_text(
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>fope plan</title><style>'
        "body{font:1rem/1.5 system-ui,sans-serif;margin:2rem}div{overflow-x:auto}"
        "table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}"
        "th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right}"
        "td:nth-child(-n+3){text-align:left}.no{background:#eee;font-weight:600}</style>"
        f"<h1>fope plan</h1><div><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div><p>{html.escape(NOTE)}</p><ul>{more}</ul>"
        f"<p>Compiled with {html.escape(', '.join(versions))}.</p></html>\n"
    )
