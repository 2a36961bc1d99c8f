"""One labelled example of each method and scaling, for figures, benchmarks and tables."""

from __future__ import annotations

from collections.abc import Iterable

from fope_jax.position import scaling
from fope_jax.position.absolute import Learned, Sinusoidal
from fope_jax.position.alibi import ALiBi
from fope_jax.position.base import ModelShape, NoPE, PositionEmbedding
from fope_jax.position.checks import find
from fope_jax.position.contextual import CoPE
from fope_jax.position.dape import DAPE
from fope_jax.position.drope import DroPE
from fope_jax.position.fope import FoPE
from fope_jax.position.forgetting import Cable, FoX
from fope_jax.position.logit_scaling import LogitScaling
from fope_jax.position.mixing import ByLayer, ByShare
from fope_jax.position.pope import PoPE
from fope_jax.position.registry import METHODS, make, required_knobs
from fope_jax.position.relative_bias import FIRE, Kerple, T5Bias
from fope_jax.position.rope import RoPE
from fope_jax.position.sandwich import Sandwich
from fope_jax.position.self_extend import ReRoPE, SelfExtend
from fope_jax.position.windows import LocalChunks, SlidingWindow
from fope_jax.position.xpos import XPos

LENGTH = 512  # tokens, the training length of the examples
SHAPE = ModelShape(d_model=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64)


def examples(length: int = LENGTH, head_dim: int = SHAPE.head_dim) -> dict[str, PositionEmbedding]:
    """All methods at training length ``length``, and RoPE with each scaling to four times that.

    Each entry of ``METHODS`` and ``SCALINGS`` occurs, except registered methods of users that need
    a knob. Labels are the name of a method at its defaults, and ``rope+`` with the name of a
    scaling.

    >>> examples(1024)["fope"].training_length
    1024
    """
    fast = (1.0,) * (head_dim // 2)
    slow = tuple(1.0 + 3.0 * pair / (head_dim // 2 - 1) for pair in range(head_dim // 2))
    scalings: dict[str, scaling.Scaling] = {
        "position_interpolation": scaling.PositionInterpolation(4.0),
        "ntk": scaling.NTKAware(4.0),
        "dynamic_ntk": scaling.DynamicNTK(4.0, length, length=4 * length),
        "yarn": scaling.YaRN(4.0, length),
        "llama3": scaling.Llama3(4.0, length),
        "longrope": scaling.LongRoPE(fast, slow, length, 4.0, length=4 * length),
        "proportional": scaling.Proportional(0.5, factor=4.0),
        "adjusted_base": scaling.AdjustedBase(500_000.0),
        "clip_floor": scaling.ClipFloor(length),
        "snap_to_cycles": scaling.SnapToCycles(length),
        "p_rope": scaling.PRoPE(0.75),
    }
    known = {
        "nope": NoPE(),
        "drope": DroPE(length),
        "sinusoidal": Sinusoidal(),
        "learned": Learned(table_length=length),
        "rope": RoPE(),
        "xpos": XPos(),
        "fope": FoPE(length),
        "fope-equations": FoPE.equations(length),
        "alibi": ALiBi(),
        "t5": T5Bias(),
        "kerple": Kerple(),
        "kerple-power": Kerple(form="power"),
        "fire": FIRE(),
        "sandwich": Sandwich(),
        "cope": CoPE(init_std=0.02),  # at the default 0 it starts as NoPE and shows nothing
        "dape": DAPE(),
        "pope": PoPE(),
        "fox": FoX(),
        "cable": Cable(),
        "by_layer": ByLayer((RoPE(), NoPE())),
        "by_share": ByShare((FoPE(length), NoPE()), (0.5, 0.5)),
        "logit_scaling": LogitScaling(RoPE(), training_length=length),
        "sliding_window": SlidingWindow(RoPE(), length // 2),
        "local_chunks": LocalChunks(RoPE(), length // 2),
        "self_extend": SelfExtend(RoPE(), window=length // 2, group=8),
        "rerope": ReRoPE(RoPE(), window=length // 2),
        "rerope-leaky": ReRoPE(RoPE(), window=length // 2, leak=8),
        **{f"rope+{name}": RoPE(scaling=(step,)) for name, step in scalings.items()},
        "fope+yarn": FoPE(4 * length, scaling=(scaling.YaRN(4.0, length, attention_factor=1.0),)),
    }
    others = {name: cls for name, cls in METHODS.items() if name not in known}
    return known | {name: cls() for name, cls in others.items() if not required_knobs(cls)}


EXAMPLES = examples()


def choose(
    labels: Iterable[str] | None, known: dict[str, PositionEmbedding] | None = None
) -> dict[str, PositionEmbedding]:
    """The examples of these labels, in order; all for None.

    A label is a key of ``known`` (None: ``examples()``), or ``their_package.module:Class``, which
    is imported; else ValueError with the nearest label.

    >>> choose(["nope"])
    {'nope': NoPE()}
    """
    known = examples() if known is None else known
    if labels is None:
        return known
    return {
        label: make(label, allow=None) if ":" in label else find("method", label, known)
        for label in labels
    }
