"""Bad steps: detected on the device, counted on the host.

A step is bad if its loss or gradient norm x is not finite. With a spike factor c it is also bad if
x is more than c times the running mean over the k good steps with a scored token so far:

    m_k = m_(k-1) + (x_k - m_(k-1)) / min(k, WINDOW)         bad if x > c m_k and k >= WARMUP

The means are part of the training state, so that a resumed run skips the same steps.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fope_jax.config import TrainConfig
from fope_jax.data.task_mixture import BatchLoader
from fope_jax.model.transformer import check_batch
from fope_jax.processes.collectives import is_main_process
from fope_jax.storage.files import write_json
from fope_jax.typing import Array, Batch

log = logging.getLogger(__name__)

WINDOW = 100  # about how many steps the running means cover
WARMUP = 20  # good steps before a step can be a spike
BAD_STEPS = "bad_steps"  # directory for the batches of bad steps
ADVICE = (
    "nothing has been saved since the last checkpoint; a lower train.learning_rate may help, and "
    "--config.train.on_bad_step=skip leaves such steps out"
)


# ---------------------------------------------------------------------------- on the device


class RunningMeans(NamedTuple):
    """Float32 means of loss and gradient norm over good steps, and the int32 count of these."""

    loss: Array
    norm: Array
    steps: Array


@dataclass(frozen=True)
class Guard:
    """Rejects the updates of bad steps; without a factor it keeps no state."""

    spike_factor: float | None = None

    def state(self, values: Sequence[float] = (0.0, 0.0, 0)) -> RunningMeans | tuple[()]:
        """A new state, or one with the ``values`` from a checkpoint."""
        if self.spike_factor is None:
            return ()
        loss, norm, steps = values
        return RunningMeans(np.float32(loss), np.float32(norm), np.int32(steps))

    def judge(
        self,
        state: RunningMeans | tuple[()],
        loss: Array,
        norm: Array,
        is_scored: Array | bool = True,
    ) -> tuple[Array, RunningMeans | tuple[()]]:
        """Whether a step is good, from its float32 scalars, and the state after a good one.

        Without a scored token loss and norm are 0; such a step leaves the means as they are.
        """
        is_good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if self.spike_factor is None or not isinstance(state, RunningMeans):
            return is_good, ()
        factor = jnp.float32(self.spike_factor)
        is_spike = (loss > factor * state.loss) | (norm > factor * state.norm)
        weight = 1.0 / jnp.minimum(state.steps + 1, WINDOW).astype(jnp.float32)
        updated = RunningMeans(
            state.loss + (loss - state.loss) * weight,
            state.norm + (norm - state.norm) * weight,
            state.steps + 1,
        )
        updated = RunningMeans(
            *(jnp.where(is_scored, x, old) for x, old in zip(updated, state, strict=True))
        )
        return is_good & ~(is_spike & (state.steps >= WARMUP)), updated


def make_guard(config: TrainConfig) -> Guard | None:
    """The guard that ``config`` asks for; None if every update is applied."""
    if config.on_bad_step == "stop" and config.spike_factor is None:
        return None
    return Guard(config.spike_factor)


# ---------------------------------------------------------------------------- on the host


class BadStep(NamedTuple):
    """A bad step: its number (from 1), mean loss (nats per token) and gradient norm."""

    step: int
    loss: float
    norm: float


class BadStepError(FloatingPointError):
    """A run ended because of bad ``steps``, or because of parameters that are not finite."""

    def __init__(self, message: str, steps: Sequence[BadStep] = ()):
        super().__init__(message)
        self.steps = tuple(steps)


class BadStepCounter:
    """Counts the skipped steps of a run; ``in_a_row`` are those since the last good one."""

    def __init__(self, config: TrainConfig, total: int = 0, in_a_row: Sequence[BadStep] = ()):
        self._config = config
        self.total, self.in_a_row = total, list(in_a_row)

    def record(self, step: int, loss: float, norm: float, is_skipped: bool) -> None:
        """Records one step; raises BadStepError if it must end the run."""
        config, is_finite = self._config, np.isfinite(loss) and np.isfinite(norm)
        if is_finite and not is_skipped:
            self.in_a_row = []
            return
        text = f"step {step}: loss is {loss:.6g}, gradient norm {norm:.6g}"
        if is_finite:
            text += f", beyond train.spike_factor = {config.spike_factor} times the running mean"
        bad = BadStep(step, loss, norm)
        if config.on_bad_step == "stop":
            raise BadStepError(f"{text}; {ADVICE}", [bad])
        self.in_a_row.append(bad)
        self.total += 1
        count = f"{len(self.in_a_row)} in a row, train.max_skipped = {config.max_skipped}"
        if len(self.in_a_row) >= config.max_skipped:
            raise BadStepError(f"{text}; bad steps: {count}", self.in_a_row)
        log.warning("%s; skipped (%s)", text, count)


@contextlib.contextmanager
def dump_batches_of_bad_steps(
    workdir: Path, loader_at: Callable[[int], BatchLoader], data_start: int
) -> Iterator[None]:
    """On a BadStepError, writes the batches of its steps and adds their path to the error.

    ``bad_steps/STEP.npz`` has the arrays. ``STEP.json`` has the loss and, for each row, its window
    and documents. ``data_start`` is the number of batches before the first step.
    """
    try:
        yield
    except BadStepError as error:
        if not is_main_process() or not error.steps:
            raise
        directory = workdir / BAD_STEPS
        directory.mkdir(parents=True, exist_ok=True)
        for bad in error.steps:
            loader, number = loader_at(bad.step), bad.step - 1 + data_start
            content = io.BytesIO()
            np.savez(content, **loader.batch(number, whole=True)._asdict())
            (directory / f"{bad.step}.npz").write_bytes(content.getvalue())
            facts = {
                "step": bad.step,
                "batch": number,
                "loss": str(bad.loss),  # JSON has no NaN
                "grad_norm": str(bad.norm),
                "rows": loader.row_sources(number),
            }
            write_json(directory / f"{bad.step}.json", facts)
        names = ", ".join(f"{bad.step}.npz" for bad in error.steps[-3:])
        names += " and more" if len(error.steps) > 3 else ""
        where = f"its batch and documents are in {directory}: {names}, and .json beside"
        raise BadStepError(f"{error}; {where}", error.steps) from None


def check_tokens(batch: Batch, step: int, vocab_size: int) -> None:
    """Raises ValueError if a token of the batch of ``step`` is not in the vocabulary."""
    for name, tokens in (("tokens", batch.tokens), ("targets", batch.targets)):
        try:
            check_batch(tokens, vocab_size)
        except ValueError as error:
            raise ValueError(f"step {step}, {name} of the batch: {error}") from error
