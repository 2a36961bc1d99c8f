"""Where the numbers of README.md come from; `python -m experiments.check recall_newer`."""

from __future__ import annotations

from experiments.check.rows import BySeed, accuracy, late_loss, mean, minus, select, starred

ROWS = "recall_newer/results/*.jsonl"
CONTROLS = "recall_controls/results/*.jsonl"
LENGTH = 64
BEYOND = (128, 256, 512, 1024)
SEEDS = range(5)
HYBRIDS = {"SWAN": "swan", "RNoPE-SWA": "rnope"}
METHODS = {"RoPE": "rope", "floor alone": "floor", "FoPE": "fope"}  # of recall_controls
RATES = {"SWAN": "swan", "RNoPE-SWA": "rnope", "PoPE": "pope", "FoX": "fox"}
RATES |= {"FoX, gates open": "fox-open", "RoPE, random positions": "random", "DroPE": "drope"}


def right(name: str, *contexts: int) -> BySeed:
    """Percent of trials that are right, over all ``contexts``, of the five seeds."""
    pattern, variant = (ROWS, HYBRIDS[name]) if name in HYBRIDS else (CONTROLS, METHODS[name])
    return {
        seed: value
        for seed, value in accuracy(pattern, variant, contexts, task="recall").items()
        if seed in SEEDS
    }


def apart(one: str, other: str, *contexts: int) -> BySeed:
    """Points by which ``one`` answers more, over all lengths beyond L if none are named."""
    contexts = contexts or BEYOND
    return minus(right(one, *contexts), right(other, *contexts))


def answers(header: list[str], row: list[str]) -> list:
    name = row[0]
    contexts = [int(column.replace(",", "")) for column in header[1:6]]
    others = ("RoPE", "floor alone")
    differences = ["" if name == other else starred(apart(name, other), 1) for other in others]
    return [None, *(mean(right(name, context)) for context in contexts), *differences]


def rates(header: list[str], row: list[str]) -> list:
    """Nats a token of the last batches, by learning rate; DroPE's end after 150 updates."""
    label = RATES[row[0]]
    after = 100 if label == "drope" else 1_200
    found = []
    for column in header[1:]:
        pattern = f"recall_newer/rates/recall_{label}-{float(column):g}.jsonl"
        stands = bool(select(pattern, "train")) if (column and row[header.index(column)]) else False
        found.append(late_loss(pattern, after) if stands else "")
    return [None, *found]


def at_length(label: str) -> float:
    """The most percent that a rate of a method answers at L."""
    best = 0.0
    for rate in ("0.00125", "0.0025", "0.005", "0.01"):
        rows = select(f"recall_newer/rates/recall_{label}-{rate}.jsonl", "retrieval", task="recall")
        if rows:
            best = max(best, 100 * sum(r["correct"] for r in rows) / sum(r["total"] for r in rows))
    return best
