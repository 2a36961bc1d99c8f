"""A run in a bucket, from the text to the report, in two processes; what came out as JSON.

Programs by themselves, because the libraries read the address of the bucket when they are loaded,
and because the first one is killed:

    python -m tests.buckets_runs start gs://bucket SCRATCH
    python -m tests.buckets_runs resume gs://bucket SCRATCH
    python -m tests.buckets_runs extend gs://bucket SCRATCH
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

from fope_jax.evaluate.metrics import read_rows
from fope_jax.main import main
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.directories import list_file_sizes
from fope_jax.storage.paths import as_path
from fope_jax.train import loop
from tests.cloud_storage import FORBIDDEN

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({{
        "name": "fope", "seed": 1,
        "model": {{
            "vocab_size": 300, "d_model": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16,
            "attention": "reference",
        }},
        "position": {{"method": "fope"}},
        "data": {{
            "corpus": "text", "tokenizer": "bytes", "cache_dir": "{0}/caches",
            "train_files": ["{0}/text/train_*.txt", "{0}/text/**/*.jsonl.gz"],
            "validation_files": ["{0}/text/validation.txt"],
        }},
        "train": {{
            "steps": 12, "batch_size": 2, "length": 16, "learning_rate": 1e-2, "warmup_steps": 2,
            "log_every": 3, "save_every": 4,
        }},
        "evaluate": {{
            "lengths": (1, 2), "num_windows": 4, "position_windows": 0, "passkey_trials": 0,
        }},
    }})
"""


def fope(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of one verb."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as error:  # of the parser
            code = int(error.code or 0)
    return code, said.getvalue()


def succeed(*arguments: str) -> str:
    code, said = fope(*arguments)
    assert code == 0, said
    return said


def rows(workdir: str) -> list[list[float]]:
    names = ("step", "nats", "tokens", "grad_norm")
    found = read_rows(as_path(workdir) / "metrics.jsonl")
    return [[row[name] for name in names] for row in found if row["kind"] == "train"]


def start(bucket: str, scratch: Path) -> NoReturn:
    """Text and token cache into the bucket, a run on disk, and one in the bucket that is killed."""
    text = as_path(bucket) / "text"
    for name in ("train_0", "train_1", "validation"):
        (text / f"{name}.txt").write_text(f"{name}: {TEXT * 40}")
    line = json.dumps({"text": "A page. " * 100}) + "\n"
    (text / "more" / "deep" / "pages.jsonl.gz").write_bytes(gzip.compress(line.encode() * 3))

    config = str(scratch / "config.py")
    Path(config).write_text(CONFIG.format(bucket))
    built = succeed("data", "build", "--config", config)
    again = succeed("data", "build", "--config", config)
    local = str(scratch / "local")
    succeed("train", "--config", config, "--workdir", local)
    found = {"built": built, "again": again, "train": rows(local)}
    (scratch / "start.json").write_text(json.dumps(found))

    steps, share = iter(range(100)), loop.share_positions

    def killed_at_step_7(*arguments):
        if next(steps) == 7:  # the first call compiles
            while not (as_path(bucket) / "runs/x/checkpoints/4/manifest.json").exists():
                time.sleep(0.05)  # it is written in the background
            os.kill(os.getpid(), signal.SIGKILL)
        return share(*arguments)

    loop.share_positions = killed_at_step_7
    code, said = fope("train", "--config", config, "--workdir", f"{bucket}/runs/x")
    raise AssertionError(f"the run ended with {code} before it was killed: {said}")


def resume(bucket: str, scratch: Path) -> dict[str, Any]:
    """Goes on with that run, and then damages what it left."""
    config, run = str(scratch / "config.py"), f"{bucket}/runs/x"
    found: dict[str, Any] = {"rows_of_the_killed": rows(run)}
    moved = f"--config.data.train_files=('{bucket}/elsewhere/*.txt',)"  # the cache stays
    found["resumed"] = succeed("train", "--config", config, "--workdir", run, moved)
    found["train"] = rows(run)
    found["files"] = list(list_file_sizes(as_path(run)))

    found["another_config"] = fope(
        "train", "--config", config, "--workdir", run, "--config.train.steps=13"
    )
    steps = as_path(run) / "checkpoints"
    payload = max(list_file_sizes(steps / "12").items(), key=lambda item: item[1])[0]
    found["damaged"] = f"checkpoints/12/{payload}"
    content = bytearray((steps / "12" / payload).read_bytes())
    content[len(content) // 2] ^= 1
    (steps / "12" / payload).write_bytes(bytes(content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = CheckpointStore(steps)
        found["valid_after_damage"] = store.latest_valid_step()
    found["warned"] = [str(warning.message) for warning in caught]
    try:
        store.restore(12, {})
    except CheckpointError as error:
        found["refused"] = str(error)
    files = list_file_sizes(as_path(bucket) / "caches")
    (cache,) = {path.partition("/")[0] for path in files if "/" in path}
    shard = as_path(bucket) / "caches" / cache / "train-00000.tokens"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"?")
    os.environ["FOPE_CACHE"] = str(scratch / "another_machine")
    found["damaged_cache"] = fope("data", "inspect", "--config", config)
    shard.write_bytes(whole)

    found["refused_bucket"] = fope("report", f"gs://{FORBIDDEN}/x", "-o", str(scratch))
    nowhere = "gs://no-such-bucket/runs/x"
    build = ("data", "build", "--config", config)
    found["no_bucket"] = [
        fope("train", "--config", config, "--workdir", nowhere),
        fope("evaluate", "--run", nowhere),
        fope("report", nowhere, "-o", str(scratch)),
        fope(*build, f"--config.data.cache_dir={nowhere}"),
        fope(*build, f"--config.data.train_files=('{nowhere}/*.txt',)"),
    ]
    return found


def extend(bucket: str, scratch: Path) -> dict[str, Any]:
    """Mends that run, goes on from it at twice its length, into the bucket; and once more."""
    # From step 8, over the damaged step, to where the run ended before.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        succeed("train", "--config", str(scratch / "config.py"), "--workdir", f"{bucket}/runs/x")
    cache = f"--config.data.cache_dir={bucket}/again"
    succeed("data", "build", "--config", str(scratch / "config.py"), cache)
    run = f"{bucket}/runs/longer"
    command = ("extend", "--from", f"{bucket}/runs/x", "--method", "fope", "--length", "32")
    command += ("--workdir", run, cache, "--config.train.steps=3", "--config.evaluate.lengths=1")
    found: dict[str, Any] = {"train_again": rows(f"{bucket}/runs/x")}
    found |= {"said": succeed(*command), "again": succeed(*command)}
    found["files"] = list(list_file_sizes(as_path(run)))
    found["lineage"] = json.loads((as_path(run) / "lineage.json").read_text())
    found["steps"] = {
        kind: [
            row["step"] for row in read_rows(as_path(run) / "metrics.jsonl") if row["kind"] == kind
        ]
        for kind in ("train", "validation", "perplexity")
    }
    succeed("report", f"{bucket}/runs/x", run, "-o", str(scratch / "both"))
    found["report"] = "goes on from fope, step 12" in (scratch / "both/index.html").read_text()
    return found


if __name__ == "__main__":
    verb, address, directory = sys.argv[1:]
    if verb == "start":
        start(address, Path(directory))
    story = {"resume": resume, "extend": extend}[verb]
    (Path(directory) / f"{verb}.json").write_text(json.dumps(story(address, Path(directory))))
