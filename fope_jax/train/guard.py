"""Which updates must not be made, decided on the device inside the step.

A loss or gradient norm that is not finite is bad. With a spike factor c so is one beyond c times
its running mean over the steps that were good:

    m_k = m_(k-1) + (x_k - m_(k-1)) / min(k, WINDOW)         bad where x > c m_k and k >= WARMUP

The means belong to the training state, so that a resumed run judges as the unbroken one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fope_jax.config import TrainConfig
from fope_jax.typing import Array

WINDOW = 100  # steps that a running mean goes back, about
WARMUP = 20  # good steps before a mean can call anything a spike


class RunningMeans(NamedTuple):
    """Of the good steps so far: float32 means of loss and gradient norm, and int32 their number."""

    loss: Array
    norm: Array
    steps: Array


@dataclass(frozen=True)
class Guard:
    """Judges steps.

    Attributes:
      spike_factor: c; None judges by what is finite alone and keeps no state.
    """

    spike_factor: float | None = None

    def state(self, values: Sequence[float] = (0.0, 0.0, 0)) -> RunningMeans | tuple[()]:
        """The state before the first step, or the one with the ``values`` of a checkpoint."""
        if self.spike_factor is None:
            return ()
        loss, norm, steps = values
        return RunningMeans(np.float32(loss), np.float32(norm), np.int32(steps))

    def judge(
        self, state: RunningMeans | tuple[()], loss: Array, norm: Array
    ) -> tuple[Array, RunningMeans | tuple[()]]:
        """Whether a step is good, and the state after it if it is.

        Args:
          state: from `state` or the step before.
          loss, norm: float32 scalars of this step.
        """
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if self.spike_factor is None or not isinstance(state, RunningMeans):
            return good, ()
        factor = jnp.float32(self.spike_factor)
        spike = (loss > factor * state.loss) | (norm > factor * state.norm)
        weight = 1.0 / jnp.minimum(state.steps + 1, WINDOW).astype(jnp.float32)
        seen = RunningMeans(
            state.loss + (loss - state.loss) * weight,
            state.norm + (norm - state.norm) * weight,
            state.steps + 1,
        )
        return good & ~(spike & (state.steps >= WARMUP)), seen


def make_guard(config: TrainConfig) -> Guard | None:
    """The guard that a configuration asks for; None where every update is made, as it comes."""
    if config.on_bad_step == "stop" and config.spike_factor is None:
        return None
    return Guard(config.spike_factor)
