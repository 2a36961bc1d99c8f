"""The files of a run; how it is named, and its checkpoints: RUN/STEP or RUN/checkpoints/STEP."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fope_jax.storage.paths import as_path

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
QUARANTINE = "quarantine"  # among the checkpoints, for damaged ones
RUN = "run.json"
LINEAGE = "lineage.json"  # of a run that extends another
IMPORTED = "imported"  # key in run.json: the origin of imported weights


def is_of_weights(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to weights of Hugging Face, which name their files alike."""
    return "model_type" in config or "architectures" in config


def describe_weights(path: str | os.PathLike[str]) -> str:
    """What a directory with weights of Hugging Face is to who asks for a run."""
    return (
        f"{os.fspath(path)} is no run but a checkpoint of Hugging Face; `fope import "
        f"{os.fspath(path)} --workdir RUN` makes a run of it"
    )


def split_step(path: str | os.PathLike[str], step: int | None = None) -> tuple[Path, int | None]:
    """Splits ``runs/a/500`` into run and step.

    If ``path`` names a run alone, the step is ``step``; None stands for the newest checkpoint.
    ValueError if both name a step and the two differ.
    """
    run, named = as_path(path), None
    if run.name.isdecimal() and not (run / CONFIG).is_file():
        parent = run.parent.parent if run.parent.name == CHECKPOINTS else run.parent
        if (parent / CONFIG).is_file():
            run, named = parent, int(run.name)
    if None not in (step, named) and step != named:
        raise ValueError(f"{run}/{named} and --step {step}: leave one out")
    return run, step if named is None else named
