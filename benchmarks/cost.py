"""Seconds of a training step for each position embedding, all in one process and interleaved.

Timings of separate runs cannot be compared to a per cent: the machine drifts by more. Here every
round steps every method once, in an order that rotates, and a ratio is taken within its round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fope_jax.config import TrainConfig
from fope_jax.model.config import TransformerConfig
from fope_jax.model.presets import PRESETS
from fope_jax.model.transformer import Transformer, split
from fope_jax.position.base import PositionEmbedding
from fope_jax.train.optim import make_optimizer
from fope_jax.train.step import TrainState, train_step
from fope_jax.typing import Batch


class Contestant(NamedTuple):
    """A method with what is its own; the weights and their optimizer state are shared.

    Attributes:
      label: its name in the tables.
      step: from the shared and the own leaves to the next ones, by path.
      own: leaves of the train state that exist for this method, by path.
    """

    label: str
    step: Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
    own: dict[str, Any]


class Ratio(NamedTuple):
    """Quartiles over rounds of one method's seconds over its base's in the same round."""

    base: str
    low: float
    median: float
    high: float


class Cost(NamedTuple):
    """One method: seconds of every round, and how they compare with a base.

    Attributes:
      label: its name in the tables.
      seconds: of all processes.
      ratio: over the rounds of all processes; None for a base.
      by_process: the median ratio of each process.
    """

    label: str
    seconds: list[float]
    ratio: Ratio | None
    by_process: list[float]


def base_of(label: str, method: PositionEmbedding) -> str:
    """What a method is compared with: rotations with RoPE, all others with no embedding.

    Empty for NoPE itself.

    >>> from fope_jax.position import ALiBi, FoPE, RoPE
    >>> base_of("fope", FoPE(512)), base_of("rope", RoPE()), base_of("alibi", ALiBi())
    ('rope', 'nope', 'nope')
    """
    if label == "nope":
        return ""
    return "rope" if method.kind == "rotation" and label != "rope" else "nope"


def make_config(
    size: str, layers: int | None, vocab: int | None, block: int | None = None
) -> TransformerConfig:
    """A preset, with other depth, vocabulary or block of attention where given."""
    changed = {"num_layers": layers, "vocab_size": vocab, "attention_block": block}
    known: dict[str, Any] = {n: value for n, value in changed.items() if value is not None}
    return TransformerConfig(**(PRESETS[size] | known))


def make_batch(vocab: int, batch: int, length: int, packed: bool) -> Batch:
    """Random tokens: one document a row, positions shared by all; or documents of many lengths."""
    random = np.random.default_rng(0)
    ids = random.integers(0, vocab, (batch, length + 1), dtype=np.int32)
    weights = np.ones((batch, length), np.float32)
    if not packed:
        positions = np.arange(length, dtype=np.int32)[None]
        return Batch(ids[:, :-1], ids[:, 1:], positions, np.ones_like(positions), weights)
    starts = random.random((batch, length)) < 4 / length  # about four documents a row
    starts[:, 0] = True
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    begin = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], index - begin, segments, weights)


def contestants(
    methods: dict[str, PositionEmbedding], config: TransformerConfig, batch: Batch
) -> tuple[list[Contestant], dict[str, Any]]:
    """A contestant for each method, and the leaves of the train state that they share.

    One set of weights and moments serves all, which steps of any method go on changing, so that a
    dozen methods need the memory of one.
    """
    size, length = batch.tokens.shape
    settings = TrainConfig(steps=10_000, batch_size=size, length=length, learning_rate=1e-5)
    optimizer = make_optimizer(settings)
    batch = jax.device_put(batch)
    shared: dict[str, Any] = {}
    found = []
    for label, method in methods.items():
        graphdef, params, constants = split(Transformer(config, method, rngs=nnx.Rngs(0)))
        state = TrainState(params, jax.jit(optimizer.init)(params))
        del params
        leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        own = {name: leaf for name, leaf in named.items() if "position_" in name}
        shared = shared or {name: leaf for name, leaf in named.items() if name not in own}
        names = tuple(named)
        del state, leaves, named

        def step(shared, own, graphdef=graphdef, constants=constants, treedef=treedef, names=names):
            both = {**shared, **own}
            state = treedef.unflatten([both[name] for name in names])
            state, metrics = train_step(graphdef, optimizer, state, constants, batch)
            jax.block_until_ready(metrics)
            after = dict(zip(names, jax.tree.leaves(jax.block_until_ready(state)), strict=True))
            return {n: after[n] for n in shared}, {n: after[n] for n in own}

        found.append(Contestant(label, step, own))
    return found, shared


def time_interleaved(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each run in each round; the order of ``interleave``."""
    seconds: list[list[float]] = [[] for _ in runs]
    for order in interleave(len(runs), rounds):
        for index in order:
            start = time.perf_counter()
            jax.block_until_ready(runs[index]())
            seconds[index].append(time.perf_counter() - start)
    return seconds


def interleave(count: int, rounds: int) -> list[list[int]]:
    """Who goes when in each round: rotated and every other time turned round.

    So none always follows the same, and in each two rounds a pair meets in both orders.

    >>> interleave(3, 3)
    [[0, 1, 2], [2, 1, 0], [1, 2, 0]]
    """
    orders = [[(i + r // 2) % count for i in range(count)] for r in range(rounds)]
    return [order[:: -1 if r % 2 else 1] for r, order in enumerate(orders)]


def measure(
    field: Sequence[Contestant],
    shared: dict[str, Any],
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of a step by label and round, compilation and one further step left out."""
    own = [contestant.own for contestant in field]
    for index, contestant in enumerate(field):
        start = time.perf_counter()
        shared, own[index] = contestant.step(shared, own[index])
        compiled = time.perf_counter()
        shared, own[index] = contestant.step(shared, own[index])
        now = time.perf_counter()
        progress(
            f"{contestant.label}: compiled in {compiled - start:.1f} s, {now - compiled:.2f} s"
        )
    seconds: dict[str, list[float]] = {contestant.label: [] for contestant in field}
    for number, order in enumerate(interleave(len(field), rounds)):
        for index in order:
            start = time.perf_counter()
            shared, own[index] = field[index].step(shared, own[index])
            seconds[field[index].label].append(time.perf_counter() - start)
        progress(f"round {number + 1} of {rounds}")
    return seconds


def ratio(own: Iterable[float], base: Iterable[float], name: str) -> Ratio:
    """The quartiles of the paired ratios.

    >>> ratio([2.0, 2.2, 1.8], [1.0, 1.0, 1.0], "nope").median
    2.0
    """
    pairs = [a / b for a, b in zip(own, base, strict=True)]
    if len(pairs) == 1:
        return Ratio(name, pairs[0], pairs[0], pairs[0])
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(name, low, median, high)


def costs(
    processes: Sequence[dict[str, list[float]]], methods: dict[str, PositionEmbedding]
) -> list[Cost]:
    """The measurements beside those of each method's base, where that was measured too.

    Args:
      processes: seconds by label and round, of each process.
      methods: by label.
    """
    found = []
    for label in processes[0]:
        seconds = [second for process in processes for second in process[label]]
        base = base_of(label, methods[label])
        if base not in processes[0]:
            found.append(Cost(label, seconds, None, []))
            continue
        theirs = [second for process in processes for second in process[base]]
        medians = [ratio(process[label], process[base], base).median for process in processes]
        found.append(Cost(label, seconds, ratio(seconds, theirs, base), medians))
    return found


def cost_table(found: Sequence[Cost]) -> str:
    """Markdown."""
    lines = [
        "| method | s/step (median) | ratio (median) | quartiles | n | by process |",
        "|---|---|---|---|---|---|",
    ]
    for cost in found:
        r = cost.ratio
        shown = f"{r.median:.3f} x {r.base}" if r else "-"
        spread = f"{r.low:.3f} to {r.high:.3f}" if r else "-"
        each = ", ".join(f"{median:.3f}" for median in cost.by_process) or "-"
        middle = statistics.median(cost.seconds)
        lines.append(
            f"| {cost.label} | {middle:.3f} | {shown} | {spread} | {len(cost.seconds)} | {each} |"
        )
    return "\n".join(lines)
