"""A small sweep on real processes: train, extend, evaluate, report, and nothing twice."""

import signal
import subprocess
import sys
import time

import pytest

from fope_jax.main import main
from fope_jax.storage.checkpoint import CheckpointStore

SWEEP = """
from fope_jax.sweep.runs import Extend, Train

TINY = (
    "data.corpus=text", "data.tokenizer=bytes", "data.cache_dir={0}/cache",
    "data.train_files={0}/train.txt", "data.validation_files={0}/validation.txt",
    "model.vocab_size=259", "model.num_layers=1", "model.d_model=16", "model.num_heads=2",
    "model.mlp_dim=16", "train.length=16", "train.batch_size=2", "train.steps=4",
    "evaluate.lengths=1,2", "evaluate.num_windows=2", "evaluate.position_windows=0",
    "evaluate.passkey_trials=0", "evaluate.texts=letters={0}/letters.txt",
)


def get_sweep(arg=""):
    runs = []
    for seed in (0, 1):
        config = f"configs/quickstart.py:position=rope,seed={{seed}}"
        runs.append(Train(f"rope_{{seed}}", config, TINY))
        runs.append(Extend(f"rope_yarn_{{seed}}", f"rope_{{seed}}", "yarn", 32))
    return runs
"""


def build_data(directory):
    for name in ("train", "validation", "letters"):
        (directory / f"{name}.txt").write_text(f"Some text to {name} with, over and over. " * 40)
    values = (
        "data.corpus=text",
        "data.tokenizer=bytes",
        f"data.cache_dir={directory}/cache",
        f"data.train_files={directory}/train.txt",
        "model.vocab_size=259",
        f"data.validation_files={directory}/validation.txt",
    )
    config = ["--config", "configs/quickstart.py:position=rope"]
    assert main(["data", "build", *config, *(f"--config.{value}" for value in values)]) == 0


@pytest.mark.slow
def test_a_sweep_from_file_to_page(tmp_path, capsys):
    build_data(tmp_path)
    path, workdir = tmp_path / "sweep.py", tmp_path / "runs"
    path.write_text(SWEEP.format(tmp_path))
    command = ["sweep", str(path), "--workdir", str(workdir), "--jobs", "2"]
    command += ["--results", str(tmp_path / "results")]
    assert main(command) == 0
    page = (workdir / "report" / "index.html").read_text()
    assert "Differences between variants (letters)" in page
    assert "rope+yarn-32" in page
    stamps = {p: p.stat().st_mtime_ns for p in workdir.glob("*/sweep.json")}
    assert len(stamps) == 4
    assert main(command) == 0  # everything is done
    assert {p: p.stat().st_mtime_ns for p in workdir.glob("*/sweep.json")} == stamps
    kept = sorted((tmp_path / "results").iterdir())
    assert [p.name for p in kept] == [
        "rope_0.jsonl",
        "rope_1.jsonl",
        "rope_yarn_0.jsonl",
        "rope_yarn_1.jsonl",
    ]
    assert main(["report", *map(str, kept), "-o", str(tmp_path / "page")]) == 0
    assert "goes on from rope" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_ends_leaves_no_run_behind(tmp_path, number):
    """Killed too: its run notices, saves and ends."""
    build_data(tmp_path)
    path, workdir = tmp_path / "sweep.py", tmp_path / "runs"
    path.write_text(SWEEP.format(tmp_path).replace("steps=4", "steps=1000000"))
    command = [sys.executable, "-m", "fope_jax.main", "sweep", path, "--workdir", workdir]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = workdir / "rope_0"
    wait_for(lambda: (run / "metrics.jsonl").exists() and "train" in read(run / "metrics.jsonl"))
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
    wait_for(lambda: not (run / "run.lock").exists())
    assert "fope: stopped by SIGTERM after step" in read(workdir / "rope_0.log")
    assert CheckpointStore(run / "checkpoints").latest_valid_step()


def read(path):
    return path.read_text() if path.exists() else ""


def wait_for(what, seconds=90):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
