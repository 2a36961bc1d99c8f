"""The adapter under lm-evaluation-harness itself, on tasks from files made here.

Slow, and with a library that nothing else needs: pip install '.[harness]'.
"""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fope_jax.data.bos import Bos
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.evaluate.downstream.harness_tasks import (
    PAPER_TASKS,
    load_harness_tasks,
    score_harness_task,
)
from fope_jax.evaluate.downstream.metrics import classification, f1, rouge_l
from fope_jax.evaluate.harness import harness_model, load_text_model
from fope_jax.evaluate.text_model import TextModel, rolling_windows
from tests.evaluate.harness_test import Pieces

pytestmark = pytest.mark.slow

CONFIG = {
    "name": "fope",
    "seed": 4,
    "model": dict(vocab_size=259, d_model=16, num_layers=1, num_heads=2, mlp_dim=16, init_std=0.5),
    "position": {"method": "fope"},
    "data": {"corpus": "none", "tokenizer": "bytes", "tasks": ["recall=1"]},
    "train": dict(steps=1, batch_size=2, length=32, warmup_steps=1),
}

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """
task: local_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 7, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from fope_jax.config import build_experiment
    from fope_jax.train.loop import train

    workdir = tmp_path_factory.mktemp("runs") / "fope"
    train(build_experiment(CONFIG), workdir)
    return workdir


def test_tasks_of_every_kind_give_the_adapters_own_numbers(run, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = harness_model(run)

    class Ask:
        def __init__(self, *args):
            self.args = args

    docs = []
    for i, question in enumerate(("The sky is", "A longer question about the grass:", "One")):
        choices = [" blue", " green and yellow", " x"]
        scores = model.loglikelihood([Ask(question, choice) for choice in choices])
        best = int(np.argmax([total for total, _ in scores]))
        (written,) = model.generate_until([Ask(question, {"until": ["."], "max_gen_toks": 7})])
        docs.append(
            {
                "question": question,
                "choices": choices,
                "written": written,
                "gold": best if i else (best + 1) % 3,
            }
        )
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(path=data))
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=["local_choice", "local_rolling", "local_writing"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert results["local_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert results["local_writing"]["exact_match,none"] == 1.0
    questions = [doc["question"] for doc in docs]
    total = sum(model.loglikelihood_rolling([Ask(question) for question in questions]))
    bits = -total / math.log(2) / sum(len(question.encode()) for question in questions)
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    assert bits > 3


def test_tasks_and_groups_become_rows_of_their_items(run, tmp_path, monkeypatch):
    """Sums over items, also of all tasks of a group, are the means that the harness gives."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    random = np.random.default_rng(1)
    for name, count in (("choice", 7), ("other", 4)):
        docs = [
            {
                "question": f"Question {i}: ".ljust(12 + 3 * i),
                "choices": [" blue", " green and yellow", " x"],
                "gold": int(random.integers(3)),
            }
            for i in range(count)
        ]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        text = CHOICE.format(path=data).replace("local_choice", f"local_{name}")
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "group.yaml").write_text("group: both\ntask: [local_choice, local_other]\n")
    (tmp_path / "writing.yaml").write_text(
        WRITING.format(path=data).replace("{{written}}", "{{choices[gold]}}")
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    text_model = load_text_model(run)
    rows = {}
    for task in load_harness_tasks(["local_choice", "local_other", "both"], manager=manager):
        (rows[task.name],) = score_harness_task(text_model, task)
        assert json.loads(json.dumps(task.settings))["lm_eval"]
    expected = lm_eval.simple_evaluate(
        model=harness_model(run),
        tasks=["local_choice", "local_other"],
        task_manager=manager,
        bootstrap_iters=0,
    )["results"]
    assert rows["local_choice"]["total"] == 7 and rows["both"]["total"] == 11
    for metric in ("acc", "acc_norm"):
        sums = {name: row["scores"][metric] for name, row in rows.items()}
        for name in ("local_choice", "local_other"):
            mean = sums[name][0] / rows[name]["total"]
            assert mean == pytest.approx(expected[name][f"{metric},none"])
        assert sums["both"][0] == sums["local_choice"][0] + sums["local_other"][0]
        assert sums["both"][0] == sums["both"][1]  # scores of 0 and 1

    (first,) = load_harness_tasks(["local_choice"], most=2, manager=manager)
    (row,) = score_harness_task(dataclasses.replace(text_model, max_length=25), first)
    assert (row["total"], row["truncated"]) == (2, 2)  # one choice is too long in both
    (writing,) = load_harness_tasks(["local_writing"], manager=manager)
    with pytest.raises(ValueError, match="gives 'local_writing' none of acc, acc_norm"):
        score_harness_task(text_model, writing)
    (tmp_path / "other.jsonl").unlink()
    with pytest.raises(ValueError, match=r"cannot read its task 'local_other': .*HF_HOME"):
        load_harness_tasks(["local_other"], manager=manager)
    with pytest.raises(ValueError, match="cannot read its task 'nowhere'"):
        load_harness_tasks(["nowhere"], manager=manager)


def test_the_papers_tasks_are_known_to_the_harness():
    from lm_eval.tasks import TaskManager

    assert set(PAPER_TASKS) <= set(TaskManager().all_tasks)


def test_answers_are_scored_as_longbench_scores_them(monkeypatch):
    """By the copy of its metrics in the harness; two of its libraries are not needed for these."""
    for name in ("jieba", "fuzzywuzzy"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(fuzz=None))
    from lm_eval.tasks.longbench import metrics as theirs

    classes = ["City", "Other city", "State", "Date", "Number of something", "Other number"]
    text = "the a an City Other city State. Date Number of something 1828, river's x. .. ok"
    words = text.split()
    random, different = np.random.default_rng(2), set()
    for _ in range(400):
        one, other = (" ".join(random.choice(words, random.integers(0, 14))) for _ in range(2))
        name = str(random.choice(classes))
        for ours, their in (
            (f1(one, other), theirs.qa_f1_score(one, other)),
            (rouge_l(one, other), theirs.rouge_score(one, other)),
            (
                classification(classes)(one, name),
                theirs.classification_score(one, name, all_classes=classes),
            ),
        ):
            assert ours == their
            different.add(ours)
    assert len(different) > 100


def test_windows_are_those_of_the_harness():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = BytesTokenizer().encode("abcdefghijklmnopq")
    for length in (1, 2, 5, 16, 17, 30):
        theirs = [
            make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, 1, length, 1)
        ]
        assert [tuple(w) for w in rolling_windows(tokens, 1, length)] == [tuple(w) for w in theirs]


@pytest.mark.parametrize("added", [None, False, True])
def test_pairs_are_cut_where_the_harness_cuts_them(added):
    """But where a token spans the border: there it scores other tokens, or stops."""
    from lm_eval.api.model import TemplateLM

    pieces = Pieces("a", "b", "c", "ab", "bc", "abc", " a", " b", " ", "\n", "\n\n", "\na", "\t")
    bos = None if added is None else Bos("<s>", 1)

    class Theirs(TemplateLM):
        eot_token_id, prefix_token_id = 0, 0 if bos is None else bos.id

        def tok_encode(self, text, add_special_tokens=None):
            adds = added if add_special_tokens is None else add_special_tokens
            return [1] * bool(adds) + pieces.encode(text)

        def _loglikelihood_tokens(self, requests, **_):
            return [(context, target) for _, context, target in requests]

        def loglikelihood_rolling(self, *_): ...
        def generate_until(self, *_): ...

    ours = TextModel(None, None, pieces, max_length=None, bos=bos, add_bos=bool(added))
    random, same = np.random.default_rng(0), 0
    for _ in range(3000):
        context, target = (
            "".join(random.choice(list("abc \n\t"), random.integers(least, 6))) for least in (0, 1)
        )
        request = SimpleNamespace(args=(context, target))
        ((before, scored),) = Theirs().loglikelihood([request], disable_tqdm=True)
        mine = ours.encode_pair(context, target, "")
        whole = [1] * bool(added) + pieces.encode(context + target)
        if before and (not context or before + scored == whole):
            assert mine == (before, scored)
            same += 1
        assert mine[1]
    assert same > 1500
