"""Do newer methods recall beyond L: SWAN, PoPE, FoX, random positions, DroPE?

    fope sweep experiments/recall_newer/sweep.py:stage=rates --jobs 2 \\
        --workdir runs/recall_newer_rates --results experiments/recall_newer/rates
    fope sweep experiments/recall_newer/sweep.py --jobs 2 \\
        --workdir runs/recall_newer --results experiments/recall_newer/results
    fope sweep experiments/recall_newer/sweep.py:stage=longer,seeds=3 --jobs 2 \\
        --workdir runs/recall_newer_longer --results experiments/recall_newer/longer

Arguments: stage=hybrids, longer or rates; seeds=5.

The recall, models, trials and 1,500 updates of experiments/recall_controls, whose rows of RoPE and
of the floor alone are the controls: the same batches and trials for the same seed, at the rate that
is the best of the same three for both (experiments/recall_longer). First each method at three
rates, with a seed of its own; its rate is the one with the lowest mean training loss over the last
300 updates, for DroPE over the last 50 of its 150.

SWAN's pattern is four layers and the model has two: a local layer with RoPE and a window of 16
tokens, then a full one without positions whose logits grow with the length. The local layer comes
first, as in RNoPE-SWA: a full layer can find only what a layer below it has marked. "rnope" is the
same without the growth. DroPE continues the RoPE model of its seed for a tenth of its updates, at
L. Random positions are drawn from the longest context that is asked, in training and, as in their
source, in the questions. Of FoX the authors' gates start half open, those of "fox-open" at 0.98,
with a reach of 50 tokens.

Stated before the runs but after the rates, in which SWAN and RNoPE-SWA alone learn recall: these
two with five seeds, each against RoPE, against the floor alone, and SWAN against RNoPE-SWA, over
the lengths beyond L together. The others get four times the updates and three seeds
(stage=longer), against RoPE and the floor alone of experiments/recall_longer; a method that answers
95% at L in no seed is reported as not learned, and compared with nothing.

Added after eight of the runs of these two, which answer nearly all at every length: is it the
window of the first layer, or the second one without positions? "local-rope" has RoPE in the full
layer as well, "rope-nope" has no window; five seeds each, against RoPE and against RNoPE-SWA.

Added after the rates of "fox-open", at all of which it learns recall: five seeds of it, against
RoPE, the floor alone and SWAN.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Extend, Train, product

LENGTH = 64
LONGEST = 16 * LENGTH
LOCAL = {"method": "sliding_window", "window": LENGTH // 4, "inner": {"method": "rope"}}
GROWING = {"method": "logit_scaling", "training_length": LENGTH, "inner": {"method": "nope"}}


def layers(*methods: dict) -> tuple[str, ...]:
    return ("position.method=by_layer", f"position.methods={list(methods)}")


VARIANTS = {
    "rope": ("position.method=rope",),
    "swan": layers(LOCAL, GROWING),
    "rnope": layers(LOCAL, {"method": "nope"}),
    "local-rope": layers(LOCAL, {"method": "rope"}),
    "rope-nope": layers({"method": "rope"}, {"method": "nope"}),
    "pope": ("position.method=pope",),
    "fox": ("position.method=fox",),
    "fox-open": ("position.method=fox", "position.bias_init=4.0"),
    "random": (
        "position.method=rope",
        f"train.position_range={LONGEST}",
        "evaluate.random_positions=True",
    ),
}
HYBRIDS, CONTROLS = ("swan", "rnope"), ("local-rope", "rope-nope")
OPEN, OTHERS = ("fox-open",), ("pope", "fox", "random")
RATES = (2.5e-3, 5e-3, 1e-2)
LOWER_RATES = (1.25e-3, 2.5e-3, 5e-3)  # DroPE goes on from a trained model
SEED_OF_RATES = 100
CHOSEN = {"rope": 5e-3, "swan": 5e-3, "rnope": 5e-3, "pope": 5e-3, "drope": 2.5e-3}  # from rates/
CHOSEN |= dict.fromkeys(CONTROLS, 5e-3)  # the rate of the two methods that they are between
CHOSEN |= {"fox": 2.5e-3, "fox-open": 1e-2, "random": 1e-2}


def train(run: str, name: str, label: str, seed: int, rate: float, *more: str) -> Train:
    named = (f"name={name}", f"train.learning_rate={rate}", f"evaluate.trial_seed={seed}")
    return Train(run, f"configs/recall.py:seed={seed}", (*VARIANTS[label], *named, *more))


def drop(run: str, parent: Train, name: str, seed: int, rate: float, steps: int, *more: str):
    """A RoPE model that goes on without positions."""
    named = (f"name={name}", f"train.learning_rate={rate}", f"evaluate.trial_seed={seed}")
    shorter = (f"train.steps={steps}", f"train.warmup_steps={steps // 10}", "train.log_every=10")
    return Extend(run, parent.name, "drope", LENGTH, (*shorter, *named, *more))


def rates() -> list[Train | Extend]:
    runs, few = [], "evaluate.passkey_lengths=(1,)"
    for label, rate in product(label=(*HYBRIDS, *OPEN, *OTHERS), rate=RATES):
        name = f"{label}-{rate:g}"
        runs.append(train(f"recall_{name}", name, label, SEED_OF_RATES, rate, few))
    parent = train("recall_rope", "rope", "rope", SEED_OF_RATES, CHOSEN["rope"], few)
    runs.append(parent)
    for rate in LOWER_RATES:
        name = f"drope-{rate:g}"
        runs.append(drop(f"recall_{name}", parent, name, SEED_OF_RATES, rate, 150, few))
    return runs


def longer(seed: int) -> list[Train | Extend]:
    steps = ("train.steps=6000", "train.save_every=3000")
    runs = {
        label: train(f"recall_{label}_{seed}", label, label, seed, CHOSEN[label], *steps)
        for label in ("rope", *OTHERS)
    }
    dropped = drop(f"recall_drope_{seed}", runs["rope"], "drope", seed, CHOSEN["drope"], 600)
    return [*runs.values(), dropped]


def get_sweep(arg=""):
    arg = parse_arg(arg, stage="hybrids", seeds=5)
    if arg.stage == "rates":
        return rates()
    if arg.stage == "longer":
        return [run for seed in range(arg.seeds) for run in longer(seed)]
    if arg.stage != "hybrids":
        raise ValueError(f"stage={arg.stage}; accepted: hybrids, longer, rates")
    return [
        train(f"recall_{label}_{seed}", label, label, seed, CHOSEN[label])
        for seed, label in product(seed=range(arg.seeds), label=(*HYBRIDS, *CONTROLS, *OPEN))
    ]
