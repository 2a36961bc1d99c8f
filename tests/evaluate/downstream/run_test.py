"""`fope evaluate --tasks`: rows, what is kept, variants, answers, tables; on known programs."""

import json
import shutil

import numpy as np
import pytest

import fope_jax as fj
from fope_jax.command_line.report import runs_text
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.evaluate import run as run_module
from fope_jax.evaluate.downstream.harness_tasks import PAPER_TASKS
from fope_jax.evaluate.downstream.plan import RULER_TASKS, TaskRequest, read_tasks
from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.progress import no_progress
from fope_jax.evaluate.run import evaluate
from fope_jax.evaluate.text_model import RowPrograms
from fope_jax.extend.variants import make_variants
from fope_jax.main import main
from fope_jax.report.page import write_report
from fope_jax.report.rows import read_with_variants
from tests.evaluate import run_test
from tests.evaluate.downstream import stand_in
from tests.evaluate.harness_test import successor

BYTES = BytesTokenizer()
CONFIG = run_test.changed(model={"vocab_size": BYTES.vocab_size}, train={"length": 32})


def write_city(tokens, segments, count, not_first=()):
    text = [*BYTES.encode("City"), BYTES.eos_id] + [0] * count
    return np.tile(np.asarray(text[:count], np.int32), (len(tokens), 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = run_test.save_run(tmp_path_factory.mktemp("saved") / "run", CONFIG)
    trained = {"kind": "train", "step": 7, "tokens_seen": 448, "loss": 5.5}
    (workdir / "metrics.jsonl").write_text(json.dumps(trained) + "\n")
    return workdir


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_module, "row_programs", lambda model, mesh: RowPrograms(successor, write_city)
    )
    return shutil.copytree(saved, tmp_path / "run")


def ask(run, *names, say=lambda line: None, **arguments):
    request = {k: arguments.pop(k) for k in TaskRequest._fields if k in arguments}
    tasks = TaskRequest(names, **request)
    return evaluate(run, tasks=tasks, progress=no_progress, say=say, **arguments)


def own_file(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


QUESTION = {"prompt": "Where?", "answers": ["a city"]}


def test_in_python_a_row_is_a_metric_of_a_task(tmp_path, run, monkeypatch):
    path = own_file(tmp_path, QUESTION, {**QUESTION, "answers": ["no"], "id": "b"})
    table = fj.evaluate_tasks(run, str(path), positions=["same", "nope"]).set_index(
        ["method", "benchmark", "task", "metric"]
    )
    assert table.loc[("fope", "file", "own", "f1")].to_dict() == {
        "run": "fope",
        "seed": 4,
        "step": 7,
        "workdir": str(run),
        "words": None,
        "multiples": (0, 1),
        "score": 0.5,
        "standard_error": 0.5,
        "items": 2,
        "truncated": 0,
    }
    assert {*table.index.get_level_values("method")} == {"fope", "nope"}
    monkeypatch.setattr(run_test.RunData, "open", lambda self, split: run_test.Cache())
    monkeypatch.setattr(run_test.Cache, "tokenizer", BYTES)
    at_512 = {"passkey_lengths": (16,), "evaluate_needle_haystack": "noise"}
    ruler = fj.evaluate_tasks(run, "ruler", max_items=1, **at_512)
    assert {*ruler["benchmark"]} == {"ruler"} and {*ruler["multiples"]} == {(16.0, 16.0)}
    assert {*ruler["task"]} == {*RULER_TASKS} and (ruler["score"] == 0).all()
    assert (ruler["items"] >= 1).all() and {*ruler["metric"]} == {"accuracy"}
    with pytest.raises(ValueError, match="max_itms.*nearest: max_items"):
        fj.evaluate_tasks(run, str(path), max_itms=1)
    with pytest.raises(ValueError, match="--max-items 0; accepted: 1 or more") as raised:
        fj.evaluate_tasks(run, str(path), max_items=0)
    assert raised.value.__notes__ == ["--an-option is an_option=... in Python"]


def test_a_file_gives_rows_and_answers_and_is_kept_until_it_changes(tmp_path, run):
    path, said = own_file(tmp_path, QUESTION, {**QUESTION, "answers": ["no"], "id": "b"}), []
    rows = ask(run, str(path), say=said.append)
    scored = [row for row in rows if row["kind"] == "task"]
    assert len(scored) == 1
    shared = {"protocol": "file", "task": "own", "step": 7, "training_length": 32, "seed": 4}
    assert scored[0].items() >= shared.items()
    assert (scored[0]["total"], scored[0]["scores"]["f1"]) == (2, [1.0, 1.0])
    answers = [json.loads(line) for line in (run / "answers/7/file-own.jsonl").open()]
    assert [(a["_id"], a["pred"], a["scores"]["exact_match"]) for a in answers] == [
        ("1", "City", 1.0),
        ("b", "City", 0.0),
    ]
    assert ask(run, str(path), say=said.append) == rows
    assert "file (own): rows for step 7 exist" in said[-1]
    # Other numbers of items, lengths or contents are other settings; their rows replace these.
    for changes in ({"max_items": 1}, {"max_length": 40}, {"max_new_tokens": 9}):
        (row,) = [row for row in ask(run, str(path), **changes) if row["kind"] == "task"]
        assert row["total"] == changes.get("max_items", 2)
    own_file(tmp_path, {**QUESTION, "answers": ["no"]})
    (row,) = [row for row in ask(run, str(path)) if row["kind"] == "task"]
    assert (row["total"], row["scores"]["f1"]) == (1, [0.0, 0.0])
    kinds = [row["kind"] for row in read_rows(run / "metrics.jsonl")]
    assert (kinds.count("task"), kinds.count("protocol"), kinds.count("train")) == (1, 1, 1)


@pytest.mark.slow
def test_longbench_under_two_position_embeddings(tmp_path, run):
    stand_in.write(tmp_path / "longbench")
    variants = make_variants(run, 7, ["same", "nope"])
    rows = ask(run, f"longbench={tmp_path / 'longbench'}", variants=variants)
    scored = [row for row in rows if row["kind"] == "task"]
    assert {row["task"] for row in scored} == set(stand_in.PROMPTS)
    assert {(row["variant"], row.get("as")) for row in scored} == {
        ("fope", None),
        ("fope as nope", "nope"),
    }
    for label in (None, "nope"):
        of_trec = [r for r in scored if r["task"] == "trec" and r.get("as") == label]
        assert sum(r["total"] for r in of_trec) == 4
        assert sum(r["scores"]["classification"][0] for r in of_trec) == 4
    assert (run / "answers/7/longbench-trec.jsonl").is_file()
    assert (run / "answers/7 as nope/longbench-trec.jsonl").is_file()
    text = runs_text(read_with_variants(run))
    assert "longbench trec: classification (%), by words of context and question" in text
    assert "0-4k" in text and "8k+" in text and "fope as nope" in text
    assert "longbench trec: classification (%), by tokens of the prompt in training" in text
    page = write_report([run], tmp_path / "report").read_text()
    assert "Downstream tasks" in page and "longbench samsum" in page


def test_cut_prompts_are_in_the_table(tmp_path, run):
    path = own_file(tmp_path, {**QUESTION, "prompt": "x" * 100}, QUESTION)
    ask(run, str(path), max_length=60)
    text = runs_text(read_with_variants(run))
    assert "1 of 2 prompts lost their middle (longest 60 tokens)" in " ".join(text.split())


def test_ruler_is_the_retrieval_tasks_after_it(run, monkeypatch):
    seen = []
    monkeypatch.setattr(run_module, "_run_protocol", lambda p, *rest: seen.append(p))
    override = ["evaluate.needle_haystack=noise", "evaluate.passkey_lengths=16,32"]
    monkeypatch.setattr(run_test.RunData, "open", lambda self, split: run_test.Cache())
    monkeypatch.setattr(run_test.Cache, "tokenizer", BYTES)
    ask(run, "ruler", overrides=override)
    assert [(p.kind, p.identity["task"]) for p in seen] == [("retrieval", t) for t in RULER_TASKS]
    assert set(RULER_TASKS) >= {"multi_key", "multi_value", "multi_query", "variable_tracking"}
    assert all(p.settings["contexts"] == [512, 1024] for p in seen)
    with pytest.raises(ValueError, match="--tasks ruler: evaluate.passkey_trials or .* is empty"):
        ask(run, "ruler", overrides=["evaluate.passkey_trials=0"])


def test_ruler_has_at_most_the_asked_items_and_length(run, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr(run_module, "_run_protocol", lambda p, *rest: seen.append(p))
    monkeypatch.setattr(run_test.RunData, "open", lambda self, split: run_test.Cache())
    monkeypatch.setattr(run_test.Cache, "tokenizer", BYTES)
    override = ["evaluate.needle_haystack=noise", "evaluate.passkey_lengths=16,32"]
    ask(run, "ruler", overrides=override, max_items=3, max_length=600)
    assert {(*p.settings["contexts"], p.settings["trials"]) for p in seen} == {(512, 3)}
    assert "--tasks ruler: 1,024 tokens are left out, longer than --max-length 600" in caplog.text
    ask(run, "ruler", overrides=[*override, "evaluate.passkey_trials=2"], max_items=3)
    assert seen[-1].settings["trials"] == 2
    with pytest.raises(
        ValueError, match="--max-length 99: the shortest of --tasks ruler is of 512"
    ):
        ask(run, "ruler", overrides=override, max_length=99)


def test_a_task_of_ruler_and_of_the_retrieval_protocol_is_scored_once(run, monkeypatch):
    seen = []
    monkeypatch.setattr(run_module, "_run_protocol", lambda p, *rest: seen.append(p.label))
    monkeypatch.setattr(run_test.RunData, "open", lambda self, split: run_test.Cache())
    monkeypatch.setattr(run_test.Cache, "tokenizer", BYTES)
    override = ["evaluate.needle_haystack=noise", "evaluate.passkey_lengths=16"]
    override += ["evaluate.retrieval_tasks=multi_key,recall", "evaluate.passkey_trials=20"]
    ask(run, "ruler", overrides=override, protocols=("retrieval",))
    assert len(seen) == len({*seen}) == len({*RULER_TASKS, "recall"})
    told = r"retrieval \(multi_key\) is asked for by .* with trials 20 and 3"
    with pytest.raises(ValueError, match=told):
        ask(run, "ruler", overrides=override, protocols=("retrieval",), max_items=3)


def test_tasks_come_in_place_of_protocols_unless_these_are_named(tmp_path, run, monkeypatch):
    seen = []
    monkeypatch.setattr(run_module, "_run_protocol", lambda p, *rest: seen.append(p.label))
    monkeypatch.setattr(run_test.RunData, "open", lambda self, split: run_test.Cache())
    monkeypatch.setattr(run_test.Cache, "tokenizer", BYTES)
    path = str(own_file(tmp_path, QUESTION))
    ask(run, path)
    ask(run, path, protocols=("chunks",))
    assert seen == ["file (own)", "chunks (validation)", "file (own)"]


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tasks", "longbemch"], "no such file; did you mean 'longbench'?; accepted: longbench"),
        (["--tasks", "none.jsonl"], "--tasks none.jsonl: no such file; accepted: longbench, ruler"),
        (["--tasks", "longbench=nowhere"], "LongBench: nowhere is not there"),
        (["--tasks", "ruler", "--max-items", "0"], "--max-items 0; accepted: 1 or more"),
        (["--max-length", "9"], "--max-length 9 is of --tasks"),
        (["--tasks", "OWN,OWN"], "two tasks 'own'"),
        (["--tasks", "OWN", "--max-length", "33"], "32 tokens to write leave no room"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_is_read(
    tmp_path, run, monkeypatch, capsys, options, told
):
    monkeypatch.setattr(run_module, "load_run", None)
    path = str(own_file(tmp_path, QUESTION))
    options = [option.replace("OWN", path) for option in options]
    assert main(["evaluate", str(run), *options]) == 2
    assert told in capsys.readouterr().err


def test_without_their_libraries_benchmarks_say_the_pip_line(tmp_path, monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "rouge", None)
    monkeypatch.setitem(modules, "lm_eval", None)
    stand_in.write(tmp_path)
    with pytest.raises(ImportError, match=r"rouge is not installed.* pip install '.\[downstream\]"):
        read_tasks(TaskRequest([f"longbench={tmp_path}"]))
    with pytest.raises(ImportError, match=r"lm_eval is not installed.* pip install '.\[harness\]"):
        read_tasks(TaskRequest(["paper"]))
    assert "mmlu_stem" in PAPER_TASKS and "arc_easy" in PAPER_TASKS
