"""A sweep is checked whole before anything of it is run."""

from pathlib import Path

import pytest

from fope_jax.fields import ConfigError
from fope_jax.sweep.spec import Extend, Train, check_sweep, load_sweep, product, zipped

QUICK = "configs/quickstart.py"


def test_combinations():
    assert product(seed=(0, 1), method=("rope",)) == [(0, "rope"), (1, "rope")]
    assert zipped(a=(1, 2), b=(3, 4)) == [(1, 3), (2, 4)]
    with pytest.raises(ValueError, match=r"cannot be zipped: \{'a': 1, 'b': 2\}"):
        zipped(a=(1,), b=(3, 4))


def test_every_run_has_its_experiment_and_its_command():
    train = Train("a", f"{QUICK}:position=rope,seed=3", ("train.steps=40",))
    longer = Extend("b", "a", "yarn", 256, ("train.steps=7",), ("--match", "index"))
    first, second = check_sweep([train, longer])
    assert (first.parent, second.parent) == (None, "a")
    assert (first.experiment.seed, first.experiment.train.steps) == (3, 40)
    assert second.experiment.train.length == 256
    assert second.experiment.train.steps == 7
    assert second.experiment.train.data_start == 40  # where the parent will have stopped
    assert first.command(Path("w")) == [
        "train", "--config", f"{QUICK}:position=rope,seed=3", "--workdir", "w/a",
        "--config.train.steps=40",
    ]  # fmt: skip
    assert second.command(Path("w")) == [
        "extend", "--from", "w/a", "--method", "yarn", "--length", "256", "--workdir", "w/b",
        "--match", "index", "--config.train.steps=7",
    ]  # fmt: skip


A = Train("a", QUICK)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "the sweep has no runs"),
        ([A, A], "two runs are called 'a'"),
        ([Train("a/b", QUICK)], r"run name 'a/b'; accepted: letters, digits and _ \. \+ -"),
        ([Extend("b", "a", "yarn", 256)], "run 'b': its parent 'a' is no run before it"),
        ([A, Extend("b", "a", "t5", 256)], "run 'b': .*t5"),
        ([A, Extend("b", "a", "same", 100)], "run 'b': length 100: .* no whole rows"),
        ([Train("a", QUICK, ("train.stepz=1",))], r"run 'a': .*train\.stepz.*steps"),
        ([Train("a", "nowhere.py")], "run 'a': .*'nowhere.py' does not exist"),
    ],
)
def test_mistakes_are_found_before_any_run(runs, message):
    with pytest.raises(ConfigError, match=message):
        check_sweep(runs)


def test_files(tmp_path):
    with pytest.raises(ConfigError, match=r"sweep file 'no\.py' does not exist"):
        load_sweep("no.py:seeds=1")
    (tmp_path / "s.py").write_text("")
    with pytest.raises(ConfigError, match=r"defines no get_sweep\(arg\)"):
        load_sweep(f"{tmp_path}/s.py")


@pytest.mark.parametrize("path", sorted(map(str, Path("experiments").glob("*/sweep.py"))))
def test_shipped_sweeps_can_be_built(path):
    names = [run.name for run in load_sweep(f"{path}:seeds=2")]
    assert {name.rpartition("_")[2] for name in names} == {"0", "1"}
