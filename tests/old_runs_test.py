"""Runs that older code made are read, scored again, gone on with and extended.

goldens/old_runs.tar.xz holds seven runs of two layers, 16 wide, as commit 801ce02 wrote them with
jax 0.10.2 in /tmp/old_runs: `configs/NAME.py` trained for 6 steps and evaluated, `fope` measured by
`fope spectrum` and extended with YaRN to `fope_32`. Of `mixed` and `t5_fire` the checkpoint of
step 4 is there too.
"""

import json
import math
import shutil
import tarfile
from pathlib import Path

import pytest

from fope_jax.main import main

ARCHIVE = Path(__file__).parent / "goldens" / "old_runs.tar.xz"
NAMES = ("cope", "fope", "fope_32", "mixed", "partial", "scaled_alibi", "t5_fire")
FAST = "mixed"  # shows most of what the others do
JSON = ("config.json", "run.json", "lineage.json", "metrics.jsonl")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    directory = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    moved = [p for p in directory.rglob("*") if p.name in JSON and "checkpoints" not in p.parts]
    for path in [*moved, *(directory / "configs").iterdir()]:
        path.write_text(path.read_text().replace("/tmp/old_runs", str(directory)))
    assert main(["data", "build", "--config", str(directory / "configs/fope.py")]) == 0
    return directory


def rows_of(run, kind):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def perplexities(run):
    return {
        (row["protocol"], row["context"], row.get("document")): row["nats"]
        for row in rows_of(run, "perplexity")
    }


@pytest.mark.fast(FAST)
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_numbers_are_those_of_then(old, tmp_path, name):
    run = tmp_path / name
    shutil.copytree(old / "runs" / name, run)
    before = perplexities(run)
    assert main(["doctor", str(run)]) == 0
    assert main(["evaluate", "--run", str(run), "--force"]) == 0
    after = perplexities(run)
    assert after.keys() == before.keys() and len(before) > 3
    for key, nats in before.items():
        assert math.isclose(after[key], nats, rel_tol=1e-6), key


@pytest.mark.fast(FAST)
@pytest.mark.parametrize("name", ["mixed", "t5_fire"])
def test_an_old_run_goes_on(old, tmp_path, name):
    """From the checkpoint of step 4, to the losses that it had without the stop."""
    run = tmp_path / name
    shutil.copytree(old / "runs" / name, run)
    shutil.rmtree(run / "checkpoints" / "6")
    before = {row["step"]: row["nats"] for row in rows_of(run, "train")}
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(r for r in rows if json.loads(r)["step"] <= 4))
    command = ["train", "--config", str(old / "configs" / f"{name}.py"), "--workdir", str(run)]
    assert main([*command, "--config.train.keep=2"]) == 0
    after = {row["step"]: row["nats"] for row in rows_of(run, "train")}
    assert after.keys() == before.keys() == set(range(1, 7))
    for step, nats in before.items():
        assert math.isclose(after[step], nats, rel_tol=1e-6), step


@pytest.mark.slow
def test_an_old_run_is_extended(old, tmp_path):
    """With YaRN to 32 tokens, to the numbers of the extension that older code made of it."""
    run = tmp_path / "fope_32"
    command = ["extend", "--from", str(old / "runs/fope"), "--method", "yarn", "--length", "32"]
    assert main([*command, "--workdir", str(run), "--config.train.steps=2"]) == 0
    before, after = (
        {row["step"]: row["nats"] for row in rows_of(path, "train")}
        for path in (old / "runs/fope_32", run)
    )
    assert after.keys() == before.keys()
    for step, nats in before.items():
        assert math.isclose(after[step], nats, rel_tol=1e-6), step


@pytest.mark.slow
def test_old_rows_are_reported(old, tmp_path):
    runs = [str(old / "runs" / name) for name in NAMES]
    assert main(["report", *runs, "-o", str(tmp_path)]) == 0
    assert "fope_32" in (tmp_path / "index.html").read_text()
