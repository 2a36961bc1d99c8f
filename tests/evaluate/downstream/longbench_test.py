"""LongBench's published form: what is read, and how what is missing or wrong is named."""

import json

import pytest

from fope_jax.evaluate.downstream.longbench import DATA_SETS, read_longbench
from tests.evaluate.downstream import stand_in


def test_the_five_data_sets_of_table_1_are_read(tmp_path):
    tasks = {task.name: task for task in read_longbench(stand_in.write(tmp_path))}
    assert list(tasks) == ["gov_report", "multi_news", "trec", "triviaqa", "samsum"]
    first = tasks["trec"].items[0]
    assert first.prompt == "Of which kind is the question?\nw0 w1 w2\nQuestion 0?\nAnswer:"
    assert first.classes == tuple(stand_in.CLASSES) and first.answers == ("City",)
    assert (first.name, first.words) == ("trec-0", 1000)
    # As LongBench's pred.py and eval.py at 2e00731 have them.
    assert {name: task.count for name, task in tasks.items()} == {
        "gov_report": 512,
        "multi_news": 512,
        "trec": 64,
        "triviaqa": 32,
        "samsum": 128,
    }
    assert {n for n, task in tasks.items() if task.is_one_line} == {"trec", "triviaqa", "samsum"}
    assert [n for n, task in tasks.items() if task.ends_at_line_break] == ["samsum"]
    assert {n: list(task.metrics(task.items[0])) for n, task in tasks.items()} == {
        "gov_report": ["rouge_l"],
        "multi_news": ["rouge_l"],
        "trec": ["classification"],
        "triviaqa": ["f1"],
        "samsum": ["rouge_l"],
    }
    score = tasks["trec"].metrics(first)["classification"]
    assert score("City, not State", "City") == 1 / 2


def test_an_empty_answer_beside_others_is_no_mistake(tmp_path):
    stand_in.write(tmp_path, ["trec"])
    line = json.dumps(stand_in.row("trec", 0, answers=["", "City"]))
    (tmp_path / "data" / "trec_e.jsonl").write_text(line + "\n")
    assert read_longbench(tmp_path)[0].items[0].answers == ("", "City")


def test_balanced_files_come_before_the_others(tmp_path):
    stand_in.write(tmp_path, ["trec"], count=2)
    stand_in.write(tmp_path, ["trec"], count=3, end="")
    (task,) = read_longbench(tmp_path)
    assert len(task.items) == 2
    (tmp_path / "data" / "trec_e.jsonl").unlink()
    (task,) = read_longbench(tmp_path)
    assert len(task.items) == 3
    assert len(read_longbench(tmp_path, most=1)[0].items) == 1


def test_settings_follow_file_and_prompt(tmp_path):
    def settings(**changes):
        stand_in.write(tmp_path, ["trec"], **changes)
        return read_longbench(tmp_path)[0].settings

    before = settings()
    assert settings() == before
    assert settings(count=3)["file"] != before["file"]
    other = stand_in.PROMPTS | {"trec": "{context}{input}"}
    assert settings(prompts=other)["prompt"] != before["prompt"]


def test_what_is_left_out_or_not_official_is_said(tmp_path, caplog):
    read_longbench(stand_in.write(tmp_path, ["trec"]))
    assert "gov_report, multi_news, triviaqa, samsum not in" in caplog.text
    assert "the prompt of trec is not the one LongBench published" in caplog.text
    assert all(len(data_set.prompt) == 16 for data_set in DATA_SETS.values())


def test_missing_files_are_named_with_where_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not there; .* NAME_e.jsonl or NAME.jsonl"):
        read_longbench(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="has no data set; .* data.zip, unpacked, .* longbench=DIR"
    ):
        read_longbench(tmp_path)
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="data.zip is a file, no directory; accepted: a directory"):
        read_longbench(tmp_path / "data.zip")
    stand_in.write(tmp_path, ["trec"])
    (tmp_path / "config" / "dataset2prompt.json").unlink()
    with pytest.raises(ValueError, match="there is no dataset2prompt.json in .*LongBench/config"):
        read_longbench(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"answers": "City"}, "trec_e.jsonl, line 1: 'answers' is 'City'; accepted: a list"),
        ({"context": None}, "line 1: 'context' is None; accepted: a text"),
        ({"length": "long"}, "line 1: 'length' is 'long'; accepted: a number of words"),
        ({"all_classes": None}, "line 1: 'all_classes' is None"),
        ({"answers": ["Town"]}, r"line 1: 'answers' is \['Town'\], none of 'all_classes'"),
        ({"answers": ["", " "]}, r"line 1: 'answers' is \['', ' '\], empty"),
        ({"dataset": "samsum"}, "line 1: 'dataset' is 'samsum', in a file of 'trec'"),
    ],
)
def test_rows_of_another_form_are_named(tmp_path, changes, told):
    stand_in.write(tmp_path, ["trec"])
    line = json.dumps(stand_in.row("trec", 0, **changes))
    (tmp_path / "data" / "trec_e.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=told):
        read_longbench(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("no field", "the prompt of 'trec' has no {context}"),
        ("{context}{question}", "names something else than {context} and {input}: {question}"),
        ("{context.x}", "the prompt of 'trec' names something else .*: {context.x}"),
        ("{context[0]}", r"names something else .*: {context\[0\]}"),
        ("{context:.9}{input}", "names something else .*: {context:.9}"),
        ("{context} }", "the prompt of 'trec' cannot be filled: Single '}'"),
        (3, "'trec' is 3; accepted: a text"),
    ],
)
def test_prompts_without_their_fields_are_named(tmp_path, prompt, told):
    stand_in.write(tmp_path, ["trec"], prompts={"trec": prompt})
    with pytest.raises(ValueError, match=told):
        read_longbench(tmp_path)
