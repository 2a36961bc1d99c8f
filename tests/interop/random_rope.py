"""Random ``rope_parameters``, odd ones among them, to compare with formulas and transformers."""

from __future__ import annotations

from typing import Any

import numpy as np

ORIGINAL = "original_max_position_embeddings"


def random_parameters(rng: np.random.Generator) -> tuple[int, int, dict[str, Any]]:
    """Head width, length at hand and keys, with ends of ramps that are equal in one of four."""
    head_dim = int(rng.choice([16, 64, 96, 128]))
    kind = str(rng.choice(["default", "linear", "dynamic", "longrope", "llama3", "yarn"]))
    keys: dict[str, Any] = {"rope_type": kind, "rope_theta": float(10 ** rng.uniform(2, 7))}
    if rng.random() < 0.3:
        keys["partial_rotary_factor"] = float(rng.choice([0.25, 0.5]))
    pairs = int(head_dim * keys.get("partial_rotary_factor", 1)) // 2
    if kind != "default":
        keys["factor"] = float(rng.choice([1.0, rng.uniform(1, 64)]))
    if kind not in ("default", "linear"):
        keys[ORIGINAL] = int(2 ** rng.uniform(8, 15))
    if kind == "longrope":
        keys["short_factor"], keys["long_factor"] = rng.uniform(1, 64, (2, pairs)).tolist()
    if kind == "llama3":
        low, high = sorted(rng.uniform(0.5, 8, 2).tolist())
        keys |= {"low_freq_factor": low, "high_freq_factor": low if rng.random() < 0.25 else high}
    if kind == "yarn":
        slow, fast = sorted(rng.uniform(0.5, 40, 2).tolist())
        keys |= {"beta_fast": fast, "beta_slow": fast if rng.random() < 0.25 else slow}
        keys["truncate"] = bool(rng.random() < 0.5)
    if kind in ("yarn", "longrope") and rng.random() < 0.3:
        keys["attention_factor"] = float(rng.uniform(0.5, 2))
    return head_dim, int(2 ** rng.uniform(6, 17)), keys
