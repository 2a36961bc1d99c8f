"""Tables of a result, in Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.units import OURS, TORCH
from fope_jax.report.markdown import markdown_table

Row = dict[str, Any]


def render(result: Row) -> str:
    """Everything that was measured, and what was not, under headings."""
    parts = {
        "Machine": _machine(result),
        "Attention programs against the reference": _checks(result, "paths"),
        "Methods against the reference": _checks(result, "methods"),
        "A training step with RoPE": _training(result),
        "Methods beside RoPE": _cost(result),
        "Attention alone, forward and backward": _attention(result),
        "Failed": "\n".join(f"- {row['unit']}: {row['error']}" for row in _failed(result)),
        "Not run": "\n".join(f"- {row['unit']}: {row['reason']}" for row in result["not_run"]),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)


def peak_rate(result: Row) -> float | None:
    """Operations a second that MFU is a share of: as stated, or of the device; None if unknown."""
    if result.get("peak"):
        return 1e12 * result["peak"]
    machines = _results(result, "machine")
    return machines[0][1]["peak"] if machines else None


def _results(result: Row, kind: str) -> list[tuple[Row, Any]]:
    """Rows of a kind that did not fail, each with its result."""
    rows = [row for row in result["rows"] if row["kind"] == kind and "result" in row]
    return [(row, row["result"]) for row in rows]


def _failed(result: Row) -> list[Row]:
    return [row for row in result["rows"] if "error" in row]


def _machine(result: Row) -> str:
    lines = []
    for _, machine in _results(result, "machine"):
        peak = peak_rate(result)
        of_peak = f", {machine['product_rate'] / peak:.0%} of its peak" if peak else ""
        lines.append(
            f"{machine['count']} x {machine['device']}, jax {machine['jax']}, Python "
            f"{machine['python']}; a large product runs at "
            f"{machine['product_rate'] / 1e12:.1f} TFLOP/s{of_peak}; "
            f"{result['seconds']:.0f} s of {60 * result['minutes']:.0f} s"
        )
    return "\n".join(lines)


def _checks(result: Row, kind: str) -> str:
    """How many agree, by program and dtype; and each that does not."""
    checks = [check for _, checks in _results(result, kind) for check in checks]
    groups: dict[tuple[str, str], list[Row]] = {}
    for check in checks:
        groups.setdefault((check.get("backend", "auto"), check["dtype"]), []).append(check)
    rows, wrong = [], []
    for (backend, dtype), of_group in groups.items():
        run = [check for check in of_group if "ok" in check]
        errors = [check["worst"] for check in run if check.get("worst") is not None]
        right = sum(check["ok"] for check in run)
        cells = [f"{right} of {len(run)}", f"{max(errors):.1e}" if errors else ""]
        cells += [f"{run[0]['limit']:.0e}" if run and "limit" in run[0] else ""]
        rows.append([backend, dtype, *cells, str(len(of_group) - len(run))])
        for check in run:
            if not check["ok"]:
                what = check.get("case", check.get("method"))
                found = check.get("error") or f"{check['worst_array']} {check['worst']}"
                wrong.append(f"- wrong: {what}, {backend}, {dtype}: {found}")
    header = ["program", "dtype", "agree", "largest error", "limit", "cannot run"]
    return "\n".join([markdown_table(header, rows), *wrong]) if rows else ""


def _training(result: Row) -> str:
    """Tokens a second, MFU and memory of both sides, and ours beside PyTorch's."""
    peak = peak_rate(result)
    found = {
        (row["side"], row["size"], row["length"]): (row, measured)
        for row, measured in _results(result, "training")
    }
    rows = []
    for size, length in dict.fromkeys((size, length) for _, size, length in found):
        ours, theirs = (found.get((side, size, length)) for side in (OURS, TORCH))
        flops = ours[1]["flops"] if ours else None
        cells = [size, f"{length:,}", str((ours or theirs)[0]["batch"])]  # type: ignore[index]
        for side in (ours, theirs):
            cells += _speed_cells(side, flops, peak)
        both = ours and theirs
        cells += [f"{theirs[1]['seconds'] / ours[1]['seconds']:.2f}" if both else ""]  # type: ignore[index]
        cells += [ours[1]["attention"] if ours else ""]
        rows.append(cells)
    header = ["size", "T", "B", "tokens/s", "MFU", "GB", "torch: tokens/s", "MFU", "GB"]
    return markdown_table([*header, "beside torch", "attention"], rows) if rows else ""


def _speed_cells(
    side: tuple[Row, Row] | None, flops: float | None, peak: float | None
) -> list[str]:
    if side is None:
        return ["", "", ""]
    unit, measured = side
    rate = unit["length"] * unit["batch"] / measured["seconds"]
    mfu = f"{flops / measured['seconds'] / peak:.1%}" if flops and peak else ""
    return [f"{rate:,.0f}", mfu, _gigabytes(measured.get("bytes"))]


def _cost(result: Row) -> str:
    rows = []
    for unit, measured in _results(result, "cost"):
        for label, of_method in measured["methods"].items():
            low, middle, high = of_method.get("beside_rope", (None,) * 3)
            compared = f"{middle:.3f} ({low:.3f} to {high:.3f})" if middle else ""
            cells = [unit["size"], f"{unit['length']:,}", label, f"{of_method['seconds']:.4f}"]
            rows.append([*cells, compared, _gigabytes(of_method["bytes"]), of_method["attention"]])
        rows += [
            [unit["size"], f"{unit['length']:,}", label, "failed", error, "", ""]
            for label, error in measured["failed"].items()
        ]
    header = ["size", "T", "method", "s/step", "beside RoPE (quartiles)", "GB", "attention"]
    return markdown_table(header, rows) if rows else ""


def _attention(result: Row) -> str:
    rows = []
    for unit, measured in _results(result, "attention"):
        for name, seconds in measured["seconds"].items():
            rate = f"{measured['flops'] / seconds / 1e12:.1f}"
            rows.append(
                [f"{unit['length']:,}", str(unit["batch"]), name, f"{1e3 * seconds:.3f}", rate]
            )
        rows += [
            [f"{unit['length']:,}", str(unit["batch"]), name, reason, ""]
            for name, reason in measured["failed"].items()
        ]
    return (
        markdown_table(["T", "B", "program", "ms", "TFLOP/s of the causal half"], rows)
        if rows
        else ""
    )


def _gigabytes(size: float | None) -> str:
    return f"{size / 1e9:.2f}" if size else ""
