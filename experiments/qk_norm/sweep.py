"""Do whole cycles, no positions, or normed queries and keys let a model read beyond its length?

    fope data build --config configs/quickstart.py
    fope sweep experiments/qk_norm/sweep.py --workdir runs/qk_norm --jobs 2 \\
        --results experiments/qk_norm/results

Argument: seeds=3.

The paper's Table 2 on the books of the quickstart: RoPE, RoPE with each frequency moved to the
nearest that turns a whole number of times in L tokens, NoPE, and FoPE, which the paper's table
leaves out, each with a root-mean-square norm of queries and keys by head and without. Stated before
the runs, and tested pair by pair: each with the norm against itself without, and the whole cycles
and FoPE against RoPE, at L and at 16L.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

LENGTH = 128  # of configs/quickstart.py
WHOLE_CYCLES = [{"scaling": "snap_to_cycles", "training_length": LENGTH}]
METHODS = {
    "rope": ("position.method=rope",),
    "whole-cycles": ("position.method=rope", f"position.scaling={WHOLE_CYCLES}"),
    "nope": ("position.method=nope",),
    "fope": ("position.method=fope",),
}
NORMS = {"": (), "-qk-norm": ("model.qk_norm=head",)}


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=3)
    return [
        Train(
            f"books_{method}{norm}_{seed}",
            f"configs/quickstart.py:seed={seed}",
            (*METHODS[method], *NORMS[norm], f"name={method}{norm}", "evaluate.passkey_trials=0"),
        )
        for seed, method, norm in product(seed=range(arg.seeds), method=METHODS, norm=NORMS)
    ]
