"""Items of four public sets of questions, from the files that their authors published.

Prompts and choices are those of lm-evaluation-harness 0.4.13 (piqa, arc_easy, social_iqa and
hellaswag, without examples), as lines that `fope evaluate --tasks FILE.jsonl` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.evaluate.downstream.items import read_objects
from fope_jax.storage.files import write_text

SEED = 0  # of which items are asked
Item = dict[str, Any]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in read_objects(path))


def piqa(directory: Path) -> Iterator[Item]:
    """valid.jsonl and valid-labels.lst of Bisk et al. 2020."""
    labels = _lines(directory / "valid-labels.lst")
    for row, label in zip(_objects(directory / "valid.jsonl"), labels, strict=True):
        choices = [row["sol1"], row["sol2"]]
        yield _item(f"Question: {row['goal']}\nAnswer:", choices, int(label))


def social_iqa(directory: Path) -> Iterator[Item]:
    """dev.jsonl and dev-labels.lst of Sap et al. 2019."""
    labels = _lines(directory / "dev-labels.lst")
    for row, label in zip(_objects(directory / "dev.jsonl"), labels, strict=True):
        choices = [row[f"answer{letter}"] for letter in "ABC"]
        yield _item(f"Q: {row['context']} {row['question']}\nA:", choices, int(label) - 1)


def arc_easy(directory: Path) -> Iterator[Item]:
    """ARC-Easy-Test.jsonl of Clark et al. 2018."""
    for row in _objects(directory / "ARC-Easy-Test.jsonl"):
        options = row["question"]["choices"]
        right = [option["label"] for option in options].index(row["answerKey"])
        choices = [option["text"] for option in options]
        yield _item(f"Question: {row['question']['stem']}\nAnswer:", choices, right)


def hellaswag(directory: Path) -> Iterator[Item]:
    """hellaswag_val_full.txt, as llama.cpp reads Zellers et al. 2019: six lines an item.

    The file begins the last sentence of a context in small letters; the harness, in a capital.
    """
    lines = _lines(directory / "hellaswag_val_full.txt")
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        context = re.sub(r"(?<=\. )[a-z](?=[^.]*$)", lambda x: x[0].upper(), context)
        yield _item(_without_brackets(context), list(map(_without_brackets, endings)), int(label))


def _without_brackets(text: str) -> str:
    """As the harness reads a text: brackets are left over from the pages that it is from."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _item(prompt: str, choices: list[str], right: int) -> Item:
    return {"prompt": prompt, "choices": choices, "answers": [choices[right]]}


SETS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "piqa": piqa,
    "social_iqa": social_iqa,
    "arc_easy": arc_easy,
    "hellaswag": hellaswag,
}


def write_items(sets: Path, items: Path, count: int) -> None:
    """Writes ``count`` items of each set, drawn with one seed, as ``items/SET.jsonl``."""
    items.mkdir(parents=True, exist_ok=True)
    for name, read in SETS.items():
        rows = list(read(sets / name))
        chosen = sorted(np.random.default_rng(SEED).choice(len(rows), count, replace=False))
        lines = (json.dumps({**rows[i], "id": f"{name}-{i}"}) + "\n" for i in chosen)
        write_text(items / f"{name}.jsonl", "".join(lines))
