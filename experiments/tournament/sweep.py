"""Every position embedding under the same conditions: books to 16L, and recall to 16L.

    fope sweep experiments/tournament/sweep.py --workdir runs/tournament --jobs 2 \\
        --results experiments/tournament/results

Argument: seeds=3. With `--only "books_*"` or `--only "recall_*"` one of the tasks.

Every method gets the same text in the same order and the same updates. One that is not defined
beyond L (a learned table) is left out, and so are the scalings of RoPE, which belong to a change of
length (experiments/extrapolation).
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

ROPE, NOPE, FOPE = ({"method": name} for name in ("rope", "nope", "fope"))


def method(name, **knobs):
    """Overrides of a position embedding."""
    return (f"position.method={name}", *(f"position.{key}={value}" for key, value in knobs.items()))


VARIANTS = {
    "nope": method("nope"),
    "sinusoidal": method("sinusoidal"),
    "rope": method("rope"),
    "rope-500k": method("rope", theta=500000.0),
    "p-rope": method("rope", scaling=[{"scaling": "p_rope", "share": 0.75}]),
    "xpos": method("xpos"),
    "fope": method("fope"),
    "fope-equations": method("fope", preset="equations"),
    "alibi": method("alibi"),
    "t5": method("t5"),
    "kerple": method("kerple"),
    "fire": method("fire", init_length=128),
    "cope": method("cope"),
    "fope-half": method("by_share", methods=[FOPE, NOPE], shares="0.5,0.5"),
    "rope-log-n": method("logit_scaling", inner=ROPE),
}


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=3)
    runs = []
    for seed, label in product(seed=range(arg.seeds), label=VARIANTS):
        overrides = (*VARIANTS[label], f"name={label}")
        books = (*overrides, "evaluate.passkey_trials=0")
        recall = tuple(o.replace("init_length=128", "init_length=64") for o in overrides)
        runs += [
            Train(f"books_{label}_{seed}", f"configs/quickstart.py:seed={seed}", books),
            Train(f"recall_{label}_{seed}", f"configs/recall.py:seed={seed}", recall),
        ]
    return runs
