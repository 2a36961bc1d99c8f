"""What is measured, as a list in the order of its worth; each unit is one task of one process."""

from __future__ import annotations

from typing import NamedTuple

OURS, TORCH = "fope_jax", "torch"
KINDS = ("machine", "paths", "methods", "training", "cost", "attention")
METHOD_GROUPS = 4  # of all examples of methods, one unit each
# Tokens of a step. What Adam and the logits leave of 80 GB holds them without recomputation.
TOKENS = {"60m": 32_768, "180m": 32_768, "1200m": 16_384}
SIZES = (("180m", 4096), ("60m", 512), ("1200m", 4096), ("60m", 4096), ("180m", 512))
SIZES += (("1200m", 512), ("60m", 32_768), ("180m", 32_768), ("1200m", 32_768))
BESIDE_ROPE = ("rope", "fope", "alibi")


class Unit(NamedTuple):
    """One measurement.

    Attributes:
      side: the process that makes it, ``OURS`` or ``TORCH``.
      kind: of ``KINDS``.
      size: of the model, a preset of ``fope_jax.model.presets``; "" without a model.
      length: tokens of a row.
      batch: rows.
      group: of methods, its number.
      methods: labels of ``fope_jax.gallery.examples``; whose steps are timed, or which are checked,
        all where there are none.
      cases: of ``correctness.path_cases`` that are checked; None is all.
      remat: what the backward pass computes again, "none" or "full".
      seconds: that it takes on an H100, compilation included: an estimate, to plan with.
    """

    side: str
    kind: str
    size: str = ""
    length: int = 0
    batch: int = 1
    group: int = 0
    methods: tuple[str, ...] = ()
    cases: int | None = None
    remat: str = "none"
    seconds: float = 20.0

    @property
    def name(self) -> str:
        """In messages and in the list of what was not run.

        >>> Unit(TORCH, "training", "60m", 512, 64).name
        'training of 60m at 512 tokens (torch)'
        """
        words = [self.kind]
        words += [f"of {self.size}"] if self.size else []
        words += [f"at {self.length:,} tokens"] if self.length else []
        words += [f"group {self.group + 1} of {METHOD_GROUPS}"] if self.kind == "methods" else []
        return " ".join([*words, f"({self.side})"])


def all_units() -> list[Unit]:
    """Correctness first, then our steps, what methods cost, attention alone, and PyTorch's steps.

    A side's units stand together: only one process holds the GPU at a time.
    """
    return [
        Unit(OURS, "machine", seconds=8),
        Unit(OURS, "paths", length=1030, batch=2, seconds=30),
        *(
            Unit(OURS, "methods", "tiny", 258, 2, group=group, seconds=12)
            for group in range(METHOD_GROUPS)
        ),
        *(_training(OURS, size, length, 15) for size, length in SIZES),
        Unit(OURS, "cost", "180m", 4096, 8, methods=BESIDE_ROPE, seconds=33),
        Unit(OURS, "cost", "180m", 512, 64, methods=BESIDE_ROPE, seconds=33),
        *(Unit(OURS, "attention", "", t, 32_768 // t, seconds=8) for t in (4096, 512, 32_768)),
        *(_training(TORCH, size, length, 12) for size, length in SIZES),
    ]


def _training(side: str, size: str, length: int, seconds: float) -> Unit:
    batch = max(1, TOKENS[size] // length)
    remat = "full" if batch * length > TOKENS[size] else "none"
    methods = ("rope",)
    return Unit(side, "training", size, length, batch, 0, methods, None, remat, seconds)


def small_units() -> list[Unit]:
    """Each kind once, in a minute of a CPU core."""
    return [
        Unit(OURS, "machine"),
        Unit(OURS, "paths", length=66, batch=2, cases=1),
        Unit(OURS, "methods", "tiny", 34, 2, methods=("alibi",)),
        Unit(OURS, "training", "tiny", 16, 2, methods=("rope",)),
        Unit(TORCH, "training", "tiny", 16, 2, methods=("rope",)),
        Unit(OURS, "cost", "tiny", 16, 2, methods=("rope", "fope")),
        Unit(OURS, "attention", "", 64, 2),
    ]
