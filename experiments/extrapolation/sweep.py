"""Figure 4 of the paper, small: trained at L, then at 2L with YaRN or FoPE, scored to 16L.

    fope sweep experiments/extrapolation/sweep.py --workdir runs/length \\
        --results experiments/extrapolation/results

Arguments: seeds=3, steps=1000 (updates at L; a tenth of them follow at 2L).

"yarn" is stretched to what it trains at, factor 2; "yarn16" to the longest context that is scored,
without a temperature, as the paper has it. On FoPE the paper clips first ("yarn16-after-clip");
"yarn16" there scales first.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Extend, Train, product

LENGTH = 128
# What a model of each kind goes on with at twice its length. "same" changes nothing but the length:
# what longer sequences alone do.
EXTENSIONS = {
    "rope": ("same", "yarn", "yarn16", "fope"),
    "fope": ("same", "yarn", "yarn16", "yarn16-after-clip", "fope"),
}
METHODS = {"yarn16": "yarn", "yarn16-after-clip": "yarn"}  # where `fope extend` has another name
FACTOR16 = ("position.factor=16", "position.attention_factor=1")


def knobs(method, extension):
    """What an extension sets beyond its method and length."""
    if extension.startswith("yarn16"):
        after = ("position.scaling_order=after_clip",) if extension != "yarn16" else ()
        return (*FACTOR16, *after, f"name={method}+{extension}-{2 * LENGTH}")
    return ("position.preset=official",) if (method, extension) == ("rope", "fope") else ()


def base(method, seed, steps):
    """One model trained at L, scored on books, web pages and news."""
    return Train(
        f"{method}_{seed}",
        f"configs/quickstart.py:position={method},seed={seed}",
        (f"train.steps={steps}", "evaluate.texts=web,news", "evaluate.passkey_trials=0"),
    )


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=3, steps=1000)
    runs = []
    for seed, method in product(seed=range(arg.seeds), method=EXTENSIONS):
        parent = base(method, seed, arg.steps)
        runs.append(parent)
        for extension in EXTENSIONS[method]:
            name, way = f"{method}_{extension}_{seed}", METHODS.get(extension, extension)
            runs.append(Extend(name, parent.name, way, 2 * LENGTH, knobs(method, extension)))
    return runs
