"""`fope import FILE.gguf` makes a run as every import does."""

import hashlib
import json
import shutil

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="pip install '.[gguf]'")

from fope_jax.config import ConfigError  # noqa: E402
from fope_jax.evaluate.restore import load_run, read_experiment  # noqa: E402
from fope_jax.evaluate.run_data import load_run_tokenizer  # noqa: E402
from fope_jax.interop.gguf import import_gguf_weights, open_gguf  # noqa: E402
from fope_jax.interop.run_export import export_run  # noqa: E402
from fope_jax.interop.run_import import import_run  # noqa: E402
from fope_jax.main import main  # noqa: E402
from fope_jax.model.transformer import split  # noqa: E402
from tests.interop.tiny_gguf import TYPES, random_tensors, vocabulary, write  # noqa: E402


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A file with another type in each matrix, and the run of it."""
    directory = tmp_path_factory.mktemp("gguf")
    kinds = {"token_embd.weight": TYPES.Q8_0, "blk.0.attn_q.weight": TYPES.Q4_1}
    path = write(directory / "tiny model.Q4_1.gguf", random_tensors(), kinds=kinds)
    import_run(path, directory / "run", ["train.length=32"])
    return path, directory / "run"


def test_the_run_has_weights_tokenizer_lineage_and_fingerprint(imported):
    path, run = imported
    loaded, weights = load_run(run), import_gguf_weights(open_gguf(path))
    params = split(loaded.model)[1]
    for name, array in weights.params["layers"].items():
        np.testing.assert_array_equal(params["layers"][name], array)
    np.testing.assert_array_equal(params["embedding"], weights.params["embedding"])
    info, experiment = json.loads((run / "run.json").read_text()), read_experiment(run)
    assert info["imported"] == {
        "directory": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "quantisations": "F32 18, Q8_0 1, Q4_1 1",
        "training_length": 128,
    }
    assert info["position"]["summary"].startswith("rope(theta=50000, ")
    assert (experiment.name, experiment.train.length) == ("tiny model.Q4_1", 32)
    assert experiment.data.tokenizer == str(run / "tokenizer.json")  # the run's own
    assert (experiment.evaluate.bos_token, experiment.evaluate.add_bos_token) == (
        "<|im_start|>",
        False,
    )
    tokens = vocabulary()[0]
    tokenizer = load_run_tokenizer(run, experiment.data)
    assert [tokens[i] for i in tokenizer.encode("and the 12")] == ["and", "Ġthe", "Ġ", "1", "2"]


def test_an_export_of_it_is_the_same_model(imported, tmp_path):
    _, run = imported
    export_run(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("llama", 2)
    import_run(tmp_path / "out", tmp_path / "again")
    first, second = split(load_run(run).model)[1], split(load_run(tmp_path / "again").model)[1]
    for name, array in first["layers"].items():
        np.testing.assert_array_equal(array, second["layers"][name])
    infos = [json.loads((d / "run.json").read_text()) for d in (run, tmp_path / "again")]
    assert infos[0]["position"] == infos[1]["position"]
    assert infos[0]["tokenizer"]["fingerprint"] == infos[1]["tokenizer"]["fingerprint"]


def test_another_tokenizer_can_be_named_and_then_the_files_own_is_not_read(imported, tmp_path):
    _, run = imported
    path = write(tmp_path / "x.gguf", random_tensors(), values={"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(ValueError, match="tokenizer.ggml.pre='tekken'.*--config.data.tokenizer"):
        import_run(path, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    shutil.copy(run / "tokenizer.json", tmp_path / "own.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    import_run(path, tmp_path / "yes", [f"data.tokenizer={tmp_path / 'own.json'}"])
    tokenizer = load_run_tokenizer(tmp_path / "yes", read_experiment(tmp_path / "yes").data)
    assert tokenizer.eos == "<|endoftext|>"


@pytest.mark.parametrize(
    ("values", "rows", "message"),
    [
        ({"vocab_size": 299}, 300, r"of another shape: token_embd.weight \[300, 256\], .*\[299, "),
        ({}, 200, r"of another shape: token_embd.weight \[200, 256\], expected \[300, 256\]"),
        (
            {"vocab_size": 200},
            200,
            "tokenizer in .*x.gguf has 269 tokens, the embedding of x has 200",
        ),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_named(tmp_path, values, rows, message):
    tensors = random_tensors()
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:rows]
    path = write(tmp_path / "x.gguf", tensors, values=values)
    with pytest.raises(ValueError, match=message):
        import_run(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_verb_says_what_is_wrong(imported, tmp_path, capsys):
    path, run = imported

    def refused(source, workdir=tmp_path / "run"):
        assert main(["import", "--from", str(source), "--workdir", str(workdir)]) == 2
        assert not (tmp_path / "run").exists()
        return " ".join(capsys.readouterr().err.split())

    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:2000])
    assert "cut.gguf is cut off: it has 2,000 bytes and announces" in refused(tmp_path / "cut.gguf")
    assert "there is no such file" in refused(tmp_path / "none.gguf")
    said = refused(path.parent)
    assert "is a directory of GGUF files: name one, as `fope import" in said and path.name in said
    said = refused(path, run)
    assert "holds weights imported from" in said and "train.length: 32, now 128" in said


def test_a_file_without_the_suffix_is_known_by_its_content(imported, tmp_path, capsys):
    path, _ = imported
    plain = shutil.copy(path, tmp_path / "weights")
    assert main(["import", str(plain), "--workdir", str(tmp_path / "run")]) == 0
    extension = ["--method", "same", "--length", "64", "--workdir", str(tmp_path / "child")]
    for command in (["evaluate", str(plain)], ["extend", str(path), *extension]):
        assert main(command) == 2
        told = f"it is a GGUF file; `fope import {command[1]} --workdir RUN` makes a run of it"
        assert told in capsys.readouterr().err
    assert main(["extend", f"hf:{plain}", *extension]) == 2
    assert f"`fope import {plain} --workdir RUN`" in capsys.readouterr().err


def test_an_import_that_is_there_is_left_as_it_is(imported, tmp_path):
    path, run = imported
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    same = shutil.copy(path, tmp_path / "tiny model.Q4_1.gguf")
    assert "already" in import_run(same, run, ["train.length=32"])
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    write(same, random_tensors(seed=1))
    with pytest.raises(ConfigError, match="(?s)holds weights imported from .*sha256: '.*', now '"):
        import_run(same, run, ["train.length=32"])


def test_a_moved_import_is_there_too(imported, tmp_path):
    path, run = imported
    moved = shutil.copytree(run, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    for before in ("before/tokenizer.json", "other.json"):
        config["data"]["tokenizer"] = str(tmp_path / before)
        (moved / "config.json").write_text(json.dumps(config))
        assert "already" in import_run(path, moved, ["train.length=32"])
    other = {"train.length": 32, "data.tokenizer": tmp_path / "other.json"}
    (tmp_path / "other.json").write_text((run / "tokenizer.json").read_text() + " ")
    with pytest.raises(ConfigError, match="(?s)holds weights imported from .*data.tokenizer: "):
        import_run(path, run, [f"{key}={value}" for key, value in other.items()])


def test_an_import_cut_off_in_saving_names_the_import(imported, tmp_path, capsys):
    path, run = imported
    cut = shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints")
    assert main(["generate", str(cut), "and"]) == 2
    assert f"import it again with `fope import {path} --workdir {cut}`" in capsys.readouterr().err


def test_the_python_function_refuses_a_change_of_the_model(imported, tmp_path):
    told = "config.model.num_layers = 1, but the weights are of 2; an import can change model.scan"
    with pytest.raises(ConfigError, match=told):
        import_run(imported[0], tmp_path / "run", ["model.num_layers=1"])
