"""Does a model that finds every passkey at L find them beyond L, as the paper's figure 1 asks?

    fope sweep experiments/passkey/sweep.py:stage=rates --jobs 2 \\
        --workdir runs/passkey_rates --results experiments/passkey/rates
    fope sweep experiments/passkey/sweep.py --workdir runs/passkey --jobs 2 \\
        --results experiments/passkey/results

Arguments: stage=long or rates, seeds=3.

A model of 0.1 M parameters on text that cannot read a passkey says nothing of passkeys. Here half
of the windows are passkeys, the compact template in bytes, and half are copying, which comes first
and teaches to find the place. L = 128 bytes, 3,000 updates, trials of other keys than in training
and of each seed's own. First each method at three learning rates, 1,500 updates, with a seed of its
own; its rate is the one with the lowest mean training loss over the last 300 updates. Stated before
the runs: a method counts beyond L only if every seed has 95% at L; tested over the lengths beyond L
together, paired by seed: FoPE against RoPE, the floor alone against RoPE, FoPE against the floor
alone, ALiBi against RoPE.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

FOPE = "position.method=fope"
VARIANTS = {
    "rope": ("position.method=rope",),
    "fope": (FOPE,),
    "floor": (FOPE, "position.series=False"),
    "alibi": ("position.method=alibi",),
    "nope": ("position.method=nope",),
}
RATES, SEED_OF_RATES = (2.5e-3, 5e-3, 1e-2), 100
CHOSEN = {
    **dict.fromkeys(("rope", "fope", "floor"), 5e-3),
    **dict.fromkeys(("alibi", "nope"), 2.5e-3),
}
TASK = (
    "data.tasks=copy=0.5,passkey=0.5",
    "train.length=128",
    "evaluate.retrieval_tasks=()",
    "evaluate.passkey_templates=compact",
)


def train(run: str, name: str, label: str, seed: int, *more: str) -> Train:
    named = (f"name={name}", f"evaluate.trial_seed={seed}")
    return Train(run, f"configs/recall.py:seed={seed}", (*VARIANTS[label], *TASK, *named, *more))


def get_sweep(arg=""):
    arg = parse_arg(arg, stage="long", seeds=3)
    if arg.stage == "rates":
        return [
            train(
                f"passkey_{label}-{rate:g}",
                f"{label}-{rate:g}",
                label,
                SEED_OF_RATES,
                f"train.learning_rate={rate}",
                "evaluate.passkey_lengths=(1,)",
            )
            for rate, label in product(rate=RATES, label=VARIANTS)
        ]
    if arg.stage != "long":
        raise ValueError(f"stage={arg.stage}; accepted: long, rates")
    return [
        train(
            f"passkey_{label}_{seed}",
            label,
            label,
            seed,
            f"train.learning_rate={CHOSEN[label]}",
            "train.steps=3000",
            "train.save_every=1500",
        )
        for seed, label in product(seed=range(arg.seeds), label=VARIANTS)
    ]
