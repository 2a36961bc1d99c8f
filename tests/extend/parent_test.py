"""What a run can go on from is found, or the message says what is not there."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from fope_jax.config import ConfigError, build_experiment
from fope_jax.data.build import build
from fope_jax.data.cache import CacheError
from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.restore import load_run, read_experiment
from fope_jax.extend.lineage import read_lineage
from fope_jax.extend.parent import open_parent
from fope_jax.extend.run import extend
from fope_jax.interop.run_export import export_run
from fope_jax.interop.run_import import import_run
from fope_jax.interop.weights import export_weights, import_weights
from fope_jax.main import main
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import FoPE, RoPE, YaRN
from fope_jax.storage.checkpoint import CheckpointError
from fope_jax.train.state import plan_state


def test_parents_are_found_by_run_and_by_step(rope, tmp_path):
    assert open_parent(str(rope)).step == 12
    for source in (rope / "8", rope / "checkpoints" / "8"):
        assert (open_parent(str(source)).step, open_parent(str(source)).source) == (8, str(rope))
    with pytest.raises(FileNotFoundError, match="nowhere is no run: there is no such dir"):
        open_parent(str(tmp_path / "nowhere"))
    untrained = Path(shutil.copytree(rope, tmp_path / "untrained"))
    shutil.rmtree(untrained / "checkpoints")
    with pytest.raises(FileNotFoundError, match="untrained has no valid checkpoint; train it"):
        open_parent(str(untrained))
    with pytest.raises(CheckpointError, match="checkpoints/5 does not exist; there are: 8, 12"):
        extend(str(rope / "5"), "yarn", 32, tmp_path / "run")
    with pytest.raises(CheckpointError, match="checkpoints/99 does not exist; there are: 8, 12"):
        extend(str(rope / "99"), "yarn", 32, tmp_path / "run")  # beyond its train.steps
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """SmolLM's layers, small and random, trained on 16 tokens; with no tokenizer.json."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    config = TransformerConfig(
        vocab_size=300, d_model=16, num_layers=2, num_heads=2, mlp_dim=16, tie_embeddings=True
    )
    model = Transformer(config, RoPE(theta=100.0), rngs=nnx.Rngs(3))
    _, params, constants = split(model)
    kept = {"eos_token_id": 7, "bos_token_id": 5}
    export_weights(directory, config, model.position, params, constants, length=16, extra_keys=kept)
    return directory


FOPE = ["position.share_layers=true", "position.outputs=surviving", "position.zero_sine=1"]
TRAIN = ["train.steps=2", "train.batch_size=2", "train.learning_rate=1e-2", "model.attention=auto"]


@pytest.mark.slow  # trains three times
def test_weights_go_on_as_their_imported_run_does_and_are_exported(weights, runs, tmp_path):
    data = [f"data.{key}={value}" for key, value in runs.data.items()]
    given = [*FOPE, *TRAIN, "train.evaluate_every=none"]
    extend(f"hf:{weights}", "fope", 32, tmp_path / "a", overrides=[*data, *given])
    import_run(weights, tmp_path / "tiny", data)
    extend(tmp_path / "tiny", "fope", 32, tmp_path / "b", overrides=given)
    for step in (0, 2):
        assert runs.arrays(tmp_path / "a", step) == runs.arrays(tmp_path / "b", step)
    assert runs.losses(tmp_path / "a") == runs.losses(tmp_path / "b")
    configs, facts, lineages = (
        [json.loads((tmp_path / run / name).read_text()) for run in "ab"]
        for name in ("config.json", "run.json", "lineage.json")
    )
    assert configs[0] == configs[1] and configs[0]["name"] == "tiny+fope-32"
    assert lineages[0]["start"] == lineages[1]["start"]
    assert lineages[0]["request"]["parent"] == f"hf:{weights}"
    assert lineages[0]["parent"]["position"] == lineages[1]["parent"]["position"]
    for own in facts:
        assert own["kept"]["eos_token_id"] == 7 and "imported" not in own
    export_run(tmp_path / "a", tmp_path / "out")
    again, exported = import_weights(tmp_path / "out"), load_run(tmp_path / "a").model
    assert (
        again.extra_keys["bos_token_id"] == 5 and again.extra_keys["max_position_embeddings"] == 32
    )
    assert (
        again.position
        == exported.position
        == FoPE(32, theta=100.0, share_layers=True, outputs="surviving")
    )
    for here, there in zip(
        jax.tree.leaves(again[2:4]), jax.tree.leaves(split(exported)[1:]), strict=True
    ):
        assert np.asarray(here).tobytes() == np.asarray(there).tobytes()


def test_what_weights_do_not_say_is_asked_for(weights, runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no .*: there is no such directory"):
        open_parent("hf:nowhere")
    with pytest.raises(
        ConfigError, match="tiny has no tokenizer.json: say which .*data.tokenizer="
    ):
        open_parent(f"hf:{weights}")
    parent = open_parent(f"hf:{weights}", tokenizer="bytes")
    assert (parent.is_imported, parent.step, parent.experiment.train.length) == (True, 0, 16)
    assert parent.experiment.data.tokenizer == "bytes" and parent.kept["eos_token_id"] == 7
    with pytest.raises(
        ConfigError, match="imported weights have no train.batch_size and train.steps"
    ):
        extend(f"hf:{weights}", "yarn", 32, tmp_path / "run", overrides=["data.tokenizer=bytes"])
    with pytest.raises(ConfigError, match="no optimizer to keep; take reset"):
        parent.load(plan_state(parent.experiment), True)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_cannot_be_read_is_found_before_anything_is_written(weights, tmp_path):
    directory = Path(shutil.copytree(weights, tmp_path / "tiny"))
    run, absent = tmp_path / "run", f"{tmp_path}/absent.json"
    for begin in (
        lambda: import_run(directory, run, [f"data.tokenizer={absent}"]),
        lambda: open_parent(f"hf:{directory}", tokenizer=absent),
    ):
        with pytest.raises(ConfigError, match=f"data.tokenizer = '{absent}': there is no such fil"):
            begin()
    (directory / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 123\n"
    )
    for begin in (lambda: import_run(directory, run), lambda: open_parent(f"hf:{directory}")):
        with pytest.raises(ConfigError, match="tokenizer.json': it is a Git LFS pointer, .*pull"):
            begin()
    (directory / "tokenizer.json").write_text('{"version": "1.0", "added_tok')  # half a download
    for begin in (lambda: import_run(directory, run), lambda: open_parent(f"hf:{directory}")):
        with pytest.raises(ConfigError, match="tokenizer.json' cannot be read: EOF .*; get the f"):
            begin()
    assert not run.exists()
    write_tokenizer(other := tmp_path / "other.json", 290)
    parent = open_parent(f"hf:{directory}", tokenizer=str(other))
    assert parent.experiment.data.tokenizer == str(other)


def write_tokenizer(path, size):
    """A tokenizer.json of ``size`` tokens: bytes, and added tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens([f"<extra {i}>" for i in range(size - len(alphabet))])
    tokenizer.save(str(path))


def test_a_tokenizer_larger_than_the_embedding_is_found_before_anything_is_written(
    weights, tmp_path, capsys
):
    """The embedding has 300 rows; the advice of the message is then taken, by both verbs."""
    directory = Path(shutil.copytree(weights, tmp_path / "tiny"))
    run, small = tmp_path / "run", tmp_path / "small.json"
    write_tokenizer(small, 290)
    write_tokenizer(directory / "tokenizer.json", 301)
    extending = ["extend", "--from", f"hf:{directory}", "--method", "yarn", "--length", "32"]
    for command in (["import", "--from", str(directory)], extending):
        assert main([*command, "--workdir", str(run)]) == 2
        error = capsys.readouterr().err
        assert f"the tokenizer {directory}/tokenizer.json has 301 tokens, the embedding" in error
        assert "300, and an import does not change it" in error
        assert "--config.data.tokenizer=PATH/tokenizer.json" in error and not run.exists()
    for stated, problem in (
        (str(small), None),
        ("sentencepiece", "sentencepiece has 4,096 tokens"),
    ):
        change = f"data.tokenizer={stated}"
        if problem is None:
            assert (
                open_parent(f"hf:{directory}", tokenizer=stated).experiment.data.tokenizer == stated
            )
            import_run(directory, tmp_path / "imported", [change])
            assert read_experiment(tmp_path / "imported").data.tokenizer == stated
            continue
        with pytest.raises(ConfigError, match=problem):
            open_parent(f"hf:{directory}", tokenizer=stated)
        with pytest.raises(ConfigError, match=problem):
            import_run(directory, run, [change])
    for size in (300, 258):  # as many as rows, and fewer: rows without a token are padding
        write_tokenizer(directory / "tokenizer.json", size)
        assert open_parent(f"hf:{directory}").experiment.data.tokenizer.endswith("/tokenizer.json")
    # One that fits is the model's own: another is not taken in its place.
    assert open_parent(f"hf:{directory}", tokenizer=str(small)).experiment.data.tokenizer != str(
        small
    )
    assert not run.exists()


def test_weights_that_are_not_finite_are_found_before_anything_is_written(
    weights, tmp_path, capsys
):
    from safetensors.numpy import load_file, save_file

    directory = Path(shutil.copytree(weights, tmp_path / "tiny"))
    stored = load_file(directory / "model.safetensors")
    stored["model.layers.0.self_attn.v_proj.weight"][3, :2] = np.nan
    save_file(stored, directory / "model.safetensors")
    command = ["import", "--from", str(directory), "--workdir", str(tmp_path / "run")]
    assert main([*command, "--config.data.tokenizer=bytes"]) == 2
    named = "NaN or infinite: model.layers.0.self_attn.v_proj.weight (2 values)"
    assert named in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_cache_that_is_missing_can_be_built_from_the_new_runs_config(weights, runs, tmp_path):
    data = runs.data | {"cache_dir": str(tmp_path / "cache")}
    overrides = [*(f"data.{key}={value}" for key, value in data.items()), *TRAIN]
    with pytest.raises(CacheError, match=f"fope data build --config {tmp_path}/run/config.json$"):
        extend(f"hf:{weights}", "yarn", 32, tmp_path / "run", overrides=overrides)
    build(build_experiment(json.loads((tmp_path / "run/config.json").read_text())).data)
    overrides += ["train.evaluate_every=none", "train.steps=2"]
    extend(f"hf:{weights}", "yarn", 32, tmp_path / "run", overrides=overrides)
    assert load_run(tmp_path / "run").model.position == RoPE(theta=100.0, scaling=(YaRN(2.0, 16),))


SMOLLM = Path(__file__).parents[2] / "configs/paper/smollm_4096.py"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fope", "yarn"])
def test_the_papers_smollm_runs_its_whole_course_on_a_small_model(
    weights, runs, tmp_path, capsys, method
):
    """Build the data, extend by the configuration file, evaluate, export: from 16 to 32 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = Path(shutil.copytree(weights, tmp_path / "tiny"))
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = f"{SMOLLM}:weights={directory},method={method}"
    data = [
        f"--config.data.{key}={value}"
        for key, value in (runs.data | {"cache_dir": str(tmp_path / "cache")}).items()
        if key != "tokenizer"
    ]
    small = [
        "train.steps=2",
        "train.batch_size=4",
        "train.accumulate=2",
        "train.evaluate_every=1",
        "model.dtype=float32",
        "evaluate.num_windows=2",
        "evaluate.position_windows=0",
        "evaluate.passkey_trials=0",
        "evaluate.lengths=(1, 2)",
        "evaluate.training_windows=2",
    ]
    changes = [*data, *(f"--config.{change}" for change in small)]
    assert main(["data", "build", "--config", config, *data]) == 0
    command = [
        "extend",
        "--from",
        f"hf:{directory}",
        "--method",
        method,
        "--length",
        "32",
        "--config",
        config,
        "--workdir",
        str(tmp_path / "run"),
        *changes,
    ]
    knobs = [f"--config.{knob}" for knob in FOPE] if method == "fope" else []
    if method == "fope":  # what an export needs is no part of the paper's
        assert main([*command, *knobs]) == 2
        told = "--config.position.share_layers=False --config.position.outputs=official"
        assert f"what differs: {told}" in capsys.readouterr().err
        command.append("--config.position.preset=official")  # as the file's head says
    assert main(command) == 0
    experiment = read_experiment(tmp_path / "run")
    assert (experiment.train.learning_rate, experiment.train.b2) == (3e-4, 0.999)
    assert experiment.data.tokenizer == f"{directory}/tokenizer.json"
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    scored = {(r["kind"], r["step"], r["context"]) for r in rows if "context" in r}
    during = {("validation", step, context) for step in (0, 1, 2) for context in (32, 64)}
    assert scored == during | {("perplexity", 2, 32), ("perplexity", 2, 64)}
    told = read_lineage(tmp_path / "run")["data"]["text"]
    assert "windows of 32; 4 rows an update, 128 tokens; begins at batch 0" in told
    assert told.endswith("what the imported weights saw is not known")
    if method == "yarn":
        out = tmp_path / "out"
        assert main(["export", "--run", str(tmp_path / "run"), "-o", str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["rope_parameters"] | {} == {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 2.0,
            "original_max_position_embeddings": 16,
        }
        assert (out / "tokenizer.json").is_file()
