"""How to train: the section ``train`` of a configuration, and the stages of a run."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fope_jax.config.fields import check_value

_MOST = 2**31  # of any count: the step is an int32 on the device
Schedule = Literal["cosine", "constant"]
OnBadStep = Literal["stop", "skip"]
OnSaveError = Literal["stop", "continue"]


class Stage(NamedTuple):
    """Updates ``start`` to ``stop - 1`` of a run, counted from 0, all of one length.

    Attributes:
      start, stop: updates done before the stage and at its end.
      length: tokens a sequence.
      batch_size: sequences an update.
    """

    start: int
    stop: int
    length: int
    batch_size: int


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults are the paper's (section A.3 and its released code).

    Attributes:
      steps: optimizer updates in the whole run.
      batch_size: sequences an update, over all devices.
      length: tokens a sequence; the training length of the experiment.
      first_lengths: entries "length=updates", such as ``("512=4000",)``: shorter sequences in the
        first updates, in the order given, and ``length`` in what is left of ``steps``. There are
        more of them in a batch, so that the tokens of an update stay. They are cut from windows
        of ``length`` tokens, so that stages share an epoch and read no token twice. A position
        embedding's training length is ``length`` from the first update on.
      learning_rate: the peak rate.
      warmup_steps: updates over which the rate grows linearly from 0 to its peak.
      schedule: after the warmup, "cosine" decays to ``final_learning_rate_fraction`` of the peak
        at the last update; "constant" stays.
      final_learning_rate_fraction: what is left of the peak at the end of "cosine".
      b1, b2, eps: AdamW's moments and divisor.
      weight_decay: decoupled, times the learning rate, on every parameter: norms and embeddings
        too, as in the paper's code. Position constants are not parameters and never decay.
      gradient_clip: largest global norm of the gradient; None does not clip.
      schedule_start: updates of the learning rate's schedule done before the first one of this run,
        which then goes on where another run stood. The schedule has ``schedule_start + steps``.
      data_start: batches of the data's stream that are left out before the first one of this run.
      accumulate: pieces an update's batch is computed in, one after the other. Divides
        ``batch_size``; changes memory, not the update (up to rounding).
      log_every: updates between two rows of metrics.
      save_every: updates between two checkpoints; the last update is always saved.
      evaluate_every: updates between two evaluations inside training, on the parameters as they
        are; the first is before any update, the last after all. None evaluates never. See
        ``evaluate.training_windows``.
      keep: checkpoints kept.
      on_bad_step: what becomes of a step whose loss or gradient is not finite, or that is a spike.
        "stop" ends the run; "skip" leaves parameters and optimizer as they were, bit for bit, and
        uses up the batch but no update of the learning rate's schedule.
      max_skipped: with "skip", so many bad steps in a row end the run all the same.
      spike_factor: a loss or gradient norm above so many times its running mean makes a step bad,
        see ``train.guard``. None looks at what is not finite alone.
      on_save_error: what becomes of a run whose checkpoint cannot be written, as on a full disk:
        "stop", or "continue" and try again at the next one. The last one must be written, and
        several processes always stop.
    """

    steps: int
    batch_size: int
    length: int
    first_lengths: tuple[str, ...] = ()
    learning_rate: float = 6e-4
    warmup_steps: int = 10_000
    schedule: Schedule = "cosine"
    final_learning_rate_fraction: float = 0.1
    schedule_start: int = 0
    data_start: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float | None = 1.0
    accumulate: int = 1
    log_every: int = 10
    save_every: int = 1_000
    keep: int = 2
    evaluate_every: int | None = None
    on_bad_step: OnBadStep = "stop"
    max_skipped: int = 10
    spike_factor: float | None = None
    on_save_error: OnSaveError = "stop"

    def __post_init__(self):
        counts = ("steps", "batch_size", "length", "accumulate", "log_every", "save_every")
        for name in (*counts, "keep", "max_skipped"):
            count = getattr(self, name)
            check_value(name, count, count >= 1, "an integer of 1 or more")
            check_value(name, count, count < _MOST, f"an integer below {_MOST}")
        every, spike = self.evaluate_every, self.spike_factor
        check_value("evaluate_every", every, every is None or every >= 1, "1 or more, or None")
        check_value("spike_factor", spike, spike is None or spike > 1, "a number above 1, or None")
        check_value(
            "accumulate",
            self.accumulate,
            self.batch_size % self.accumulate == 0,
            f"a divisor of batch_size = {self.batch_size}",
        )
        for name in ("warmup_steps", "schedule_start", "data_start"):
            check_value(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "eps"):
            rate = getattr(self, name)
            check_value(name, rate, 0 < rate < math.inf, "a positive number")
        decay = self.weight_decay
        check_value("weight_decay", decay, 0 <= decay < math.inf, "0 or more")
        for name in ("b1", "b2"):
            check_value(name, getattr(self, name), 0 <= getattr(self, name) < 1, "0 <= value < 1")
        fraction = self.final_learning_rate_fraction
        check_value("final_learning_rate_fraction", fraction, 0 <= fraction <= 1, "0 <= value <= 1")
        clip = self.gradient_clip
        check_value("gradient_clip", clip, clip is None or clip > 0, "a positive number or None")
        for name, kind in (
            ("schedule", Schedule),
            ("on_bad_step", OnBadStep),
            ("on_save_error", OnSaveError),
        ):
            names = typing.get_args(kind)
            check_value(name, getattr(self, name), getattr(self, name) in names, f"one of {names}")
        object.__setattr__(self, "first_lengths", tuple(self.first_lengths))
        for entry in self.first_lengths:
            self._check_first_length(entry)
        used = sum(steps for _, steps in map(_length_and_steps, self.first_lengths))
        check_value(
            "first_lengths",
            self.first_lengths,
            used < self.steps,
            f"fewer updates than steps = {self.steps}; these are {used}",
        )

    def _check_first_length(self, entry: str) -> None:
        length, steps = _length_and_steps(entry)
        check_value(
            "first_lengths",
            entry,
            1 <= length < self.length and steps >= 1,
            f"'length=updates', 1 update or more of sequences shorter than length = {self.length}",
        )
        tokens, pieces = self.batch_size * self.length, length * self.accumulate
        check_value(
            "first_lengths",
            entry,
            tokens % pieces == 0,
            f"a length of which whole rows, and a multiple of accumulate = {self.accumulate} of "
            f"them, make up the {self.batch_size} * {self.length} = {tokens} tokens of an update",
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run, one after the other; a single one without ``first_lengths``.

        >>> config = TrainConfig(steps=9, batch_size=2, length=16, first_lengths=("8=4",))
        >>> [tuple(stage) for stage in config.stages]
        [(0, 4, 8, 4), (4, 9, 16, 2)]
        """
        stages, tokens = [], self.batch_size * self.length
        for entry in self.first_lengths:
            length, steps = _length_and_steps(entry)
            start = stages[-1].stop if stages else 0
            stages.append(Stage(start, start + steps, length, tokens // length))
        start = stages[-1].stop if stages else 0
        return (*stages, Stage(start, self.steps, self.length, self.batch_size))


def _length_and_steps(entry: str) -> tuple[int, int]:
    """The numbers of an entry of ``first_lengths``; 0, 0 where it is none."""
    length, _, steps = entry.partition("=")
    decimal = length.strip().isdecimal() and steps.strip().isdecimal()
    return (int(length), int(steps)) if decimal else (0, 0)
