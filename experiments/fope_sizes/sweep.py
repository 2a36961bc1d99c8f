"""Does FoPE gain more by wider heads than by more heads or layers, at the same loss at L?

    fope sweep experiments/fope_sizes/sweep.py --workdir runs/fope_sizes --jobs 2 \\
        --results experiments/fope_sizes/results

Argument: seeds=3.

The paper's figure 6a doubles head_dim, heads or layers of a model trained with FoPE and says that
head_dim helps most beyond L. Larger models also learn faster or slower, and the gap (the loss at
16L minus that at L) grows with training, so gaps are compared where the loss at L is the same:
trained at a constant rate, the loss at L and at 16L is measured every 50 updates, and read where
that at L has come down to that of RoPE in the base size after 500 updates of its seed, linearly
between two measurements. Stated before the runs: for each size FoPE's gap against RoPE's of the
same size, and whether that difference is larger for wide heads than for more heads, and than for
more layers; paired by seed.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

SIZES = {
    "base": (),
    "wide-heads": ("model.head_dim=64",),
    "more-heads": ("model.num_heads=8", "model.head_dim=32"),
    "more-layers": ("model.num_layers=6",),
}
# Wide heads were 0.34 nats behind at L after 500 updates (experiments/fope_ablations).
UPDATES = {"base": 700, "wide-heads": 1_500, "more-heads": 1_000, "more-layers": 1_000}
METHODS = ("rope", "fope")


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=3)
    return [
        Train(
            f"{method}_{size}_{seed}",
            f"configs/quickstart.py:position={method},seed={seed}",
            (
                *SIZES[size],
                f"name={method}-{size}",
                f"train.steps={UPDATES[size]}",
                "train.schedule=constant",
                "train.evaluate_every=50",
                "evaluate.training_windows=96",
                "evaluate.lengths=(1, 16)",
                "evaluate.protocols=same-tokens",
            ),
        )
        for seed, size, method in product(seed=range(arg.seeds), size=SIZES, method=METHODS)
    ]
