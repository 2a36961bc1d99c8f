"""Does recall beyond L keep its order with more updates and a learning rate for each method?

    fope sweep experiments/recall_longer/sweep.py:stage=rates --jobs 2 \\
        --workdir runs/recall_rates --results experiments/recall_longer/rates
    fope sweep experiments/recall_longer/sweep.py --workdir runs/recall_longer --jobs 2 \\
        --results experiments/recall_longer/results

Arguments: stage=long or rates, seeds=3.

The recall, models and trials of experiments/recall_controls, there 1,500 updates at the rate that
was chosen on RoPE. Here, first each variant at three learning rates, 1,500 updates, with a seed of
its own; its rate is the one with the lowest mean training loss over the last 300 updates, whose
batches are new ones. Then 6,000 updates at that rate. Stated before the runs, and tested pair by
pair over the lengths beyond L together: the floor alone against RoPE, FoPE against the floor alone,
and the series on all pairs against RoPE.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

FOPE = "position.method=fope"
VARIANTS = {
    "fope": (FOPE,),
    "floor": (FOPE, "position.series=False"),
    "rope": ("position.method=rope",),
    "series-all": (FOPE, "position.clip=False", "position.outputs=surviving"),
}
RATES, SEED_OF_RATES = (2.5e-3, 5e-3, 1e-2), 100
CHOSEN = {"fope": 2.5e-3, "floor": 5e-3, "rope": 5e-3, "series-all": 5e-3}  # from rates/


def train(run: str, name: str, label: str, seed: int, *more: str) -> Train:
    named = (f"name={name}", f"evaluate.trial_seed={seed}")
    return Train(run, f"configs/recall.py:seed={seed}", (*VARIANTS[label], *named, *more))


def get_sweep(arg=""):
    arg = parse_arg(arg, stage="long", seeds=3)
    if arg.stage == "rates":
        return [
            train(
                f"recall_{label}-{rate:g}",
                f"{label}-{rate:g}",
                label,
                SEED_OF_RATES,
                f"train.learning_rate={rate}",
                "evaluate.passkey_lengths=(1,)",
            )
            for label, rate in product(label=CHOSEN, rate=RATES)
        ]
    if arg.stage != "long":
        raise ValueError(f"stage={arg.stage}; accepted: long, rates")
    return [
        train(
            f"recall_{label}_{seed}",
            label,
            label,
            seed,
            f"train.learning_rate={CHOSEN[label]}",
            "train.steps=6000",
            "train.save_every=3000",
        )
        for seed, label in product(seed=range(arg.seeds), label=CHOSEN)
    ]
