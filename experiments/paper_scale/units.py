"""What is trained, in the order of its worth, and the configuration of each run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fope_jax.config import Experiment, build_experiment

# With head_dim 64 and 512 tokens, 16 of RoPE's 32 frequencies turn less than once, as in the paper.
HEAD_DIM = 64
METHODS: dict[str, dict[str, Any]] = {
    "rope": {"method": "rope"},
    "clip": {"method": "rope", "scaling": [{"scaling": "clip_floor"}]},  # the floor alone
    "fope": {"method": "fope"},
    "fope-d-64": {"method": "fope", "preset": "equations", "num_frequencies": 64},
    "alibi": {"method": "alibi"},
    "nope": {"method": "nope"},
    "pope": {"method": "pope"},
}
# Shares of a batch's rows. Copying is learned first, and what finds the place in the source finds a
# value as well (configs/recall.py).
TASKS = {"copy": 0.375, "recall": 0.25, "passkey": 0.1875, "multi_key": 0.1875}


@dataclass(frozen=True)
class Scale:
    """Sizes of the model, of its training and of its test.

    Attributes:
      length: L, tokens of a training window.
      multiples: of L, the lengths of the test.
      trials: of each task, length and depth.
      batch_tokens: most tokens of a forward pass in the test.
    """

    d_model: int = 256
    num_layers: int = 4
    length: int = 512
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    trials: int = 40
    batch_tokens: int = 65_536

    @property
    def contexts(self) -> list[int]:
        """Tokens of the windows of the test."""
        return [self.length * multiple for multiple in self.multiples]


PAPER = Scale()
# A window of multi_key takes 250 bytes.
SMALL = Scale(32, 1, 256, 16, warmup_steps=1, multiples=(1, 2), depths=(0.5,), trials=2)


class Unit(NamedTuple):
    """One run: a method, the updates it gets, and the seed of weights, data and trials."""

    method: str
    updates: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file of results.

        >>> Unit("rope", 3000, 0).name
        'rope_3000_0'
        """
        return f"{self.method}_{self.updates}_{self.seed}"


def all_units(updates: int, seeds: int) -> list[Unit]:
    """All methods with the first seed, then with the next: data and trials are made once a seed."""
    return [Unit(method, updates, seed) for seed in range(seeds) for method in METHODS]


def unit_experiment(unit: Unit, scale: Scale, dtype: str) -> Experiment:
    """The run's configuration; ``dtype`` of activations, "bfloat16" on an accelerator."""
    tasks = [f"{name}={share}" for name, share in TASKS.items()]
    return build_experiment(
        {
            "name": unit.method,
            "seed": unit.seed,
            "data": {"corpus": "none", "tokenizer": "bytes", "tasks": tasks, "packing": "windows"},
            "model": {
                "vocab_size": 259,
                "d_model": scale.d_model,
                "num_layers": scale.num_layers,
                "num_heads": max(1, scale.d_model // HEAD_DIM),
                "head_dim": HEAD_DIM,
                "mlp_dim": 4 * scale.d_model,
                "dtype": dtype,
            },
            "position": METHODS[unit.method],
            "train": {
                "steps": unit.updates,
                "batch_size": scale.batch_size,
                "length": scale.length,
                "learning_rate": scale.learning_rate,
                "warmup_steps": scale.warmup_steps,
                "log_every": 100,
                "evaluate_every": None,
            },
            "evaluate": {
                "num_windows": 0,
                "position_windows": 0,
                "passkey_lengths": scale.multiples,
                "passkey_depths": scale.depths,
                "passkey_trials": scale.trials,
                "passkey_templates": ("compact",),
                "retrieval_tasks": tuple(name for name in TASKS if name != "passkey"),
                "needle_haystack": "noise",
                "batch_tokens": scale.batch_tokens,
            },
        }
    )
