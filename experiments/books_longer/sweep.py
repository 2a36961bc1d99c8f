"""Does the order on books hold at 20 tokens a parameter, with more books and a rate for each?

    fope sweep experiments/books_longer/sweep.py:stage=rates --jobs 2 \\
        --workdir runs/books_rates --results experiments/books_longer/rates
    fope sweep experiments/books_longer/sweep.py --workdir runs/books_longer --jobs 2 \\
        --results experiments/books_longer/results

Arguments: stage=long, twice or rates, seeds=5.

The other experiments on books train 1.2 M parameters on 1 to 2 M tokens, at one learning rate, and
score 6,144 tokens of the same three books for all seeds. Here a model of 0.42 M parameters reads
8.4 M tokens (20 a parameter) or twice that; each seed holds out three books of its own and scores
61,440 tokens of them, so that an interval over seeds also holds the draw of the books; and each
method has the best of four learning rates: the lowest mean training loss over the last 200 of
1,000 updates, with a seed of its own (1.5e-3 was added when 3e-3 was the best of the other three
for all). Stated before the runs, and tested at L and at 16L: FoPE,
ALiBi and NoPE against RoPE; and whether each difference has the same sign after twice the updates.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

METHODS = ("rope", "fope", "alibi", "nope")
HELD_OUT = (
    ("austen-persuasion", "chesterton-ball", "shakespeare-macbeth"),  # of configs/quickstart.py
    ("austen-sense", "chesterton-thursday", "shakespeare-hamlet"),
    ("austen-emma", "chesterton-brown", "shakespeare-caesar"),
    ("melville-moby_dick", "bryant-stories", "carroll-alice"),
    ("edgeworth-parents", "milton-paradise", "burgess-busterbrown"),
)
UPDATES = {"long": 4_200, "twice": 8_400, "rates": 1_000}
RATES, SEED_OF_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2), 100
CHOSEN = dict.fromkeys(METHODS, 3e-3)  # README.md has the losses
SMALLER = ("model.d_model=64", "model.num_heads=2", "model.mlp_dim=192")


def train(run, label, method, seed, stage, rate, *more):
    books = str(HELD_OUT[seed % len(HELD_OUT)])
    updates = UPDATES[stage]
    return Train(
        run,
        f"configs/quickstart.py:position={method},seed={seed}",
        (
            *SMALLER,
            f"name={label}",
            f"data.validation_books={books}",
            f"train.learning_rate={rate}",
            f"train.steps={updates}",
            f"train.save_every={updates // 2}",
            "evaluate.protocols=same-tokens",
            *more,
        ),
    )


def get_sweep(arg=""):
    arg = parse_arg(arg, stage="long", seeds=5)
    if arg.stage not in UPDATES:
        raise ValueError(f"stage={arg.stage}; accepted: {', '.join(UPDATES)}")
    if arg.stage == "rates":
        few = ("evaluate.num_windows=96", "evaluate.lengths=(1,)")
        return [
            train(
                f"{method}-{rate:g}",
                f"{method}-{rate:g}",
                method,
                SEED_OF_RATES,
                "rates",
                rate,
                *few,
            )
            for method, rate in product(method=METHODS, rate=RATES)
        ]
    many = ("evaluate.num_windows=960", "evaluate.lengths=(1, 2, 16)")
    suffix = "-twice" if arg.stage == "twice" else ""
    return [
        train(
            f"{method}{suffix}_{seed}",
            method + suffix,
            method,
            seed,
            arg.stage,
            CHOSEN[method],
            *many,
        )
        for seed, method in product(seed=range(arg.seeds), method=METHODS)
    ]
