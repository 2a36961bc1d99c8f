"""An export is the run: numbers, position, length, tokenizer and BOS; and a card that says so."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx

from fope_jax.config import ConfigError
from fope_jax.data.bos import read_bos
from fope_jax.data.tokenizers import BytesTokenizer, JsonTokenizer, train_sentencepiece
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.restore import load_run, read_experiment
from fope_jax.evaluate.run_data import load_run_tokenizer
from fope_jax.interop import tokenizer_conversion
from fope_jax.interop.huggingface import export_warning
from fope_jax.interop.run_export import export_run
from fope_jax.interop.run_import import import_run
from fope_jax.interop.tokenizer_conversion import first_difference, sample_lines, to_tokenizer_json
from fope_jax.interop.tokenizer_files import BosPolicy, special_ids, write_tokenizer
from fope_jax.main import main
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import ALiBi, FoPE, NoPE, RoPE
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.train.workdir import open_workdir, write_run_info
from tests.interop.weights_runs import logits_of_parts

YARN = {"scaling": "yarn", "factor": 2.0, "original_length": 8}
DYNAMIC = {"scaling": "dynamic_ntk", "factor": 2.0, "original_length": 8}
METHODS = {
    "rope": {"method": "rope", "theta": 100.0},
    "yarn": {"method": "rope", "scaling": [YARN]},
    # Its config.json has the trained length of the scaling; that of the run is another.
    "dynamic": {"method": "rope", "scaling": [DYNAMIC]},
    "fope": {"method": "fope", "theta": 100.0, "share_layers": True, "outputs": "surviving"},
    "nope": {"method": "nope"},
    "window": {"method": "sliding_window", "inner": {"method": "rope"}, "window": 8},
}
LINE = "the {0} times, it was the  worst of\n\ttimes: naïve café №{0}\n\n"
TEXT = " ".join(map(LINE.format, range(300)))


def untrained_run(runs, workdir, method):
    """A run with its initial parameters as step 7."""
    experiment = runs.experiment(method=method, length=24)
    model = Transformer(experiment.model, experiment.position, rngs=nnx.Rngs(3))
    _, params, constants = split(model)
    open_workdir(workdir, experiment)
    write_run_info(workdir, {"name": experiment.name}, 0)
    _, identity = checkpoint_fingerprint(experiment.position, experiment.model.shape, constants)
    store = CheckpointStore(workdir / "checkpoints")
    store.save(7, {"params": params, "constants": constants}, identity | {"data": None})
    store.close()
    return workdir


# ---------------------------------------------------------------------------- there and back


def test_other_weights_are_not_said_to_be_imported(runs, tmp_path, monkeypatch):
    """From another place under the same relative name, or from the Hub's cache."""
    run = untrained_run(runs, tmp_path / "run", METHODS["rope"])
    for place in ("a", "b"):
        export_run(run / "7", tmp_path / place / "out")
    snapshot = tmp_path / "models--org--out" / "snapshots" / "0a1b"
    shutil.copytree(tmp_path / "a" / "out", snapshot)
    monkeypatch.chdir(tmp_path / "a")
    import_run("out", tmp_path / "back")
    assert "already" in import_run("out", tmp_path / "back")
    monkeypatch.chdir(tmp_path / "b")
    for other in ("out", snapshot):
        with pytest.raises(ConfigError, match="but others or in another way; use another"):
            import_run(other, tmp_path / "back")


@pytest.mark.fast("fope")
@pytest.mark.parametrize("name", METHODS)
def test_an_export_is_imported_as_the_same_run(runs, tmp_path, name):
    run = untrained_run(runs, tmp_path / "run", METHODS[name])
    export_run(run / "7", tmp_path / "out")
    import_run(tmp_path / "out", tmp_path / "back")
    before, after = load_run(run), load_run(tmp_path / "back")
    for loaded in (before, after):
        assert loaded.experiment.train.length == 24
        evaluate = loaded.experiment.evaluate
        assert (evaluate.bos_token, evaluate.add_bos_token) == (None, False)
    parts = [split(loaded.model)[1:] for loaded in (before, after)]
    identities = [
        checkpoint_fingerprint(loaded.model.position, loaded.model.config.shape, constants)[0]
        for loaded, (_, constants) in zip((before, after), parts, strict=True)
    ]
    assert identities[0] == identities[1]
    tokens = np.arange(3, 43, dtype=np.int32)[None]
    how = {"attention": "reference"}  # a checkpoint says what is computed, not how
    logits = [
        logits_of_parts(
            (dataclasses.replace(loaded.model.config, **how), loaded.model.position, *trees), tokens
        )
        for loaded, trees in zip((before, after), parts, strict=True)
    ]
    assert np.isfinite(logits[0]).all() and logits[0].tobytes() == logits[1].tobytes()
    again = JsonTokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert again.encode("naïve </s>\n 7") == BytesTokenizer().encode("naïve </s>\n 7")
    # And once more: what an export of the import says is the same.
    export_run(tmp_path / "back", tmp_path / "out2")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out2" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_bos_token_and_a_length_chosen_at_the_import_go_with_the_run(runs, tmp_path):
    export_run(untrained_run(runs, tmp_path / "run", METHODS["rope"]), tmp_path / "out")
    chosen = ["evaluate.bos_token=<unk>", "evaluate.add_bos_token=true", "train.length=12"]
    import_run(tmp_path / "out", tmp_path / "chosen", chosen)
    export_run(tmp_path / "chosen", tmp_path / "out2")
    import_run(tmp_path / "out2", tmp_path / "back")
    back = read_experiment(tmp_path / "back")
    assert (back.evaluate.bos_token, back.evaluate.add_bos_token) == ("<unk>", True)
    assert back.train.length == 12
    assert json.loads((tmp_path / "out2/config.json").read_text())["max_position_embeddings"] == 24
    # The run keeps its tokenizer: the directory that it came from may go.
    shutil.rmtree(tmp_path / "out2")
    tokenizer = load_run_tokenizer(tmp_path / "back", back.data)
    assert tokenizer.encode("a") == [100] and tokenizer.token_id("<unk>") == 2


def test_the_files_of_an_export(runs, tmp_path, capsys):
    run = untrained_run(runs, tmp_path / "run", METHODS["rope"])
    row = {"variant": "fope", "seed": 1, "step": 7, "training_length": 24, "context": 24}
    row |= {"nats": 20.0, "tokens": 10, "bytes": 10, "correct": 2, "split": "validation"}
    row |= {"kind": "perplexity", "protocol": "same-tokens", "scored_per_window": 5, "windows": 2}
    (run / "metrics.jsonl").write_text(json.dumps(row | {"document": "a"}) + "\n")
    command = ["export", str(run), "-o", str(tmp_path / "tiny"), "--license", "apache-2.0"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"checkpoint in {tmp_path}/tiny\n")
    files = {path.name: path for path in (tmp_path / "tiny").iterdir()}
    assert files.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {oct(path.stat().st_mode & 0o777) for path in files.values()} == {"0o644"}
    ids = {"eos_token_id": 1, "pad_token_id": 0}
    assert json.loads(files["generation_config.json"].read_text()) == ids
    assert json.loads(files["config.json"].read_text()).items() >= ids.items()
    settings = json.loads(files["tokenizer_config.json"].read_text())
    assert (settings["eos_token"], settings["split_special_tokens"]) == ("</s>", True)
    card = files["README.md"].read_text()
    for said in (
        "license: apache-2.0\n",
        "# tiny\n",
        "(seed 1) at step 7",
        '"theta": 100.0',
        "training length: 24 tokens",
        "data: text\n",
        "7.39",  # exp(20 / 10)
        "fope import tiny --workdir",
        'from_pretrained("tiny")',
        "converted from bytes",
    ):
        assert said in card, said
    assert str(tmp_path) not in card


# ---------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def sentencepiece():
    return train_sentencepiece([TEXT], 340)


def test_a_converted_tokenizer_gives_the_same_tokens(sentencepiece):
    for tokenizer in (BytesTokenizer(), sentencepiece):
        again = JsonTokenizer(to_tokenizer_json(tokenizer), "</s>")
        lines = [*sample_lines(tokenizer), *TEXT.splitlines(keepends=True), TEXT]
        assert len(lines) > 400 and any("\n\n" in line for line in lines)
        for ours, theirs in zip(
            tokenizer.encode_batch(lines), again.encode_batch(lines), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        assert [again.decode(ids) for ids in again.encode_batch(lines)] == lines
        assert (again.vocab_size, again.eos_id, again.pad_id) == (tokenizer.vocab_size, 1, 0)
        np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)


def test_a_tokenizer_that_would_not_be_exact_stays_what_it_is(
    sentencepiece, tmp_path, monkeypatch, caplog
):
    rules = json.loads(to_tokenizer_json(sentencepiece))
    rules["model"]["merges"].reverse()
    assert "would be tokens [" in first_difference(sentencepiece, json.dumps(rules))
    monkeypatch.setattr(tokenizer_conversion, "_pairs", lambda piece, pieces: [])
    note = write_tokenizer(tmp_path, sentencepiece, None, BosPolicy(None), 16)
    assert "There is no tokenizer.json, since it would not be exact (" in note
    assert note in caplog.text
    assert not (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "tokenizer.model").read_bytes() == sentencepiece.model


def with_template(directory, token):
    """A tokenizer.json that puts ``token`` before a text."""
    rules = json.loads(to_tokenizer_json(BytesTokenizer()))
    pieces = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    special = {token: {"id": token, "ids": [rules["model"]["vocab"][token]], "tokens": [token]}}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": special,
    }
    directory.mkdir()
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(rules))
    return path


@pytest.mark.parametrize(("stated", "used"), [("<pad>", None), (None, "<pad>"), ("<pad>", "<pad>")])
def test_texts_begin_with_the_bos_token_of_the_run(tmp_path, stated, used):
    """Whatever the files that the run was made with say; they are copied where they agree."""
    from tokenizers import Tokenizer

    source = with_template(tmp_path / "source", stated or "<unk>")
    if stated is None:
        rules = json.loads(source.read_text()) | {"post_processor": None}
        source.write_text(json.dumps(rules))
    tokenizer = JsonTokenizer.load(source)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "tokenizer.json"
    note = write_tokenizer(tmp_path / "out", tokenizer, source, BosPolicy(used), 16)
    assert ("which it did not say" in note) == (stated != used)
    bos = read_bos(out)
    assert (bos.added, bos.token if bos.added else None) == (used is not None, used)
    ids = Tokenizer.from_file(str(out)).encode("a").ids
    assert ids == [0] * (used is not None) + [100]
    assert (out.read_bytes() == source.read_bytes()) == (stated == used)
    assert special_ids(tokenizer, BosPolicy(used))["bos_token_id"] == (0 if used else None)


# ---------------------------------------------------------------------------- before training


@pytest.mark.parametrize(
    ("position", "advice"),
    [
        (RoPE(), None),
        (NoPE(), None),
        (FoPE(64, share_layers=True, outputs="surviving"), None),
        (FoPE(64), "to export it, train it with --config.position.share_layers=True"),
        (FoPE(64, zero_sine=0.0), "share_layers=True --config.position.zero_sine=1.0"),
        (ALiBi(), "position.method='alibi': models of Hugging Face have no form of it"),
    ],
)
def test_a_run_that_cannot_be_exported_is_told_so_before_it_is_trained(position, advice):
    config = TransformerConfig(vocab_size=8, d_model=64, num_layers=2, num_heads=4, mlp_dim=8)
    warning = export_warning(config, position)
    assert (advice is None and warning is None) or advice in warning
    if advice and "=True" in advice:
        changes = {"share_layers": True, "zero_sine": 1.0}
        assert export_warning(config, dataclasses.replace(position, **changes)) is None


def test_training_says_it_in_one_line(runs, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise runs.Interrupted

    monkeypatch.setattr("fope_jax.train.loop.trace_step", stop)  # the first thing after the line
    values = runs.values(method={"method": "rope", "partial_rotary_factor": 0.5})
    (tmp_path / "config.json").write_text(json.dumps(values))
    command = ["train", "--config", str(tmp_path / "config.json"), "--workdir"]
    with pytest.raises(runs.Interrupted):
        main([*command, str(tmp_path / "a")])
    line = "this run cannot be exported to Hugging Face: partial_rotary_factor=0.5: these models"
    assert capsys.readouterr().err.count(line) == 1
