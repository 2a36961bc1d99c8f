"""The losses of parent and child before any further training."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fope_jax.config import Experiment
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.loader import Loader
from fope_jax.data.task_mixture import make_stage_loaders
from fope_jax.train.state import StatePlan, plan_state, shard_batch, share_positions
from fope_jax.train.step import TrainState, batch_loss
from fope_jax.typing import Batch

log = logging.getLogger(__name__)

WARN_ABOVE = 1.2  # ratio of the child's loss to the parent's
NUM_UPDATES = 4  # losses are measured on the tokens of this many updates
UNSEEN_STEP = 2**30  # of the stream of tasks; no run gets so far


def stream_loss(
    plan: StatePlan, params: Any, constants: Any, cache: TokenCache, tokens: int
) -> float:
    """Nats per token of the first ``tokens`` tokens of a split, in windows of the plan's length.

    Without text they are ``tokens`` tokens of the run's training tasks.
    """
    make_batches = _text_batches if cache.num_tokens else _task_batches
    score = jax.jit(lambda params, *rest: batch_loss(params, plan.graphdef, *rest))
    total, scored = 0.0, 0.0
    with jax.set_mesh(plan.mesh):
        for batch in make_batches(plan, cache, tokens):
            batch = share_positions(batch, plan.experiment)
            nats, weights = score(params, constants, shard_batch(batch, plan.mesh))
            total, scored = total + float(nats), scored + float(weights)
    return total / scored


def _text_batches(plan: StatePlan, cache: TokenCache, tokens: int) -> Iterator[Batch]:
    config, packing = plan.experiment.train, plan.experiment.data.packing
    rows, count = config.batch_size // config.accumulate, math.ceil(tokens / config.length)
    loader = Loader(cache, length=config.length, batch_size=rows, seed=0, packing=packing)
    for start in range(0, count, rows):
        numbers = np.arange(start, start + rows)
        batch = loader.windows(np.minimum(numbers, count - 1))
        is_counted = (numbers < count).astype(np.float32)[:, None]
        yield batch._replace(weights=batch.weights * is_counted)


def _task_batches(plan: StatePlan, cache: TokenCache, tokens: int) -> Iterator[Batch]:
    config, data = plan.experiment.train, plan.experiment.data
    (loader,) = make_stage_loaders(data, cache, config.stages[-1:], seed=0)
    updates = math.ceil(tokens / (config.batch_size * config.length))
    return loader.iterate(UNSEEN_STEP, updates)


def compare_initial_losses(
    parent: Experiment,
    arrays: Mapping[str, Any],
    child: Experiment,
    state: TrainState,
    constants: Any,
    cache: TokenCache,
    warn_above: float,
) -> dict[str, Any]:
    """Nats per token of parent and child; warns if their ratio is above ``warn_above``."""
    update = child.train.batch_size * child.train.length
    tokens = update * min(NUM_UPDATES, cache.num_tokens // update) or cache.num_tokens
    tokens = tokens or update * NUM_UPDATES
    trained = arrays["params"], arrays["constants"]
    before = stream_loss(plan_state(parent), *trained, cache, tokens)
    after = stream_loss(plan_state(child), state.params, constants, cache, tokens)
    limit, at_new_length = parent.position.limits.max_length, None
    if limit is None or limit >= child.train.length:
        longer = dataclasses.replace(parent, train=child.train)
        at_new_length = stream_loss(plan_state(longer), *trained, cache, tokens)
    log.info(
        "before the first update: loss %.4f with the parent's position embedding at %d tokens, "
        "%s at %d, %.4f with the new one (%d validation tokens)",
        before,
        parent.train.length,
        "undefined" if at_new_length is None else f"{at_new_length:.4f}",
        child.train.length,
        after,
        tokens,
    )
    warning = None
    if not after <= warn_above * before:  # also if it is not finite
        warning = (
            f"the child starts at a loss of {after:.4f}, {after / before:.2f} times the parent's "
            f"{before:.4f}, more than {warn_above:g} times: the change breaks more than it keeps, "
            "and much of the training will be spent on mending it"
        )
        log.warning("WARNING: %s", warning)
    return {
        "tokens": tokens,
        "parent": before,
        "parent_at_new_length": at_new_length,
        "child": after,
        "ratio": after / before,
        "warn_above": warn_above,
        "warning": warning,
    }
