"""Every public function under jax's strict settings: the numbers of the plain ones, or none.

The settings are those of people who look for silent promotion, rank errors and NaN. They are global
to the process: each is a context manager here.
"""

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax import position
from fope_jax.extend import coefficients
from fope_jax.model.attention import scale_queries
from fope_jax.position import (
    DAPE,
    FIRE,
    METHODS,
    SCALINGS,
    AdjustedBase,
    ALiBi,
    ByLayer,
    ByShare,
    Cable,
    ClipFloor,
    CoPE,
    DroPE,
    DynamicNTK,
    FoPE,
    FoX,
    Kerple,
    Learned,
    Llama3,
    LocalChunks,
    LogitScaling,
    LongRoPE,
    ModelShape,
    NoPE,
    NTKAware,
    PoPE,
    PositionEmbedding,
    PositionInterpolation,
    PRoPE,
    Proportional,
    ReRoPE,
    RoPE,
    Sandwich,
    Scaling,
    SelfExtend,
    Sinusoidal,
    SlidingWindow,
    SnapToCycles,
    T5Bias,
    XPos,
    YaRN,
)
from fope_jax.position.base import bias_of_heads, embed_tokens, has_hook

SHAPE = ModelShape(d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
RANDOM = np.random.default_rng(5)
P = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 1500, 1501]], np.int32)
K = np.array([[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 12, 14, 1500]], np.int32)
GRID = position.inverse_frequencies(8)


def floats(*shape):
    return RANDOM.normal(size=shape)


SLOPES, TABLE = np.abs(floats(2)) + 0.1, floats(8, 2)
Q, LOGITS = floats(2, 5, 2, 8), np.where(np.tri(5, 7, 2, dtype=bool), floats(2, 2, 5, 7), -np.inf)
COS, SIN = np.cos(floats(2, 5, 4)), np.sin(floats(2, 5, 4))
COEF = floats(2, 3, 2)
FIRE_ARRAYS = {
    "c": np.array(0.3),
    "threshold": np.array(3.0),
    "hidden_weight": floats(4),
    "hidden_bias": floats(4),
    "out_weight": floats(4, 2),
    "out_bias": floats(2),
}
KEY = jax.random.key(3)

# Of each function what it is called with; arrays of float64 become the dtype under test.
FUNCTIONS: dict[str, Any] = {
    "alibi_bias": (position.alibi_bias, P, K, SLOPES),
    "alibi_slopes": (lambda: position.alibi_slopes(3),),
    "bias_of_heads": (
        lambda q, k, slopes: bias_of_heads(ALiBi(), {"slopes": slopes}, q, k),
        P,
        K,
        SLOPES,
    ),
    "angles": (position.angles, P, GRID),
    "carry_coefficients": (
        lambda: coefficients.carry_coefficients(COEF, COEF, np.array([0, -1, 1]), COEF[0], COEF[0]),
    ),
    "clip_floor": (lambda w: position.clip_floor(w, 30), GRID),
    "coefficient_std": (lambda: position.coefficient_std(0.3, 2, 3, 4),),
    "cope_bias": (position.cope_bias, Q, LOGITS, floats(4, 8)),
    "fire_bias": (lambda p, k, own: position.fire_bias(p, k, **own), P, K, FIRE_ARRAYS),
    "floor_frequency": (lambda: position.floor_frequency(64),),
    "fourier_coefficients": (lambda key: position.fourier_coefficients(key, 2, 3, 2, 0.3), KEY),
    "fourier_tables": (
        lambda p, cos, sin: position.fourier_tables(p, GRID[:3], cos, sin, head_dim=8),
        P,
        COEF,
        COEF + 1,
    ),
    "inverse_frequencies": (lambda: position.inverse_frequencies(8),),
    "kerple_log_bias": (position.kerple_log_bias, P, K, SLOPES, SLOPES),
    "kerple_power_bias": (position.kerple_power_bias, P, K, SLOPES, SLOPES),
    "dape_network": (
        lambda z, b, own: position.dape_network(z, b, **own),
        floats(2, 2, 5, 7),
        floats(1, 2, 5, 7),
        {
            "hidden_weight": floats(4, 4),
            "hidden_bias": floats(4),
            "out_weight": floats(4, 2),
            "out_bias": floats(2),
        },
    ),
    "drope_scale": (lambda n: position.drope_scale(n, 4, 0.4), np.array([3, 9], np.int32)),
    "llama4_scale": (lambda p: position.llama4_scale(p, 4), P),
    "log_forget_gate": (position.log_forget_gate, floats(2, 5, 16), floats(2, 16), floats(2)),
    "polar": (position.polar, Q, COS[:, :, None], SIN[:, :, None]),
    "sandwich_bias": (lambda p, k, r: position.sandwich_bias(p, k, r, 8), P, K, SLOPES),
    "sandwich_ratios": (lambda: position.sandwich_ratios(3),),
    "log_n_scale": (lambda p: position.log_n_scale(p, 4, within=True), P),
    "match_frequencies": (lambda: coefficients.match_frequencies(GRID, GRID[1:]),),
    "mix_tables": (
        lambda c, s, cos, sin: position.mix_tables(c, s, cos, sin, head_dim=8),
        COS[..., :3],
        SIN[..., :3],
        COEF,
        COEF + 1,
    ),
    "normalise_columns": (position.normalise_columns, np.abs(COEF) + 1),
    "rotate": (lambda x, c, s: position.rotate(x, c, s, interleaved=True), Q, COS, SIN),
    "scaled_frequencies": (
        lambda n: position.scaled_frequencies(8, 1e4, (DynamicNTK(4.0, 4),), n)[:2],
        np.int32(9),
    ),
    "sinusoidal_table": (lambda p: position.sinusoidal_table(p, 8), P),
    "interpolate_table": (lambda: coefficients.interpolate_table(TABLE, 6, 9),),
    "t5_bias": (lambda p, k, table: position.t5_bias(p, k, table, max_distance=16), P, K, TABLE),
    "t5_buckets": (lambda p: position.t5_buckets(p, bidirectional=True), P),
    "xpos_decay": (lambda: position.xpos_decay(8),),
    "yarn_temperature": (lambda: position.yarn_temperature(4.0),),
}
# Of strings, methods and frozen records: no arrays of jax.
WITHOUT_ARRAYS = {
    "Fingerprint",
    "LAYER_PATTERNS",
    "Layer",
    "Limits",
    "METHODS",
    "ModelShape",
    "PRESETS",
    "PositionEmbedding",
    "PositionVariables",
    "SCALINGS",
    "RotaryFrequencies",
    "Scaling",
    "fill_layers",
    "fingerprint",
    "find_class",
    "from_spec",
    "has_hook",
    "import_module",
    "import_modules",
    "make",
    "make_scaling",
    "name_of",
    "preset_knobs",
    "register",
    "split_spec",
    "to_spec",
}
STEPS: dict[str, Scaling] = {
    "pi": PositionInterpolation(2.0),
    "ntk": NTKAware(2.0),
    "dynamic-ntk": DynamicNTK(4.0, 8),
    "dynamic-ntk-fixed": DynamicNTK(4.0, 8, length=40),
    "yarn": YaRN(4.0, 40),
    "llama3": Llama3(4.0, 40),
    "longrope": LongRoPE((1.0,) * 4, (2.0,) * 4, 8, 4.0),
    "longrope-fixed": LongRoPE((1.0,) * 4, (2.0,) * 4, 8, 4.0, length=40),
    "proportional": Proportional(0.5, 2.0),
    "adjusted-base": AdjustedBase(5e5),
    "clip-floor": ClipFloor(30),
    "snap-to-cycles": SnapToCycles(30),
    "p-rope": PRoPE(0.5),
}
TAMED = (DynamicNTK(4.0, 8), AdjustedBase(5e5), ClipFloor(30), SnapToCycles(30), PRoPE(0.75))
METHODS_UNDER_TEST: dict[str, PositionEmbedding] = {
    "nope": NoPE(),
    "sinusoidal": Sinusoidal(),
    "learned": Learned(1600),
    "rope": RoPE(),
    "rope-learnable": RoPE(learnable=True, interleaved=True, partial_rotary_factor=0.5),
    "rope-chain": RoPE(scaling=TAMED),
    "xpos": XPos(scale_base=512.0),
    "fope": FoPE(64),
    "fope-equations": FoPE.equations(64, heads="query"),
    "fope-normalised": FoPE(64, normalise=True, clip=False, learnable=True),
    "fope-clip": FoPE(64, series=False, scaling=(YaRN(2.0, 32),)),
    "alibi": ALiBi(),
    "t5": T5Bias(),
    "kerple": Kerple(),
    "kerple-power": Kerple(form="power"),
    "fire": FIRE(init_length=4.0),
    "cope": CoPE(4, 0.5),
    "dape": DAPE(),
    "sandwich": Sandwich(8),
    "pope": PoPE(),
    "fox": FoX(rotation=RoPE()),
    "cable": Cable(),
    "drope": DroPE(4),
    "window": SlidingWindow(RoPE(), 3),
    "chunks": LocalChunks(RoPE(), 3),
    "self-extend": SelfExtend(RoPE(), window=3, group=2),
    "rerope": ReRoPE(RoPE(), window=3, leak=2),
    "by_layer": ByLayer((NoPE(), FoPE(64))),
    "by_share": ByShare((RoPE(), NoPE()), (0.5, 0.5)),
    "log-n": LogitScaling(ALiBi(), training_length=4),
    "log-n-cope": LogitScaling(CoPE(4, 0.5), training_length=4, within=True),
    "temperature": LogitScaling(RoPE(), form="yarn", factor=4.0),
    **{f"rope-{name}": RoPE(scaling=(step,)) for name, step in STEPS.items()},
}


def every_hook(method, values):
    """What each hook of the last layer of a period makes of embeddings, queries and keys.

    Without ``values`` what is trained is zero, and nothing is computed.
    """
    shape = SHAPE

    def call(x, q, k, trained, positions, key_positions):
        owned = method.init(KEY, shape)
        model_params, layer_params = trained
        model = {**owned.model_constants, **model_params}
        layer = {name: value[0] for name, value in owned.layer_constants.items()}
        layer |= {name: value[0] for name, value in layer_params.items()}
        last = method.layers()[-1]
        own, variables = last.method, last.select({**model, **layer})
        tables = own.tables(variables, positions, shape.head_dim)
        q, k = own.rotate(variables, tables, q, k)
        if last.logit_scale is not None:
            q = scale_queries(q, last.logit_scale(positions))
        out = [embed_tokens(method, model, x, positions), q, k]
        if has_hook(own, "bias"):
            out.append(bias_of_heads(own, variables, positions, key_positions))
        if has_hook(own, "running_bias"):
            out.append(own.running_bias(variables, x))
        if has_hook(own, "contextual_bias"):
            logits = jnp.where(np.tri(5, dtype=bool)[None, None], 0.5, -jnp.inf)
            logits = jnp.broadcast_to(logits.astype(jnp.float32), (2, 2, 5, 5))
            out.append(own.contextual_bias(variables, q, logits))
        return out

    owned = method.init(KEY, shape) if values else jax.eval_shape(lambda: method.init(KEY, shape))
    trained = jax.tree.map(
        lambda x: np.asarray(x, np.float64) if values else np.zeros(x.shape),
        (owned.model_params, owned.layer_params),
    )
    random = np.random.default_rng(6)
    x, q, k = (random.normal(size=(2, 5, *own)) for own in ((16,), (2, 8), (1, 8)))
    return call, x, q, k, trained, P, K


ROWS = (*FUNCTIONS, *METHODS_UNDER_TEST)


CARRIED = ("carry_coefficients", "match_frequencies", "interpolate_table")  # of fope_jax.extend


def test_every_public_name_has_a_row():
    methods = {type(method) for method in METHODS_UNDER_TEST.values()}
    assert methods == set(METHODS.values())
    assert {type(step) for step in STEPS.values()} == set(SCALINGS.values())
    classes = {cls.__name__ for cls in methods | set(SCALINGS.values())}
    modules = {name for name, value in vars(position).items() if inspect.ismodule(value)}
    public = {name for name in vars(position) if not name.startswith("_")} - modules
    assert set(FUNCTIONS) | WITHOUT_ARRAYS | classes == public | set(CARRIED)


SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug NaN": lambda: jax.debug_nans(True),
}


ALL = tuple(SETTINGS)  # x64 among them
# bfloat16 first: beside it a constant of float32 or float64 shows as well.
SLOW_DTYPES = [pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "float16")]
EVERY_DTYPE = pytest.mark.parametrize("dtype", ["bfloat16", *SLOW_DTYPES])
# Second rows of a method.
SLOW_ROWS = (
    "rope",
    "fope",
    "fope-normalised",
    "fope-clip",
    "kerple",
    "log-n",
    "temperature",
    *(f"rope-{name}" for name in STEPS if name != "longrope"),
)


def every_row(test):
    names = [name for name in ROWS if name not in HOST]
    rows = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_ROWS else n for n in names]
    return pytest.mark.parametrize("name", rows)(EVERY_DTYPE(test))


@contextlib.contextmanager
def plain():
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
    ):
        yield


@contextlib.contextmanager
def settings(*names):
    with plain(), contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(SETTINGS[name]())
        yield


@dataclass(frozen=True)
class Row:
    """A function, its arrays and which of them are floating."""

    call: Any
    leaves: list
    structure: Any

    def run(self, *leaves):
        return self.call(*jax.tree.unflatten(self.structure, leaves))

    def gradient(self, *leaves):
        floating = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

        def loss(*moving):
            given = list(leaves)
            for i, leaf in zip(floating, moving, strict=True):
                given[i] = leaf
            return sum(weighted(x) for x in jax.tree.leaves(self.run(*given)))

        if not floating:
            return ()
        return jax.grad(loss, argnums=tuple(range(len(floating))))(*(leaves[i] for i in floating))

    def both_passes(self, *leaves):
        return self.run(*leaves), self.gradient(*leaves)


def weighted(x):
    """A number that every entry moves, unlike a norm, which a rotation keeps."""
    x = jnp.asarray(x, jnp.float32)
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return jnp.mean(weights * x) / jax.lax.stop_gradient(jnp.abs(x).max())


def is_float(x):
    return isinstance(x, (np.ndarray, jax.Array)) and jnp.issubdtype(x.dtype, jnp.floating)


def row_of(name, dtype, values=True):
    """Without ``values`` its arrays are shapes."""
    call, *arguments = FUNCTIONS.get(name) or every_hook(METHODS_UNDER_TEST[name], values)
    leaves, structure = jax.tree.flatten(arguments)

    def arrays():
        return [jnp.asarray(x, dtype) if is_float(x) else jnp.asarray(x) for x in leaves]

    return Row(call, arrays() if values else jax.eval_shape(arrays), structure)


def same(out, expected, dtype):
    """Equal to the precision of the dtype; x64 may widen what is made on the host alone."""
    rtol = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = np.abs(b[np.isfinite(b)]).max(initial=1e-6)
        np.testing.assert_allclose(a / size, b / size, rtol=rtol, atol=rtol)


# What is computed on the host, in float64, of no array.
HOST = [name for name, (_, *arguments) in FUNCTIONS.items() if not arguments]


@pytest.mark.parametrize("name", HOST)
def test_on_the_host(name):
    call = FUNCTIONS[name][0]
    with plain():
        expected = call()
    with settings(*SETTINGS):
        np.testing.assert_array_equal(call(), expected)


@every_row
@pytest.mark.parametrize("chosen", [ALL, pytest.param(("x64",), marks=pytest.mark.slow)], ids=str)
def test_tracing(name, dtype, chosen):
    """Promotion of dtypes and ranks is an error here already, forwards and backwards."""
    with plain():
        row = row_of(name, dtype, values=False)
        expected = jax.eval_shape(row.both_passes, *row.leaves)
    with settings(*chosen):
        traced = jax.eval_shape(row.both_passes, *row.leaves)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), traced) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


QUICK = ("rotate", "scaled_frequencies")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ROWS if name not in (*HOST, *QUICK)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_values(name, dtype):
    """All settings together, outside jit and inside: what the plain ones give."""
    with plain():
        row = row_of(name, dtype)
        expected = jax.jit(row.both_passes)(*row.leaves)
    chex.assert_tree_all_finite(jax.tree.map(np.asarray, expected))
    with settings(*SETTINGS):
        same(jax.jit(row.both_passes)(*row.leaves), expected, dtype)
        if dtype == "float32":
            same(row.both_passes(*row.leaves), expected, dtype)
