"""Tokens a second that a cache is built with and read with, beside what a training step takes.

    python -m benchmarks.data --config configs/quickstart.py

The cache is built twice: where the config says, which brings the corpus, and then, timed, in a
temporary directory. Batches are read as `fope train` reads them, and given to its step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from fope_jax.config import Experiment, build_experiment, load_config
from fope_jax.data.build import build
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.loader import Loader
from fope_jax.train.state import (
    init_constants,
    init_train_state,
    plan_state,
    shard_batch,
    share_positions,
    trace_step,
)


def build_once(experiment: Experiment, directory: Path) -> tuple[TokenCache, float]:
    """The train split of a cache built from nothing, and the tokens a second of all splits."""
    config = dataclasses.replace(experiment.data, cache_dir=str(directory))
    build(experiment.data)  # brings the corpus
    downloads = Path(experiment.data.cache_dir, "downloads").absolute()
    if downloads.exists():
        (directory / "downloads").symlink_to(downloads)
    began = time.perf_counter()
    caches = build(config)
    seconds = time.perf_counter() - began
    return caches["train"], sum(cache.num_tokens for cache in caches.values()) / seconds


def read(experiment: Experiment, cache: TokenCache, steps: int) -> float:
    """Tokens a second of batches that nothing else waits for."""
    train = experiment.train
    loader = _loader(experiment, cache)
    began = time.perf_counter()
    count = sum(1 for _ in loader.iterate(0, steps))
    return count * train.batch_size * train.length / (time.perf_counter() - began)


def consume(experiment: Experiment, cache: TokenCache, steps: int) -> list[float]:
    """Tokens a second of each training step after the first two."""
    train, plan = experiment.train, plan_state(experiment)
    state, constants = init_train_state(plan), init_constants(plan)
    step, found = trace_step(plan).lower().compile(), []
    for index, batch in enumerate(_loader(experiment, cache).iterate(0, steps + 2)):
        placed = shard_batch(share_positions(batch, experiment), plan.mesh)
        began = time.perf_counter()
        state, metrics = step(state, constants, placed)
        jax.block_until_ready((state, metrics))
        if index > 1:
            found.append(train.batch_size * train.length / (time.perf_counter() - began))
    return found


def _loader(experiment: Experiment, cache: TokenCache) -> Loader:
    train = experiment.train
    return Loader(
        cache,
        length=train.length,
        batch_size=train.batch_size,
        seed=experiment.seed,
        packing=experiment.data.packing,
    )


def render(result: dict[str, Any]) -> str:
    step = statistics.median(result["step"])
    rows = [
        ("cache built, tokenizer trained and files written", result["build"]),
        ("batches read", result["read"]),
        ("training step", step),
    ]
    lines = ["| what | tokens/s | times the step |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {n:,.0f} | {n / step:.1f} |" for what, n in rows])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="configs/quickstart.py", metavar="FILE[:ARG]")
    parser.add_argument("--batches", type=int, default=500, help="read")
    parser.add_argument("--steps", type=int, default=10, help="timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as well")
    arguments = parser.parse_args(argv)
    experiment = build_experiment(load_config(arguments.config, []))
    with tempfile.TemporaryDirectory() as directory:
        cache, built = build_once(experiment, Path(directory))
        result = {
            "build": built,
            "read": read(experiment, cache, arguments.batches),
            "step": consume(experiment, cache, arguments.steps),
        }
    print(render(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
