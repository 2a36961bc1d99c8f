"""Is recall beyond the training length lost to length, or to keys that repeat more often?

    fope sweep experiments/recall_repetition/sweep.py --workdir runs/recall_repetition --jobs 2 \\
        --results experiments/recall_repetition/results

Argument: seeds=5.

In the task recall a longer window has more pairs of the same 16 keys, so that length and repetition
grow together: another key stands 2 times in a window of L = 64 tokens, and 34 times at 16L. With 64
keys it stands 0.5 times at L and 2 times at 4L. So models that were trained on 16 keys, as in
experiments/recall_controls, are asked for both. Stated before the runs, for RoPE, the floor alone
and FoPE, paired by seed: repetition alone is 64 keys minus 16 at 4L, at 8L and at 16L; length alone
is 64 keys at 4L, 8L and 16L minus 16 keys at L, 2L and 4L, where keys repeat as often. A method
counts with 64 keys if it answers 95% of them at L, or at 2L, where keys repeat once.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

VARIANTS = {
    "rope": ("position.method=rope",),
    "floor": ("position.method=fope", "position.series=False"),
    "fope": ("position.method=fope",),
}


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=5)
    return [
        Train(
            f"recall_{label}_{seed}",
            f"configs/recall.py:seed={seed}",
            (
                *VARIANTS[label],
                f"name={label}",
                f"evaluate.trial_seed={seed}",
                "evaluate.retrieval_tasks=recall,recall_64_keys",
            ),
        )
        for seed, label in product(seed=range(arg.seeds), label=VARIANTS)
    ]
