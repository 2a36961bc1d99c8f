"""Another position embedding without training: what it shares with its parent, and who takes it."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import fope_jax as fj
from fope_jax.config import experiment_to_dict
from fope_jax.evaluate.restore import load_run
from fope_jax.extend.parent import Parent, open_parent
from fope_jax.extend.run import extend, read_lineage
from fope_jax.extend.untrained import untrained_experiment
from fope_jax.main import main
from fope_jax.model.transformer import split
from fope_jax.position import DroPE, FoPE, RoPE, SlidingWindow, YaRN


def change(parent, workdir, method="yarn", length=64, *overrides, **options):
    extend(str(parent), method, length, workdir, no_train=True, overrides=overrides, **options)
    return workdir


@pytest.fixture(scope="module")
def parent(rope, tmp_path_factory):
    return Path(shutil.copytree(rope, tmp_path_factory.mktemp("runs") / "rope"))


@pytest.fixture(scope="module")
def yarn(parent, tmp_path_factory):
    return change(parent, tmp_path_factory.mktemp("runs") / "yarn")


def files(directory):
    return {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}


def test_the_weights_lie_on_disk_once(yarn, parent, runs):
    """Every file of the parameters is the parent's own; there is no optimizer."""
    ours, theirs = yarn / "checkpoints/0", parent / "checkpoints/12"
    assert files(ours / "params") == files(theirs / "params")
    for name in files(ours / "params"):
        assert os.path.samefile(ours / "params" / name, theirs / "params" / name)
    assert not (ours / "optimizer").exists()
    own = sum((ours / name).stat().st_size for name in files(ours) if name.parts[0] != "params")
    assert own < 5000, "manifest and metadata alone"
    child = load_run(yarn)
    assert child.model.position == RoPE(scaling=(YaRN(4.0, 16),))
    assert child.experiment.train.length == 16, "lengths count in what the weights were trained on"
    assert child.experiment.name == "fope+yarn-64-untrained"
    trained = load_run(parent, 12)
    for new, old in zip(*(jax_leaves(run) for run in (child, trained)), strict=True):
        assert np.array_equal(new, old)


def jax_leaves(run):
    import jax

    return jax.tree.leaves(split(run.model)[1])


def test_its_lineage_says_what_was_changed_and_that_nothing_was_trained(yarn, parent):
    lineage = read_lineage(yarn)
    assert lineage["request"]["no_train"] is True and lineage["start"] is lineage["data"] is None
    assert lineage["parent"]["run"] == str(parent.resolve()) and lineage["parent"]["step"] == 12
    assert lineage["child"]["length"] == 64 and "yarn" in lineage["child"]["position"]["summary"]
    assert "3 divided by" in lineage["frequencies"]["text"]
    info = json.loads((yarn / "run.json").read_text())
    assert info["untrained"] == {"length": 64}
    assert info["data"] == json.loads((parent / "run.json").read_text())["data"]


def test_its_batches_begin_where_those_of_the_whole_chain_end(runs, tmp_path):
    """A parent of 7 updates that began at batch 80: a child of the child is trained from 87."""
    own = runs.experiment(method="rope", data_start=80)
    (tmp_path / "config.json").write_text(json.dumps(experiment_to_dict(own)))
    before = Parent(str(tmp_path), own, 7, is_imported=False, kept={}, load=None)
    assert untrained_experiment(before, "yarn", 64).train.data_start == 80 + 7


def test_nothing_is_lost_when_the_parent_is_deleted(parent, tmp_path):
    copy = Path(shutil.copytree(parent, tmp_path / "parent"))
    child = change(copy, tmp_path / "child")
    before = [np.array(leaf) for leaf in jax_leaves(load_run(child))]
    shutil.rmtree(copy)
    assert all(map(np.array_equal, before, jax_leaves(load_run(child))))


def test_where_the_disk_has_no_links_it_is_copied(parent, tmp_path, monkeypatch, caplog):
    def no_links(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    child = change(parent, tmp_path / "child")
    assert (child / "checkpoints/0/params/manifest.ocdbt").stat().st_nlink == 1
    assert load_run(child).step == 0


def test_changed_arrays_are_its_own_and_the_rest_is_shared(parent, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fope_jax"):
        child = change(parent, tmp_path / "fope", "fope", 64)
    model = load_run(child).model
    assert model.position == FoPE(64, zero_sine=0.0, outputs="surviving")
    assert split(model)[2]["position_layers"]["cos_coef"].size
    shared = parent / "checkpoints/12/params/manifest.ocdbt"
    assert os.path.samefile(child / "checkpoints/0/params/manifest.ocdbt", shared)
    said = " ".join(record.message for record in caplog.records)
    assert "FoPE in the form that changes the parent least" in said and "params of" in said


def test_the_same_command_again_does_nothing_and_another_is_refused(yarn, parent):
    before = files(yarn)
    change(parent, yarn)
    assert files(yarn) == before
    with pytest.raises(ValueError, match="holds an extension with length = 64, now 32"):
        change(parent, yarn, "yarn", 32)
    with pytest.raises(ValueError, match="no_train = True, now False"):
        extend(str(parent), "yarn", 64, yarn)
    with pytest.raises(ValueError, match="(?s)another configuration.*position.scaling"):
        change(parent, yarn, "yarn", 64, "--config.position.factor=8")


@pytest.mark.slow
def test_other_verbs_take_it(yarn, parent, tmp_path, capsys):
    """generate, evaluate and report; a further extension trains it, or changes it again."""
    assert main(["generate", str(yarn), "It was", "--max-new-tokens", "3"]) == 0
    one = ["--config.evaluate.num_windows=2", "--protocols", "same-tokens"]
    assert main(["evaluate", str(yarn), *one, "--config.evaluate.lengths=1,2"]) == 0
    told = "fope+yarn-64-untrained is fope, step 12 (not shown), without training, with positions "
    assert told in capsys.readouterr().out
    assert main(["report", str(yarn), "-o", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page/index.html").read_text()
    assert told in page
    assert main(["doctor", str(yarn)]) == 0
    again = change(yarn, tmp_path / "again", "yarn", 128)
    assert load_run(again).model.position == RoPE(scaling=(YaRN(8.0, 16),))
    trained = tmp_path / "trained"
    extend(str(again), "same", 32, trained, overrides=["--config.train.steps=1"])
    assert load_run(trained).step == 1
    assert read_lineage(trained)["parent"]["tokens_seen"] == 12 * 32


def test_from_python(parent, tmp_path):
    run = fj.extend(str(parent), "drope", 16, tmp_path / "drope", no_train=True)
    assert run.experiment.position == DroPE(16) and run.step == 0


def test_windows_and_wrappers_without_training(parent, tmp_path):
    child = change(parent, tmp_path / "window", "sliding_window", 16, "--config.position.window=4")
    assert load_run(child).model.position == SlidingWindow(RoPE(), 4)
    assert load_run(change(child, tmp_path / "inner", "inner", 16)).model.position == RoPE()


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({"optimizer": "keep"}, (), "--optimizer keep: --no-train has no optimizer"),
        ({}, ("--config.train.steps=3",), "config.train.steps = 3: --no-train changes the posi"),
        ({}, ("--config.model.d_model=8",), "config.model.d_model"),
        ({"method": "alibi"}, (), "rope to alibi: .* never part of what it learned"),
        ({"method": "same", "length": -5}, (), "length -5; accepted: 1 token or more"),
        ({"method": "pi", "length": 8}, (), "length=8: shorter .* before any stretch"),
    ],
)
def test_what_is_refused(parent, tmp_path, options, overrides, message):
    options = {"method": "yarn", "length": 64} | options
    method, length = options.pop("method"), options.pop("length")
    with pytest.raises(ValueError, match=message):
        change(parent, tmp_path / "run", method, length, *overrides, **options)
    assert not (tmp_path / "run").exists()


def test_it_is_neither_trained_in_place_nor_kept_an_optimizer(yarn, tmp_path, capsys):
    config = str(yarn / "config.json")
    assert main(["train", "--config", config, "--workdir", str(yarn)]) == 2
    assert "positions were changed without training" in capsys.readouterr().err
    with pytest.raises(ValueError, match="made without training and has no optimizer to keep"):
        extend(str(yarn), "same", 16, tmp_path / "run", optimizer="keep")
    assert open_parent(yarn).made_for == 64


@pytest.mark.slow
def test_fope_after_rope_costs_less_in_the_default_form_than_in_the_released_one(parent, tmp_path):
    """Before any update, on the same tokens, at the parent's own length."""
    losses = {}
    for label in ("fope", "fope:preset=official", "clip"):
        table = fj.evaluate(
            fj.load(parent, step=12),
            ["same-tokens"],
            contexts=[1],
            num_windows=16,
            scored_tokens=8,
            positions=[label],
        )
        (losses[label],) = table["loss"]
    own = fj.evaluate(
        fj.load(parent, step=12), ["same-tokens"], contexts=[1], num_windows=16, scored_tokens=8
    )["loss"][0]
    costs = {label: loss - own for label, loss in losses.items()}
    assert abs(costs["fope"]) < abs(costs["fope:preset=official"])
