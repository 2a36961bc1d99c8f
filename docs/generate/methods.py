"""A page for each position embedding and each scaling, from its docstring and what was measured."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from docs.generate.links import ROOT
from fope_jax.config.keys import POSITION, class_keys
from fope_jax.gallery.catalogue import Entry, method_entries, scaling_entries
from fope_jax.gallery.examples import examples
from fope_jax.position.registry import METHODS, SCALINGS, name_of
from fope_jax.report.comparison import comparisons
from fope_jax.report.markdown import markdown_table
from fope_jax.report.rows import Run, read_runs
from fope_jax.report.sums import Sums
from fope_jax.report.tables import format_percent

TOURNAMENT = ROOT / "experiments/tournament/results"


class Docstring(NamedTuple):
    """A method's docstring up to its knobs."""

    about: str
    formula: str
    remarks: str


def pages() -> dict[str, str]:
    """``{page of the site: Markdown}``, one for each method and scaling."""
    entries = [(entry, METHODS) for entry in method_entries()]
    entries += [(entry, SCALINGS) for entry in scaling_entries()]
    return {page_of(entry.name): method_page(entry, known[entry.name]) for entry, known in entries}


def page_of(name: str) -> str:
    return f"methods/{name}.md"


def method_page(entry: Entry, cls: type) -> str:
    text = read_docstring(cls)
    parts = [f"# {entry.name}", f"{plain_code(text.about)}", facts(entry, cls)]
    parts += ["## Formula", f"```text\n{plain_code(text.formula)}\n```", plain_code(text.remarks)]
    parts += ["## Picture", *map(picture, labels_of(entry.name)), PICTURE_NOTE]
    if dataclasses.fields(cls):
        parts += ["## Knobs", knob_table(cls)]
    parts += ["## How to use it", usage(entry, cls)]
    parts += ["## What was measured", measured(entry.name)]
    parts += ["## Source", plain_code(entry.source) + "."]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---------------------------------------------------------------------------- the docstring


def read_docstring(cls: type) -> Docstring:
    """Paragraphs indented by four are the formula.

    >>> read_docstring(METHODS["learned"]).formula
    'x[p] += table[p]'
    """
    text = re.split(r"^(?:Knobs|Reference|>>>)", inspect.getdoc(cls) or "", flags=re.MULTILINE)[0]
    about, *others = text.strip("\n").split("\n\n")
    formulas = [textwrap.dedent(part) for part in others if part.startswith("    ")]
    remarks = [part for part in others if not part.startswith("    ")]
    return Docstring(about, "\n".join(formulas), "\n\n".join(remarks))


def plain_code(text: str) -> str:
    """Docstrings write ``code`` with two quotes, Markdown with one."""
    return text.replace("``", "`")


# ---------------------------------------------------------------------------- what a page shows


def facts(entry: Entry, cls: type) -> str:
    named = {"kind": entry.kind, "trained": entry.learnable, "beyond training": entry.extends}
    shown = {title: text for title, text in named.items() if text}
    shown["class"] = f"[`{cls.__name__}`][{cls.__module__}.{cls.__name__}]"
    return markdown_table(list(shown), [list(shown.values())])


def knob_table(cls: Any) -> str:
    rows = []
    for key in class_keys(POSITION, cls):
        default = "required" if key.default is None else f"`{key.default}`"
        knob = key.name.removeprefix(f"{POSITION}.")
        rows.append((f"`{knob}`", key.type, default, key.meaning))
    return markdown_table(["knob", "type", "default", "meaning"], rows)


def labels_of(name: str) -> list[str]:
    """The gallery's examples that show a method, or RoPE with a scaling."""
    if name in SCALINGS:
        return [f"rope+{name}"]
    return [
        label
        for label, method in examples().items()
        if name_of(method) == name and "+" not in label
    ]


def picture_file(label: str) -> str:
    return f"methods/pictures/{label}.svg"


def picture(label: str) -> str:
    return f"![What {label} does to attention, and its frequencies](pictures/{label}.svg)"


PICTURE_NOTE = (
    "Before training, a head of 64 dimensions, training length 512. Left: what position alone does "
    "to attention, out to four times the training length. Right: the period of each frequency, or "
    "the numbers that each head owns. `fope gallery -o runs/gallery` draws all methods."
)


def usage(entry: Entry, cls: Any) -> str:
    """The command that reads a trained RoPE model with it, or trains the demo's model."""
    if entry.name in FOR_TRAINED:
        return f"On a trained model:\n\n```bash\n{FOR_TRAINED[entry.name]}\n```"
    name, workdir = entry.name, f"--workdir runs/{entry.name}"
    keys = class_keys(POSITION, cls)
    needs = [key.name.removeprefix(f"{POSITION}.") for key in keys if key.default is None]
    if name in SCALINGS:
        knobs = "".join(f', "{knob}": {EXAMPLE_VALUES[knob]}' for knob in needs)
        spec = f"""'[{{"scaling": "{name}"{knobs}}}]'"""
        command = f"quickstart:position=rope {workdir} \\\n    --config.position.scaling={spec}"
    else:
        knobs = "".join(
            f" \\\n    --config.position.{knob}={EXAMPLE_VALUES[knob]}" for knob in needs
        )
        command = f"quickstart:position={name} {workdir}{knobs}"
    train = f"```bash\nfope train --config {command}\n```"
    if not getattr(cls, "stretches", False) or set(needs) - {"factor", "original_length"}:
        return train
    read = f"```bash\nfope evaluate runs/rope --as {name}:factor=4\n```"
    return f"On a trained model, to four times its length:\n\n{read}\n\nIn training:\n\n{train}"


# What is made for a model that is trained already, with a block for it alone.
FOR_TRAINED = {
    "drope": "fope extend runs/rope --method drope --length 128 --workdir runs/drope",
    "self_extend": "fope evaluate runs/rope --as self_extend:window=64,group=8",
    "rerope": "fope evaluate runs/rope --as rerope:window=64",
}
EXAMPLE_VALUES = {
    "table_length": "128",
    "training_length": "128",
    "methods": """'[{"method": "fope"}, {"method": "fope"}, {"method": "nope"}]'""",
    "window": "64",
    "chunk": "64",
    "group": "8",
    "shares": "0.5,0.25,0.25",
    "inner": """'{"method": "rope"}'""",
    "factor": "4.0",
    "original_length": "128",
    "share": "0.75",
    "theta": "500000.0",
    "short_factor": str([1.0] * 16),
    "long_factor": str([1.0] * 8 + [4.0] * 8),
}


# ---------------------------------------------------------------------------- what was measured


def measured(name: str) -> str:
    """The tournament's rows of a method beside RoPE's, and the experiments that have runs of it."""
    variants = [label for label, names in tournament_variants().items() if name in names]
    parts = []
    if variants:
        shown = [*variants, *(["rope"] if "rope" not in variants else [])]
        parts.append(tournament_table(shown))
        parts.append(
            "Mean over three seeds, from [the tournament](../findings/tournament.md), which has "
            "the intervals and says what such small models can show."
        )
    others = [folder for folder in experiments_with(name) if folder != "tournament"]
    if others:
        linked = ", ".join(f"[{folder}](../findings/{folder}.md)" for folder in others)
        parts.append(f"Runs with it are also in {linked}.")
    if not parts:
        parts.append("No experiment of this repository has a run with it yet.")
    parts.append("Time, memory and exactness of phases: [benchmarks](../findings/benchmarks.md).")
    return "\n\n".join(parts)


@functools.cache
def tournament(part: str) -> list[Run]:
    """The runs of a part, ``books`` or ``recall``."""
    return read_runs(sorted(TOURNAMENT.glob(f"{part}_*.jsonl")))


@functools.cache
def tournament_variants() -> dict[str, set[str]]:
    """Variant -> the methods and scalings in its position embedding."""
    return {run.variant: names_in(run.config["position"]) for run in tournament("books")}


def names_in(spec: Any) -> set[str]:
    """Names of methods and scalings in a specification.

    >>> sorted(names_in({"method": "rope", "scaling": [{"scaling": "ntk", "factor": 4.0}]}))
    ['ntk', 'rope']
    """
    if isinstance(spec, list):
        return set().union(*map(names_in, spec)) if spec else set()
    if not isinstance(spec, dict):
        return set()
    own = {spec[key] for key in ("method", "scaling") if isinstance(spec.get(key), str)}
    return own.union(*(names_in(value) for value in spec.values()))


@functools.cache
def experiments_with(name: str) -> list[str]:
    """Folders of experiments/ with a run of the method or scaling."""
    found = []
    for folder in sorted(ROOT.glob("experiments/*/results")):
        if any(name in names for names in _names_of_results(folder)):
            found.append(folder.parent.name)
    return found


@functools.cache
def _names_of_results(folder: Any) -> list[set[str]]:
    names = []
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            first = json.loads(next(file, "{}"))
        names.append(names_in(first.get("config", {}).get("position", {})))
    return names


@functools.cache
def tournament_numbers() -> dict[str, dict[str, str]]:
    """``{variant: {column: number}}``."""
    numbers: dict[str, dict[str, str]] = {}
    (books,) = comparisons(tournament("books"), "perplexity")
    for label, spreads in books.spreads(Sums.perplexity).items():
        for context in (128, 2048):
            column = f"perplexity at {context:,}"
            numbers.setdefault(label, {})[column] = f"{spreads[context].mean:,.2f}"
    for task in comparisons(tournament("recall"), "retrieval"):
        if task.name == "recall":
            for label, spreads in task.spreads(Sums.accuracy).items():
                for context in (64, 128, 256, 1024):
                    shown = format_percent(spreads[context].mean)
                    numbers[label][f"recall at {context:,}"] = shown
    return numbers


def tournament_table(variants: Sequence[str]) -> str:
    numbers = tournament_numbers()
    columns = list(numbers["rope"])
    rows = [(f"`{v}`", *(numbers[v].get(column, "") for column in columns)) for v in variants]
    return markdown_table(["variant", *columns], rows)
