"""The corpus, the configuration and the unbroken runs that trials compare with."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.config import build_experiment, load_config
from fope_jax.data.build import build
from fope_jax.evaluate.metrics import read_rows
from fope_jax.storage.checkpoint import CheckpointStore
from tests.faults.nursery import Nursery, Request

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 24, 6
PACE = 0.02  # seconds a step, so that there is a time at which a signal can come
ROW_EVERY = "train.log_every=4"  # so that a signal comes in the middle of rows
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
CONFIG = """
from ml_collections import ConfigDict
from fope_jax.position.base import has_hook

def get_config(arg=""):
    return ConfigDict({{
        "name": "fope", "seed": 0,
        "data": {{
            "corpus": "text", "tokenizer": "bytes", "cache_dir": "{0}/cache",
            "train_files": ("{0}/train*.txt",), "validation_files": ("{0}/validation.txt",),
        }},
        "model": {{
            "vocab_size": 300, "d_model": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16,
            "attention": "reference",
        }},
        "position": {{"method": "fope"}},
        "train": {{
            "steps": {1}, "batch_size": 4, "length": 16, "learning_rate": 1e-2,
            "warmup_steps": 2, "log_every": 1, "save_every": {2},
        }},
    }})
"""


@functools.cache
def scratch() -> Path:
    """A directory for the life of this process, with the corpus and its token cache."""
    made = Path(tempfile.mkdtemp(prefix="fope-faults-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    made.chmod(0o755)  # a training without rights reads it too
    make_corpus(made)
    (made / "config.py").write_text(CONFIG.format(made, STEPS, SAVE_EVERY))
    build_cache(made / "config.py")
    return made


def make_corpus(directory: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train0", 900), ("train1", 700), ("validation", 200)):
        (directory / f"{name}.txt").write_text(" ".join(rng.choice(WORDS, count)))


def build_cache(config: Path) -> None:
    build(build_experiment(load_config(str(config))).data)


def config() -> str:
    return str(scratch() / "config.py")


def environment() -> dict[str, str]:
    """Steps of such small models take longer to compile than to run, so that is done once."""
    kept = {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(scratch() / "compiled"),
    }
    always = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    always["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return kept | os.environ | always


@functools.cache
def nursery() -> Nursery:
    made = Nursery(environment())
    atexit.register(made.close)
    return made


# ---------------------------------------------------------------------------- trainings

harm_of_all: dict[str, Any] = {}  # part of every request, see broken.py


def request(workdir: Path, *overrides: str, **harm: Any) -> Request:
    """A training in ``workdir`` with overrides such as "train.steps=3"."""
    given = [f"--config.{override}" for override in overrides]
    argv = ["train", "--config", config(), "--workdir", str(workdir), *given]
    return {"argv": argv, "log": str(workdir.with_suffix(".log"))} | harm | harm_of_all


def start(workdir: Path, *overrides: str, **harm: Any) -> int:
    """Starts a training; returns its process id."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    return nursery().start(request(workdir, *overrides, **harm))


def train(workdir: Path, *overrides: str, **harm: Any) -> tuple[int, str]:
    """Trains to the end, whatever that is; returns the exit code and what was said."""
    before = len(said(workdir))
    code = nursery().wait(start(workdir, *overrides, **harm))
    return code, said(workdir)[before:]


def said(workdir: Path) -> str:
    log = workdir.with_suffix(".log")
    return log.read_text() if log.exists() else ""


def wait_for(what: Any, seconds: float = 60.0) -> None:
    """Waits until ``what()`` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


@functools.cache
def unbroken(*overrides: str, **harm: Any) -> Path:
    """A run with these overrides that nothing has happened to, made once."""
    scratch()
    workdir = Path(tempfile.mkdtemp(dir=scratch())) / "unbroken"
    code, text = train(workdir, *overrides, **harm)
    assert code == 0, text
    return workdir


@functools.cache
def seconds_of_a_run(pace: float) -> float:
    """How long a training at this pace takes here, from its start to its end."""
    workdir = Path(tempfile.mkdtemp(dir=scratch())) / "timed"
    began = time.monotonic()
    code, text = train(workdir, pace=pace)
    assert code == 0, text
    return time.monotonic() - began


def copy_of(run: Path, directory: Path) -> Path:
    """A copy of a run to do harm to."""
    return Path(shutil.copytree(run, directory / "run"))


# ---------------------------------------------------------------------------- what is compared

NUMBERS = ("step", "nats", "tokens", "grad_norm", "learning_rate", "tokens_seen", "skipped")


def numbers(workdir: Path) -> list[str]:
    """The numbers of every train row, in the order of the file; as text, where nan equals nan."""
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == "train"]
    return [json.dumps([row.get(name) for name in NUMBERS]) for row in rows]


def steps(workdir: Path) -> list[int]:
    rows = read_rows(workdir / "metrics.jsonl")
    return [row["step"] for row in rows if row["kind"] == "train"]


def valid_step(workdir: Path) -> int:
    """The newest valid checkpoint, 0 where there is none, without a word about the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CheckpointStore(workdir / "checkpoints").latest_valid_step() or 0


def arrays(workdir: Path, step: int = STEPS) -> dict[str, bytes]:
    """Every array of a checkpoint as bytes, read by Orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    reader, found = ocp.PyTreeCheckpointer(), {}
    for item in ("params", "constants", "optimizer"):
        path = workdir / "checkpoints" / str(step) / item
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the file says where arrays lay: one device here
            tree = reader.restore(path.absolute())
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found[f"{item}{jax.tree_util.keystr(keys)}"] = np.asarray(leaf).tobytes()
    return found


def assert_whole(workdir: Path, reference: Path) -> None:
    """A run has ended with every row and bit of the one that nothing happened to."""
    assert numbers(workdir) == numbers(reference)
    assert valid_step(workdir) == STEPS
    assert arrays(workdir) == arrays(reference)
    left = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert not [name for name in left if "tmp" in name], left
    assert not (workdir / "run.lock").exists()


def resume_killed(run: Path, reference: Path, *overrides: str) -> None:
    """Goes on with a run that was killed, and compares it with the unbroken one."""
    rows = steps(run)
    assert rows == sorted(set(rows)), f"a step twice or out of order: {rows}"
    left = valid_step(run)
    lost = max(rows, default=0) - left
    # The next save waits for the one before, so that no more than two intervals are at stake.
    assert 0 <= lost <= 2 * SAVE_EVERY, f"{lost} steps lost"
    code, text = train(run, *overrides)
    assert code == 0, text
    if left and left < STEPS:
        assert f"resuming {run} at step {left} " in text, text
    assert_whole(run, reference)
