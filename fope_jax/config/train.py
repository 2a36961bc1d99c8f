"""The section ``train`` of a configuration, and the stages of a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fope_jax.config.fields import check_fields, check_value
from fope_jax.data.random_positions import check_draw

_EVALUATIONS, _LEAST_INTERVAL = 10, 100  # of evaluate_every = "auto"
_MOST = 2**31  # limit of any count: the step is an int32 on the device


class Stage(NamedTuple):
    """Updates ``start`` to ``stop - 1`` of a run, counted from 0, all with ``length`` tokens."""

    start: int
    stop: int
    length: int
    batch_size: int


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults are the paper's (section A.3 and its released code).

    Attributes:
      steps: optimizer updates in the whole run.
      batch_size: sequences per update, over all devices.
      length: tokens per sequence; the training length of the experiment.
      first_lengths: stages of shorter sequences before ``length``, as "length=updates", such as
        ``("512=4000",)``. An update keeps its number of tokens, and no token is read twice. The
        training length of position embeddings stays ``length``.
      position_range: R, tokens: each document of a batch is trained at ordered positions drawn at
        random from 0 to R - 1, in place of 0, 1, 2, ..; None does not draw. Evaluation counts from
        0, unless ``evaluate.random_positions``.
      position_draw: of ``position_range``: "subset" draws whole positions, every ordered subset
        with the same probability; "float" draws fractions of a token too.
      learning_rate: the peak rate.
      warmup_steps: updates of linear warmup from 0 to the peak.
      schedule: after the warmup, "cosine" decay or a "constant" rate.
      final_learning_rate_fraction: final rate of "cosine" as a fraction of the peak.
      b1, b2, eps: of AdamW.
      weight_decay: decoupled, times the learning rate, on every parameter, also norms and
        embeddings, as in the paper's code; not on position constants.
      gradient_clip: maximum global norm of the gradient; None does not clip.
      decay_steps: updates of this run up to the end of the "cosine" decay; the final rate stays
        from there on. None is all ``steps``; `fope train --continue-for` sets it.
      schedule_start: updates of the schedule before this run; its decay ends at
        ``schedule_start + decay_steps``.
      data_start: batches of the data stream to skip before the first one.
      accumulate: pieces in which a batch is computed, to save memory; divides ``batch_size``.
      log_every: updates between rows of metrics.
      save_every: updates between checkpoints; the last update is always saved.
      evaluate_every: updates between evaluations during training, which also run before the first
        and after the last update, on ``evaluate.training_windows``. "auto" measures the shortest of
        ``evaluate.lengths`` alone, which is the training length by default, ten times in a run but
        at least 100 updates apart, and in a shorter run or without held-out text never. A number
        measures all of ``evaluate.lengths``. None never evaluates.
      tracker: "module:function" that makes an experiment tracker, see ``train/tracker.py``.
      keep: number of checkpoints to keep, the newest ones.
      keep_period: keep for ever, beside these, each checkpoint whose step is a multiple of this; a
        multiple of ``save_every``. None keeps no other.
      grace_seconds: seconds between SIGTERM and the end of the machine; only compared, in the log,
        with what a save takes. 30 is what Google Cloud's spot machines, Slurm and Kubernetes give
        by default.
      on_bad_step: if loss or gradient is not finite, or a spike: "stop" ends the run; "skip" keeps
        parameters and optimizer unchanged and goes to the next batch.
      max_skipped: with "skip", end the run after this many bad steps in a row.
      spike_factor: a step is bad if loss or gradient norm is above this multiple of its running
        mean, see ``train.bad_steps``; None checks only that they are finite.
      on_save_error: if a checkpoint cannot be written: "stop", or "continue" and try at the next
        one. The last checkpoint must be written.
      compiler_options: XLA's for the program of a step, each as "name=value", which change its
        speed and memory; () is none, None those tuned for the mesh, see
        ``fope_jax.train.compiler_options``.
    """

    steps: int
    batch_size: int
    length: int
    first_lengths: tuple[str, ...] = ()
    position_range: int | None = None
    position_draw: Literal["subset", "float"] = "subset"
    learning_rate: float = 6e-4
    warmup_steps: int = 10_000
    schedule: Literal["cosine", "constant"] = "cosine"
    final_learning_rate_fraction: float = 0.1
    decay_steps: int | None = None
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
    keep_period: int | None = None
    grace_seconds: float = 30.0
    evaluate_every: int | Literal["auto"] | None = "auto"
    tracker: str | None = None
    on_bad_step: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    spike_factor: float | None = None
    on_save_error: Literal["stop", "continue"] = "stop"
    compiler_options: tuple[str, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "first_lengths", tuple(self.first_lengths))
        if self.compiler_options is not None:
            object.__setattr__(self, "compiler_options", tuple(self.compiler_options))
        check_fields(
            self,
            (
                "steps batch_size length accumulate log_every save_every keep max_skipped",
                lambda n: 1 <= n < _MOST,
                f"an integer of 1 or more, below {_MOST}",
            ),
            ("warmup_steps schedule_start data_start", lambda n: n >= 0, "0 or more"),
            ("decay_steps", lambda n: n is None or 1 <= n < _MOST, "1 or more, or None"),
            (
                "evaluate_every",
                lambda n: n in ("auto", None) or n >= 1,
                "1 or more, 'auto', or None",
            ),
            (
                "tracker",
                lambda name: name is None or all(name.partition(":")),
                "'module:function', or None",
            ),
            (
                "position_range",
                lambda n: n is None or self.length <= n < _MOST,
                f"length = {self.length} or more, or None to train on positions 0 to length - 1",
            ),
            ("spike_factor", lambda x: x is None or x > 1, "a number above 1, or None"),
            ("gradient_clip", lambda x: x is None or x > 0, "a positive number or None"),
            (
                "keep_period",
                lambda n: n is None or (n >= 1 and n % self.save_every == 0),
                f"a multiple of save_every = {self.save_every}, or None",
            ),
            ("learning_rate eps grace_seconds", lambda x: 0 < x < math.inf, "a positive number"),
            ("weight_decay", lambda x: 0 <= x < math.inf, "0 or more"),
            ("b1 b2", lambda x: 0 <= x < 1, "0 <= value < 1"),
            ("final_learning_rate_fraction", lambda x: 0 <= x <= 1, "0 <= value <= 1"),
            (
                "accumulate",
                lambda n: self.batch_size % n == 0,
                f"a divisor of batch_size = {self.batch_size}",
            ),
        )
        for option in self.compiler_options or ():
            check_value(
                "compiler_options",
                option,
                re.fullmatch(r"xla_\w+=[^\s=]+", option) is not None,
                "'name=value', a name that begins with xla_ and no space",
            )
        check_draw(self.position_range, self.position_draw)
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
    def trained_positions(self) -> int:
        """Positions that training meets, from 0: ``length``, or the range they are drawn from."""
        return self.position_range or self.length

    @property
    def evaluation_interval(self) -> int | None:
        """Updates between evaluations during training; None without any.

        >>> TrainConfig(steps=5_000, batch_size=1, length=8).evaluation_interval
        500
        """
        if self.evaluate_every != "auto":
            return self.evaluate_every
        tenth = max(_LEAST_INTERVAL, self.steps / _EVALUATIONS)
        # A multiple: otherwise evaluations would cut the rows of metrics.
        interval = math.ceil(tenth / self.log_every) * self.log_every
        return interval if interval <= self.steps else None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run in order; a single one without ``first_lengths``.

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
    """Parses an entry of ``first_lengths``; (0, 0) if it is invalid."""
    length, _, steps = entry.partition("=")
    decimal = length.strip().isdecimal() and steps.strip().isdecimal()
    return (int(length), int(steps)) if decimal else (0, 0)
