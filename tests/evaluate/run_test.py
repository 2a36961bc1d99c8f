"""Loading a run and running every protocol on it, with a cache in memory."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from fope_jax.config import ConfigError, build_experiment, experiment_to_dict
from fope_jax.config import evaluate as evaluate_config
from fope_jax.data.retrieval import PASSKEY_TEMPLATES
from fope_jax.data.retrieval.passkey import TEMPLATES
from fope_jax.data.tokenizers import BytesTokenizer, describe_tokenizer
from fope_jax.evaluate import protocols as protocols_module
from fope_jax.evaluate import run as run_module
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.progress import no_progress
from fope_jax.evaluate.restore import NonFiniteError, load_run
from fope_jax.evaluate.run import evaluate
from fope_jax.evaluate.run_data import RunData
from fope_jax.main import main
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore


class Bytes:
    vocab_size, fingerprint, eos_id, pad_id = 256, "bytes", 0, 0
    token_bytes = np.ones(256, np.int32)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(int(i) for i in ids).decode(errors="replace")

    def token_id(self, name):
        return {"<s>": 200, "</s>": 0}.get(name)


class Cache:
    tokenizer, fingerprint = Bytes(), "cache-1"

    def __init__(self):
        lengths = (500, 60, 300)
        self.stream = np.random.default_rng(0).integers(0, 256, sum(lengths)).astype(np.int32)
        self.documents = np.zeros(3, [("name", object), ("start", "i8"), ("length", "i8")])
        self.documents["name"] = ["Persuasion", "a note", "Macbeth"]
        self.documents["start"] = np.cumsum(lengths) - lengths
        self.documents["length"] = lengths

    def tokens(self, start, stop):
        return self.stream[start:stop]


CONFIG = {
    "name": "fope",
    "seed": 4,
    "model": dict(vocab_size=256, d_model=16, num_layers=2, num_heads=2, mlp_dim=32),
    "position": {"method": "fope"},
    "data": {
        "corpus": "text",
        "tokenizer": "bytes",
        "train_files": ["train.txt"],
        "validation_files": ["validation.txt"],
    },
    "train": dict(steps=10, batch_size=2, length=32),
    "evaluate": dict(
        lengths=(1, 2, 4),
        num_windows=9,
        position_windows=2,
        passkey_lengths=(4,),
        passkey_depths=(0.0, 1.0),
        passkey_trials=3,
        passkey_templates=("compact",),
        batch_tokens=256,
    ),
}


def changed(**sections):
    config = {key: dict(v) if isinstance(v, dict) else v for key, v in CONFIG.items()}
    for section, changes in sections.items():
        config[section] = changes if section == "position" else config[section] | changes
    return config


def new_model(config):
    experiment = build_experiment(config)
    return Transformer(experiment.model, experiment.position, rngs=nnx.Rngs(experiment.seed))


def position_hash(model):
    return checkpoint_fingerprint(model.position, model.config.shape, split(model)[2])[0].hash


@functools.cache
def drawn(config):
    """The position's hash and the arrays of one model, however many runs hold it."""
    model = new_model(CONFIG | json.loads(config))
    return position_hash(model), *split(model)[1:]


def save_run(workdir, config=CONFIG, steps=(7,), fingerprint=None, data="cache-1"):
    workdir.mkdir(exist_ok=True)
    experiment = build_experiment(config)
    (workdir / "config.json").write_text(json.dumps(experiment_to_dict(experiment)))
    (workdir / "run.json").write_text(json.dumps({"commit": "abc"}))
    (workdir / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 5.5}\n')
    of_model = {key: config[key] for key in ("seed", "model", "position", "train")}
    model_hash, params, constants = drawn(json.dumps(of_model))
    store = CheckpointStore(workdir / "checkpoints")
    metadata = {"position": fingerprint or model_hash, "data": data}
    for step in steps:
        store.save(step, {"params": params, "constants": constants, "optimizer": {}}, metadata)
    store.close()
    return workdir


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    cache = Cache()
    monkeypatch.setattr(RunData, "open", lambda self, split: cache)
    return cache


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def workdir(saved_once, tmp_path):
    """A run of its own, to be evaluated and changed."""
    return shutil.copytree(saved_once, tmp_path / "run")


def quiet(workdir, **arguments):
    return evaluate(workdir, **{"progress": no_progress, "say": lambda line: None} | arguments)


@pytest.fixture
def scored(monkeypatch):
    """Counts the protocols that are run, on a scorer that needs no compilation."""
    seen, run_protocol = [], run_module._run_protocol

    def scorer(tokens, targets, index=None):
        return (targets % 7).astype(np.float32), targets > 100

    def answerer(prompts, answers):
        return answers[:, -1], (answers % 7).astype(np.float32)

    monkeypatch.setattr(run_module, "model_scorer", lambda model, mesh: scorer)
    monkeypatch.setattr(run_module, "model_answerer", lambda model, mesh: answerer)
    monkeypatch.setattr(
        run_module, "_run_protocol", lambda p, *rest: (seen.append(p.label), run_protocol(p, *rest))
    )
    return seen


# ---------------------------------------------------------------------------- loading


def test_a_run_is_rebuilt_from_its_directory(workdir):
    loaded = load_run(workdir)
    assert (loaded.step, loaded.run_info) == (7, {"commit": "abc"})
    assert loaded.experiment == build_experiment(CONFIG)
    definition, *arrays = split(loaded.model)
    expected_definition, *expected = split(new_model(CONFIG))
    assert definition == expected_definition
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)


def test_another_position_embedding_than_the_trained_one_is_refused(tmp_path):
    workdir = save_run(tmp_path / "run", fingerprint="0123456789abcdef")
    told = r"fingerprint 0123456789abcdef \(no summary was kept\), but .* give [0-9a-f]{16} \(fope"
    with pytest.raises(CheckpointError, match=told):
        load_run(workdir)


def test_changed_constants_are_another_position_embedding(tmp_path):
    model = new_model(CONFIG)
    before = position_hash(model)
    graphdef, params, constants = split(model)
    name, array = next(iter(constants["position_layers"].items()))
    constants["position_layers"][name] = array.at[(0,) * array.ndim].add(1e-3)
    assert position_hash(merge(graphdef, params, constants)) != before


def test_a_checkpoint_of_another_model_is_refused(workdir):
    config = changed(model={"d_model": 32})
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        load_run(workdir)


def test_missing_parts_of_a_run_are_named(tmp_path, workdir):
    with pytest.raises(FileNotFoundError, match="nowhere is no run: there is no such directory"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="checkpoints/9 does not exist; there are: 7"):
        load_run(workdir, step=9)
    untrained = save_run(tmp_path / "untrained", steps=())
    for attempt in (load_run, quiet):
        with pytest.raises(FileNotFoundError, match="untrained has no valid checkpoint; train"):
            attempt(untrained)


# ---------------------------------------------------------------------------- evaluating


def test_every_protocol_writes_its_rows_with_the_same_ids(workdir):
    rows = quiet(workdir)
    ids = {"variant": "fope", "seed": 4, "step": 7, "training_length": 32}
    assert all(row.items() >= ids.items() for row in rows)
    kinds = [row["kind"] for row in rows]
    assert kinds.count("perplexity") == 3 * 2
    assert kinds.count("passkey") == 2
    assert kinds.count("protocol") == 3
    tokens = {
        c: sum(r["tokens"] for r in rows if r["kind"] == "perplexity" and r["context"] == c)
        for c in (32, 64, 128)
    }
    assert set(tokens.values()) == {9 * 16}
    buckets = [row["bucket"] for row in rows if row["kind"] == "position"]
    assert (buckets[0][0], buckets[-1][1]) == (0, 128)
    assert 32 in {start for start, _ in buckets}
    stated = next(row for row in rows if row.get("protocol") == "same-tokens" and "settings" in row)
    assert (stated["windows"], stated["too_short"], stated["too_short_names"]) == (9, 1, ["a note"])
    on_disk = read_rows(workdir / "metrics.jsonl")
    assert on_disk[0] == {"kind": "train", "step": 5, "loss": 5.5}
    phases = [row["phase"] for row in on_disk if row["kind"] == "time"]
    assert phases[0] == "evaluate: restore"
    assert len(phases) == 4


def test_a_second_evaluation_keeps_what_is_there_and_says_so(workdir, scored):
    first = quiet(workdir)
    text, lines = (workdir / "metrics.jsonl").read_text(), []
    assert len(scored) == 3
    assert quiet(workdir, say=lines.append) == first
    assert len(scored) == 3
    assert (workdir / "metrics.jsonl").read_text() == text
    assert len(lines) == 3
    assert all("rows for step 7 exist" in line for line in lines)


def test_forcing_replaces_rows_instead_of_adding_them(workdir, scored):
    first = quiet(workdir)
    size = len(read_rows(workdir / "metrics.jsonl"))
    assert quiet(workdir, force=True) == first
    assert len(scored) == 6
    assert len(read_rows(workdir / "metrics.jsonl")) == size


def test_other_settings_are_scored_again_and_only_those(workdir, scored):
    quiet(workdir)
    config = changed(evaluate={"num_windows": 5})
    (workdir / "config.json").write_text(json.dumps(config))
    rows = quiet(workdir)
    assert scored[3:] == ["same-tokens (validation)"]
    assert sum(r["tokens"] for r in rows if r["kind"] == "perplexity") == 3 * 5 * 16


def test_settings_can_be_changed_for_one_call(workdir, scored):
    kept, config, lines = quiet(workdir), (workdir / "config.json").read_text(), []
    rows = quiet(workdir, overrides=["--config.evaluate.num_windows=5"], say=lines.append)
    assert lines[2] == (
        "same-tokens (validation): its rows for step 7 give way to new ones: num_windows 9, now 5"
    )
    assert scored[3:] == ["same-tokens (validation)"]
    assert sum(r["tokens"] for r in rows if r["kind"] == "perplexity") == 3 * 5 * 16
    assert (workdir / "config.json").read_text() == config
    again = quiet(workdir)
    assert len(again) == len(kept)
    assert all(row in again for row in kept)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.length=64", "train.length=64: a trained run keeps its configuration; accepted: "),
        (
            "evaluate.num_window=5",
            "config.evaluate.num_window is unknown .nearest: evaluate.num_windows",
        ),
        ("evaluate.texts=blogs", "text 'blogs'; accepted: web, news, or NAME=GLOB"),
    ],
)
def test_settings_that_cannot_be_changed_are_refused(workdir, scored, override, told):
    with pytest.raises(ValueError, match=told):
        quiet(workdir, overrides=[override])
    assert not scored


def test_steps_are_kept_apart(tmp_path, scored):
    workdir = save_run(tmp_path / "run", steps=(3, 7))
    early = quiet(workdir, step=3)
    late = quiet(workdir)
    assert {row["step"] for row in early} == {3}
    assert {row["step"] for row in late} == {7}
    assert quiet(workdir, step=3) == early


def test_an_interrupted_evaluation_goes_on_where_it_stopped(workdir, scored):
    def interrupt(batches, desc):
        if desc.startswith("by position"):
            raise KeyboardInterrupt
        return batches

    with pytest.raises(KeyboardInterrupt):
        quiet(workdir, progress=interrupt)
    quiet(workdir)
    assert scored == [
        "same-tokens (validation)",
        "long-window (validation)",
        "long-window (validation)",
        "passkey (compact)",
    ]


def test_protocols_can_be_left_out(tmp_path):
    config = changed(evaluate=dict(num_windows=0, position_windows=0, passkey_templates=()))
    workdir = save_run(tmp_path / "run", config)
    assert quiet(workdir) == []


def test_all_protocols_run_by_name_and_the_rest_stays(workdir, scored):
    quiet(workdir, protocols=["chunks", "from-start"])
    assert scored == ["chunks (validation)", "from-start (validation)"]
    rows = quiet(workdir, protocols=["all"])
    assert scored[2:] == [
        "same-tokens (validation)",
        "sliding-window (validation)",
        "document-resets (validation)",
        "no-resets (validation)",
        "long-window (validation)",
        "passkey (compact)",
        "retrieval (recall)",
        "retrieval (recall_64_keys)",
        "retrieval (copy)",  # the others do not fit
    ]
    stated = {row["protocol"]: row for row in rows if row["kind"] == "protocol"}
    names = ("chunks", "from-start", *(name.split()[0] for name in scored[2:]))
    assert tuple(stated) == tuple(dict.fromkeys(names))
    assert set(stated) == set(protocols_module.PROTOCOLS)
    assert all(row["bos"].startswith("no BOS token is added") for row in stated.values())
    assert stated["sliding-window"]["settings"]["stride"] == 16
    assert (stated["document-resets"]["windows"], stated["from-start"]["windows"]) == (2, 2)
    assert all("document" in row for row in rows if row["kind"] in ("perplexity", "position"))


WITH_BOS = {"bos_token": "<s>", "add_bos_token": True}


@pytest.fixture
def first_tokens(monkeypatch):
    """The tokens that windows and prompts begin with, on models that need no compilation."""
    seen = set()

    def scorer(tokens, targets, index=None):
        seen.update(tokens[:, 0].tolist())
        return (targets % 7).astype(np.float32), targets > 100

    def answerer(prompts, answers):
        seen.update(prompts[:, 0].tolist())
        return answers[:, -1], (answers % 7).astype(np.float32)

    monkeypatch.setattr(run_module, "model_scorer", lambda model, mesh: scorer)
    monkeypatch.setattr(run_module, "model_answerer", lambda model, mesh: answerer)
    return seen


def test_every_protocol_follows_the_bos_token_of_the_run(tmp_path, first_tokens):
    workdir, lines = save_run(tmp_path / "run", changed(evaluate=WITH_BOS)), []
    rows = quiet(workdir, protocols=["all"], say=lines.append)
    assert first_tokens == {200}
    assert {row["bos_token"] for row in rows} == {"<s>"}
    stated = {row["protocol"]: row for row in rows if row["kind"] == "protocol"}
    assert set(stated) == set(protocols_module.PROTOCOLS)
    assert all(row["settings"]["bos_token"] == "<s>" for row in stated.values())
    assert stated["same-tokens"]["bos"] == (
        "every window begins with <s>, in place of its first token; it is read and not scored"
    )
    assert stated["from-start"]["bos"].startswith("every document is read after <s>")
    assert stated["passkey"]["bos"] == "every prompt begins with <s>"
    assert all(stated[line.split()[0]]["bos"] in line for line in lines)


@pytest.mark.slow
def test_the_other_choice_replaces_the_rows(tmp_path, first_tokens):
    workdir = save_run(tmp_path / "run")
    kept = quiet(workdir)
    assert not first_tokens <= {200} and not any("bos_token" in row for row in kept)
    first_tokens.clear()
    added = [f"--config.evaluate.{key}={value}" for key, value in WITH_BOS.items()]
    rows = quiet(workdir, overrides=added)
    assert first_tokens == {200} and len(rows) == len(kept)
    assert {row.get("bos_token") for row in rows} == {"<s>"}
    first_tokens.clear()
    quiet(workdir, overrides=added)
    assert not first_tokens  # they are there already
    again = quiet(workdir)
    assert [row for row in again if row not in kept] == []
    named = quiet(workdir, overrides=["evaluate.bos_token=<s>"])  # named, but not added
    assert named == again


@pytest.mark.parametrize(
    ("evaluate_settings", "told"),
    [
        ({"bos_token": "<bos>", "add_bos_token": True}, "bos_token = '<bos>' is no token of the"),
        ({"add_bos_token": True}, "add_bos_token = True; accepted: False where bos_token is None"),
    ],
)
def test_a_bos_token_that_is_none_is_named(workdir, first_tokens, evaluate_settings, told):
    added = [f"evaluate.{key}={value}" for key, value in evaluate_settings.items()]
    with pytest.raises(ValueError, match=told):
        quiet(workdir, overrides=added)
    assert not first_tokens


@pytest.mark.slow
def test_imports_of_before_bos_was_kept_are_told_of(workdir, first_tokens, caplog):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "run.json").write_text(json.dumps({"kept": {"bos_token_id": 1}}))
    quiet(workdir)
    assert "imported by an older version" not in caplog.text  # its configuration says
    for key in WITH_BOS:
        del config["evaluate"][key]
    (workdir / "config.json").write_text(json.dumps(config))
    quiet(workdir, force=True)
    assert f"{workdir}: its weights were imported by an older version" in caplog.text
    assert first_tokens != {200}
    caplog.clear()
    quiet(workdir, overrides=[f"evaluate.{key}={value}" for key, value in WITH_BOS.items()])
    assert not caplog.text


def test_what_cannot_run_is_an_error_by_name_and_a_warning_among_all(
    workdir, scored, cache, caplog
):
    cache.documents = cache.documents[:1]  # nothing meets
    told = "no two documents meet inside a block of 128 tokens"
    with pytest.raises(ValueError, match=told):
        quiet(workdir, protocols=["no-resets"])
    quiet(workdir, protocols=["all"])
    assert not any("resets" in name for name in scored)
    (warned,) = [record.message for record in caplog.records if told in record.message]
    assert warned.startswith("document-resets (validation), no-resets (validation): left out: no")
    assert len(scored) == 9


def test_wrong_answers_beyond_the_learned_table_are_found_before_any_work(
    tmp_path, cache, scored, caplog
):
    cache.tokenizer = BytesTokenizer()
    learned = {"method": "learned", "table_length": 1024}
    changes = {"retrieval_tasks": ("common_words",), "needle_haystack": "noise"}
    at = {"model": {"vocab_size": 259}, "position": learned, "train": {"length": 64}}
    stated = changed(**at, evaluate=changes | {"passkey_lengths": (8, 16)})
    told = "a context of 1024 tokens, and with wrong answers of 'common_words' 10.. are read"
    with pytest.raises(ValueError, match=told):
        quiet(save_run(tmp_path / "stated", stated), protocols=["retrieval"])
    assert not scored
    usual = changed(**at, evaluate=changes | {"passkey_lengths": (1, 2, 4, 8, 16)})
    rows = quiet(save_run(tmp_path / "unstated", usual), protocols=["retrieval"])
    assert scored == ["retrieval (common_words)"]
    assert {row["context"] for row in rows if row["kind"] == "retrieval"} == {256, 512}
    assert "1,024 tokens left out: passkey_lengths gives a context of" in caplog.text
    assert "with wrong answers of 'common_words'" in caplog.text


def test_windows_of_a_named_protocol_must_be_wanted(tmp_path):
    workdir = save_run(tmp_path / "run", changed(evaluate={"position_windows": 0}))
    message = r"chunks is asked for, but .* has evaluate.position_windows = 0, .*windows=16"
    with pytest.raises(ValueError, match=message):
        quiet(workdir, protocols=["chunks"])


def test_the_configuration_names_protocols_too(tmp_path, scored):
    workdir = save_run(
        tmp_path / "run", changed(evaluate={"protocols": ("sliding-window",), "stride": 7})
    )
    rows = quiet(workdir)
    assert scored == ["sliding-window (validation)"]
    assert {row["scored_per_window"] for row in rows if row["kind"] == "perplexity"} == {7}


def test_the_bar_of_the_command_line_shows_the_length(workdir, scored, capsys):
    evaluate(workdir)
    output = capsys.readouterr()
    assert "same tokens, context 128" in output.err
    assert "documents too short for them: 1" in output.out


def test_retrieval_tasks_are_protocols_of_their_own(tmp_path, cache, scored):
    cache.tokenizer, cache.num_tokens, cache.split = BytesTokenizer(), 860, "validation"
    changes = dict(
        num_windows=0,
        position_windows=0,
        passkey_trials=2,
        passkey_lengths=(8,),
        retrieval_tasks=("recall", "variable_tracking"),
    )
    config = changed(model={"vocab_size": 259}, evaluate=changes)
    rows = quiet(save_run(tmp_path / "run", config))
    assert scored == ["passkey (compact)", "retrieval (recall)", "retrieval (variable_tracking)"]
    recall, tracking = (
        [row for row in rows if row.get("task") == task and row["kind"] == "retrieval"]
        for task in ("recall", "variable_tracking")
    )
    assert [(row["context"], row["depth"], row["total"]) for row in recall] == [
        (256, 0.0, 2),
        (256, 1.0, 2),
    ]
    assert [(row["depth"], row["total"], row["asked"]) for row in tracking] == [(None, 4, 16)]
    stated = [row["settings"] for row in rows if row["kind"] == "protocol"]
    assert [s.get("haystack") for s in stated] == [None, None, "validation"]
    assert {s["half"] for s in stated} == {"test"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluate": {"lengths": (1, 32)}}, "takes 1025, and the longest of 3 documents has 500"),
        ({"evaluate": {"lengths": (0.3,)}}, "0.3 times train.length = 32 is 9.6 tokens: expected"),
        ({"evaluate": {"passkey_lengths": (1, 4)}}, "32 tokens, too short for 'passkey .compact.'"),
        (
            {"evaluate": {"protocols": ("sliding-window",), "stride": 33}},
            "stride is 33, accepted: 1 to the shortest context of 32 tokens",
        ),
        (
            {"evaluate": {"protocols": ("no-resets",), "lengths": (32,)}},
            "3 documents joined have 860 tokens, and a block of 1024 takes 1025",
        ),
        ({"evaluate": {"scored_tokens": 33}}, "33, more than the shortest context of 32 tokens"),
        (
            {"position": {"method": "learned", "table_length": 64}},
            "reach 128 tokens, but Learned is defined for at most 64; .* 32 up to 2",
        ),
        ({"model": {"vocab_size": 200}}, "tokenizer has 256 tokens but config.model.vocab_size"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_evaluated_is_named(tmp_path, sections, message):
    workdir = save_run(tmp_path / "run", changed(**sections))
    with pytest.raises(ValueError, match=message):
        quiet(workdir)
    assert not any(row["kind"] == "perplexity" for row in read_rows(workdir / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("protocol", "field", "value"),
    [("passkey", "passkey_templates", ()), ("passkey", "passkey_trials", 0)]
    + [("retrieval", "passkey_depths", ()), ("retrieval", "passkey_lengths", ())],
)
def test_a_protocol_asked_for_by_name_needs_trials(tmp_path, protocol, field, value):
    """Otherwise the answer is a table without rows."""
    workdir = save_run(tmp_path / "run", changed(evaluate={field: value}))
    shown = re.escape(str(value))
    message = f"protocol {protocol} is asked for, .*{field} = {shown}, .*--config.evaluate.{field}="
    with pytest.raises(ConfigError, match=message):
        quiet(workdir, protocols=[protocol])
    assert {row["kind"] for row in read_rows(workdir / "metrics.jsonl")} == {"train"}


def test_a_configuration_knows_the_names_of_protocols_and_templates():
    assert evaluate_config.PROTOCOLS == protocols_module.PROTOCOLS
    assert set(PASSKEY_TEMPLATES) == set(TEMPLATES)


def test_other_texts_are_scored_beside_the_splits(tmp_path, cache, scored):
    cache.tokenizer = BytesTokenizer()
    (tmp_path / "letters.txt").write_text("A letter, long enough for a window. " * 40)
    texts = (f"letters={tmp_path}/letters.txt",)
    changes = {
        "lengths": (0.5, 1, 1.5),
        "scored_tokens": 16,
        "texts": texts,
        "num_windows": 4,
        "position_windows": 0,
        "passkey_trials": 0,
    }
    workdir = save_run(tmp_path / "run", changed(model={"vocab_size": 259}, evaluate=changes))
    rows = quiet(workdir)
    assert {row["split"] for row in rows if row["kind"] == "perplexity"} == {
        "validation",
        "letters",
    }
    assert {row["context"] for row in rows if row["kind"] == "perplexity"} == {16, 32, 48}
    assert scored == ["same-tokens (validation)", "same-tokens (letters)"]


def test_texts_alone_need_no_token_cache(tmp_path, monkeypatch, scored):
    """As of imported weights, which else take the building of a corpus nobody asks about."""
    workdir = save_run(tmp_path / "run", changed(model={"vocab_size": 259}))
    info = {"tokenizer": describe_tokenizer(BytesTokenizer())}
    (workdir / "run.json").write_text(json.dumps(info))
    (tmp_path / "letters.txt").write_text("A letter, long enough for a window. " * 40)

    def no_cache(self, split):
        raise AssertionError(f"the cache of {split} is opened")

    monkeypatch.setattr(RunData, "open", no_cache)
    changes = ["evaluate.splits=", f"evaluate.texts=letters={tmp_path}/letters.txt"]
    changes += ["evaluate.passkey_lengths=16", "evaluate.retrieval_tasks=multi_key"]
    rows = quiet(workdir, overrides=changes, protocols=["same-tokens", "passkey", "retrieval"])
    assert {row["split"] for row in rows if row["kind"] == "perplexity"} == {"letters"}
    assert {"passkey (compact)", "retrieval (multi_key)"} < {*scored}


# ---------------------------------------------------------------------------- not finite


def break_weights(workdir, name="query", value=np.nan):
    """Another checkpoint, 8, with one bad weight."""
    config = json.loads((workdir / "config.json").read_text())
    _, params, constants = split(new_model(config))
    array = params["layers"][name]
    params["layers"][name] = array.at[(0,) * array.ndim].set(value)
    store = CheckpointStore(workdir / "checkpoints")
    metadata = {"position": position_hash(new_model(config)), "data": "cache-1"}
    store.save(8, {"params": params, "constants": constants, "optimizer": {}}, metadata)
    store.close()
    return workdir


@pytest.mark.fast("nan")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named_before_anything_is_scored(
    workdir, scored, capsys, value
):
    before = (break_weights(workdir, "up", value) / "metrics.jsonl").read_bytes()
    assert main(["evaluate", "--run", str(workdir), "--protocols", "all"]) == 2
    told = capsys.readouterr().err
    assert "run, step 8: weights that are not finite: layers.up (1 value); no score" in told
    assert "Traceback" not in told and not scored
    assert (workdir / "metrics.jsonl").read_bytes() == before
    quiet(workdir, step=7)
    assert len(scored) == 3


def overflowing(monkeypatch, where):
    """A model of finite weights that gives NaN, for windows that ``where`` finds."""

    def scorer(tokens, targets, index=None):
        bad = where(tokens)[:, None] & np.ones_like(targets, bool)
        return np.where(bad, np.nan, 1.0).astype(np.float32), ~bad

    def answerer(prompts, answers):
        bad = where(prompts)
        written = np.where(bad[:, None], -1, answers[:, 0])
        return written, np.where(bad[:, None, None], np.nan, answers % 7).astype(np.float32)

    monkeypatch.setattr(run_module, "model_scorer", lambda model, mesh: scorer)
    monkeypatch.setattr(run_module, "model_answerer", lambda model, mesh: answerer)


@pytest.mark.fast("same-tokens", "document-resets", "passkey")
@pytest.mark.parametrize("protocol", protocols_module.PROTOCOLS)
def test_documents_whose_scores_are_not_finite_are_named_in_every_protocol(
    tmp_path, cache, monkeypatch, protocol
):
    config = changed(evaluate={"retrieval_tasks": ("recall",)})
    workdir = save_run(tmp_path / "run", config)
    overflowing(monkeypatch, lambda tokens: np.full(len(tokens), tokens.shape[1] >= 64))
    before = read_rows(workdir / "metrics.jsonl")
    told = r"step 7: .*\): scores are not finite at context (64|128), d.*model.dtype = float32"
    with pytest.raises(NonFiniteError, match=told) as error:
        quiet(workdir, protocols=[protocol])
    if protocol in protocols_module.TEXT_PROTOCOLS:
        assert "document 'Persuasion'" in str(error.value)
    assert [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] != "time"] == before


@pytest.mark.slow
def test_rows_of_nan_that_an_earlier_version_wrote_are_scored_again(workdir, scored):
    rows = quiet(workdir)
    path = workdir / "metrics.jsonl"
    broken = [row | {"nats": np.nan} if row["kind"] == "passkey" else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in broken))
    assert quiet(workdir) == rows
    assert scored[3:] == ["passkey (compact)"]
