"""A sweep is checked whole before anything of it is run."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from fope_jax.config import experiment_to_dict, load_config
from fope_jax.config.fields import ConfigError
from fope_jax.extend import run as extend_module
from fope_jax.extend.child import child_experiment
from fope_jax.main import main
from fope_jax.sweep.kept_rows import kept_runs
from fope_jax.sweep.runs import (
    Extend,
    Train,
    check_sweep,
    choose,
    load_sweep,
    product,
    with_parents,
    zipped,
)

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
        "train",
        "--config",
        f"{QUICK}:position=rope,seed=3",
        "--workdir",
        "w/a",
        "--config.train.steps=40",
    ]
    assert second.command(Path("w")) == [
        "extend",
        "w/a",
        "--method",
        "yarn",
        "--length",
        "256",
        "--workdir",
        "w/b",
        "--match",
        "index",
        "--config.train.steps=7",
    ]


def test_a_part_is_what_is_named_and_what_that_extends():
    runs = [
        Train(f"{method}_{seed}", f"{QUICK}:seed={seed}", (f"name={method}",))
        for seed, method in product(seed=(0, 1), method=("rope", "nope"))
    ]
    runs += [
        Extend("rope_yarn_1", "rope_1", "yarn", 256),
        Extend("again_1", "rope_yarn_1", "same", 512),
    ]
    planned = check_sweep(runs)

    def names(*patterns):
        chosen = choose(planned, patterns)
        return [[run.name for run in part] for part in (chosen, with_parents(chosen, planned))]

    assert names("nope_*") == [["nope_0", "nope_1"]] * 2
    assert names("again_*", "nope_0") == [
        ["nope_0", "again_1"],
        ["nope_0", "rope_1", "rope_yarn_1", "again_1"],
    ]
    with pytest.raises(
        ConfigError, match="no run of the sweep is called 'fope_.*'; runs: rope_0, "
    ):
        names("nope_0", "fope_*")


def test_the_rows_of_what_is_extended_are_not_written_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "sweep.py"
    path.write_text(
        "from fope_jax.sweep import Extend, Train\n"
        f"def get_sweep(arg=''): return [Train('a', {QUICK!r}), Extend('b', 'a', 'yarn', 256)]\n"
    )
    command = ["sweep", str(path), "--workdir", str(tmp_path / "w"), "--only", "b"]
    assert main([*command, "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("fope train") and second.startswith("fope extend")
    kept = []
    for name, stand_in in {
        "fope_jax.sweep.queue.run_sweep": lambda planned, workdir, *, jobs, keep: [
            keep(run.name) for run in planned
        ],
        "fope_jax.report.results.write_results": lambda run, path: kept.append(path.name),
        "fope_jax.report.rows.read_with_variants": lambda path: [
            SimpleNamespace(path=path),
            SimpleNamespace(path=path.with_name(f"{path.name} as yarn:factor=4")),
        ],
        "fope_jax.report.rows.read_runs": lambda paths: [],
        "fope_jax.report.verdict.verdict": lambda runs: SimpleNamespace(text=lambda: "done"),
        "fope_jax.command_line.train._page_of_sweep": lambda workdir, runs: workdir,
    }.items():
        monkeypatch.setattr(name, stand_in)
    assert main([*command, "--results", str(tmp_path / "results")]) == 0
    assert kept == ["b.jsonl", "b_as_yarn_factor_4.jsonl"]


def test_rows_of_another_run_are_not_replaced(tmp_path):
    def keep(name, spec):
        (run,) = check_sweep([Train(name, spec)])
        head = {"kind": "run", "config": experiment_to_dict(run.experiment), "info": {}}
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(head | {"lineage": {}}) + "\n")

    planned = check_sweep([A, Train("c", f"{QUICK}:seed=1", ("evaluate.num_windows=5",))])
    keep("c", f"{QUICK}:seed=1")
    assert kept_runs(planned, tmp_path) == {"c"}, "the same run, measured otherwise"
    keep("a", f"{QUICK}:position=alibi")
    with pytest.raises(
        ConfigError, match=r"a\.jsonl holds another run.*--results(?s:.*)method: 'alibi'"
    ):
        kept_runs(planned, tmp_path)
    assert kept_runs(choose(planned, ["c"]), tmp_path) == {"c"}


def test_what_is_kept_on_another_machine_is_left_out(tmp_path, capsys):
    path, results = tmp_path / "sweep.py", tmp_path / "results"
    path.write_text(
        "from fope_jax.sweep import Extend, Train\n"
        f"def get_sweep(arg=''): return [Train('a', {QUICK!r}), Train('c', '{QUICK}:seed=1'), "
        "Extend('b', 'a', 'yarn', 256)]\n"
    )
    command = ["sweep", str(path), "--workdir", str(tmp_path / "w"), "--missing", "--dry-run"]
    assert main(command) == 2
    assert "--missing asks which rows --results DIR has; give both" in capsys.readouterr().err
    command += ["--results", str(results)]
    results.mkdir()
    for run in load_sweep(str(path))[:2]:
        head = {"kind": "run", "config": experiment_to_dict(run.experiment), "info": {}}
        line = json.dumps(head | {"lineage": {}}) + "\n"
        (results / f"{run.name}.jsonl").write_text(line)
    assert main(command) == 0
    said, first, second = capsys.readouterr().out.splitlines()
    assert said == f"2 runs have rows in {results} and are left out"
    # Its parent has rows, but to be extended it is needed whole.
    assert "--workdir " + str(tmp_path / "w/a") in first and second.startswith("fope extend")
    assert main([*command, "--only", "a,c"]) == 0
    assert capsys.readouterr().out.splitlines() == [said]


A = Train("a", QUICK)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "the sweep has no runs"),
        ([A, A], "two runs are called 'a'"),
        (
            [A, Train("b", QUICK, ("train.steps=7",))],
            r"runs 'a' and 'b' are both variant '.*' with seed 0, but .*: train\.steps \(.*, 7\)",
        ),
        ([Train("a/b", QUICK)], r"run name 'a/b'; accepted: letters, digits and _ \. \+ -"),
        ([Extend("b", "a", "yarn", 256)], "run 'b': its parent 'a' is no run before it"),
        ([A, Extend("b", "a", "t5", 256)], "run 'b': .*t5"),
        ([A, Extend("b", "a", "same", 100)], "run 'b': length 100: .* no whole rows"),
        ([Train("a", QUICK, ("train.stepz=1",))], r"run 'a': .*train\.stepz.*steps"),
        ([Train("a", "nowhere.py")], "run 'a': .*'nowhere.py' does not exist"),
        ([Train(3, QUICK)], "run 3: name = 3; accepted: a text"),
        ([Train("a", Path(QUICK))], "run 'a': config = PosixPath.*; accepted: a text"),
        ([Train("a", QUICK, "train.steps=9")], "overrides = 'train.steps=9'; accepted: a list of"),
        ([Train("a", QUICK, {"train.steps": 9})], "overrides = {'train.steps': 9}; accepted: a li"),
        ([Train("a", QUICK, None)], "run 'a': overrides = None; accepted: a list of texts"),
        (
            [A, Extend("b", "a", "yarn", 256, options=("--warn-above", 1.5))],
            r"run 'b': options = \('--warn-above', 1.5\); accepted: a list of texts",
        ),
        ([A, Extend("b", "a", "yarn", 256, options="--no-evaluate")], "options = '--no-evaluate';"),
        ([A, Extend("b", A, "yarn", 256)], r"run 'b': parent = Train\(.*; accepted: a text"),
        ([A, Extend("b", "a", None, 256)], "run 'b': method = None; accepted: a text"),
        ([A, Extend("b", "a", "yarn", 256.0)], "run 'b': argument --length: invalid int value"),
    ],
)
def test_mistakes_are_found_before_any_run(runs, message):
    with pytest.raises(ConfigError, match=message):
        check_sweep(runs)


KEPT = ("--optimizer", "keep")


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (("--optimizer", "keep"), {"optimizer": "keep"}),
        (("--optimizer=keep",), {"optimizer": "keep"}),
        (("--optimizer=keep", "--optimizer", "reset"), {"optimizer": "reset"}),
        (("--no-evaluate", *KEPT, "--match=index"), {"optimizer": "keep"}),
        (("--match", "index", "--warn-above=2", *KEPT, "--traceback"), {"optimizer": "keep"}),
        (("--config.train.steps=9",), {"overrides": ["train.steps=9"]}),
        (
            ("--config.train.steps=9", "--config.train.weight_decay=0.5", *KEPT),
            {"overrides": ["train.steps=9", "train.weight_decay=0.5"], "optimizer": "keep"},
        ),
        (("--length=512",), {"length": 512}),
        (("--method", "pi"), {"method": "pi"}),
        (("--config", "FILE"), {"config": "FILE"}),
        (("--config=FILE", "--optimizer=keep"), {"config": "FILE", "optimizer": "keep"}),
        (
            ("--config=FILE", "--config.train.steps=9"),
            {"config": "FILE", "overrides": ["train.steps=9"]},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_are_planned_as_the_verb_reads_them(options, changes, tmp_path):
    """Whatever form they have; run, too, with the verb's own parser, as the verb calls it."""
    file = tmp_path / "child.py"
    file.write_text(
        "import runpy\n"
        f"def get_config(arg=''):\n"
        f"    c = runpy.run_path({str(Path(QUICK).resolve())!r})['get_config']('position=rope')\n"
        "    c.train.length, c.train.batch_size, c.train.steps = 256, 8, 33\n"
        "    c.train.learning_rate = 0.125\n"
        "    c.position = {'method': 'rope', 'scaling': [{'scaling': 'yarn', 'factor': 2.0,"
        " 'original_length': 128}]}\n"
        "    return c\n"
    )
    options = tuple(option.replace("FILE", str(file)) for option in options)
    changes = {key: str(file) if value == "FILE" else value for key, value in changes.items()}
    parent = Train("a", f"{QUICK}:position=rope")
    first, planned = check_sweep([parent, Extend("b", "a", "yarn", 256, options=options)])

    def extend(source, method, length, workdir, *, optimizer, overrides, config, **_):
        asked.append(
            child_experiment(
                first.experiment,
                first.experiment.train.steps,
                method,
                length,
                optimizer,
                overrides,
                config=config,
            )
        )

    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend_module, "extend", extend)
        assert main(planned.command(tmp_path)) == 0
    assert asked == [planned.experiment]
    config = changes.pop("config", None)
    wanted = {"method": "yarn", "length": 256} | changes
    assert planned.experiment == child_experiment(
        first.experiment,
        first.experiment.train.steps,
        config=load_config(config) if config else None,
        **wanted,
    )
    if config:
        assert planned.experiment.train.learning_rate == 0.125
        assert planned.experiment.train.steps == (9 if "overrides" in changes else 33)
    start = first.experiment.train.steps if changes.get("optimizer") == "keep" else 0
    assert planned.experiment.train.schedule_start == start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--opt=keep",), "unknown argument '--opt=keep'"),
        (("--optimiser", "keep"), "unknown argument '--optimiser'"),
        (("--optimizer", "kept"), "argument --optimizer: invalid choice: 'kept'"),
        (("--optimizer",), "argument --optimizer: expected one argument"),
        (("--length=x",), "argument --length: invalid int value: 'x'"),
        (("--warn-above=nan",), "argument --warn-above: 'nan'; accepted: a number above 0"),
        (("--help",), "unknown argument '--help'"),
        (("keep",), "unknown argument 'keep'"),
        (("--config.train.stepz=9",), "train.stepz"),
        (("--config=nowhere.py",), "nowhere.py"),
        (("--from=elsewhere",), "unknown argument 'elsewhere'"),
        (("--workdir", "elsewhere"), "its options give another workdir, elsewhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_the_verb_refuses_are_found_before_any_run(options, message):
    with pytest.raises(ConfigError, match=f"run 'b': .*{re.escape(message)}"):
        check_sweep([A, Extend("b", "a", "same", 256, options=options)])


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
