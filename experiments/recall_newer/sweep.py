"""Do newer methods recall beyond L: PoPE, FoX, SWAN, random positions, DroPE?

    fope sweep experiments/recall_newer/sweep.py:stage=rates --jobs 2 \\
        --workdir runs/recall_newer_rates --results experiments/recall_newer/rates
    fope sweep experiments/recall_newer/sweep.py --workdir runs/recall_newer --jobs 2 \\
        --results experiments/recall_newer/results

Arguments: stage=long or rates, seeds=5.

The recall, models, trials and 1,500 updates of experiments/recall_controls. Each method gets the
best of three learning rates, by its mean training loss over the last 300 updates, with a seed of
its own; those of RoPE and of the floor alone are from experiments/recall_longer. Stated before the
runs, and tested pair by pair over the lengths beyond L together, with five seeds: each method
against RoPE, and each against the floor alone.

SWAN's pattern is four layers and the model has two: a local layer with RoPE and a window of 16
tokens, then a full one without positions whose logits grow with the length. The local layer comes
first, as in RNoPE-SWA: a full layer can find only what a layer below it has marked. "rnope" is the
same without the growth. DroPE continues the RoPE model of its seed for 150 updates, a tenth, at L.
Random positions are drawn from the longest context that is asked, "random" asked at 0, 1, 2, ..,
"random-drawn" at drawn ones as in its source.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Extend, Train, product

LENGTH = 64
LONGEST = 16 * LENGTH
LOCAL = {"method": "sliding_window", "window": LENGTH // 4, "inner": {"method": "rope"}}
GROWING = {"method": "logit_scaling", "training_length": LENGTH, "inner": {"method": "nope"}}
RANDOM = ("position.method=rope", f"train.position_range={LONGEST}")


def layers(*methods: dict) -> tuple[str, ...]:
    return ("position.method=by_layer", f"position.methods={list(methods)}")


VARIANTS = {
    "rope": ("position.method=rope",),
    "floor": ("position.method=fope", "position.series=False"),
    "pope": ("position.method=pope",),
    "fox": ("position.method=fox",),
    "swan": layers(LOCAL, GROWING),
    "rnope": layers(LOCAL, {"method": "nope"}),
    "random": RANDOM,
    "random-drawn": (*RANDOM, "evaluate.random_positions=True"),
}
RATES = (2.5e-3, 5e-3, 1e-2)
LOWER_RATES = (1.25e-3, 2.5e-3, 5e-3)  # DroPE goes on from a trained model
RATED, SEED_OF_RATES = ("pope", "fox", "swan", "rnope", "random"), 100
CHOSEN = dict.fromkeys((*VARIANTS, "drope"), 5e-3)


def train(run: str, name: str, label: str, seed: int, rate: float, *more: str) -> Train:
    named = (f"name={name}", f"train.learning_rate={rate}", f"evaluate.trial_seed={seed}")
    return Train(run, f"configs/recall.py:seed={seed}", (*VARIANTS[label], *named, *more))


def drop(run: str, parent: Train, name: str, seed: int, rate: float, *more: str) -> Extend:
    """A RoPE model that goes on without positions."""
    named = (f"name={name}", f"train.learning_rate={rate}", f"evaluate.trial_seed={seed}")
    shorter = ("train.steps=150", "train.warmup_steps=15", "train.log_every=10")
    return Extend(run, parent.name, "drope", LENGTH, (*shorter, *named, *more))


def get_sweep(arg=""):
    arg = parse_arg(arg, stage="long", seeds=5)
    runs = []
    if arg.stage == "rates":
        few = "evaluate.passkey_lengths=(1,)"
        for label, rate in product(label=RATED, rate=RATES):
            name = f"{label}-{rate:g}"
            runs.append(train(f"recall_{name}", name, label, SEED_OF_RATES, rate, few))
        parent = train("recall_rope", "rope", "rope", SEED_OF_RATES, CHOSEN["rope"], few)
        runs.append(parent)
        for rate in LOWER_RATES:
            name = f"drope-{rate:g}"
            runs.append(drop(f"recall_{name}", parent, name, SEED_OF_RATES, rate, few))
        return runs
    if arg.stage != "long":
        raise ValueError(f"stage={arg.stage}; accepted: long, rates")
    for seed in range(arg.seeds):
        for label in VARIANTS:
            runs.append(train(f"recall_{label}_{seed}", label, label, seed, CHOSEN[label]))
        parent = runs[-len(VARIANTS)]
        runs.append(drop(f"recall_drope_{seed}", parent, "drope", seed, CHOSEN["drope"]))
    return runs
