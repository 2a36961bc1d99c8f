"""Is it the floor or the series that lets FoPE recall beyond its training length?

    fope sweep experiments/recall_controls/sweep.py --workdir runs/recall_controls --jobs 2 \\
        --results experiments/recall_controls/results

Arguments: seeds=10 of FoPE and of the floor alone, controls=5 the most of the others, steps=1500.

The task, model and updates of the tournament's recall. Each seed has trials of its own, the same
for all variants. Stated before the runs, and tested pair by pair over the lengths beyond L
together: FoPE against the floor alone (ten seeds), the floor alone against RoPE, and the series
alone against RoPE (five seeds).

"series" is the released code without its floor. It gives the series to half of the pairs alone,
made of every second frequency, and leaves the others without rotation, as was seen after its first
run. So three controls came then, five seeds each: the series on all pairs, the fastest half of the
pairs without a series, and every second frequency on half of the dimensions without a series.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

FOPE = "position.method=fope"
HALF = [{"scaling": "p_rope", "share": 0.5}]
VARIANTS = {
    "fope": (FOPE,),
    "floor": (FOPE, "position.series=False"),
    "rope": ("position.method=rope",),
    "series": (FOPE, "position.clip=False"),
    "series-all": (FOPE, "position.clip=False", "position.outputs=surviving"),
    "half": ("position.method=rope", f"position.scaling={HALF}"),
    "every-second": ("position.method=rope", "position.partial_rotary_factor=0.5"),
    "fope-zero-phase": (FOPE, "position.zero_sine=0"),
}
PAIR, FIRST, SECOND, THIRD, LAST = (
    ("fope", "floor"),
    ("rope", "series"),
    ("series-all", "half"),
    ("every-second",),
    ("fope-zero-phase",),
)


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=10, controls=5, steps=1500)
    first, further = range(min(arg.seeds, arg.controls)), range(arg.controls, arg.seeds)
    # In this order, so that a sweep that is cut short has what was asked first.
    wanted = [
        *product(seed=first, label=(*PAIR, *FIRST)),
        *product(seed=first, label=SECOND),
        *product(seed=first, label=THIRD),
        *product(seed=further, label=PAIR),
        *product(seed=first, label=LAST),
    ]
    return [
        Train(
            f"recall_{label}_{seed}",
            f"configs/recall.py:seed={seed}",
            (
                *VARIANTS[label],
                f"name={label}",
                f"train.steps={arg.steps}",
                f"evaluate.trial_seed={seed}",
            ),
        )
        for seed, label in wanted
    ]
