"""Trains small models on simulated devices and prints what came out as JSON.

A program by itself, because the number of simulated devices is fixed when jax starts:

    python -m tests.train.mesh_runs '[{"method": "fope", "mesh": {"context": 2}}, ...]'
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.config import Experiment, TrainConfig
from fope_jax.data import DataConfig
from fope_jax.gallery.examples import examples
from fope_jax.model import sharding
from fope_jax.model.config import TransformerConfig
from fope_jax.model.sharding import MeshConfig
from fope_jax.position.base import PositionEmbedding
from fope_jax.position.layer_patterns import LAYER_PATTERNS
from fope_jax.train import state as train_state
from fope_jax.train.state import (
    StatePlan,
    init_constants,
    init_train_state,
    plan_state,
    shard_batch,
    trace_step,
)
from fope_jax.typing import Batch
from tests.model.everything import Everything

BATCH, LENGTH, VOCAB = 8, 64, 256
LARGE = 2**10  # numbers; norms are smaller, and replicated on purpose


@dataclass(frozen=True)
class OneBias(PositionEmbedding):
    """A bias without variables, the same for all heads."""

    def bias(self, variables, q_positions, k_positions):
        return -0.1 * jnp.abs(q_positions - k_positions).astype(jnp.float32)


# Windows and chunks shorter than the documents, and than a device's share of the tokens.
SHORT = {
    "gemma2": {"window": 6},
    "gemma3": {"window": 6},
    "olmo3": {"window": 6, "original_length": 16},
    "gpt_oss": {"window": 6, "original_length": 16},
    "smollm3": {},
    "llama4": {"chunk": 6, "original_length": 16, "floor_scale": 8},
    "rnope_swa": {"window": 6},
    "swan": {"window": 6, "training_length": 16},
}
PATTERNS = {name: LAYER_PATTERNS[name](**knobs) for name, knobs in SHORT.items()}
OTHERS = {"one-bias": OneBias(), "everything": Everything(theta=100.0), **PATTERNS}


def experiment(case: dict[str, Any]) -> Experiment:
    # Heads that share keys, blocks that do not divide a device's share of the tokens.
    model = {
        "vocab_size": VOCAB,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_dim": 96,
        "attention_block": 24,
    } | case.get("model", {})
    train = {"steps": 100, "batch_size": BATCH, "length": LENGTH, "warmup_steps": 2}
    train |= {"learning_rate": 3e-3, "accumulate": case.get("accumulate", 1)}
    return Experiment(
        name="mesh",
        seed=3,
        model=TransformerConfig(**model),
        position=(examples(LENGTH, 16) | OTHERS)[case["method"]],
        data=DataConfig(corpus="gutenberg"),
        train=TrainConfig(**train),
        evaluate=None,  # type: ignore[arg-type]
        mesh=MeshConfig(**case["mesh"]),
    )


def batches(packed: bool, steps: int) -> list[Batch]:
    """Rows of one document with shared positions, or of several and some padding at the end.

    Each token follows from the one before and one of three random numbers, so there is something
    to learn: on noise alone rounding errors grow by a factor of ten every few steps.
    """
    random, found = np.random.default_rng(7), []
    for _ in range(steps):
        ids = np.empty((BATCH, LENGTH + 1), np.int32)
        ids[:, 0] = random.integers(0, VOCAB, BATCH)
        for place in range(LENGTH):
            ids[:, place + 1] = (5 * ids[:, place] + random.integers(0, 3, BATCH)) % VOCAB
        weights = (random.random((BATCH, LENGTH)) < 0.9).astype(np.float32)
        segments = np.ones((BATCH, LENGTH), np.int32)
        positions = np.arange(LENGTH, dtype=np.int32)[None]
        if packed:
            starts = random.random((BATCH, LENGTH)) < 0.08
            starts[:, 0] = True
            begin = np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
            segments = np.cumsum(starts, axis=1, dtype=np.int32)
            positions = (positions - begin).astype(np.int32)
            segments[0, -9:], weights[0, -9:] = 0, 0
        found.append(Batch(ids[:, :-1], ids[:, 1:], positions, segments, weights))
    return found


def plan_on_slices(setup: Experiment, devices: Sequence[Any]) -> StatePlan:
    """`plan_state` with as many slices as the mesh names; CPU devices belong to none."""
    count = max(1, setup.mesh.dcn_data) * setup.mesh.dcn_fsdp

    def devices_by_slice(devices: Sequence[Any]) -> list[Sequence[Any]]:
        return [devices[index::count] for index in range(count)]  # no two neighbours in one

    with (
        mock.patch.object(sharding, "devices_by_slice", devices_by_slice),
        mock.patch.object(train_state, "devices_by_slice", devices_by_slice),
    ):
        return plan_state(setup, devices)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Losses of each step, per-device memory, and what the compiled step keeps whole."""
    plan = plan_on_slices(experiment(case), jax.devices()[: case.get("devices", 8)])
    state, constants = init_train_state(plan), init_constants(plan)
    data = batches(case.get("packed", True), case.get("steps", 3))
    step = trace_step(plan, shard_batch(data[0], plan.mesh)).lower().compile()
    whole = []
    for name, tree, shardings in (
        ("in", (state, constants), step.input_shardings[0][:2]),
        ("out", state, step.output_shardings[0]),
    ):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        for (path, leaf), placed in zip(leaves, jax.tree.leaves(shardings), strict=True):
            if leaf.size >= LARGE and placed.is_fully_replicated:
                whole.append(f"{name} {jax.tree_util.keystr(path)} {leaf.shape}")
    losses, norms = [], []
    for batch in data:
        state, metrics = step(state, constants, shard_batch(batch, plan.mesh))
        losses.append(float(metrics.nats / metrics.tokens))
        norms.append(float(metrics.grad_norm))
    return {
        "losses": losses,
        "norms": norms,
        "whole": whole,
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps([run(case) for case in json.loads(sys.argv[1])]))
