"""Trains one model and asks it, at every length, what it read.

A trial counts where the answer's tokens are each the model's first choice after those before it,
which is where greedy decoding writes the answer. So one forward pass is enough, and one program a
length serves all tasks and seeds.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.paper_scale.data import SeedData, Windows
from experiments.paper_scale.units import TASKS
from fope_jax.config import Experiment, experiment_to_dict
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.metrics import row_ids
from fope_jax.evaluate.scoring import Scorer, scorer_factory
from fope_jax.model.transformer import Transformer, split
from fope_jax.report.rows import NO_BOS, Run
from fope_jax.train.state import StatePlan, plan_state, shard_batch, trace_step
from fope_jax.train.step import TrainState
from fope_jax.train.workdir import provenance

Row = dict[str, Any]


class Programs(NamedTuple):
    """What is compiled once for all seeds of a method."""

    plan: StatePlan
    step: Any
    make_scorer: Any


def make_programs(experiment: Experiment) -> Programs:
    """The compiled training step, and what makes scorers."""
    plan = plan_state(experiment)
    mesh = plan.mesh if plan.mesh.size > 1 else None
    step = trace_step(plan).lower().compile()
    return Programs(plan, step, scorer_factory(plan.graphdef, mesh))


def run_unit(
    experiment: Experiment, programs: Programs, data: SeedData, contexts: list[int], path: Path
) -> Run:
    """The run with its rows, as `fope report` reads them; ``path`` is where they will be."""
    info = {"name": experiment.name, "seed": experiment.seed, **provenance()}
    info["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    state, constants = init_state(experiment, programs.plan)
    info["parameters"] = sum(x.size for x in jax.tree.leaves(state.params))
    position, _ = checkpoint_fingerprint(experiment.position, experiment.model.shape, constants)
    info["position"] = position._asdict()
    state, rows = train(experiment, programs, data, state, constants)
    scorer = programs.make_scorer(state.params, constants)
    rows += score(experiment, scorer, data, contexts)
    config = experiment_to_dict(experiment)
    return Run(path, config, info, tuple(rows), experiment.train.steps)


def init_state(experiment: Experiment, plan: StatePlan) -> tuple[TrainState, Any]:
    """Weights, optimizer state and position constants of the experiment's seed.

    Not jitted: the seed would be part of the program, and each would be compiled.
    """
    model = Transformer(experiment.model, experiment.position, rngs=nnx.Rngs(experiment.seed))
    _, params, constants = split(model)

    def place(tree: Any, planned: Any) -> Any:
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, planned)

    state = TrainState(params, plan.optimizer.init(params))
    return place(state, plan.state), place(constants, plan.constants)


def train(
    experiment: Experiment, programs: Programs, data: SeedData, state: TrainState, constants: Any
) -> tuple[TrainState, list[Row]]:
    """The state after all updates, and a row of losses for every ``log_every`` of them."""
    config, rows, sums = experiment.train, [], []
    began = time.perf_counter()
    for step, batch in enumerate(data.batches(), start=1):
        placed = shard_batch(batch, programs.plan.mesh)
        state, metrics = programs.step(state, constants, placed)
        sums.append((metrics.nats, metrics.tokens))
        if step % config.log_every == 0 or step == config.steps:
            nats, weights = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
            loss, sums = float(nats / weights), []
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"{experiment.name}, seed {experiment.seed}: the loss of step {step} is {loss}"
                )
            row = {"kind": "train", "step": step, "loss": loss}
            row["tokens_seen"] = step * config.batch_size * config.length
            rows.append(row | {"seconds": round(time.perf_counter() - began, 3)})
    return state, rows


def score(experiment: Experiment, scorer: Scorer, data: SeedData, contexts: list[int]) -> list[Row]:
    """A row for each task, length and depth, and one that describes each task's trials."""
    evaluate, rows, began = experiment.evaluate, [], time.perf_counter()
    depths = evaluate.passkey_depths
    for context in contexts:
        windows = data.trials(context)
        right, nats = score_windows(scorer, windows, evaluate.batch_tokens)
        for number, name in enumerate(TASKS):
            for index, depth in enumerate(depths):
                chosen = (windows.task == number) & (windows.depth == index)
                sums = {
                    "correct": int(right[chosen].sum()),
                    "total": int(chosen.sum()),
                    "nats": float(nats[chosen].sum()),
                    "tokens": int(windows.answer[chosen].sum()),
                }
                rows.append(
                    _identity(name, experiment) | {"context": context, "depth": depth} | sums
                )
    settings = {
        "contexts": contexts,
        "depths": list(depths),
        "trials": evaluate.passkey_trials,
        "seed": experiment.seed,
        "half": "test",
    }
    shared = {"settings": settings, "bos": NO_BOS}
    shared["seconds"] = round(time.perf_counter() - began, 3)
    return rows + [_identity(name, experiment) | {"kind": "protocol"} | shared for name in TASKS]


def _identity(task: str, experiment: Experiment) -> Row:
    """The fields of a task's rows; wrong answers are not ranked, and 0 says so."""
    ids = row_ids(experiment, experiment.train.steps)
    if task == "passkey":
        return {"kind": "passkey", "protocol": "passkey", "template": "compact", **ids}
    unranked = dict.fromkeys(("found", "asked", "first", "rank_sum", "candidates"), 0)
    return {"kind": "retrieval", "protocol": "retrieval", "task": task, **ids, **unranked}


def score_windows(
    scorer: Scorer, windows: Windows, batch_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each window's answer is the model's first choice throughout, and its nats: ``[W]``.

    The last token of a window is an input too, though nothing is asked after it: kernels take whole
    blocks, and windows of ``C - 1`` tokens have none.
    """
    count, context = windows.tokens.shape
    longest = int(windows.answer.max())
    size = min(count, max(1, batch_tokens // context))
    right, nats = np.zeros(count, bool), np.zeros(count)
    for start in range(0, count, size):
        chosen = np.arange(start, min(start + size, count))
        tokens = windows.tokens[np.resize(chosen, size)].astype(np.int32)
        after = np.zeros((size, 1), np.int32)  # of the last input, and left out below
        targets = np.concatenate([tokens[:, -longest:], after], axis=1)
        of_targets, hits = (np.asarray(x)[: len(chosen), :-1] for x in scorer(tokens, targets))
        is_answer = np.arange(longest) >= longest - windows.answer[chosen, None]
        right[chosen] = np.all(hits | ~is_answer, axis=1)
        nats[chosen] = np.sum(np.where(is_answer, of_targets, 0.0), axis=1)
    return right, nats
