"""What a change costs before any training: the loss of parent and child."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fope_jax.config import Experiment
from fope_jax.data.cache import TokenCache, open_cache
from fope_jax.data.loader import Loader
from fope_jax.train.loop import shard_batch, share_positions
from fope_jax.train.state import StatePlan, plan_state
from fope_jax.train.step import TrainState, batch_sums

log = logging.getLogger(__name__)

WARN_ABOVE = 1.2  # loss at the start over the parent's
CHECKED_UPDATES = 4  # the start is measured on the tokens of so many updates


def stream_loss(
    experiment: Experiment,
    plan: StatePlan,
    params: Any,
    constants: Any,
    cache: TokenCache,
    tokens: int,
) -> float:
    """The loss of the first ``tokens`` tokens of a split, in windows of the training length.

    At every length the same targets are scored, each with what stands before it in its window.

    Args:
      experiment: gives length, rows of a forward pass and packing.
      plan: of its state, ``plan_state(experiment)``.
      params, constants: arrays of the model.
      cache: the split.
      tokens: a multiple of the length, or all that there are.

    Returns:
      Nats a token.
    """
    config, packing = experiment.train, experiment.data.packing
    rows, count = config.batch_size // config.accumulate, math.ceil(tokens / config.length)
    loader = Loader(cache, length=config.length, batch_size=rows, seed=0, packing=packing)
    score = jax.jit(lambda *arrays: batch_sums(plan.graphdef, *arrays))
    nats, scored = 0.0, 0.0
    with jax.set_mesh(plan.mesh):
        for start in range(0, count, rows):
            numbers = np.arange(start, start + rows)
            batch = loader.windows(np.minimum(numbers, count - 1))
            inside = (numbers < count).astype(np.float32)[:, None]
            batch = batch._replace(weights=batch.weights * inside)
            sums = score(params, constants, shard_batch(share_positions(batch, packing), plan.mesh))
            nats, scored = nats + float(sums.nats), scored + float(sums.tokens)
    return nats / scored


def compare_initial_losses(
    parent: Experiment,
    arrays: Mapping[str, Any],
    child: Experiment,
    state: TrainState,
    constants: Any,
    warn_above: float,
) -> dict[str, Any]:
    """What the change alone costs: validation loss of parent and child, before any update.

    Warns where the child's loss at its length is more than ``warn_above`` times the parent's at its
    own.

    Returns:
      Losses in nats a token, their ratio, and the warning or None.
    """
    cache = open_cache(child.data, "validation")
    update = child.train.batch_size * child.train.length
    tokens = update * min(CHECKED_UPDATES, cache.num_tokens // update) or cache.num_tokens

    def loss(experiment: Experiment, params: Any, constants: Any) -> float:
        return stream_loss(experiment, plan_state(experiment), params, constants, cache, tokens)

    trained = arrays["params"], arrays["constants"]
    before, after = loss(parent, *trained), loss(child, state.params, constants)
    limit, longer = parent.position.limits.max_length, None
    if limit is None or limit >= child.train.length:
        longer = loss(dataclasses.replace(parent, train=child.train), *trained)
    result = {
        "tokens": tokens,
        "parent": before,
        "parent_at_new_length": longer,
        "child": after,
        "ratio": after / before,
        "warn_above": warn_above,
        "warning": None,
    }
    log.info(
        "before the first update: loss %.4f with the parent's position embedding at %d tokens, "
        "%s at %d, %.4f with the new one (%d validation tokens)",
        before,
        parent.train.length,
        "undefined" if longer is None else f"{longer:.4f}",
        child.train.length,
        after,
        tokens,
    )
    if not after <= warn_above * before:  # also where it is no number
        result["warning"] = (
            f"the child starts at a loss of {after:.4f}, {after / before:.2f} times the parent's "
            f"{before:.4f}, more than {warn_above:g} times: the change breaks more than it keeps, "
            "and much of the training will be spent on mending it"
        )
        log.warning("WARNING: %s", result["warning"])
    return result
