r"""The paper's extrapolation: models trained at 512 tokens go on at 1,024 with YaRN or with FoPE.

Question   Which of {RoPE, FoPE} trained at 512 tokens, alone, continued at 1,024 with YaRN, or
           continued at 1,024 with FoPE, reads up to 8,192 tokens best?
Paper      Hua et al. 2025, "Fourier Position Embedding" (FoPE), section 5.3, figure 4.
Command    fope train --config configs/paper/c4_books.py:position=rope --workdir runs/rope
           CONFIG=configs/paper/extrapolation.py:parent=rope
           fope extend runs/rope --method yarn --length 1024 --workdir runs/rope_yarn \
             --config $CONFIG,method=yarn \
             --config.position.factor=16 --config.position.attention_factor=1.0
           fope extend runs/rope --method fope --length 1024 --workdir runs/rope_fope \
             --config $CONFIG,method=fope --config.position.preset=official \
             --config.position.sigma=0.3
           and after FoPE, with position=fope and parent=fope,
           fope extend runs/fope --method yarn --length 1024 --workdir runs/fope_yarn \
             --config $CONFIG,method=yarn \
             --config.position.factor=16 --config.position.scaling_order=after_clip
           fope extend runs/fope --method fope --length 1024 --workdir runs/fope_fope \
             --config $CONFIG,method=fope --match index
           Arguments: size=60m|180m|1200m, parent=rope|fope, method=yarn|fope|pi|ntk|...,
           data=c4|c4-files|dolma|books, seed=6198, smoke (a few small steps).
Hardware   As c4_books.py: a tenth of its updates, each of the same tokens.
Not run    Here only that each combination builds is tested, and one is compiled for a slice.

One billion tokens after the ten of the parent: a tenth of its updates, 512 sequences of 1,024
tokens each. As in the released code YaRN has a factor of 16 although the length only doubles and no
temperature, FoPE is clipped before it, and peak rate and warmup are those of pretraining: after
1,907 of 10,000 updates the rate ends at a fifth of its peak. Moments begin anew; --optimizer keep
takes the parent's. The paper's figure 5 (data=books, scored on C4) is c4_books.py alone; its models
can go on here all the same.
"""

from pathlib import Path

from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    build_experiment,
    experiment_to_dict,
    load_config,
    parse_arg,
)
from fope_jax.extend.child import child_experiment

SIGMA = {"60m": 0.3, "180m": 0.4, "1200m": 0.6}
KNOBS = {
    ("rope", "yarn"): {"factor": 16, "attention_factor": 1.0},
    ("fope", "yarn"): {"factor": 16, "scaling_order": "after_clip"},
}


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg, size="60m", parent="rope", method="yarn", data="c4", seed=6198, smoke=False
    )
    if arg.parent not in ("rope", "fope"):
        raise ConfigError(f"argument parent = {arg.parent!r}; accepted: rope, fope")
    paper = Path(__file__).with_name("c4_books.py")
    smoke = ",smoke" if arg.smoke else ""
    spec = f"size={arg.size},length=512,position={arg.parent},data={arg.data},seed={arg.seed}"
    parent = build_experiment(load_config(f"{paper}:{spec}{smoke}"))
    knobs = KNOBS.get((arg.parent, arg.method), {})
    if (arg.parent, arg.method) == ("rope", "fope"):
        knobs = {"preset": "official", "sigma": SIGMA[arg.size]}
    settings = {f"position.{knob}": value for knob, value in knobs.items()}
    settings["train.warmup_steps"] = parent.train.warmup_steps
    child = child_experiment(
        parent,
        parent.train.steps,
        arg.method,
        1024,
        "reset",
        [f"{key}={value}" for key, value in settings.items()],
    )
    return ConfigDict(experiment_to_dict(child))
