"""The doctor finds what is wrong with a run, says what to do, and a repair deletes nothing."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import json
import math
import shutil
import socket

import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax import doctor
from fope_jax.config import build_experiment, experiment_to_dict
from fope_jax.data.build import build
from fope_jax.data.cache_directories import cache_directory
from fope_jax.doctor.checks import RowSchedule
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.main import main
from fope_jax.storage import lock
from fope_jax.storage.checkpoint import MANIFEST, CheckpointStore
from fope_jax.storage.files import write_json

LOG_EVERY, SAVE_EVERY, STEPS = 3, 4, 12
TRAIN_STEPS = [3, 4, 6, 8, 9, 12]


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory):
    """A finished run of 12 steps with checkpoints at 8 and 12, made without training."""
    directory = tmp_path_factory.mktemp("sound")
    for name in ("train", "held"):
        (directory / f"{name}.txt").write_text(f"{name} " + "some words " * 50)
    experiment = build_experiment(
        {
            "name": "rope",
            "seed": 1,
            "model": {
                "vocab_size": 300,
                "d_model": 16,
                "num_layers": 1,
                "num_heads": 2,
                "mlp_dim": 16,
            },
            "position": {"method": "rope"},
            "data": {
                "corpus": "text",
                "train_files": [f"{directory}/train.txt"],
                "validation_files": [f"{directory}/held.txt"],
                "tokenizer": "bytes",
                "cache_dir": f"{directory}/cache",
            },
            "train": {
                "steps": STEPS,
                "batch_size": 2,
                "length": 16,
                "log_every": LOG_EVERY,
                "save_every": SAVE_EVERY,
            },
        }
    )
    cache = build(experiment.data)["train"]
    run = directory / "run"
    run.mkdir()
    write_json(run / "config.json", experiment_to_dict(experiment))
    write_json(run / "run.json", {"name": "rope"})
    _, identity = checkpoint_fingerprint(experiment.position, experiment.model.shape, {})
    store = CheckpointStore(run / "checkpoints")
    for step in (8, 12):
        items = {"params": {"w": jnp.full(64, step, jnp.float32)}}
        store.save(step, items, identity | {"data": cache.fingerprint})
    store.close()
    write_rows(run, [train_row(step) for step in TRAIN_STEPS])
    return run


@pytest.fixture
def run(sound_run, tmp_path):
    """A copy of the run and of its cache, to be broken."""
    copy = tmp_path / "run"
    shutil.copytree(sound_run, copy)
    shutil.copytree(sound_run.parent / "cache", tmp_path / "cache")
    config = json.loads((copy / "config.json").read_text())
    config["data"]["cache_dir"] = str(tmp_path / "cache")
    write_json(copy / "config.json", config)
    return copy


def train_row(step, **changes):
    return {"kind": "train", "step": step, "tokens_seen": step * 32, "loss": 2.5} | changes


def write_rows(run, rows, end=""):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text + end)


def found(run):
    """The problems, and the notes."""
    findings = [finding for check in doctor.examine(run) for finding in check.findings]
    problems = [finding for finding in findings if not finding.harmless]
    return problems, [finding for finding in findings if finding.harmless]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def payload(run, step):
    files = (p for p in (run / "checkpoints" / str(step)).glob("*/**/*") if p.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def test_a_sound_run(run, capsys):
    assert found(run) == ([], [])
    assert main(["doctor", str(run)]) == 0
    out = capsys.readouterr().out
    assert "checkpoints  sound    2 sound (8, 12)" in out
    assert "metrics      sound    6 rows, train rows to step 12" in out
    assert main(["doctor", str(run / "8")]) == 0
    assert "checkpoints  sound    1 sound (8)" in capsys.readouterr().out
    assert main(["doctor", str(run / "9")]) == 2
    assert "has no checkpoint 9; there are: 8, 12" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["doctor", str(run), "--repair"]) == 0  # nothing to repair: nothing is touched
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_moved_and_not_deleted(run, capsys):
    flip(payload(run, 12))
    damaged = payload(run, 12).read_bytes()
    problems, notes = found(run)
    assert len(problems) == 1 and "12 is damaged: params/" in problems[0].problem
    assert problems[0].advice == f"fope doctor {run} --repair"
    assert "rows of steps beyond the newest checkpoint, 8: 9, 12" in notes[0].problem
    assert main(["doctor", str(run)]) == 1
    assert main(["doctor", str(run), "--repair"]) == 0
    captured = capsys.readouterr()
    assert f"moved {run}/checkpoints/12 to {run}/checkpoints/quarantine/12" in captured.err
    assert "1 in " in captured.out.splitlines()[-3] or "quarantine" in captured.out
    assert payload(run, "quarantine/12").read_bytes() == damaged


def test_all_checkpoints_damaged(run):
    for step in (8, 12):
        flip(payload(run, step))
    problems, _ = found(run)
    assert [p.advice[:30] for p in problems[:2]] == ["bring one back from a copy: wi"] * 2
    assert summary_of(run, "checkpoints") == "none that is sound"


def test_no_checkpoint_yet(run):
    shutil.rmtree(run / "checkpoints")
    assert summary_of(run, "checkpoints") == "none"


def summary_of(run, name):
    return next(check.summary for check in doctor.examine(run) if check.name == name)


def test_a_checkpoint_of_another_position_embedding_and_of_other_text(run):
    config = json.loads((run / "config.json").read_text())
    config["position"]["theta"] = 500.0
    write_json(run / "config.json", config)
    metadata = run.parent / "cache"
    manifest = next(metadata.glob("*/manifest.json"))
    content = json.loads(manifest.read_text())
    content["fingerprint"] = "e" * 64
    del content["sha256"]
    manifest.write_text(json.dumps(content))
    problems, _ = found(run)
    told = " ".join(problem.problem for problem in problems)
    assert "theta=10000" in told and "theta=500" in told and "another position embedding" in told
    assert f"that of {manifest.parent} is {'e' * 64}: the text has changed" in told


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ([3, 4, 6, 6, 8, 9, 12], "several train rows of step 6"),
        ([3, 6, 4, 8, 9, 12], "train rows out of order at step 4"),
        ([3, 4, 8, 9, 12], "train rows are missing after step 4 (one every 3 steps)"),
        ([4, 6, 8, 9, 12], "train rows are missing after step 0 (one every 3 steps)"),
        (
            [3, 4, 6, 8],
            "train rows are missing from step 8 to the checkpoint 12 (one every 3 steps)",
        ),
    ],
)
def test_rows_that_are_twice_missing_or_out_of_order(run, steps, problem):
    write_rows(run, [train_row(step) for step in steps])
    problems, notes = found(run)
    assert [p.problem for p in problems] == [f"{run}/metrics.jsonl: {problem}" for _ in problems]
    assert len(problems) == 1 and notes == [], problems


def test_lines_that_are_no_rows(run, capsys):
    rows = [train_row(step) for step in TRAIN_STEPS]
    rows[2]["loss"] = float("nan")
    write_rows(run, rows, end='nonsense\n{"kind": "tr')
    problems, notes = found(run)
    assert [p.problem.partition(": ")[2] for p in problems] == [
        "no JSON object in line 7",
        "numbers that are not finite in line 3 (loss)",
    ]
    assert notes[0].problem.endswith("line 8 was cut off")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["doctor", str(run), "--repair"]) == 1  # the NaN is what was measured, and stays
    assert (run / "metrics.jsonl.bak-1").read_bytes() == before
    assert "2 of 8 lines are left out of it now" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text().count("\n") == 6
    assert doctor.repair(run) == []


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("kind", ["train", "validation", "perplexity", "position", "passkey"])
def test_advice_on_numbers_that_are_not_finite_fits_what_wrote_them(run, imported, kind):
    if imported:
        write_json(run / "run.json", {"imported": {"directory": "models/x"}})
    broken = {"kind": kind, "step": 12, "nats": float("nan"), "loss": float("inf")}
    rows = [train_row(step) for step in TRAIN_STEPS[: -1 if kind == "train" else None]]
    write_rows(run, [*rows, broken])
    (problem,), _ = found(run)
    assert problem.problem.endswith(
        f"not finite in line {len(rows) + 1} (nats), {len(rows) + 1} (loss)"
    )
    trained = kind in ("train", "validation")
    assert ("learning_rate" in problem.advice) == trained
    assert (f"fope evaluate {run} --force names the weights" in problem.advice) != trained
    assert ("imported again" in problem.advice) == (imported and not trained)


def test_a_repair_keeps_the_last_of_two_rows_and_all_others(run):
    score = {"kind": "perplexity", "step": 8}
    twice = [train_row(3), train_row(6, loss=1.0), score, train_row(4), train_row(6, loss=2.0)]
    write_rows(run, [*twice, *(train_row(step) for step in (8, 9, 12))])
    (run / "metrics.jsonl.bak-1").write_text("an earlier copy")
    assert len(doctor.repair(run)) == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        train_row(3),
        score,
        train_row(4),
        train_row(6, loss=2.0),
        *(train_row(step) for step in (8, 9, 12)),
    ]
    assert (run / "metrics.jsonl.bak-1").read_text() == "an earlier copy"
    assert (run / "metrics.jsonl.bak-2").read_text().count("\n") == 8
    assert found(run) == ([], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is no JSON"),
        (b"[1]", "config.json is no JSON object"),
        (None, "config.json does not exist"),
        (b'{"model_type": "llama"}', "is of a checkpoint of Hugging Face, no run"),
        (b'{"name": 3}', "config.seed is missing"),
    ],
)
def test_a_broken_configuration(run, content, message):
    path = run / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    problems, _ = found(run)
    assert len(problems) == 1 and message in problems[0].problem
    assert str(path) in problems[0].problem


def test_a_method_of_ones_own_is_no_damage(run):
    path = run / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"position": {"method": "my_methods:LogDistance"}}))
    (problem,), _ = found(run)
    assert problem.advice == f"if you trust it: fope doctor {run} --allow-module my_methods"


def test_the_token_cache(run):
    directory = next(path for path in (run.parent / "cache").iterdir() if path.is_dir())
    (directory / "train-00001.tokens").write_bytes(b"x")
    flip(directory / "train-00000.tokens")
    problems, notes = found(run)
    assert "train-00000.tokens is damaged: sha256" in problems[0].problem
    assert problems[0].advice == f"fope data build --config {run}/config.json"
    assert notes[0].problem.endswith("does not name: train-00001.tokens")
    shutil.rmtree(directory)
    problems, _ = found(run)
    assert [p.problem[:38] for p in problems] == [
        "train: there is no token cache of corp",
        "validation: there is no token cache of",
    ]


def hold(run, **process):
    """Leaves a lock as that process would."""
    owner = {"host": socket.gethostname(), "started": "2026-01-01T10:00:00+00:00", "verb": "train"}
    write_json(run / "run.lock", owner | process)


def test_what_killed_processes_leave(run):
    (run / "checkpoints" / "16.orbax-checkpoint-tmp-1").mkdir()
    (run / ".metrics.jsonl.tmp").write_text("x")
    hold(run, pid=2**30, began=0)
    problems, notes = found(run)
    assert problems == []
    assert ".metrics.jsonl.tmp, 16.orbax-checkpoint-tmp-1" in notes[0].problem
    assert "run.lock: its owner is gone" in notes[1].problem


def test_a_run_that_is_being_written(run):
    hold(run, pid=os.getppid(), began=lock._start_ticks(os.getppid()))
    (run / "checkpoints" / "16").mkdir()
    (run / "checkpoints" / "16" / "x").write_text("on its way")
    problems, notes = found(run)
    assert problems == [] and "16" in notes[0].problem
    assert notes[0].advice == "nothing: it is being written"
    with pytest.raises(lock.LockError, match=f"pid {os.getppid()}"):
        doctor.repair(run)


def test_the_progress_of_a_run(run, capsys):
    """The last row and the newest complete checkpoint, also while either is being written."""
    rows = [train_row(step, loss=step / 2, tokens_per_second=1e6) for step in TRAIN_STEPS[:5]]
    write_rows(run, rows, end='{"kind": "tra')
    (run / "checkpoints" / "16").mkdir()  # its manifest is not there yet
    now = run.stat().st_mtime
    os.utime(run / "metrics.jsonl", (now - 30, now - 30))
    os.utime(run / "checkpoints" / "12" / MANIFEST, (now - 7200, now - 7200))
    progress = doctor.read_progress(run)
    assert progress[1:5] == (STEPS, 9, 4.5, 1e6) and progress.saved == 12
    assert abs(progress.row_age - 30) < 30 and abs(progress.saved_age - 7200) < 30
    assert main(["doctor", str(run), "--progress"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{run}: step 9 of 12 (75%), loss 4.500, 1,000,000 tokens/s, ")
    assert said.endswith("; last checkpoint 12, 120 min ago\n")
    assert main(["doctor", str(run), "--progress", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saved"] == 12

    write_rows(run, [train_row(3, loss=None, tokens_per_second=1e6)])  # no token was scored
    assert ": step 3 of 12 (25%), loss none, 1,000," in doctor.read_progress(run).text

    # A number that is none, or that no JSON can say.
    write_rows(run, [train_row(3, loss="x", tokens_per_second=math.nan)])
    assert doctor.read_progress(run)[3:5] == (None, None)

    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    text = doctor.read_progress(run).text
    assert text == f"{run}: no train row yet, of 12 steps; no checkpoint yet"
    report = run.parent / "report"
    report.mkdir()
    (report / "index.html").write_text("a report of these runs")
    assert main(["doctor", str(report), str(run), "--progress"]) == 0
    (run / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="but a checkpoint of Hugging Face; `fope import"):
        doctor.read_progress(run)
    (run / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no run has begun there"):
        doctor.read_progress(run)


def test_the_parent_of_an_extension(run):
    write_json(run / "lineage.json", {"parent": {"run": str(run.parent / "parent")}})
    problems, notes = found(run)
    assert problems == [] and f"its parent {run.parent}/parent is not there" in notes[0].problem
    shutil.rmtree(run / "checkpoints" / "12")  # not finished any more: it needs its parent
    write_rows(run, [train_row(step) for step in TRAIN_STEPS[:4]])
    problems, _ = found(run)
    assert "parent" in problems[0].problem
    for content in ({}, {"parent": 3}, {"parent": {"run": 7}}, {"parent": {"run": "s3://x"}}):
        write_json(run / "lineage.json", content)
        assert len(found(run)[0]) == 1


def test_output_for_programs_and_no_run(run, capsys):
    assert main(["doctor", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 0 and [c["name"] for c in told["checks"]][:2] == [
        "config",
        "checkpoints",
    ]
    assert main(["doctor", "/nowhere/run"]) == 2
    assert "/nowhere/run does not exist" in capsys.readouterr().err


def test_rows_are_due_where_training_writes_them():
    schedule = RowSchedule(LOG_EVERY, SAVE_EVERY, (STEPS,))
    steps = [0]
    while (after := schedule.next_step(steps[-1])) is not None:
        steps.append(after)
    assert steps[1:] == TRAIN_STEPS
    assert np.all(np.diff(steps) > 0)


def test_the_cache_of_the_fixture_is_its_own(run):
    config = json.loads((run / "config.json").read_text())
    assert str(cache_directory(build_experiment(config).data)).startswith(str(run.parent))
