"""Training from an empty, a half-done and a finished workdir, on real files."""

import json
import logging
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from fope_jax.checkpoint import CheckpointError, CheckpointStore
from fope_jax.config import ConfigError, Experiment, build_experiment
from fope_jax.data.build import build
from fope_jax.evaluate.metrics import read_rows
from fope_jax.train import loop
from fope_jax.train.loop import NonFiniteError, train
from fope_jax.train.workdir import git_commit

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for name in ("train_0", "train_1", "validation"):
        words = rng.permutation(TEXT.split() * 40)
        (directory / f"{name}.txt").write_text(" ".join(words))
    config = {
        "corpus": "text",
        "train_files": [f"{directory}/train_*.txt"],
        "validation_files": [f"{directory}/validation.txt"],
        "tokenizer": "bytes",
        "cache_dir": str(directory / "cache"),
    }
    build(build_experiment(values(config)).data)
    return config


def values(data: dict, **train_changes) -> dict:
    return {
        "name": "fope",
        "seed": 1,
        "model": {
            "vocab_size": 300, "d_model": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16,
            "attention": "reference",
        },
        "position": {"method": "fope"},
        "data": data,
        "train": {
            "steps": 12, "batch_size": 2, "length": 16, "learning_rate": 1e-2, "warmup_steps": 2,
            "log_every": 3, "save_every": 4,
        } | train_changes,
    }  # fmt: skip


def experiment(data: dict, **train_changes) -> Experiment:
    return build_experiment(values(data, **train_changes))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(experiment(data), workdir)
    return workdir


def arrays(workdir: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint as bytes, through Orbax and not through our own restore."""
    tree = CheckpointStore(workdir / "checkpoints")._orbax.restore(
        workdir.absolute() / "checkpoints" / str(step)
    )
    leaves = jax.tree_util.tree_flatten_with_path(dict(tree.items()))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def losses(workdir: Path) -> list[tuple]:
    rows = read_rows(workdir / "metrics.jsonl")
    return [
        (r["step"], r["nats"], r["tokens"], r["grad_norm"]) for r in rows if r["kind"] == "train"
    ]


def test_a_run_leaves_rows_checkpoints_and_its_provenance(finished, data):
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

    assert build_experiment(json.loads((finished / "config.json").read_text())) == experiment(data)
    run = json.loads((finished / "run.json").read_text())
    assert run["parameters"] == 2 * 300 * 16 + 4 * 16 * 16 + 3 * 16 * 16 + 3 * 16
    assert run["position"]["summary"].startswith("fope(")
    assert run["versions"]["jax"] == jax.__version__
    assert (run["seed"], run["resumed"]) == (1, [])


def test_a_finished_run_says_so_and_changes_nothing(finished, data, caplog, monkeypatch):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    monkeypatch.setattr(loop, "open_cache", lambda *a: pytest.fail("data was opened"))
    with caplog.at_level(logging.INFO, logger="fope_jax"):
        train(experiment(data), finished)
    assert "is finished: 12 steps" in caplog.text
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


@pytest.fixture(scope="module")
def half_done(data, tmp_path_factory) -> Path:
    """A run that stopped in step 11 of 12; copied by the tests that go on with it."""

    class Interrupted(Exception):
        pass

    class Loader(loop.Loader):
        def iterate(self, start, count):
            for step, batch in enumerate(super().iterate(start, count), start):
                if step == 10:
                    raise Interrupted
                yield batch

    workdir = tmp_path_factory.mktemp("runs") / "half_done"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "Loader", Loader)
        train(experiment(data), workdir)
    return workdir


@pytest.fixture
def interrupted(half_done, tmp_path) -> Path:
    return Path(shutil.copytree(half_done, tmp_path / "run"))


@pytest.mark.parametrize("damage", [False, True])
def test_resuming_gives_the_bits_and_rows_of_the_unbroken_run(finished, interrupted, data, damage):
    before = read_rows(interrupted / "metrics.jsonl")
    assert before[-1]["step"] == 9
    if damage:
        files = (interrupted / "checkpoints/8").glob("params/**/*")
        payload = max(files, key=lambda p: p.stat().st_size)
        payload.write_bytes(payload.read_bytes()[:-1] + b"\0")
        with pytest.warns(UserWarning, match="8 is damaged"):
            train(experiment(data), interrupted)
    else:
        train(experiment(data), interrupted)
    assert losses(interrupted) == losses(finished)
    assert arrays(interrupted, 12) == arrays(finished, 12)
    run = json.loads((interrupted / "run.json").read_text())
    assert [start["step"] for start in run["resumed"]] == [4 if damage else 8]
    kept = [row for row in before if row["step"] <= run["resumed"][0]["step"]]
    after = read_rows(interrupted / "metrics.jsonl")
    assert after[: len(kept)] == kept
    assert after[-1]["seconds"] > kept[-1]["seconds"], "the clock goes on"


def test_accumulation_trains_the_same_model(finished, data, tmp_path):
    train(experiment(data, accumulate=2), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=2e-3)


def test_windows_pass_their_positions_once_and_train_the_same_model(data, tmp_path, monkeypatch):
    def windows():
        return build_experiment(values(data | {"packing": "windows"}, steps=4))

    train(windows(), tmp_path / "once")
    shapes = []

    def keep(batch, packing):
        shapes.append((real(batch, packing).positions.shape, packing))
        return batch

    real = loop.share_positions
    monkeypatch.setattr(loop, "share_positions", keep)
    train(windows(), tmp_path / "every_row")
    assert set(shapes) == {((1, 16), "windows")}
    np.testing.assert_allclose(losses(tmp_path / "once"), losses(tmp_path / "every_row"), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_with_its_step(data, tmp_path, monkeypatch):
    class Loader(loop.Loader):
        def iterate(self, start, count):
            for step, batch in enumerate(super().iterate(start, count), start + 1):
                yield batch._replace(weights=batch.weights * np.float32(np.nan if step == 5 else 1))

    monkeypatch.setattr(loop, "Loader", Loader)
    with pytest.raises(NonFiniteError, match="step 5: loss is nan.*nothing has been saved since"):
        train(experiment(data), tmp_path)
    assert losses(tmp_path)[-1][0] == 4
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() == 4


def test_parameters_that_are_not_finite_are_never_saved(data, tmp_path):
    # The only update overflows; its loss and gradient are those before it, and finite.
    huge = {"learning_rate": 3e38, "weight_decay": 100.0, "warmup_steps": 0}
    with pytest.raises(NonFiniteError, match="a parameter is not finite after step 1"):
        train(experiment(data, steps=1, **huge), tmp_path)
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() is None


def test_a_workdir_of_another_configuration_is_refused(finished, data):
    with pytest.raises(ConfigError, match="another configuration") as caught:
        train(experiment(data, length=32, learning_rate=5e-3), finished)
    assert str(caught.value).splitlines()[1:] == [
        "  position.training_length: 16, now 32",
        "  train.learning_rate: 0.01, now 0.005",
        "  train.length: 16, now 32",
    ]


def test_a_run_from_before_a_field_was_added_goes_on(finished, data, tmp_path, caplog):
    """Its config.json lacks fields of today and spells another one as it was."""
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    stored = json.loads((old / "config.json").read_text())
    for name in ("norm", "tie_embeddings"):
        del stored["model"][name]
    stored["model"]["qk_norm"] = False
    (old / "config.json").write_text(json.dumps(stored))
    caplog.set_level(logging.INFO, logger="fope_jax")
    train(experiment(data), old)
    assert "is finished: 12 steps are trained" in caplog.text
    assert json.loads((old / "config.json").read_text())["model"]["qk_norm"] == "none"


def test_a_workdir_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write to workdir {tmp_path}/file/run: Not a dir"):
        train(experiment(data), tmp_path / "file" / "run")


def test_a_vocabulary_larger_than_the_embedding_fails_before_the_model(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "new_state", lambda *a, **k: pytest.fail("a model was made"))
    small = values(data)
    small["model"]["vocab_size"] = 100
    with pytest.raises(ConfigError, match=r"tokenizer has \d+ tokens but .*vocab_size = 100"):
        train(build_experiment(small), tmp_path)


def test_text_that_changed_under_a_run_is_refused(data, interrupted, monkeypatch):
    real = loop.open_cache

    def other(config, split):
        cache = real(config, split)
        cache.fingerprint = "0" * 16
        return cache

    monkeypatch.setattr(loop, "open_cache", other)
    with pytest.raises(CheckpointError, match="its data fingerprint is .*, this run's is 0000"):
        train(experiment(data), interrupted)


def test_the_commit_is_known_in_a_checkout_only(tmp_path):
    assert git_commit(tmp_path) is None
    commit = git_commit(Path(loop.__file__).parent)
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
