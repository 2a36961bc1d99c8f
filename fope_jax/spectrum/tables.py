"""Pages of `fope spectrum`: a run's spectra before and after training, and the theory's demo."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.report.html import Details, Note, Picture, Section, make_output, write_page
from fope_jax.report.rows import ReportError
from fope_jax.report.tables import EMPTY, Table
from fope_jax.spectrum import figures
from fope_jax.storage.files import read_json, write_json
from fope_jax.storage.paths import as_path

Measured = dict[str, Any]  # what ``measure_run`` returns
COLUMNS = {
    "leakage": "logits' leakage",
    "leakage_null": "null",
    "q_leakage": "q leakage",
    "k_leakage": "k leakage",
    "pair_null": "null",
    "hidden_leakage": "hidden leakage",
    "hidden_null": "null",
    "floor_energy": "floor energy",
    "floor_null": "null",
    "undertrained_energy": "undertrained energy",
    "hidden_locked": "position-locked",
    "entropy": "entropy (nats)",
    "distance": "distance (tokens)",
}
READING = (
    "Leakage is the share of a signal's energy that is not at the method's own frequencies: the "
    "projection on their cosines and sines is taken off, and what is left is divided by the whole. "
    "0 is a signal of own frequencies alone; white noise has the null value, which is below 1 as "
    "frequencies nearer than 2 pi / T fill a part of a window of T tokens. Of the logits it is the "
    "leakage of their mean at each distance, weighed by the number of pairs of tokens, without the "
    "constant, which attention does not see. Of q and k, after the rotation, it is that of each "
    "pair of dimensions from the frequencies of that pair. Floor energy is the share under 2 pi / "
    "L, L the training length; undertrained energy that of the squared Fourier coefficients of the "
    "logits, of pairs of a query and a key, at frequencies between 0 and 2 pi / L. The "
    "position-locked share of the hidden states is what is the same at a position whatever the "
    "text. Methods without frequencies have neither leakage nor undertrained energy (-)."
)


def write_spectrum(measured: Measured, out: str | Path) -> Path:
    """Writes what ``measure_run`` returned, and a page of all measured steps; returns index.html.

    ``measured`` replaces an earlier measurement of its step in ``out``, a directory of this run.

    Raises:
      ReportError: the directory cannot be written, or holds another run.
    """
    out = make_output(out, "the spectra")
    variant, seed = measured["variant"], measured["seed"]
    earlier = _earlier_states(out, variant, seed)
    write_json(out / f"spectrum-{measured['step']}.json", measured)
    states = [state for state in earlier if state["step"] != measured["step"]] + [measured]
    states.sort(key=lambda state: state["step"])
    parts = [
        Note(READING),
        _undertrained_section(states[-1]),
        Section("Numbers", [_numbers_table(states)]),
        _attention_section([states[0], states[-1]] if len(states) > 1 else states),
        *map(_energy_section, reversed(states)),
    ]
    return write_page(out, f"Spectra of {variant}, seed {seed}", parts)


def check_spectra(out: str | Path, variant: str, seed: int) -> None:
    """Raises ReportError where ``out`` holds spectra of another run, or a damaged file."""
    _earlier_states(as_path(out), variant, seed)


def _earlier_states(out: Path, variant: str, seed: int) -> list[Measured]:
    """What was measured of a run before; ReportError if ``out`` holds another's."""
    try:
        earlier = [read_json(path) for path in sorted(out.glob("spectrum-*.json"))]
    except ValueError as error:
        raise ReportError(f"{error}; remove the file and measure that step again") from error
    others = {(s["variant"], s["seed"]) for s in earlier} - {(variant, seed)}
    if others:
        names = ", ".join(f"{variant} (seed {seed})" for variant, seed in sorted(others))
        raise ReportError(
            f"{out} holds spectra of {names}; give {variant} (seed {seed}) a directory of its own"
        )
    return earlier


def write_demo(demo: dict[str, Any], out: str | Path) -> Path:
    """Writes demo.json, its figures and a page of them."""
    out = make_output(out, "the demo")
    (out / "demo.json").write_text(json.dumps(demo, default=np.ndarray.tolist))
    captions = {
        "damage": "Lines: measured over 4,096 tokens; crosses: predicted amplitudes. Bottom right: "
        "a tone seen for 64 tokens, with periods that do and do not fit.",
        "extension": "Fitted within the training length by the frequencies that a dimension "
        "carries, then extended; root-mean-square errors within and beyond.",
        "decay": "The mean of q.k under RoPE by distance: the decay is that of the means of q and "
        "k.",
    }
    alt = "The numbers are in demo.json."
    damage, extension, decay = (
        Picture(getattr(figures, f"{stem}_figure")(demo), stem, alt, text)
        for stem, text in captions.items()
    )
    columns = ["linear, within", "linear, beyond", "GELU, within", "GELU, beyond"]
    table = Table("Root-mean-square error of the extension", "a dimension carries", columns)
    cases = demo["extension"]["cases"]
    for label in cases["linear"]["errors"]:
        cells = [f"{x:.3f}" for case in cases.values() for x in case["errors"][label]]
        table.rows.append((label, cells))
    parts = [
        Section("Leakage, distortion and truncation", [damage]),
        Section("Periodic extension", [extension, table]),
        Section("Decay with distance", [decay]),
    ]
    return write_page(out, "Spectrum damage, on signals made for it", parts)


# ---------------------------------------------------------------------------- sections of a run


def _undertrained_section(state: Measured) -> Section:
    pairs, length, title = state["pairs"], state["training_length"], "Undertrained frequencies"
    if not pairs:
        return Section(title, ["The first layer's method has no frequencies."])
    columns = ["frequency (rad/token)", "period (tokens)", f"turns in {length:,} tokens", ""]
    table = Table("Pairs of dimensions of the first layer", "dimensions", columns)
    for pair in pairs:
        moves = pair["frequency"] > 0
        cells = [
            f"{pair['frequency']:.4g}",
            f"{pair['period']:,.1f}" if moves else EMPTY,
            f"{pair['turns']:.2f}" if moves else EMPTY,
            "undertrained" if pair["undertrained"] else "" if moves else "stands still",
        ]
        table.rows.append((f"{pair['dims'][0]}, {pair['dims'][1]}", cells))
    slow = sum(pair["undertrained"] for pair in pairs)
    still = sum(pair["frequency"] == 0 for pair in pairs)
    text = (
        f"{slow} of {len(pairs)} pairs of dimensions never turned fully in training, {still} stand "
        f"still. The floor is 2 pi / {length:,} = {2 * math.pi / length:.4g} radians per token; of "
        "a pair that follows a series the strongest term counts."
    )
    return Section(title, [text, Details(table.title, [table])])


def _numbers_table(states: Sequence[Measured]) -> Table:
    note = "null: what white noise has"
    table = Table("Means over heads", "step, context, layer", list(COLUMNS.values()), note=note)
    for state in states:
        for row in state["rows"]:
            name = f"{figures.state_name(state)}, {row['context']:,}, {row['layer']}"
            values = [head_mean(row[key]) for key in COLUMNS]
            table.rows.append((name, [EMPTY if x is None else f"{x:.3g}" for x in values]))
    return table


def head_mean(value: Any) -> float | None:
    """A number, or the mean over heads; None without a number."""
    if not isinstance(value, list):
        return value
    known = [x for x in value if x is not None]
    return sum(known) / len(known) if known else None


def _attention_section(states: Sequence[Measured]) -> Section:
    last = states[-1]["rows"][0]["last"]
    sizes = Picture(
        figures.sizes_figure(states),
        "sizes",
        "Mean size of q and k by dimension of the head, before and after training.",
        "Mean |q| and |k| over tokens and heads, by dimension, at the training length.",
    )
    attention = Picture(
        figures.attention_figure(states),
        "attention",
        "Entropy and mean distance of attention by context length; numbers in the table above.",
        f"The last {last:,} queries of each window; dotted: every key the same weight.",
    )
    return Section("q, k and attention", [sizes, attention])


def _energy_section(state: Measured) -> Section:
    energy = Picture(
        figures.energy_figure(state),
        f"energy-step-{state['step']}",
        "Energy of logits, q, k and hidden states by layer and frequency.",
        "Hann windows. Each row is relative to its largest, the constant left out; q and k are "
        "those after the rotation.",
    )
    profile = Picture(
        figures.profile_figure(state),
        f"profile-step-{state['step']}",
        "Mean attention logit by distance, one line a layer.",
        "The mean logit of all pairs of tokens at a distance, bias included.",
    )
    return Section(f"Energy by frequency ({figures.state_name(state)})", [energy, profile])
