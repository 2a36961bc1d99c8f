"""Workdir and data in a bucket: the libraries' own clients against a stand-in for the service."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.buckets_runs import CONFIG
from tests.cloud_storage import FORBIDDEN, Storage, serving

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def storage():
    return Storage("bucket", FORBIDDEN)


@pytest.fixture(scope="module")
def service(storage):
    with serving(storage) as environment:
        yield environment


def run(verb: str, service: dict[str, str], scratch: Path) -> int:
    command = [sys.executable, "-m", "tests.buckets_runs", verb, "gs://bucket", str(scratch)]
    environment = os.environ | service | {"FOPE_CACHE": str(scratch / verb), "JAX_PLATFORMS": "cpu"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # both make the same programs
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-6000:]
    return done.returncode


@pytest.fixture(scope="module")
def story(service, tmp_path_factory):
    """What the run on disk gave, and what the one in the bucket gave after it had been killed."""
    scratch = tmp_path_factory.mktemp("scratch")
    assert run("start", service, scratch) == -signal.SIGKILL
    assert run("resume", service, scratch) == 0
    return tuple(json.loads((scratch / f"{verb}.json").read_text()) for verb in ("start", "resume"))


def test_killed_it_goes_on_in_the_bucket_with_the_numbers_of_the_run_on_disk(story):
    start, resume = story
    assert [row[0] for row in resume["rows_of_the_killed"]] == [3, 4]  # all before checkpoint 4
    assert "resuming gs://bucket/runs/x at step 4" in resume["resumed"]
    assert [row[0] for row in start["train"]] == [3, 4, 6, 8, 9, 12]
    assert resume["train"] == start["train"]


def test_a_workdir_in_a_bucket_holds_what_one_on_disk_holds_but_tensorboard(story, storage):
    files = story[1]["files"]
    assert {"config.json", "run.json", "metrics.jsonl"} < set(files)
    steps = {name.split("/")[1] for name in files if name.startswith("checkpoints/")}
    assert steps == {"8", "12"}  # the newest two, as on disk
    assert not [name for name in files if name.startswith("tensorboard")]
    assert "no TensorBoard files in a bucket" in story[1]["resumed"]
    # Orbax's arrays went through TensorStore's own driver, not through a file system of Python.
    arrays = {name for name in storage.writers if "/checkpoints/" in name and "/d/" in name}
    arrays.remove(f"bucket/runs/x/{story[1]['damaged']}")  # written once more by the test
    assert arrays and {storage.writers[name].split("/")[0] for name in arrays} == {"tensorstore"}


def test_another_configuration_is_refused_in_a_bucket(story):
    code, said = story[1]["another_config"]
    assert code == 2 and "train.steps: 12, now 13" in said


def test_a_damaged_object_is_named_and_the_step_before_counts(story):
    resume = story[1]
    assert resume["valid_after_damage"] == 8
    place = "checkpoint gs://bucket/runs/x/checkpoints/12 is damaged: "
    assert len(resume["warned"]) == 1 and resume["warned"][0].startswith(place)
    assert resume["warned"][0].endswith("has changed (sha256); skipped")
    assert resume["refused"].startswith(place)


def test_a_token_cache_is_built_here_uploaded_once_and_read_there(story):
    start, resume = story
    assert start["built"].count("uploaded to gs://bucket/caches/text-bytes-") == 1
    # The second build finds the same text in the bucket and makes nothing.
    assert "uploaded" not in start["again"] and "tokenize" not in start["again"]
    assert start["again"].count("(built before)") == 2
    assert "download" not in start["again"] and "download" not in resume["resumed"]
    assert "token cache: gs://bucket/caches/text-bytes-" in resume["resumed"]
    assert "train: 8,743 tokens, 5 documents" in start["built"]


def test_a_damaged_token_cache_is_refused(story):
    code, said = story[1]["damaged_cache"]
    assert code == 2
    assert "/train-00000.tokens is damaged: sha256 " in said.splitlines()[-1]


def test_a_bucket_that_is_not_there_or_refuses_is_named_in_one_line(story):
    for code, said in story[1]["no_bucket"]:
        assert code == 2 and len(said.splitlines()) == 1
        assert "bucket gs://no-such-bucket does not exist" in said
    code, said = story[1]["refused_bucket"]
    assert code == 2 and len(said.splitlines()) == 1
    assert f"bucket gs://{FORBIDDEN} refuses or cannot be reached: Forbidden" in said


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_in_the_bucket(story, service, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format("gs://bucket"))
    assert run("extend", service, tmp_path) == 0
    found = json.loads((tmp_path / "extend.json").read_text())
    assert {"config.json", "run.json", "lineage.json", "metrics.jsonl"} < set(found["files"])
    assert found["train_again"] == story[0]["train"]
    assert found["lineage"]["request"]["parent"] == "gs://bucket/runs/x"
    assert found["steps"] == {"train": [1, 2, 3], "validation": [0, 1, 2, 3], "perplexity": [3]}
    assert "is finished: 3 steps" in found["again"]
    assert found["report"]


@pytest.mark.slow
def test_two_processes_write_one_run_in_a_bucket(story, storage, service, tmp_path):
    """Both write into one checkpoint, and one of them copies the index for both."""
    (tmp_path / "config.py").write_text(CONFIG.format("gs://bucket"))
    command = ["bash", ROOT / "tpu_scripts/local.sh", "--processes", "2", "--", sys.executable]
    verb = ["-m", "fope_jax.main", "train", "--config", tmp_path / "config.py"]
    rebuilt = subprocess.run(
        [
            sys.executable,
            "-m",
            "fope_jax.main",
            "data",
            "build",
            "--config",
            tmp_path / "config.py",
            "--config.data.cache_dir=gs://bucket/shared",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | service | {"FOPE_CACHE": str(tmp_path / "a")},
    )
    assert rebuilt.returncode == 0, rebuilt.stderr[-3000:]
    done = subprocess.run(
        [
            *command,
            *verb,
            "--workdir",
            "gs://bucket/runs/two",
            "--config.data.cache_dir=gs://bucket/shared",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | service | {"FOPE_CACHE": str(tmp_path / "b")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "b" / "mirrors").glob("*/train-00000.index"))) == 1
    objects = storage.buckets["bucket"]
    assert any("ocdbt.process_1/" in name for name in objects if name.startswith("runs/two/"))
    lines = objects["runs/two/metrics.jsonl"].content.decode().splitlines()
    losses = [row["nats"] for row in map(json.loads, lines) if row["kind"] == "train"]
    np.testing.assert_allclose(losses, [row[1] for row in story[0]["train"]], rtol=1e-5)
