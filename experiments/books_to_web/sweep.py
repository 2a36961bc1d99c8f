"""Figure 5 of the paper, small: trained on books, scored on books, on web pages and on news.

    fope sweep experiments/books_to_web/sweep.py --workdir runs/length \\
        --results experiments/books_to_web/results

Arguments: seeds=3, steps=1000. With the workdir of experiments/extrapolation the RoPE and FoPE runs
are those of that sweep, and only ALiBi and NoPE are trained.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=3, steps=1000)
    return [
        Train(
            f"{method}_{seed}",
            f"configs/quickstart.py:position={method},seed={seed}",
            (f"train.steps={arg.steps}", "evaluate.texts=web,news", "evaluate.passkey_trials=0"),
        )
        for seed, method in product(seed=range(arg.seeds), method=("rope", "fope", "alibi", "nope"))
    ]
