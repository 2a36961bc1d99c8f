"""Training from an empty, a half-done and a finished workdir, on real files."""

import json
import logging
import math
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from fope_jax.config import ConfigError, build_experiment
from fope_jax.data import task_mixture
from fope_jax.data.cache import open_cache
from fope_jax.data.loader import Loader
from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.restore import load_run
from fope_jax.evaluate.run import evaluate
from fope_jax.evaluate.run_data import RunData
from fope_jax.extend.parent import open_parent
from fope_jax.extend.run import extend
from fope_jax.interop.run_export import export_run
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.train import goodput, loop, metrics
from fope_jax.train.bad_steps import BadStepError
from fope_jax.train.goodput import PhaseTimer
from fope_jax.train.loop import train
from fope_jax.train.metrics import MetricsBuffer
from fope_jax.train.state import plan_state
from fope_jax.train.step import StepMetrics
from fope_jax.train.workdir import git_commit, package_commit


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    """A run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(runs.experiment(), workdir)
    return workdir


def test_a_run_leaves_rows_checkpoints_and_its_provenance(finished, runs):
    rows = [r for r in read_rows(finished / "metrics.jsonl") if r["kind"] == "train"]
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 12]
    for row in rows:
        assert row["tokens_seen"] == row["step"] * 2 * 16
        assert row["loss"] == pytest.approx(row["nats"] / row["tokens"])
        assert 0 <= row["data_wait_fraction"] <= 1 and row["tokens_per_second"] > 0
    assert sum(row["tokens"] for row in rows) == pytest.approx(12 * 2 * 16, abs=4)
    assert rows[0]["loss"] == pytest.approx(math.log(300), abs=0.2)
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3)
    assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["12", "8"]
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))

    assert build_experiment(json.loads((finished / "config.json").read_text())) == runs.experiment()
    run = json.loads((finished / "run.json").read_text())
    assert run["parameters"] == 2 * 300 * 16 + 4 * 16 * 16 + 3 * 16 * 16 + 3 * 16
    assert run["position"]["summary"].startswith("fope(")
    assert run["versions"]["jax"] == jax.__version__
    assert (run["seed"], run["resumed"]) == (1, [])


class Clock:
    """In place of the module ``time``; a test says how it goes on."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


def test_the_tokens_per_second_and_the_share_of_waiting_of_a_row(runs, monkeypatch):
    """Two updates of 4 x 16 tokens, each after 0.25 s for its batch, in 2 s."""
    monkeypatch.setattr(metrics, "time", clock := Clock())

    def batches():
        for _ in range(2):
            clock.now += 0.25
            yield object()

    buffer = MetricsBuffer(runs.experiment(batch_size=4), seconds_before=30.0, saved=None)
    for _ in buffer.time_waiting(batches()):
        clock.now += 0.75
        buffer.add(StepMetrics(nats=120.0, tokens=60.0, grad_norm=1.0, skipped=0.0))
    assert buffer.fetch(6) == (0.5, 1.5)
    row = buffer.take_row(6)
    assert (row["tokens_per_second"], row["data_wait_fraction"]) == (64.0, 0.25)
    assert (row["seconds"], row["tokens_seen"], row["loss"]) == (32.0, 6 * 4 * 16, 2.0)


def test_the_start_of_a_run_is_without_restoring_and_with_what_was_lost_before(monkeypatch):
    """The seconds that an earlier process lost are none of this one."""
    monkeypatch.setattr(goodput, "time", clock := Clock())
    timer = PhaseTimer(seconds_before=10.0)
    with timer.phase("restore"):
        clock.now += 3.0
    timer.add("lost", 5.0)
    clock.now += 1.0
    timer.end_startup()
    seconds = {row["phase"]: row["seconds"] for row in timer.take_rows(8)}
    assert seconds == {"restore": 3.0, "lost": 5.0, "start": 11.0}


def test_a_finished_run_says_so_and_changes_nothing(finished, runs, caplog, monkeypatch):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    monkeypatch.setattr(RunData, "open", lambda *a: pytest.fail("data was opened"))
    with caplog.at_level(logging.INFO, logger="fope_jax"):
        train(runs.experiment(), finished)
    assert "is finished: 12 steps" in caplog.text
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("later", "evaluates_again", "expected"),
    [
        ([], False, 25.0),  # the process that made the checkpoint died after it
        ([("restore", 2), ("start", 1), ("lost", 9), ("compile", 10)], False, 10.0),
        ([("restore", 2), ("compile", 10), ("restore", 2), ("compile", 7)], False, 7.0),
        ([], True, 5.0),  # the evaluation is made again, and so was lost
    ],
)
def test_what_the_last_process_did_at_its_checkpoint_is_not_lost(later, evaluates_again, expected):
    """Its clock held that and no more; what earlier ones did there has rows as well."""
    first = [("step", 30), ("save", 5), ("validation", 20)]
    rows = [
        {"kind": "time", "phase": phase, "step": 4, "seconds": seconds}
        for phase, seconds in [*first, *later]
    ]
    rows.insert(0, {"kind": "time", "phase": "compile", "step": 0, "seconds": 50})
    rows.append({"kind": "train", "step": 5, "seconds": 60})
    assert loop._seconds_at_checkpoint(rows, 4, evaluates_again) == expected


@pytest.fixture(scope="module")
def half_done(runs, tmp_path_factory):
    """A run that stopped in step 11 of 12; copied by the tests that go on with it."""

    workdir = tmp_path_factory.mktemp("runs") / "half_done"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(task_mixture, patch, at=10)
        train(runs.experiment(), workdir)
    return workdir


@pytest.fixture
def interrupted(half_done, tmp_path):
    return Path(shutil.copytree(half_done, tmp_path / "run"))


@pytest.mark.parametrize("damage", [False, True])
def test_resuming_gives_the_bits_and_rows_of_the_unbroken_run(finished, interrupted, runs, damage):
    before = read_rows(interrupted / "metrics.jsonl")
    assert max(row["step"] for row in before) == 9
    if damage:
        files = (interrupted / "checkpoints/8").glob("params/**/*")
        payload = max(files, key=lambda p: p.stat().st_size)
        payload.write_bytes(payload.read_bytes()[:-1] + b"\0")
        with pytest.warns(UserWarning, match="8 is damaged"):
            train(runs.experiment(), interrupted)
    else:
        train(runs.experiment(), interrupted)
    assert runs.losses(interrupted) == runs.losses(finished)
    assert runs.arrays(interrupted, 12) == runs.arrays(finished, 12)
    run = json.loads((interrupted / "run.json").read_text())
    assert [start["step"] for start in run["resumed"]] == [4 if damage else 8]
    kept = [row for row in before if row["step"] <= run["resumed"][0]["step"]]
    after = read_rows(interrupted / "metrics.jsonl")
    assert after[: len(kept)] == kept
    trained = {row["step"]: row["seconds"] for row in before if row["kind"] == "train"}
    (lost,) = [row["seconds"] for row in after if row.get("phase") == "lost"]
    resumed = 4 if damage else 8
    since_checkpoint = trained[9] - trained[resumed]
    at_it = {
        row["phase"]: row["seconds"]
        for row in kept
        if row.get("phase") in ("save", "validation") and row["step"] == resumed
    }
    assert at_it.keys() >= {"save"} and lost > 0
    assert lost == pytest.approx(since_checkpoint - sum(at_it.values()), abs=1e-3), (
        "not what was kept"
    )
    clock = [row["seconds"] for row in after if row["kind"] == "train"]
    assert clock == sorted(set(clock)), "it goes on"


@pytest.mark.slow  # step_test compares its gradients
def test_accumulation_trains_the_same_model(finished, runs, tmp_path):
    train(runs.experiment(accumulate=2), tmp_path)
    np.testing.assert_allclose(runs.losses(tmp_path), runs.losses(finished), rtol=2e-3)


@pytest.mark.slow
def test_windows_pass_their_positions_once_and_train_the_same_model(runs, tmp_path, monkeypatch):
    def windows():
        return build_experiment(runs.values(runs.data | {"packing": "windows"}, steps=4))

    train(windows(), tmp_path / "once")
    shapes = []

    def keep(batch, experiment):
        shapes.append((real(batch, experiment).positions.shape, experiment.data.packing))
        return batch

    real = loop.share_positions
    monkeypatch.setattr(loop, "share_positions", keep)
    train(windows(), tmp_path / "every_row")
    assert set(shapes) == {((1, 16), "windows")}
    np.testing.assert_allclose(
        runs.losses(tmp_path / "once"), runs.losses(tmp_path / "every_row"), rtol=1e-5
    )


def test_a_loss_that_is_not_finite_stops_with_its_step(runs, tmp_path, monkeypatch):
    class Loader(task_mixture.Loader):
        def iterate(self, start, count):
            for step, batch in enumerate(super().iterate(start, count), start + 1):
                yield batch._replace(weights=batch.weights * np.float32(np.nan if step == 5 else 1))

    monkeypatch.setattr(task_mixture, "Loader", Loader)
    with pytest.raises(BadStepError, match="step 5: loss is nan.*nothing has been saved since"):
        train(runs.experiment(), tmp_path)
    assert runs.losses(tmp_path)[-1][0] == 4
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() == 4


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_never_saved(runs, tmp_path):
    # The only update overflows; its loss and gradient are those before it, and finite.
    huge = {"learning_rate": 3e38, "weight_decay": 100.0, "warmup_steps": 0}
    with pytest.raises(BadStepError, match="a parameter is not finite after step 1"):
        train(runs.experiment(steps=1, **huge), tmp_path)
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() is None


def test_a_workdir_of_another_configuration_is_refused(finished, runs):
    with pytest.raises(ConfigError, match="another configuration") as caught:
        train(runs.experiment(length=32, learning_rate=5e-3), finished)
    assert str(caught.value).splitlines()[1:] == [
        "  position.training_length: 16, now 32",
        "  train.learning_rate: 0.01, now 0.005",
        "  train.length: 16, now 32",
    ]


def test_more_steps_in_a_finished_run_say_how_they_are_trained(finished, runs):
    with pytest.raises(
        ConfigError, match="train.steps: 12, now 20\nWith train.decay_steps = 12 as"
    ):
        train(runs.experiment(steps=20), finished)
    with pytest.raises(ConfigError, match="train.steps: 12, now 8$"):
        train(runs.experiment(steps=8), finished)


def test_a_warmup_that_does_not_end_is_said(runs, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fope_jax"):
        train(runs.experiment(steps=1, warmup_steps=50), tmp_path)
    assert "train.warmup_steps = 50, train.steps = 1: the learning rate rises to" in caplog.text


def test_a_run_from_before_a_field_was_added_goes_on(finished, runs, tmp_path, caplog):
    """Its config.json lacks fields of today and spells another one as it was."""
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    stored = json.loads((old / "config.json").read_text())
    for name in ("norm", "tie_embeddings"):
        del stored["model"][name]
    stored["model"]["qk_norm"] = False
    (old / "config.json").write_text(json.dumps(stored))
    caplog.set_level(logging.INFO, logger="fope_jax")
    train(runs.experiment(), old)
    assert "is finished: 12 steps are trained" in caplog.text
    assert json.loads((old / "config.json").read_text())["model"]["qk_norm"] == "none"


def test_a_workdir_that_cannot_be_written_is_named(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write to workdir {tmp_path}/file/run: Not a dir"):
        train(runs.experiment(), tmp_path / "file" / "run")


def test_a_vocabulary_larger_than_the_embedding_fails_before_the_model(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "init_train_state", lambda *a, **k: pytest.fail("a model was made"))
    small = runs.values()
    small["model"]["vocab_size"] = 100
    with pytest.raises(ConfigError, match=r"tokenizer has \d+ tokens but .*vocab_size = 100"):
        train(build_experiment(small), tmp_path)


def test_text_that_changed_under_a_run_is_refused(runs, interrupted, monkeypatch):
    real = RunData.open

    def other(data, split):
        cache = real(data, split)
        cache.fingerprint = "0" * 16
        return cache

    monkeypatch.setattr(RunData, "open", other)
    with pytest.raises(CheckpointError, match="its data fingerprint is .*, this run's is 0000"):
        train(runs.experiment(), interrupted)


@pytest.mark.slow
def test_another_position_embedding_is_told_with_both_and_what_to_do(
    runs, interrupted, tmp_path, caplog
):
    """On resume, evaluation, export and extension, each with the flag that would accept it."""
    config = json.loads((interrupted / "config.json").read_text())
    config["position"]["theta"] = 500.0
    config["evaluate"]["passkey_trials"] = 0
    (interrupted / "config.json").write_text(json.dumps(config))
    other = build_experiment(config)
    attempts = (
        lambda *accept: train(other, interrupted, *accept),
        lambda: evaluate(interrupted, say=pytest.fail),
        lambda: export_run(interrupted, tmp_path / "out"),
        lambda: extend(interrupted, "same", 32, tmp_path / "child"),
    )
    for attempt in attempts:
        with pytest.raises(CheckpointError) as caught:
            attempt()
        message = str(caught.value)
        trained_with = r"fingerprint [0-9a-f]{16} \(fope\(.*theta=10000,.* constants \w+\), but"
        assert re.search(trained_with, message)
        assert re.search(r"configuration give [0-9a-f]{16} \(fope\(.*theta=500,", message)
        assert "fope extend RUN --method METHOD --length TOKENS" in message
        accepted = re.fullmatch(
            r".*this one all the same: --accept-position ([0-9a-f]{16})", message
        )
        assert not (tmp_path / "child").exists() and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="another position embedding"):
        attempts[0]("0" * 16)
    load_run(interrupted, accept_position=accepted[1])
    open_parent(interrupted, accept_position=accepted[1]).load(plan_state(other), False)
    with caplog.at_level(logging.WARNING, logger="fope_jax"):
        attempts[0](accepted[1])
    assert f"accepted as {accepted[1]}" in caplog.text
    assert load_run(interrupted).step == 12, "its own from now on"


def test_a_configuration_written_before_a_field_was_added_still_resumes(runs, finished, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    config = json.loads((workdir / "config.json").read_text())
    for field in ("first_lengths", "schedule_start", "data_start"):
        del config["train"][field]
    (workdir / "config.json").write_text(json.dumps(config))
    train(runs.experiment(), workdir)
    assert runs.arrays(workdir, 12) == runs.arrays(finished, 12)


# ---------------------------------------------------------------------------- curricula of lengths


LENGTHS = {"first_lengths": ("8=5",), "save_every": 3}


@pytest.fixture(scope="module")
def curriculum(runs, tmp_path_factory):
    """8 tokens for 5 updates, then 16; never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "curriculum"
    train(runs.experiment(**LENGTHS), workdir)
    return workdir


@pytest.mark.slow
def test_lengths_one_after_the_other_keep_the_tokens_of_an_update(curriculum, runs):
    rows = [row for row in read_rows(curriculum / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [3, 5, 6, 9, 12], "a stage ends a row"
    assert [row["tokens_seen"] for row in rows] == [32 * row["step"] for row in rows]
    cache = open_cache(runs.experiment().data, "train")
    seen = [
        Loader(cache, length=length, batch_size=size, seed=1, window=16).batch(step).weights.sum()
        for step in range(12)
        for length, size in [(8, 4) if step < 5 else (16, 2)]
    ]
    assert [row["tokens"] for row in rows] == [
        sum(seen[start:stop]) for start, stop in ((0, 3), (3, 5), (5, 6), (6, 9), (9, 12))
    ]
    times = [row for row in read_rows(curriculum / "metrics.jsonl") if row["kind"] == "time"]
    assert [row["step"] for row in times if row["phase"] == "compile"] == [0, 5]
    config = json.loads((curriculum / "config.json").read_text())
    assert config["position"]["training_length"] == 16, "the last length, from the beginning"


@pytest.mark.slow
def test_a_curriculum_resumed_in_every_stage_has_the_bits_of_the_unbroken_run(
    curriculum, runs, tmp_path
):
    for at, saved in ((4, 3), (7, 6)):  # in the first stage, and again in the second
        with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Interrupted):
            runs.interrupt(task_mixture, patch, at=at)
            train(runs.experiment(**LENGTHS), tmp_path)
        assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() == saved
    train(runs.experiment(**LENGTHS), tmp_path)
    assert runs.losses(tmp_path) == runs.losses(curriculum)
    assert runs.arrays(tmp_path, 12) == runs.arrays(curriculum, 12)


def test_the_commit_is_known_in_a_checkout_only(tmp_path):
    assert git_commit(tmp_path) is None
    commit = git_commit(Path(loop.__file__).parent)
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_an_installed_package_names_the_commit_that_pip_records(tmp_path):
    """And not that of a repository around it, as where a project keeps its .venv."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-qm", "x"]
    subprocess.run(["git", "-C", tmp_path, *commit], check=True)
    root = tmp_path / "site-packages"
    metadata = root / "fope_jax-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    assert git_commit(root) is not None and package_commit(root) is None
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fope-jax\nVersion: 0.1.0\n")
    assert package_commit(root) is None
    for origin, found in (({"dir_info": {}}, None), ({"vcs_info": {"commit_id": "12ab"}}, "12ab")):
        (metadata / "direct_url.json").write_text(json.dumps({"url": "https://host/x"} | origin))
        assert package_commit(root) == found


def test_a_packed_checkout_names_its_commit_by_a_file(tmp_path):
    assert package_commit(tmp_path) is None
    for text, commit in (("12ab-dirty\n", "12ab-dirty"), ("unknown\n", None)):
        (tmp_path / "COMMIT").write_text(text)
        assert package_commit(tmp_path) == commit
    (tmp_path / "COMMIT").write_text("12ab\n")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)  # without a commit
    assert package_commit(tmp_path) == "12ab"
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-qm", "x"]
    subprocess.run(["git", "-C", tmp_path, *commit], check=True)
    assert package_commit(tmp_path) == git_commit(tmp_path) != "12ab"  # where git tells, git tells
