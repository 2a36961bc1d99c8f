"""The experiment on short questions: items of published files, and intervals of shares."""

import json

import numpy as np
import pytest

from experiments.short_tasks import items, tables
from fope_jax.evaluate.downstream.items import read_file

PIQA = {"goal": "open a jar", "sol1": "twist the lid", "sol2": "twist the jar and the lid"}
SIQA = {
    "context": "Kim ran.",
    "question": "Why?",
    "answerA": "to be late",
    "answerB": "to be on time",
    "answerC": "to sleep",
}
ARC = {
    "id": "x",
    "question": {
        "stem": "What is hot?",
        "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
    },
    "answerKey": "2",
}
HELLASWAG = """Cooking: A man boils [water. An egg] rice. he
1
eats  a pan.
drains it [step] well.
sleeps.
leaves."""


@pytest.fixture
def sets(tmp_path):
    files = {
        "piqa/valid.jsonl": json.dumps(PIQA),
        "piqa/valid-labels.lst": "1",
        "social_iqa/dev.jsonl": json.dumps(SIQA),
        "social_iqa/dev-labels.lst": "2",
        "arc_easy/ARC-Easy-Test.jsonl": json.dumps(ARC),
        "hellaswag/hellaswag_val_full.txt": HELLASWAG,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([text] * 7))
    return tmp_path


def test_items_have_the_prompts_of_the_harness(sets, tmp_path):
    items.write_items(sets, tmp_path / "items", 3)
    read = {name: read_file(tmp_path / "items" / f"{name}.jsonl", 1).items for name in items.SETS}
    assert {name: len(tasks) for name, tasks in read.items()} == dict.fromkeys(items.SETS, 3)
    first = {name: (item.prompt, item.answers) for name, (item, *_) in read.items()}
    assert first == {
        "piqa": ("Question: open a jar\nAnswer:", ("twist the jar and the lid",)),
        "social_iqa": ("Q: Kim ran. Why?\nA:", ("to be on time",)),
        "arc_easy": ("Question: What is hot?\nAnswer:", ("fire",)),
        "hellaswag": ("Cooking: A man boils rice. He", ("drains it well.",)),
    }
    names = [[item.name for item in tasks] for tasks in read.values()]
    assert len({name for of_set in names for name in of_set}) == 12
    items.write_items(sets, tmp_path / "again", 3)
    for name in items.SETS:
        paths = [tmp_path / directory / f"{name}.jsonl" for directory in ("items", "again")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_models_are_compared_item_by_item():
    rng = np.random.default_rng(0)
    baseline = rng.random(400) < 0.5
    better = baseline | (np.arange(400) < 40)
    gain = tables.difference(better, baseline)
    assert gain.points == pytest.approx(100 * (better.mean() - baseline.mean()))
    alone = tables.share(better)
    assert alone.around == pytest.approx(
        196 * (alone.points / 100 * (1 - alone.points / 100) / 399) ** 0.5
    )
    assert gain.around < alone.around / 2  # what both answer alike cancels


def test_every_model_was_asked_the_same_items():
    rows = tables.read_rows(tables.RESULTS / "answers.jsonl")
    files = {row["set"]: row["file"] for row in rows}
    assert files.keys() == tables.METRICS.keys()
    for row in rows:
        assert row["file"] == files[row["set"]]
        assert len(row["acc"]) == len(row["acc_norm"]) == 250
        assert set(row["acc"] + row["acc_norm"]) <= {"0", "1"}
