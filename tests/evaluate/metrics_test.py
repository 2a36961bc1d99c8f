"""Rows are replaced as a whole or not at all."""

import json

import pytest

from fope_jax.evaluate.metrics import read_rows, replace_rows


def write(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_replacing_keeps_the_rest_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": kind, "step": step} for step in (1, 2) for kind in "abc"])
    replaced = replace_rows(
        path, lambda row: row == {"kind": "b", "step": 2}, [{"kind": "new", "nats": 0.1}]
    )
    assert replaced == 1
    assert read_rows(path) == [
        {"kind": "a", "step": 1},
        {"kind": "b", "step": 1},
        {"kind": "c", "step": 1},
        {"kind": "a", "step": 2},
        {"kind": "c", "step": 2},
        {"kind": "new", "nats": 0.1},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_row_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": "a"}])
    with pytest.raises(TypeError):
        replace_rows(path, lambda row: True, [{"kind": object()}])
    assert read_rows(path) == [{"kind": "a"}]


def test_a_torn_last_line_is_left_out_and_any_other_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    write(path, [{"kind": "a"}], end='{"kind": "b", "st')
    assert read_rows(path) == [{"kind": "a"}]
    write(path, [{"kind": "a"}, [1, 2]])
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no JSON object: '\[1, 2\]"):
        read_rows(path)
