"""A user's own file of items: what is read, and how each mistake in it is named."""

import json

import pytest

from fope_jax.evaluate.downstream.items import Item, read_file


def written(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = {"prompt": "Q: two plus two?\nA:", "answers": ["4", "four"]}


def test_items_are_read_in_order_with_their_names(tmp_path):
    path = written(tmp_path, GOOD, "", {**GOOD, "id": "b\u2028", "prompt": "line\u2028two"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\\u2028", b"\xe2\x80\xa8"))
    task = read_file(path, 7)
    assert task.items == (
        Item("1", GOOD["prompt"], ("4", "four")),
        Item("b\u2028", "line\u2028two", ("4", "four")),
    )
    assert (task.benchmark, task.name, task.count) == ("file", "own", 7)
    assert task.settings["items"] == 2 and task.settings["max_new_tokens"] == 7
    first = read_file(path, 7, most=1)
    assert len(first.items) == first.settings["items"] == 1
    path.write_text(json.dumps(GOOD))
    assert read_file(path, 7).settings["file"] != task.settings["file"]


def test_choices_have_their_right_ones_among_them(tmp_path):
    task = read_file(written(tmp_path, {**GOOD, "answers": ["4"], "choices": ["3", "4"]}), 7)
    assert task.items[0].choices == ("3", "4")
    assert "max_new_tokens" not in task.settings  # nothing is written
    letters = {**GOOD, "answers": ["A"], "choices": ["A", "B"]}
    assert read_file(written(tmp_path, letters), 7).items[0].answers == ("A",)


CHOICE = {"prompt": "Q", "answers": ["a"], "choices": ["a", "b"]}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([GOOD, '{"prompt": "cut o'], r"own.jsonl, line 2 is no JSON: .*; one object a line"),
        ([GOOD, "[1]"], r"own.jsonl, line 2 is no JSON object: \[1\]"),
        ([""], "own.jsonl is empty"),
        ([{"prompt": "x"}], r"line 1: 'answers' is None; accepted: a list of one text or more"),
        ([{**GOOD, "answers": "4"}], "line 1: 'answers' is '4'; accepted: a list of one"),
        ([{**GOOD, "answers": []}], r"'answers' is \[\]"),
        ([{**GOOD, "answers": [4]}], r"'answers' is \[4\]"),
        ([{**GOOD, "answers": [" "]}], r"'answers' is \[' '\]"),
        ([GOOD, {**GOOD, "prompt": 3}], "line 2: 'prompt' is 3; accepted: a text"),
        ([{**GOOD, "prompt": " "}], "'prompt' is empty"),
        ([{**GOOD, "answer": "4"}], "unknown key 'answer'; accepted: prompt, answers, choices"),
        ([{**GOOD, "answers": ["a\nb"]}], "has a line break"),
        ([GOOD, {**GOOD, "answers": ["4", "The"]}], "line 2: the answer 'The' is empty as scores"),
        ([{**CHOICE, "choices": ["a"]}], "accepted: a list of 2 texts or more"),
        ([{**CHOICE, "answers": ["c"]}], "the answer 'c' is none of 'choices'"),
        ([{**CHOICE, "answers": ["a", "b"]}], "every one of 'choices' is an answer"),
        ([CHOICE, GOOD], "line 2: 'choices' stand in every line or in none"),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path, rows, told):
    with pytest.raises(ValueError, match=told):
        read_file(written(tmp_path, *rows), 7)


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(ValueError, match="own.jsonl is an HTML page; fetch it again"):
        read_file(path, 7)
