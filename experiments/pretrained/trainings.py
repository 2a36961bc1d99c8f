"""A short training of the model at a shorter length, and what its losses were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.pretrained.units import TRAINED_AT, TRAININGS, Unit, variant_text
from fope_jax.evaluate.metrics import METRICS, read_rows
from fope_jax.evaluate.restore import load_run
from fope_jax.evaluate.variants import variant_experiment, variant_model
from fope_jax.extend.variants import make_variants
from fope_jax.model.transformer import Transformer
from fope_jax.position import PositionEmbedding
from fope_jax.storage.files import read_json

LEARNING_RATE = 3e-4
WARMUP = 4  # updates


def child_directory(run: Path, unit: Unit) -> Path:
    """Where the trained model of a unit is kept, beside the model that it comes from."""
    return run.parent / f"{run.name}-{unit.method}-{unit.updates}-{unit.seed}"


def train_child(run: Path, unit: Unit) -> Path:
    """Trains what is not trained yet, by `fope extend`; returns the directory of the run."""
    from fope_jax.extend.run import extend

    directory = child_directory(run, unit)
    method, knobs = TRAININGS[unit.method]
    overrides = (
        f"seed={unit.seed}",
        f"train.steps={unit.updates}",
        "train.batch_size=1",
        f"train.learning_rate={LEARNING_RATE}",
        f"train.warmup_steps={WARMUP}",
        "train.log_every=1",
        "train.save_every=10",
        "train.keep=1",
        f"train.evaluate_every={max(1, unit.updates // 10)}",
        "evaluate.lengths=1",
        f"evaluate.scored_tokens={TRAINED_AT}",
        "evaluate.training_windows=1",
        "evaluate.protocols=same-tokens",
    )
    extend(run, method, TRAINED_AT, directory, overrides=(*overrides, *knobs), allow_shorter=True)
    return directory


def load_model(run: Path, unit: Unit) -> tuple[Transformer, PositionEmbedding]:
    """The model that a unit measures and its position embedding, trained first where it is not."""
    loaded = load_run(train_child(run, unit) if unit.updates else run)
    text = variant_text(unit.method, unit.context)
    if unit.updates or text == "same":
        return loaded.model, loaded.experiment.position
    (variant,) = make_variants(run, None, [text])
    experiment = variant_experiment(loaded.experiment, variant)
    return variant_model(loaded.model, experiment, variant, None), variant.position


def training_row(directory: Path) -> dict[str, Any]:
    """Nats per token by update: of the training batches, and of a held-out window."""
    rows = read_rows(directory / METRICS)
    config = read_json(directory / "config.json")
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    held_out = {
        row["step"]: row["nats"] / row["tokens"] for row in rows if row["kind"] == "validation"
    }
    return {
        "training_loss": [[step, losses[step]] for step in sorted(losses)],
        "held_out_loss": [[step, held_out[step]] for step in sorted(held_out)],
        "train": config["train"],
        "position": config["position"],
    }
