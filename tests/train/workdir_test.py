"""What a start that was refused or killed leaves: nothing, or nothing that is in the way."""

import json
import shutil
import warnings
from pathlib import Path

import pytest

from fope_jax.config import ConfigError, build_experiment
from fope_jax.evaluate.metrics import read_rows
from fope_jax.extend import run as extend_run
from fope_jax.interop import run_export
from fope_jax.interop.run_import import import_run
from fope_jax.main import main
from fope_jax.storage import directories
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.train import loop, workdir
from fope_jax.train.workdir import check_workdir, has_checkpoint, open_workdir


class Killed(BaseException):
    """What ends a process in the middle of a start, as far as its files are concerned."""


def kill(*_, **__):
    raise Killed


def tree(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*")}


def saved_as(run):
    return json.loads((run / "config.json").read_text())


# ---------------------------------------------------------------------------- refused


REFUSED = (
    ({"data": {"cache_dir": "nowhere"}}, "there is no token cache"),
    ({"model": {"vocab_size": 9}}, "the tokenizer has 259 tokens but config.model.vocab_size = 9"),
    ({"train": {"evaluate_every": 1}, "evaluate": {"lengths": (10**6,)}}, "no document is"),
    ({"mesh": {"data": 7}}, "mesh"),
    ({"train": {"batch_size": 3}, "mesh": {"tensor": 1}, "data": {"tasks": ("x",)}}, "task"),
)


@pytest.mark.slow
def test_a_start_that_is_refused_writes_nothing(runs, tmp_path):
    for changes, message in REFUSED:
        values = runs.values()
        for section, own in changes.items():
            values[section] = values.get(section, {}) | own
        with pytest.raises((ValueError, RuntimeError), match=message):
            loop.train(build_experiment(values), tmp_path / "runs" / "a")
        assert not tree(tmp_path), "not even the directories above"
    loop.train(runs.experiment(steps=1), tmp_path / "runs" / "a")


@pytest.mark.slow
def test_a_disk_without_room_for_a_checkpoint_is_refused(runs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        directories.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 99, 99)
    )
    with pytest.raises(OSError, match=r"a checkpoint takes .* GB, and 9.9e-08 GB are free"):
        loop.train(runs.experiment(), tmp_path / "run")
    assert not tree(tmp_path)
    loop.train(runs.experiment(steps=1, on_save_error="continue"), tmp_path / "run")
    assert "training begins all the same" in caplog.text


def test_an_extension_that_is_refused_writes_nothing(rope, tmp_path):
    before = tree(rope)
    for arguments, message in (
        ((rope / "11", "same", 16), "there are: 8, 12"),
        ((rope / "99", "same", 16), "checkpoints/99 does not exist; there are: 8, 12"),
        ((rope, "same", 7), "no whole rows"),
        ((rope, "fope", 10**9), "length"),
    ):
        with pytest.raises(ValueError, match=message):
            extend_run.extend(*arguments[:1], *arguments[1:], tmp_path / "new" / "run")
        assert not tree(tmp_path) and tree(rope) == before
    with pytest.raises(RuntimeError, match=rf"which is not in .*nowhere\. .*{rope}/config\.json"):
        extend_run.extend(rope, "same", 32, tmp_path / "run", overrides=["data.cache_dir=nowhere"])
    assert not tree(tmp_path)


# ---------------------------------------------------------------------------- killed


@pytest.mark.fast("the first save")
@pytest.mark.parametrize(
    ("module", "function"),
    [(loop, "write_run_info"), (loop, "MetricsWriter"), (CheckpointStore, "start_save")],
    ids=["config.json", "run.json", "the first save"],
)
def test_a_run_killed_before_its_first_checkpoint_gives_way(runs, tmp_path, module, function):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, function, kill)
        loop.train(runs.experiment(steps=4), run)
    assert saved_as(run)["train"]["steps"] == 4 and not has_checkpoint(run)
    loop.train(runs.experiment(steps=2, method="rope"), run)
    assert saved_as(run)["position"]["method"] == "rope"
    losses = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1]["step"] == 2 and {row["step"] for row in losses} <= {1, 2}


@pytest.mark.slow  # the same for a run is fast
@pytest.mark.parametrize(
    ("module", "function"),
    [(extend_run, "write_json"), (CheckpointStore, "start_save")],
    ids=["lineage.json", "the first save"],
)
def test_an_extension_killed_before_its_first_checkpoint_gives_way(
    rope, runs, tmp_path, module, function
):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, function, kill)
        extend_run.extend(rope, "yarn", 32, run, overrides=["train.steps=2"])
    assert not has_checkpoint(run)
    shorter = Path(shutil.copytree(run, tmp_path / "plain"))
    extend_run.extend(rope / "8", "pi", 32, run, overrides=["train.steps=1"])
    lineage = extend_run.read_lineage(run)
    assert (lineage["request"]["method"], lineage["request"]["step"]) == ("pi", 8)
    # No extension at all: what an earlier one has left must not be told of this run.
    loop.train(runs.experiment(steps=1), shorter)
    assert extend_run.read_lineage(shorter) is None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of Hugging Face."""
    from flax import nnx

    from fope_jax.interop.weights import export_weights
    from fope_jax.model.config import TransformerConfig
    from fope_jax.model.transformer import Transformer, split
    from fope_jax.position import RoPE

    config = TransformerConfig(vocab_size=300, d_model=16, num_layers=1, num_heads=2, mlp_dim=32)
    model = Transformer(config, RoPE(theta=100.0), rngs=nnx.Rngs(0))
    _, params, constants = split(model)
    directory = tmp_path_factory.mktemp("weights") / "hf"
    export_weights(directory, model.config, model.position, params, constants, length=16)
    return directory


def test_an_import_killed_before_its_checkpoint_gives_way(weights, tmp_path):
    run, bytes_ = tmp_path / "run", "data.tokenizer=bytes"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CheckpointStore, "start_save", kill)
        import_run(weights, run, [bytes_])
    assert not has_checkpoint(run)
    import_run(weights, run, [bytes_, "name=other"])
    assert saved_as(run)["name"] == "other" and has_checkpoint(run)
    with pytest.raises(
        ConfigError, match="(?s)holds weights imported from .*name: 'other', now 'hf'"
    ):
        import_run(weights, run, [bytes_])
    assert "already" in import_run(weights, run, [bytes_, "name=other"])
    moved = weights.rename(weights.with_name("moved"))
    with pytest.raises(ConfigError, match="(?s)path: '.*/hf', now '.*/moved'"):
        import_run(moved, run, [bytes_, "name=other"])
    moved.rename(weights)


def test_an_export_that_fails_or_is_killed_does_not_stand_in_its_own_way(weights, tmp_path):
    run, out = tmp_path / "run", tmp_path / "new" / "out"
    import_run(weights, run, ["data.tokenizer=bytes"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_export, "export_weights", kill)
        run_export.export_run(run, out)
    assert not (tmp_path / "new").exists()
    (out / run_export.PARTIAL).mkdir(parents=True)  # as SIGKILL leaves it
    (out / run_export.PARTIAL / "shard-0").write_text("cut off")
    run_export.export_run(run, out)
    assert {"config.json", "model.safetensors"} <= tree(out)
    assert not any("shard-0" in name or run_export.PARTIAL in name for name in tree(out))
    assert (out / "model.safetensors").read_bytes() == (weights / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty"):
        run_export.export_run(run, out)


# ---------------------------------------------------------------------------- what is kept


def test_a_run_that_has_saved_is_never_taken_for_a_start_that_failed(rope, runs, tmp_path):
    other = runs.experiment(method="rope", length=32)

    def refused(run):
        before = (run / "config.json").read_bytes()
        with pytest.raises(ConfigError, match=r"another configuration(?s:.*)train.length: 16, now"):
            loop.train(other, run)
        assert (run / "config.json").read_bytes() == before

    run = Path(shutil.copytree(rope, tmp_path / "whole"))
    refused(run)
    for step in ("8", "12"):  # damaged: still somebody's run
        (run / "checkpoints" / step / "metadata.json").write_text("{}")
    refused(run)
    store = CheckpointStore(run / "checkpoints")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store._quarantine(8)
        store._quarantine(12)
    refused(run)
    shutil.rmtree(run / "checkpoints")  # metrics.jsonl says that there were some
    refused(run)


def test_what_is_no_run_is_not_written_over(rope, runs, weights, tmp_path):
    experiment = runs.experiment(method="rope")
    cache = next(Path(runs.data["cache_dir"]).glob("*/manifest.json")).parent
    model = Path(shutil.copytree(weights, tmp_path / "model"))
    for directory, message in (
        (model, "has a config.json that is not of a run"),
        (cache, "has a manifest.json: it is a token cache or a checkpoint"),
        (rope / "12", "is inside another run"),
        (rope / "checkpoints" / "99", "is inside another run"),
    ):
        before = tree(directory.parent)
        with pytest.raises(ConfigError, match=message):
            check_workdir(directory, experiment)
        with pytest.raises(ConfigError, match=message):
            open_workdir(directory, experiment)
        assert tree(directory.parent) == before
    assert (model / "config.json").read_bytes() == (weights / "config.json").read_bytes()


def test_the_sweeps_of_a_start_that_failed_go_on(runs, tmp_path):
    from fope_jax.sweep import queue
    from fope_jax.sweep.runs import PlannedRun, Train

    run = PlannedRun(Train("a", "x.py"), runs.experiment(steps=2))
    open_workdir(tmp_path / "a", runs.experiment(steps=3))
    assert not queue._is_done(run, tmp_path)


def test_outputs_are_probed_before_the_work(rope, tmp_path, monkeypatch, capsys):
    """Whatever would take hours is not begun where its result cannot be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(workdir, "provenance", kill)
    out = str(tmp_path / "file" / "out")
    for line, what in (
        (["evaluate", "--run", str(rope), "--report", out], "the report"),
        (["report", str(rope), "-o", out], "the report"),
        (["spectrum", str(rope), "-o", out], "the spectra"),
        (["gallery", "-o", out], "the gallery"),
        (["export", "--run", str(rope), "-o", out], "the checkpoint"),
    ):
        assert main(line) == 2
        assert f"cannot write {what} to {out}: Not a directory" in capsys.readouterr().err
    assert tree(tmp_path) == {"file"}
