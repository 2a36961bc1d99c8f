"""Training a finished run longer: its bits, its learning rate, and what says that it was done."""

import json
import shutil

import pytest

from fope_jax.config import build_experiment, experiment_to_dict, incompatible_changes
from fope_jax.data import task_mixture
from fope_jax.evaluate.metrics import read_rows
from fope_jax.main import main
from fope_jax.report.lineage import lineage_sentences
from fope_jax.report.rows import read_run
from fope_jax.train.continuation import continued_experiment
from fope_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("compile_once")


def go_on(workdir, steps, *overrides):
    command = ["train", "--continue-for", str(steps), "--workdir", str(workdir)]
    assert main([*command, *overrides]) == 0


def read(path):
    return json.loads(path.read_text())


def rates(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return {row["step"]: row["learning_rate"] for row in rows if row["kind"] == "train"}


@pytest.mark.slow  # trains three times
def test_a_constant_rate_goes_on_with_the_bits_of_an_unbroken_run(runs, tmp_path):
    def experiment(steps):
        return runs.experiment(method="nope", schedule="constant", steps=steps)

    train(experiment(4), tmp_path / "longer")
    go_on(tmp_path / "longer", 4)
    train(experiment(8), tmp_path / "unbroken")
    assert runs.arrays(tmp_path / "longer", 8) == runs.arrays(tmp_path / "unbroken", 8)
    assert read(tmp_path / "longer/config.json") == read(tmp_path / "unbroken/config.json")
    (record,) = read(tmp_path / "longer/run.json")["continued"]
    assert record == {"from": 4, "to": 8, "learning_rate": "learning rate 0.01, constant"}
    assert "continued" not in read(tmp_path / "unbroken/run.json")


@pytest.mark.slow
def test_after_a_cosine_decay_its_last_rate_is_kept_and_the_results_say_so(
    rope, runs, tmp_path, caplog
):
    workdir = shutil.copytree(rope, tmp_path / "rope")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(task_mixture, patch, at=14)
        go_on(workdir, 4, "--config.train.save_every=1")
    assert not (workdir / "checkpoints/16").exists()
    go_on(workdir, 4, "--config.train.save_every=1")  # stopped, the same command goes on
    after = rates(workdir)
    assert max(after) == 16
    assert {step: after[step] for step in (12, 13, 16)} == pytest.approx(
        dict.fromkeys((12, 13, 16), 1e-3)
    )
    config = read(workdir / "config.json")["train"]
    assert (config["steps"], config["decay_steps"]) == (16, 12)
    (sentence,) = lineage_sentences([read_run(workdir)])
    assert sentence == (
        "fope was trained for 12 steps, then longer, to 16: learning rate 0.001, constant since "
        "its cosine decay ended at step 12."
    )
    # The command that first trained it has nothing to do, and changes nothing.
    train(runs.experiment(method="rope"), workdir)
    assert "is finished: 16 steps are trained" in caplog.text
    assert read(workdir / "config.json")["train"] == config
    assert continued_experiment(workdir, 4).train.steps == 20  # once it is done, as many again


def test_killed_between_run_json_and_config_json_the_same_request_has_the_same_end(rope, tmp_path):
    workdir = shutil.copytree(rope, tmp_path / "rope")
    run = read(workdir / "run.json") | {"continued": [{"from": 12, "to": 16}]}
    (workdir / "run.json").write_text(json.dumps(run))
    longer = continued_experiment(workdir, 4).train
    assert (longer.steps, longer.decay_steps) == (16, 12)


def with_config(rope, workdir, **changes):
    shutil.copytree(rope, workdir)
    values = read(workdir / "config.json")
    values["train"] |= changes
    (workdir / "config.json").write_text(json.dumps(values))
    return workdir


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"steps": 20}, [], "has trained 12 of its 20 steps; `fope train --config .*config.json"),
        ({"final_learning_rate_fraction": 0.0}, [], "ended at a learning rate of 0, .*fope extend"),
        ({}, ["--config.train.steps=20"], "--continue-for says how many steps are added"),
        ({}, ["--config.train.stpes=20"], "nearest: train.steps"),
    ],
)
def test_what_cannot_go_on_says_what_to_do(rope, tmp_path, changes, overrides, message):
    workdir = with_config(rope, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        continued_experiment(workdir, 4, overrides)


@pytest.mark.parametrize("origin", ["imported", "untrained"])
def test_weights_that_were_not_trained_here_go_on_by_extension(rope, tmp_path, origin):
    workdir = with_config(rope, tmp_path / "run")
    info = read(workdir / "run.json") | {origin: {}}
    (workdir / "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="no training here.*fope extend .* --method same"):
        continued_experiment(workdir, 4, [])


def test_a_change_of_the_model_is_refused(rope, tmp_path, capsys):
    workdir = shutil.copytree(rope, tmp_path / "rope")
    command = ["train", "--continue-for", "4", "--workdir", str(workdir)]
    assert main([*command, "--config.model.mlp_dim=32"]) == 2
    assert "model.mlp_dim: 16, now 32" in capsys.readouterr().err
    assert "continued" not in read(workdir / "run.json")


@pytest.mark.parametrize(
    ("before", "after", "is_accepted"),
    [
        ({"steps": 12}, {"steps": 16, "decay_steps": 12}, True),
        ({"steps": 16, "decay_steps": 12}, {"steps": 12}, True),
        ({"steps": 12}, {"steps": 16}, False),
        ({"steps": 12}, {"steps": 12, "decay_steps": 10}, False),
        ({"steps": 16, "decay_steps": 12}, {"steps": 20, "decay_steps": 16}, False),
        ({"steps": 12, "schedule": "constant"}, {"steps": 16, "schedule": "constant"}, True),
        ({"steps": 12, "schedule": "constant"}, {"steps": 16, "decay_steps": 12}, False),
    ],
)
def test_steps_may_change_where_no_rate_of_a_finished_step_does(runs, before, after, is_accepted):
    values = (experiment_to_dict(build_experiment(runs.values(**c))) for c in (before, after))
    assert (incompatible_changes(*values) == []) == is_accepted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--continue-for", "4"], "are required: --workdir"),
        (["--continue-for", "4", "--workdir", "x", "--config", "c.py"], "takes the configuration"),
        (["--continue-for", "-4", "--workdir", "x"], "'-4'; accepted: an integer of 1 or more"),
    ],
)
def test_continue_for_takes_a_workdir_and_no_config(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["train", *arguments])
    assert message in capsys.readouterr().err
