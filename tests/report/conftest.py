"""Synthetic runs with numbers that are easy to recompute."""

import json
import math
from types import SimpleNamespace

import pytest

from fope_jax.report import html, interactive

CONTEXTS = (128, 256, 512, 1024, 2048)
# Nats a token at each context: what a curve of each kind looks like.
LOSSES = {
    "rope": (3.10, 4.02, 4.85, 5.30, 5.61),
    "alibi": (3.15, 3.13, 3.12, 3.12, 3.12),
    "nope": (3.21, 3.60, 4.90, 6.10, 6.90),
    "fope": (3.09, 3.06, 3.11, 3.31, 3.47),
}
ACCURACY = {
    "rope": (1, 0.5, 0, 0, 0),
    "alibi": (1, 0.8, 0.6, 0.3, 0.1),
    "nope": (0.9, 0.1, 0, 0, 0),
    "fope": (1, 1, 0.9, 0.8, 0.7),
}
BOOKS = {"Emma": 6400, "Moby Dick": 3200}
TEN_BOOKS = {f"book {i}": 640 for i in range(10)}  # as few as have intervals
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def rows_of(variant, seed, *, length=128, tokens=BOOKS, step=1000, shift=0.0):
    """Evaluation and training rows of one run; ``shift`` moves its loss."""
    ids = {"variant": variant, "seed": seed, "step": step, "training_length": length}
    rows = []
    for i in range(1, 41):
        loss = 8 * (i * 25) ** -0.14 + shift
        rows.append(
            {
                "kind": "train",
                "step": i * 25,
                "tokens_seen": i * 25 * 4096,
                "nats": loss * 4096.0,
                "tokens": 4096.0,
                "loss": loss,
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "tokens_per_second": 21_345.0,
                "data_wait_fraction": 0.012,
                "seconds": i * 4.5,
            }
        )
    for context, loss in zip(CONTEXTS, LOSSES[variant], strict=True):
        for book, count in tokens.items():
            rows.append(
                {
                    "kind": "perplexity",
                    "protocol": "same-tokens",
                    "split": "validation",
                    **ids,
                    "context": context,
                    "scored_per_window": 64,
                    "windows": count // 64,
                    "nats": (loss + shift) * count,
                    "tokens": count,
                    "bytes": 3 * count,
                    "correct": count // 4,
                    "document": book,
                }
            )
    edges = [0, *(2**k for k in range(2, 12))]
    for start, stop in zip(edges, edges[1:], strict=False):
        place = max(0.0, math.log2(stop / length)) / 4
        loss = LOSSES[variant][0] + (LOSSES[variant][-1] - LOSSES[variant][0]) * place
        loss += 2.0 / stop**0.5
        rows.append(
            {
                "kind": "position",
                "protocol": "long-window",
                "split": "validation",
                **ids,
                "context": 2048,
                "windows": 8,
                "bucket": [start, stop],
                "nats": loss * 8 * (stop - start),
                "tokens": 8 * (stop - start),
                "bytes": 25 * (stop - start),
                "correct": stop - start,
            }
        )
    for context, share in zip(CONTEXTS, ACCURACY[variant], strict=True):
        for depth in DEPTHS:
            right = round(20 * min(1, share * (0.7 + 0.6 * depth)))
            rows.append(
                {
                    "kind": "passkey",
                    "template": "compact",
                    **ids,
                    "context": context,
                    "depth": depth,
                    "correct": right,
                    "total": 20,
                    "nats": 100 * (2.5 - 2 * share),
                    "tokens": 100,
                }
            )
    rows.append(
        {
            "kind": "protocol",
            "protocol": "same-tokens",
            "split": "validation",
            **ids,
            "settings": {"contexts": list(CONTEXTS)},
            "windows": 150,
            "too_short": 1,
            "too_short_names": ["Bryant's <Stories>"],
        }
    )
    rows.append({"kind": "time", "phase": "compile", "step": 0, "seconds": 3.25})
    return rows


def config_of(variant, seed, length=128):
    position = {"method": variant} | ({"theta": 10000.0} if variant in ("rope", "fope") else {})
    return {
        "name": variant,
        "seed": seed,
        "model": {"d_model": 64, "num_layers": 4},
        "position": position,
        "train": {"length": length, "steps": 1000},
    }


INFO = {
    "commit": "0123abc",
    "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    "host": "box",
    "devices": "1 x cpu (cpu)",
    "parameters": 1234567,
    "command": ["fope", "train"],
}


def write_run(path, variant, seed=0, *, rows=None, length=128, **changes):
    path.mkdir(parents=True)
    rows = rows_of(variant, seed, length=length, **changes) if rows is None else rows
    (path / "config.json").write_text(json.dumps(config_of(variant, seed, length)))
    (path / "run.json").write_text(json.dumps(INFO))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def synthetic():
    """What the synthetic numbers are made of."""
    return SimpleNamespace(
        CONTEXTS=CONTEXTS,
        LOSSES=LOSSES,
        ACCURACY=ACCURACY,
        DEPTHS=DEPTHS,
        TEN_BOOKS=TEN_BOOKS,
        rows_of=rows_of,
        write_run=write_run,
    )


@pytest.fixture
def undrawn(monkeypatch):
    """Figures of pages are made but not drawn, which takes most of the time of a report.

    Fixtures of a module come before this one, and have whole figures.
    """

    def save_figure(_, directory, stem):
        paths = directory / f"{stem}.png", directory / f"{stem}.svg"
        for path in paths:
            path.write_bytes(b"")
        return paths

    monkeypatch.setattr(html, "save_figure", save_figure)
    monkeypatch.setattr(interactive, "library", lambda: "/* Vega */")


@pytest.fixture
def make_run(tmp_path):
    """Writes a synthetic run directory: ``make_run("rope", seed=1)``."""

    def make(variant, seed=0, name=None, **changes):
        return write_run(tmp_path / (name or f"{variant}-{seed}"), variant, seed, **changes)

    return make


@pytest.fixture
def four_runs(make_run):
    return [make_run(variant) for variant in LOSSES]
