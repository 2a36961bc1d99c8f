"""How to train: the section ``train`` of a configuration, and the stages of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fope_jax.config.fields import check_fields, check_value

_MOST = 2**31  # of any count: the step is an int32 on the device


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
        first updates, in the order given, then ``length``. An update keeps its tokens, so it has
        more of them. They are cut from windows of ``length`` tokens: stages share an epoch and read
        no token twice. A position embedding's training length is ``length`` throughout.
      learning_rate: the peak rate.
      warmup_steps: updates over which the rate grows linearly from 0 to its peak.
      schedule: after the warmup, "cosine" decays to ``final_learning_rate_fraction`` of the peak
        at the last update; "constant" stays.
      final_learning_rate_fraction: what is left of the peak at the end of "cosine".
      b1, b2, eps: AdamW's moments and divisor.
      weight_decay: decoupled, times the learning rate, on every parameter: norms and embeddings
        too, as in the paper's code. Position constants are not parameters and never decay.
      gradient_clip: largest global norm of the gradient; None does not clip.
      schedule_start: updates of the schedule done before this run, which goes on where another run
        stood. The schedule has ``schedule_start + steps``.
      data_start: batches of the data's stream left out before the first one of this run.
      accumulate: pieces an update's batch is computed in, one after the other. Divides
        ``batch_size``; changes memory, not the update (up to rounding).
      log_every: updates between two rows of metrics.
      save_every: updates between two checkpoints; the last update is always saved.
      evaluate_every: updates between two evaluations inside training; the first is before any
        update, the last after all. None never evaluates. See ``evaluate.training_windows``.
      keep: checkpoints kept.
      on_bad_step: where loss or gradient is not finite, or a spike, "stop" ends the run; "skip"
        leaves parameters and optimizer as they were, bit for bit, and uses up the batch but no
        update of the schedule.
      max_skipped: with "skip", so many bad steps in a row end the run all the same.
      spike_factor: a loss or gradient norm above so many times its running mean makes a step bad,
        see ``train.bad_steps``. None looks at what is not finite alone.
      on_save_error: where a checkpoint cannot be written, as on a full disk, "stop", or "continue"
        and try again at the next one. The last one must be written, and several processes always
        stop.
    """

    steps: int
    batch_size: int
    length: int
    first_lengths: tuple[str, ...] = ()
    learning_rate: float = 6e-4
    warmup_steps: int = 10_000
    schedule: Literal["cosine", "constant"] = "cosine"
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
    on_bad_step: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    spike_factor: float | None = None
    on_save_error: Literal["stop", "continue"] = "stop"

    def __post_init__(self):
        object.__setattr__(self, "first_lengths", tuple(self.first_lengths))
        check_fields(
            self,
            (
                "steps batch_size length accumulate log_every save_every keep max_skipped",
                lambda n: 1 <= n < _MOST,
                f"an integer of 1 or more, below {_MOST}",
            ),
            ("warmup_steps schedule_start data_start", lambda n: n >= 0, "0 or more"),
            ("evaluate_every", lambda n: n is None or n >= 1, "1 or more, or None"),
            ("spike_factor", lambda x: x is None or x > 1, "a number above 1, or None"),
            ("gradient_clip", lambda x: x is None or x > 0, "a positive number or None"),
            ("learning_rate eps", lambda x: 0 < x < math.inf, "a positive number"),
            ("weight_decay", lambda x: 0 <= x < math.inf, "0 or more"),
            ("b1 b2", lambda x: 0 <= x < 1, "0 <= value < 1"),
            ("final_learning_rate_fraction", lambda x: 0 <= x <= 1, "0 <= value <= 1"),
            (
                "accumulate",
                lambda n: self.batch_size % n == 0,
                f"a divisor of batch_size = {self.batch_size}",
            ),
        )
        tokens = self.batch_size * self.length
        for entry in self.first_lengths:
            length, steps = _length_and_steps(entry)
            check_value(
                "first_lengths",
                entry,
                1 <= length < self.length and steps >= 1,
                "'length=updates', 1 update or more of sequences shorter than length = "
                f"{self.length}",
            )
            check_value(
                "first_lengths",
                entry,
                tokens % (length * self.accumulate) == 0,
                f"a length of which whole rows, and a multiple of accumulate = {self.accumulate} "
                f"of them, make up the {self.batch_size} * {self.length} = {tokens} tokens of an "
                "update",
            )
        used = sum(steps for _, steps in map(_length_and_steps, self.first_lengths))
        check_value(
            "first_lengths",
            self.first_lengths,
            used < self.steps,
            f"fewer updates than steps = {self.steps}; these are {used}",
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run, one after the other; a single one without ``first_lengths``.

        >>> config = TrainConfig(steps=9, batch_size=2, length=16, first_lengths=("8=4",))
        >>> [tuple(stage) for stage in config.stages]
        [(0, 4, 8, 4), (4, 9, 16, 2)]
        """
        stages, start = [], 0
        for entry in self.first_lengths:
            length, steps = _length_and_steps(entry)
            stages.append(
                Stage(start, start + steps, length, self.batch_size * self.length // length)
            )
            start += steps
        return (*stages, Stage(start, self.steps, self.length, self.batch_size))


def _length_and_steps(entry: str) -> tuple[int, int]:
    """The numbers of an entry of ``first_lengths``; 0, 0 where it is none."""
    length, _, steps = entry.partition("=")
    decimal = length.strip().isdecimal() and steps.strip().isdecimal()
    return (int(length), int(steps)) if decimal else (0, 0)
