"""Steps with a loss or gradient that cannot be used: counted, told, and their batches kept."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fope_jax.config import TrainConfig
from fope_jax.data.task_mixture import BatchLoader
from fope_jax.model.transformer import check_batch
from fope_jax.processes.collectives import is_main_process
from fope_jax.storage.files import write_json
from fope_jax.typing import Batch

log = logging.getLogger(__name__)

BAD_STEPS = "bad_steps"
ADVICE = (
    "nothing has been saved since the last checkpoint; a lower train.learning_rate may help, and "
    "--config.train.on_bad_step=skip leaves such steps out"
)


class BadStep(NamedTuple):
    """One bad step, counted from 1, with its mean loss (nats per token) and gradient norm."""

    step: int
    loss: float
    norm: float

    @property
    def text(self) -> str:
        """For people: ``step 5: loss is nan, gradient norm nan``."""
        return f"step {self.step}: loss is {self.loss:.6g}, gradient norm {self.norm:.6g}"


class BadStepError(FloatingPointError):
    """A run that bad steps, or parameters that are no numbers, have ended.

    Attributes:
      steps: those whose batches are worth a look.
    """

    def __init__(self, message: str, steps: Sequence[BadStep] = ()):
        super().__init__(message)
        self.steps = tuple(steps)


class BadSteps:
    """The bad steps of a run so far.

    Attributes:
      total: how many were skipped.
      in_a_row: the newest of them, where no good step has followed.
    """

    def __init__(self, config: TrainConfig, total: int = 0, in_a_row: Sequence[BadStep] = ()):
        self._config = config
        self.total, self.in_a_row = total, list(in_a_row)

    def see(self, step: int, loss: float, norm: float, skipped: bool) -> None:
        """Takes note of one more step.

        Raises:
          BadStepError: it ends the run.
        """
        finite = np.isfinite(loss) and np.isfinite(norm)
        if finite and not skipped:
            self.in_a_row = []
            return
        bad, config = BadStep(step, loss, norm), self._config
        spike = f", beyond train.spike_factor = {config.spike_factor} times the running mean"
        told = bad.text + (spike if finite else "")
        if config.on_bad_step == "stop":
            raise BadStepError(f"{told}; {ADVICE}", [bad])
        self.in_a_row.append(bad)
        self.total += 1
        count = f"{len(self.in_a_row)} in a row, train.max_skipped = {config.max_skipped}"
        if len(self.in_a_row) >= config.max_skipped:
            raise BadStepError(f"{told}; bad steps: {count}", self.in_a_row)
        log.warning("%s; skipped (%s)", told, count)


def dump_batches(
    workdir: Path, error: BadStepError, loader_of: Callable[[int], BatchLoader], data_start: int
) -> BadStepError:
    """Writes the batches of ``error.steps`` into the run, so that a person can look at them.

    ``bad_steps/STEP.npz`` has the arrays of the batch, ``bad_steps/STEP.json`` the loss and, for
    each row, its window and documents.

    Args:
      workdir: of the run.
      error: what ended it.
      loader_of: step -> the loader of its stage.
      data_start: batches of the stream before the first step.

    Returns:
      The error to raise, which says where they are.
    """
    if not error.steps:
        return error
    directory = workdir / BAD_STEPS
    directory.mkdir(parents=True, exist_ok=True)
    for bad in error.steps:
        loader, number = loader_of(bad.step), bad.step - 1 + data_start
        content = io.BytesIO()
        np.savez(content, **loader.batch(number)._asdict())
        (directory / f"{bad.step}.npz").write_bytes(content.getvalue())
        facts = {
            "step": bad.step,
            "batch": number,
            "loss": str(bad.loss),  # JSON has no word for nan
            "grad_norm": str(bad.norm),
            "rows": loader.row_sources(number),
        }
        write_json(directory / f"{bad.step}.json", facts)
    names = ", ".join(f"{bad.step}.npz" for bad in error.steps[-3:])
    more = " and more" if len(error.steps) > 3 else ""
    where = f"its batch and documents are in {directory}: {names}{more}, and .json beside"
    return BadStepError(f"{error}; {where}", error.steps)


@contextlib.contextmanager
def dump_batches_of_bad_steps(
    workdir: Path, loader_of: Callable[[int], BatchLoader], data_start: int
) -> Iterator[None]:
    """Where bad steps end what is done inside, leaves their batches, see `dump_batches`."""
    try:
        yield
    except BadStepError as error:
        if not is_main_process():
            raise
        raise dump_batches(workdir, error, loader_of, data_start) from None


def check_tokens(batch: Batch, step: int, vocab_size: int) -> None:
    """Raises ValueError where a token of the batch of ``step`` has no place in the model."""
    for name, tokens in (("tokens", batch.tokens), ("targets", batch.targets)):
        try:
            check_batch(tokens, vocab_size)
        except ValueError as error:
            raise ValueError(f"step {step}, {name} of the batch: {error}") from error
