"""The day of a user with text and a tokenizer of their own, and what goes wrong in it."""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from fope_jax.config import build_experiment, experiment_to_dict
from fope_jax.data.build import build
from fope_jax.data.cache_directories import base_directory, cache_directory, find_cache
from fope_jax.data.description import changed_text
from fope_jax.data.manifest import CacheError
from fope_jax.data.tokenizers import JsonTokenizer
from fope_jax.evaluate import protocol_plan
from fope_jax.evaluate.harness import load_text_model
from fope_jax.evaluate.progress import no_progress
from fope_jax.evaluate.protocol_plan import plan_protocols, unstated_settings
from fope_jax.evaluate.restore import read_experiment
from fope_jax.evaluate.run import evaluate
from fope_jax.evaluate.run_data import find_run_data, load_run_tokenizer
from fope_jax.extend import run as extend_run
from fope_jax.extend.child import child_experiment
from fope_jax.extend.parent import open_parent
from fope_jax.main import main
from fope_jax.storage.run_paths import RUN

pytestmark = pytest.mark.usefixtures("compile_once")
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({
        "name": "own", "seed": 0,
        "data": {"corpus": "text", "tokenizer": "tokenizer.json", "train_files": ("notes/*.txt",),
                 "validation_files": ("held_out/*.txt",)},
        "model": {"vocab_size": 400, "d_model": 8, "num_layers": 1, "num_heads": 1, "mlp_dim": 8,
                  "attention": "reference"},
        "position": {"method": "rope"},
        "train": {"steps": 1, "batch_size": 2, "length": 32, "learning_rate": 1e-2,
                  "warmup_steps": 0, "evaluate_every": None},
        "evaluate": {"num_windows": 2, "position_windows": 1, "passkey_trials": 1,
                     "passkey_depths": (0.5,)},
    })
"""
CONTEXTS = (32, 64, 128, 256, 512)
SHORT = ("--config.evaluate.passkey_trials=0", "--config.evaluate.position_windows=0")


def make_tokenizer(path, special="</s>"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=271, initial_alphabet=alphabet, special_tokens=[special], show_progress=False
    )
    tokenizer.train_from_iterator(["the whale and the sea"], trainer)
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A directory with notes, held-out notes of at most 200 tokens, and a tokenizer; a run."""
    desk, here = tmp_path_factory.mktemp("desk"), os.getcwd()
    for name, words in (("notes/a", 300), ("notes/b", 200), ("held_out/c", 60)):
        path = desk / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{i} whale, the sea. " for i in range(words // 4)))
    make_tokenizer(desk / "tokenizer.json")
    (desk / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (desk / "own.py").write_text(CONFIG)
    os.chdir(desk)
    try:
        assert main(["data", "build", "--config", "own.py"]) == 0
        assert main(["train", "--config", "own.py", "--workdir", "runs/a"]) == 0
    finally:
        os.chdir(here)
    return desk


@pytest.fixture
def own(desk, tmp_path, monkeypatch):
    """A copy of it, to work in; the run still names the cache of the original."""
    copy = tmp_path / "desk"
    shutil.copytree(desk, copy)
    monkeypatch.chdir(copy)
    return copy


def measure(run, *overrides, **arguments):
    return evaluate(run, overrides=overrides, progress=no_progress, say=lambda _: None, **arguments)


def nats(rows):
    return {(row["protocol"], row["context"]): row["nats"] for row in rows if "nats" in row}


# ---------------------------------------------------------------------------- what a run owns


def test_a_run_keeps_its_tokenizer(own):
    run = json.loads((own / "runs/a/run.json").read_text())
    original = JsonTokenizer.load(own / "tokenizer.json")
    assert run["tokenizer"]["fingerprint"] == original.fingerprint
    assert (own / "runs/a/tokenizer_config.json").is_file()
    shutil.rmtree(own / "data_cache")
    (own / "tokenizer.json").unlink()
    data = read_experiment(Path("runs/a")).data
    assert load_run_tokenizer("runs/a", data).encode("the sea") == original.encode("the sea")
    assert load_text_model("runs/a").tokenizer.fingerprint == original.fingerprint
    (own / "runs/a/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"runs/a/tokenizer\.json is damaged"):
        load_run_tokenizer("runs/a", data)


@pytest.fixture
def moved(own, tmp_path):
    """As imported weights in another place: no recorded cache, and a tokenizer path of before."""
    config, info = (json.loads((own / "runs/a" / n).read_text()) for n in ("config.json", RUN))
    config["data"]["tokenizer"] = str(tmp_path / "before/tokenizer.json")
    del info["data"]
    (own / "runs/a/config.json").write_text(json.dumps(config))
    (own / "runs/a" / RUN).write_text(json.dumps(info))
    return own / "runs/a"


def test_a_moved_run_reads_its_own_tokenizer_and_the_cache_of_an_equal_one(moved, capsys):
    names = sorted(path.name for path in Path("data_cache").iterdir() if path.is_dir())
    assert measure(moved, protocols=["same-tokens"])
    assert main(["data", "build", "--config", str(moved / "config.json")]) == 0
    assert "(built before)" in capsys.readouterr().err
    assert sorted(path.name for path in Path("data_cache").iterdir() if path.is_dir()) == names
    data = dataclasses.replace(read_experiment(moved).data, tokenizer=str(moved / "other.json"))
    assert find_cache(data)[1] is None
    make_tokenizer(moved / "other.json", special="<end>")
    assert find_cache(data)[1] is None
    (moved / "other.json").write_bytes((moved / "tokenizer.json").read_bytes())
    assert find_cache(data)[0].name == names[0]
    assert find_cache(dataclasses.replace(data, max_documents=1))[1] is None


def test_a_moved_run_builds_with_its_own_tokenizer(moved):
    shutil.rmtree("data_cache")
    assert main(["data", "build", "--config", str(moved / "config.json")]) == 0
    assert measure(moved, protocols=["same-tokens"])


def test_a_run_of_an_older_version_reads_the_tokenizer_of_its_cache(own):
    (own / "runs/a/tokenizer.json").unlink()
    info = json.loads((own / "runs/a/run.json").read_text())
    del info["tokenizer"], info["cache_dir"]
    (own / "runs/a/run.json").write_text(json.dumps(info))
    data = read_experiment(Path("runs/a")).data
    assert load_run_tokenizer("runs/a", data).vocab_size == 271
    assert measure("runs/a", protocols=["same-tokens"])


@pytest.mark.slow  # trains three times
def test_rebuilding_leaves_finished_runs_valid(own, caplog, capsys):
    """Evaluated, extended and trained on, each on the text of its beginning."""
    before = nats(measure("runs/a", *SHORT))
    config = read_experiment(Path("runs/a")).data
    old = cache_directory(config)
    (own / "notes/a.txt").write_text("quite another text, " * 60)
    with caplog.at_level(logging.WARNING, "fope_jax"):
        assert main(["train", "--config", "own.py", "--workdir", "runs/stale"]) == 0
    said = capsys.readouterr().err
    assert "the text has changed since this token cache was built (1: notes/a.txt)" in said
    assert main(["data", "build", "--config", "own.py"]) == 0
    assert "building another cache beside it; runs that" in capsys.readouterr().err
    new = cache_directory(config)
    assert new != old and old.is_dir()

    assert nats(measure("runs/a", *SHORT, force=True)) == before
    assert find_run_data("runs/a", config).open("train").directory == old
    assert main(["train", "--config", "own.py", "--workdir", "runs/b"]) == 0
    assert f"token cache: {new}" in capsys.readouterr().err
    assert find_run_data("runs/b", config).open("train").directory == new
    parent = open_parent("runs/a")
    child = child_experiment(parent.experiment, parent.step, "same", 64)
    assert extend_run._find_data(parent, child, Path("runs/c")).open("train").directory == old
    assert main(["train", "--workdir", "runs/a", "--continue-for", "1"]) == 0
    assert f"token cache: {old}, " in capsys.readouterr().err
    assert find_run_data("runs/a", config).open("train").directory == old

    assert main(["data", "inspect", "--config", "own.py"]) == 0
    listed = capsys.readouterr().out
    assert f"* {new.name}" in listed and f"  {old.name}" in listed and "rm -r" in listed


def test_a_cache_is_found_from_any_directory(own, tmp_path, monkeypatch):
    """From elsewhere, by the directory that the run recorded; moved, by the override."""
    info = json.loads((own / "runs/a/run.json").read_text())
    info["cache_dir"] = str(own / "data_cache")
    (own / "runs/a/run.json").write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    assert measure(own / "runs/a", protocols=["same-tokens"])
    (own / "data_cache").rename(tmp_path / "moved")
    with pytest.raises(CacheError) as caught:
        measure(own / "runs/a")
    message = str(caught.value)
    assert f"is not in {tmp_path}/data_cache nor in {own}/data_cache." in message
    assert "moved to: --config.data.cache_dir=DIR" in message
    assert f"fope data build --config {own}/runs/a/config.json" in message
    with pytest.raises(CacheError, match=r"is not in .*/nowhere\."):
        measure(own / "runs/a", "data.cache_dir=nowhere")
    measure(own / "runs/a", "data.cache_dir=moved", protocols=["same-tokens"])
    assert measure(own / "runs/a", protocols=["same-tokens"])  # run.json keeps it
    assert json.loads((own / "runs/a/config.json").read_text())["data"]["cache_dir"] == "data_cache"


def test_another_text_in_its_place_is_said(own):
    (own / "notes/a.txt").write_text("quite another text, " * 60)
    shutil.rmtree(own / "data_cache")
    assert main(["data", "build", "--config", "own.py"]) == 0
    info = json.loads((own / "runs/a/run.json").read_text())
    del info["cache_dir"]
    (own / "runs/a/run.json").write_text(json.dumps(info))
    with pytest.raises(CacheError, match="the one there has [0-9a-f]{64}: its corpus or tokenizer"):
        measure("runs/a")


def test_text_is_said_to_change_only_where_it_does(own):
    """What is trained with may be gone: the tokenizer's file, a package of books."""
    config = read_experiment(Path("runs/a")).data
    cache = find_run_data("runs/a", config).open("train")
    assert changed_text(config, cache.sources) == []
    gone = [
        {"corpus": "tokenizer", "path": "/gone/tokenizer.json", "sha256": "0"},
        {"corpus": "gutenberg", "path": "/gone/books.whl", "sha256": "0"},
    ]
    assert changed_text(config, [*cache.sources, *gone]) == []
    (own / "notes/a.txt").unlink()
    assert changed_text(config, cache.sources) == ["notes/a.txt"]


def test_weights_without_a_cache_name_the_command_that_builds_it(own):
    shutil.rmtree(own / "data_cache")
    for name in ("cache_dir", "data"):
        info = json.loads((own / "runs/a/run.json").read_text())
        del info[name]
        (own / "runs/a/run.json").write_text(json.dumps(info))
    data = find_run_data("runs/a", read_experiment(Path("runs/a")).data)
    with pytest.raises(CacheError, match="build it: fope data build --config runs/a/config.json"):
        data.open("train")


def test_another_tokenizer_in_its_place_is_said(own, caplog):
    make_tokenizer(own / "tokenizer.json", special="<|endoftext|>")
    measure("runs/a", *SHORT)
    told = "data.tokenizer = 'tokenizer.json' has changed since runs/a was trained; the run's own"
    assert told in caplog.text


def test_a_run_goes_on_where_its_tokenizer_lies_elsewhere(own, capsys):
    """By its content: the path alone may not decide, and another tokenizer is refused."""
    (own / "moved").mkdir()
    shutil.move(own / "tokenizer.json", own / "moved/bpe.json")
    train = ["train", "--config", "own.py", "--workdir", "runs/a"]
    moved = "--config.data.tokenizer=moved/bpe.json"
    config = build_experiment(json.loads((own / "runs/a/config.json").read_text()))
    assert main([*train, moved]) == 0
    assert main(["train", "--workdir", "runs/a", "--continue-for", "1", moved]) == 0
    assert "trained 2 steps" in capsys.readouterr().err
    make_tokenizer(own / "moved/bpe.json", special="<|endoftext|>")
    (own / "runs/a/config.json").write_text(
        json.dumps(experiment_to_dict(config))  # of the beginning: tokenizer.json
    )
    assert main([*train, moved]) == 2
    assert "data.tokenizer: 'tokenizer.json', now 'moved/bpe.json'" in capsys.readouterr().err


def test_caches_of_older_versions_stay_valid(own, capsys):
    config = read_experiment(Path("runs/a")).data
    base = base_directory(config)
    cache_directory(config).rename(base)
    base.with_name(f"{base.name}.current.json").unlink()
    assert measure("runs/a", protocols=["same-tokens"])
    assert build(config)["train"].directory.name == base.name
    assert capsys.readouterr().err.count("(built before)") == 2
    (own / "notes/a.txt").write_text("quite another text, " * 60)
    assert build(config)["train"].directory != base
    assert measure("runs/a", protocols=["same-tokens"], force=True)


def test_text_that_comes_back_has_its_cache(own, capsys):
    config, before = read_experiment(Path("runs/a")).data, (own / "notes/a.txt").read_text()
    first = cache_directory(config)
    for text in ("quite another text, " * 60, before):
        (own / "notes/a.txt").write_text(text)
        build(config)
    assert cache_directory(config) == first
    assert capsys.readouterr().err.count("(built before)") == 2
    pointer = base_directory(config).with_name(f"{base_directory(config).name}.current.json")
    pointer.write_text('{"directory": "../elsewhere"}')
    with pytest.raises(
        CacheError, match=r"current\.json is damaged: .* run `fope data build` again"
    ):
        cache_directory(config)
    build(config)
    assert cache_directory(config) == first
    pointer.unlink()
    with pytest.raises(
        CacheError, match=r"current\.json is missing, .* built last: text-tokenizer"
    ):
        cache_directory(config)


# ---------------------------------------------------------------------------- what does not fit


def plan(*wanted, **sections):
    return {protocol.label: protocol.settings for protocol in planned(*wanted, **sections)}


def planned(*wanted, unstated=None, **sections):
    values = experiment_to_dict(read_experiment(Path("runs/a")))
    for section, changes in sections.items():
        values[section] = changes if section == "position" else values[section] | changes
    experiment = build_experiment(values)
    data = find_run_data("runs/a", experiment.data)
    return plan_protocols(experiment, data, wanted or None, unstated)


def test_what_does_not_fit_the_text_is_left_out_with_a_line(own, caplog):
    """Lengths that no document reaches, and passkeys in windows that have no room for them."""
    planned = plan()
    assert planned["same-tokens (validation)"]["contexts"] == [32, 64]
    assert planned["long-window (validation)"]["context"] == 64
    assert planned["passkey (compact)"]["contexts"] == [64, 128, 256, 512]
    assert planned["passkey (standard)"]["contexts"] == [256, 512]
    for told in (
        "same-tokens (validation), long-window (validation): 128, 256, 512 tokens left out: "
        "no document is long enough for a window of 512 tokens: that takes 513, and the longest "
        "of 1 documents has 111; ",
        "passkey (compact): 32 tokens left out: passkey_lengths gives a context of 32 tokens, "
        "too short for 'passkey (compact)', which takes at least ",
    ):
        assert any(record.message.startswith(told) for record in caplog.records), caplog.text


def test_default_lengths_beyond_the_position_embedding_are_left_out(own, caplog):
    learned = {"method": "learned", "table_length": 40}
    planned = plan("same-tokens", position=learned)
    assert planned.keys() == {"same-tokens (validation)"}
    assert planned["same-tokens (validation)"]["contexts"] == [32]
    told = "evaluate.lengths: 64, 128, 256, 512 tokens are left out: Learned is defined for at mos"
    assert told in caplog.text
    with pytest.raises(ValueError, match="evaluate.lengths reach 64 tokens, but Learned is defin"):
        plan("same-tokens", position=learned, evaluate={"lengths": (1, 2)})


def test_lengths_that_look_like_tokens_are_warned_of(own, caplog):
    (planned,) = plan("same-tokens", evaluate={"lengths": (1, 2)}).values()
    assert planned["contexts"] == [32, 64] and "count training lengths" not in caplog.text
    plan("passkey", evaluate={"passkey_lengths": (8, 64)})
    told = "evaluate.passkey_lengths = 64 count training lengths, not tokens: of 32 tokens each, "
    assert f"{told}up to 2,048 tokens" in caplog.text


def test_an_extension_did_not_state_the_lengths_that_it_derived(own):
    """Of twice the length: half of the default ones. Stated by a run of its own they count."""
    derived = {"lengths": (1, 2, 4, 8), "passkey_trials": 0}
    settings = build_experiment(
        experiment_to_dict(read_experiment(Path("runs/a"))) | {"evaluate": derived}
    ).evaluate
    unstated = unstated_settings(settings, is_extension=True)
    planned = plan("same-tokens", unstated=unstated, evaluate=derived)
    assert planned["same-tokens (validation)"]["contexts"] == [32, 64]
    with pytest.raises(ValueError, match="no document is long enough for a window of 256"):
        plan("same-tokens", evaluate=derived)


def test_retrieval_tasks_hide_needles_in_own_text_where_it_has_room(own, caplog):
    planned = plan("retrieval")
    assert planned["retrieval (recall)"]["contexts"] == list(CONTEXTS)
    fitting = ("recall", "recall_64_keys", "copy")
    assert planned.keys() == {f"retrieval ({name})" for name in fitting}
    told = "left out: a haystack of 128 tokens is not in the validation split, which has 111; "
    assert told in caplog.text and "take --config.evaluate.needle_haystack=noise" in caplog.text


def test_the_trial_seed_draws_other_trials(own, monkeypatch):
    drawn = []

    def keep(answerer, task, tokenizer, grid, **_):
        drawn.append([grid.draw(task, n, 64).tokens.tolist() for n in range(grid.count)])
        return []

    monkeypatch.setattr(protocol_plan, "score_task", keep)
    for seed in (0, 0, 5):
        recall, *_ = planned("retrieval", evaluate={"trial_seed": seed})
        assert recall.label == "retrieval (recall)"
        assert recall.settings["seed"] == seed
        recall.run(None, None)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("overrides", "protocols", "message"),
    [
        (["evaluate.lengths=1,16"], None, "no document is long enough for a window of 512"),
        (["evaluate.lengths=1,2,4,8,16"], None, "no document is long enough for a window of 512"),
        (["evaluate.passkey_lengths=1"], None, "32 tokens, too short for 'passkey"),
        (["evaluate.retrieval_tasks=common_words"], None, "haystack of 128 tokens is not in the"),
        ([], ["document-resets"], "no two documents meet inside a block"),
    ],
)
def test_what_is_asked_for_by_name_and_does_not_fit_is_an_error(own, overrides, protocols, message):
    with pytest.raises(ValueError, match=message):
        measure("runs/a", *overrides, protocols=protocols)


# ---------------------------------------------------------------------------- common mistakes


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


NOTES = "--config.data.train_files="
MISTAKES = {
    "a wrong glob": (
        lambda own: None,
        [f"{NOTES}nots/*.txt"],
        "train_files: 'nots/*.txt' matches no file (working directory ",
    ),
    "a relative path from elsewhere": (
        lambda own: os.chdir(own / "runs"),
        ["--config.data.tokenizer=bytes"],
        "runs); name files that are there, as in 'DIRECTORY/*.txt'",
    ),
    "an empty file": (
        lambda own: [write(own / f"notes/{name}.txt", "") for name in "ab"],
        [],
        "the train split of corpus 'text' is empty: 2 documents, none with text",
    ),
    "one file in both": (
        lambda own: None,
        [f"{NOTES}*/*.txt"],
        "held_out/c.txt is matched by both train_files = ['*/*.txt'] and validation_files = [",
    ),
    "one text in both": (
        lambda own: shutil.copy(own / "notes/a.txt", own / "held_out/copy.txt"),
        [],
        "validation file held_out/copy.txt has the same content as training file notes/a.txt",
    ),
    "no field text": (
        lambda own: write(own / "notes/c.jsonl", '{"body": "a"}\n'),
        [f"{NOTES}notes/*.jsonl"],
        "notes/c.jsonl:1 has no string field 'text': it is an object with keys ['body']",
    ),
    "parquet": (
        lambda own: write(own / "notes/c.parquet", b"PAR1"),
        [f"{NOTES}notes/*"],
        "notes/c.parquet is not a complete Parquet file",
    ),
    "a table": (
        lambda own: write(own / "notes/c.csv", b"text"),
        [f"{NOTES}notes/*"],
        "c.csv is neither .txt, .jsonl, .json, one of these with .gz, nor .parquet; pandas.read_c",
    ),
    "an ending in capitals": (
        lambda own: write(own / "notes/c.TXT", b"text"),
        [f"{NOTES}notes/*"],
        "with .gz, nor .parquet; endings are in small letters: rename it",
    ),
    "latin-1": (
        lambda own: write(own / "notes/a.txt", "caf\xe9".encode("latin-1")),
        [],
        "notes/a.txt is not UTF-8: byte 0xe9 at offset 3",
    ),
    "no files": (
        lambda own: write(own / "own.py", CONFIG.replace('("notes/*.txt",)', "()")),
        [],
        "train_files = () with corpus = 'text'; accepted: globs of .txt, .jsonl, .json or .par",
    ),
    "no tokenizer": (
        lambda own: None,
        ["--config.data.tokenizer=other.json"],
        "tokenizer = 'other.json': there is no such file",
    ),
    "a vocabulary that the text does not have": (
        lambda own: None,
        ["--config.data.tokenizer=sentencepiece", "--config.data.vocab_size=5000"],
        "vocab_size = 5000 does not fit the training text",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_what_mends_it(own, capsys, mistake):
    prepare, options, message = MISTAKES[mistake]
    prepare(own)
    assert main(["data", "build", "--config", str(own / "own.py"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_byte_order_mark_is_no_text(own):
    text = (own / "notes/a.txt").read_bytes()
    write(own / "notes/a.txt", b"\xef\xbb\xbf" + text)
    cache = build(read_experiment(Path("runs/a")).data)["train"]
    assert cache.documents["bytes"][0] == len(text)


def test_a_missing_cache_names_the_command_that_builds_it(own, capsys):
    options = ["--config.data.train_files=notes/b.txt", "--config.train.steps=2"]
    assert main(["train", "--config", "own.py", "--workdir", "runs/new", *options]) == 2
    build = "build it: fope data build --config own.py --config.data.train_files=notes/b.txt\n"
    assert build in capsys.readouterr().err
    assert not (own / "runs/new").exists()


def test_a_tokenizer_larger_than_the_embedding_is_said_by_build_and_train(own, capsys):
    small = "--config.model.vocab_size=100"
    assert main(["data", "build", "--config", "own.py", small]) == 0
    assert "train with --config.model.vocab_size=271" in capsys.readouterr().out
    assert main(["train", "--config", "own.py", "--workdir", "runs/new", small]) == 2
    told = "the tokenizer has 271 tokens but config.model.vocab_size = 100; raise"
    assert told in (said := capsys.readouterr().err) and "--config.model.vocab_size=271" in said


@pytest.mark.slow
def test_training_names_corpus_tokenizer_and_cache(own, capsys):
    assert main(["train", "--config", "own.py", "--workdir", "runs/new"]) == 0
    said = capsys.readouterr().err
    cache = cache_directory(read_experiment(Path("runs/a")).data)
    assert (
        "corpus: text: train notes/*.txt (2 files); validation held_out/*.txt (1 files)\n" in said
    )
    assert "tokenizer: tokenizer.json, 271 tokens\n" in said
    assert f"token cache: {cache}, " in said
