"""What in FoPE does the work: the paper's figure 6, and what the paper leaves open.

    fope sweep experiments/fope_ablations/sweep.py --workdir runs/ablations --jobs 2 \\
        --results experiments/fope_ablations/results

Argument: seeds=3. The RoPE and FoPE runs are those of experiments/tournament where that sweep has
the same workdir.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

FOPE, ROPE = ("position.method=fope",), ("position.method=rope",)
UNIFORM = (*FOPE, "position.preset=equations")

VARIANTS = {
    "rope": ROPE,
    "fope": FOPE,
    # figure 6a: without the Fourier series, without the floor, and with a head_dim twice as wide
    "fope-no-series": (*FOPE, "position.series=False"),
    "fope-no-floor": (*FOPE, "position.clip=False"),
    "fope-wide-heads": (*FOPE, "model.head_dim=64"),
    "rope-wide-heads": (*ROPE, "model.head_dim=64"),
    # figures 6b and 6c: sigma, and the number of frequencies D (head_dim is 32)
    **{f"fope-sigma-{s}": (*UNIFORM, f"position.sigma={s}") for s in (0.0, 0.1, 0.3, 0.5)},
    **{f"fope-d-{d}": (*UNIFORM, f"position.num_frequencies={d}") for d in (16, 64, 128)},
    # open: the phase of zero frequencies, what sigma means, learned or shared coefficients
    "fope-zero-phase": (*FOPE, "position.zero_sine=0"),
    "fope-normal": (*FOPE, "position.sigma_convention=normal"),
    "fope-learnable": (*FOPE, "position.learnable=True"),
    "fope-shared-layers": (*FOPE, "position.share_layers=True"),
    "fope-shared-heads": (*FOPE, "position.heads=shared"),
    "rope-qk-norm": (*ROPE, "model.qk_norm=head"),
    "fope-qk-norm": (*FOPE, "model.qk_norm=head"),
    # the floor alone against dropping the same number of frequencies whatever the length
    "p-rope-6": (*ROPE, 'position.scaling=[{"scaling": "p_rope", "share": 0.375}]'),
}


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=3)
    return [
        Train(
            f"books_{label}_{seed}",
            f"configs/quickstart.py:seed={seed}",
            (*VARIANTS[label], f"name={label}", "evaluate.passkey_trials=0"),
        )
        for seed, label in product(seed=range(arg.seeds), label=VARIANTS)
    ]
