"""The property table: what holds for each method and preset, and what must not.

Nearly all of the time here is compilation. One program of a method costs less than the operations
in it, each compiled for its shape: so whatever can be is computed in a few programs.

A new method adds one row to ``CASES``. Each property is a theorem with a tolerance at non-trivial
settings; a method listed under ``fails`` must violate it visibly, so the test of a property that
nothing could violate does not go unnoticed.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fope_jax import testing
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
    SelfExtend,
    Sinusoidal,
    SlidingWindow,
    SnapToCycles,
    T5Bias,
    XPos,
    YaRN,
)
from fope_jax.position.base import bias_of_heads, embed_tokens, has_hook

SHAPE = ModelShape(d_model=96, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=24)
FAR = 1_048_576  # tokens; the last position of the contract, plus 1
LENGTH = 40
LOGIT = 5e-5  # float32 rounding of sums over head_dim whose size is about 50

SHIFT = "logits depend on distances only"
NORM = "rotation keeps the norm of q and k"
ORIGIN = "position 0 is the identity"
CAUSAL = "what follows a prefix changes nothing in it"
PACKED = "packed documents are as if alone"
DECODE = "one token at a time with cached keys equals the whole sequence"


@dataclass(frozen=True)
class Case:
    method: PositionEmbedding
    fails: tuple[str, ...] = field(default=())


CASES = {
    "nope": Case(NoPE()),
    "rope": Case(RoPE(theta=100.0)),
    "rope-interleaved": Case(RoPE(theta=100.0, interleaved=True)),
    "rope-partial": Case(RoPE(theta=100.0, partial_rotary_factor=1 / 3)),
    "rope-learnable": Case(RoPE(theta=100.0, learnable=True)),
    "rope-pi": Case(RoPE(theta=100.0, scaling=(PositionInterpolation(2.0),))),
    "rope-ntk": Case(RoPE(theta=100.0, scaling=(NTKAware(2.0),))),
    # The frequencies follow the length of the sequence, so they differ between a prefix and the
    # whole, between packed documents, and as decoding goes on; and between near and far positions.
    "rope-dynamic-ntk": Case(
        RoPE(theta=100.0, scaling=(DynamicNTK(4.0, 8),)), fails=(SHIFT, CAUSAL, PACKED, DECODE)
    ),
    "rope-dynamic-ntk-fixed": Case(RoPE(theta=100.0, scaling=(DynamicNTK(4.0, 8, length=40),))),
    "rope-longrope": Case(
        RoPE(theta=100.0, scaling=(LongRoPE((1.0,) * 12, tuple(range(1, 13)), 18, 4.0),)),
        fails=(NORM, ORIGIN, CAUSAL, PACKED, DECODE),
    ),
    "rope-llama3": Case(RoPE(theta=100.0, scaling=(Llama3(4.0, 40),))),
    # Its temperature makes q and k longer, at every position.
    "rope-yarn": Case(RoPE(theta=100.0, scaling=(YaRN(4.0, 40),)), fails=(NORM, ORIGIN)),
    "rope-proportional": Case(RoPE(theta=100.0, scaling=(Proportional(0.5, 2.0),))),
    "rope-chain": Case(
        RoPE(
            theta=100.0,
            interleaved=True,
            scaling=(AdjustedBase(500.0), SnapToCycles(40), PRoPE(0.75), ClipFloor(20)),
        )
    ),
    "xpos": Case(XPos(theta=100.0, scale_base=64.0), fails=(NORM,)),
    "xpos-interleaved": Case(XPos(theta=100.0, scale_base=64.0, interleaved=True), fails=(NORM,)),
    "alibi": Case(ALiBi()),
    "t5": Case(T5Bias(num_buckets=8, max_distance=32, init_std=1.0)),
    "t5-layers": Case(T5Bias(share_layers=False, init_std=1.0)),
    "kerple-log": Case(Kerple()),
    "kerple-power": Case(Kerple(form="power")),
    # Distances as a share of the query's position: beyond the threshold, not the distance alone.
    "fire": Case(FIRE(init_length=16.0), fails=(SHIFT,)),
    "fire-shared": Case(FIRE(init_length=16.0, share_layers=True), fails=(SHIFT,)),
    "cope": Case(CoPE(max_position=12, init_std=0.5)),
    "cope-heads": Case(CoPE(max_position=12, init_std=0.5, share_heads=False)),
    "dape": Case(DAPE(mlp_width=8)),
    "by-layer": Case(ByLayer((NoPE(), RoPE(theta=100.0)))),
    "by-layer-fope": Case(ByLayer((RoPE(), ALiBi(), FoPE(40))), fails=(SHIFT, NORM, ORIGIN)),
    "by-layer-cope": Case(ByLayer((RoPE(), CoPE(max_position=12, init_std=0.5)))),
    "by-share": Case(ByShare((RoPE(theta=100.0), NoPE()), (1 / 3, 2 / 3))),
    "by-share-fope": Case(
        ByShare((FoPE(40, heads="query"), RoPE(theta=100.0)), (2 / 3, 1 / 3)),
        fails=(SHIFT, NORM, ORIGIN),
    ),
    # The logits of far queries grow, by the position of the query.
    "log-n": Case(LogitScaling(RoPE(theta=100.0), training_length=8), fails=(SHIFT, NORM)),
    "log-n-alibi": Case(LogitScaling(ALiBi(), training_length=8), fails=(SHIFT, NORM)),
    "log-n-sinusoidal": Case(
        LogitScaling(Sinusoidal(theta=100.0), training_length=8), fails=(SHIFT, NORM, ORIGIN)
    ),
    # There the factor is not on q itself.
    "log-n-cope": Case(
        LogitScaling(CoPE(max_position=12, init_std=0.5), training_length=8), fails=(SHIFT,)
    ),
    "yarn-temperature": Case(
        LogitScaling(RoPE(theta=100.0), form="yarn", factor=4.0), fails=(NORM, ORIGIN)
    ),
    # The logits of far queries grow; with a stated length those of all queries, at the origin too.
    "drope": Case(DroPE(8), fails=(SHIFT, NORM)),
    "drope-length": Case(DroPE(8, length=40), fails=(NORM, ORIGIN)),
    "window": Case(SlidingWindow(RoPE(theta=100.0), 8)),
    # A shift moves tokens over the edges of groups; far queries are shown at other positions.
    "self-extend": Case(SelfExtend(RoPE(theta=100.0), window=9, group=4), fails=(SHIFT, ORIGIN)),
    "rerope-leaky": Case(ReRoPE(RoPE(theta=100.0), window=9, leak=3), fails=(ORIGIN,)),
    "sandwich": Case(Sandwich(width=16)),
    # A shift moves tokens over the edges of chunks.
    "chunks": Case(LocalChunks(ALiBi(), 8), fails=(SHIFT,)),
    "alibi-slopes": Case(ALiBi(slopes=(0.5, 0.1, 0.3, 0.0))),
    # Sizes are softplus(x), in twice the dimensions.
    "pope-uniform": Case(PoPE(theta=100.0, phase="uniform"), fails=(NORM, ORIGIN)),
    "pope-partial": Case(
        PoPE(theta=100.0, partial_rotary_factor=1 / 3, phase="none"), fails=(NORM, ORIGIN)
    ),
    "fox": Case(FoX(init_std=0.3)),
    "fox-pope": Case(
        FoX(init_std=0.3, bias_init=2.0, rotation=PoPE(theta=100.0, phase="uniform")),
        fails=(NORM, ORIGIN),
    ),
    "cable": Case(Cable(init_std=0.3)),
    "sinusoidal": Case(Sinusoidal(theta=100.0), fails=(SHIFT, ORIGIN)),
    "learned": Case(Learned(table_length=200), fails=(SHIFT, ORIGIN)),
    # Random coefficients: no rotation, so neither the distance alone nor the norm is kept; with
    # sine 1 on the zero frequency position 0 is a turn by 45 degrees and a factor sqrt 2.
    "fope-official": Case(FoPE.official(40), fails=(SHIFT, NORM, ORIGIN)),
    "fope-equations": Case(FoPE.equations(40), fails=(SHIFT, NORM, ORIGIN)),
    "fope-query-heads": Case(FoPE(40, heads="query"), fails=(SHIFT, NORM, ORIGIN)),
    "fope-shared": Case(
        FoPE(40, heads="shared", separate_sine=False, share_layers=True),
        fails=(SHIFT, NORM, ORIGIN),
    ),
    # Columns that sum to one: cosine 1 at position 0, and with zero phase the identity there.
    "fope-normalised": Case(FoPE(40, normalise=True, zero_sine=0.0), fails=(SHIFT, NORM)),
    "fope-grid": Case(
        FoPE(40, frequencies_from="grid", num_frequencies=48, outputs="surviving", identity="own"),
        fails=(SHIFT, NORM, ORIGIN),
    ),
    "fope-keep-zero": Case(FoPE(40, drop_zero=False), fails=(SHIFT, NORM, ORIGIN)),
    "fope-series-only": Case(FoPE(40, clip=False), fails=(SHIFT, NORM, ORIGIN)),
    "fope-learnable": Case(FoPE(40, learnable=True), fails=(SHIFT, NORM, ORIGIN)),
    # Zero noise, zero phase: a rotation of the frequencies above the floor. The sine of 1 keeps the
    # distance law (its factor sqrt 2 is the same everywhere) but not the norm.
    "fope-clip-only": Case(FoPE(40, series=False)),
    "fope-yarn": Case(FoPE(160, scaling=(YaRN(4.0, 40),)), fails=(SHIFT, NORM, ORIGIN)),
    "fope-yarn-after": Case(
        FoPE(160, scaling=(YaRN(4.0, 40),), scaling_order="after_clip"), fails=(SHIFT, NORM, ORIGIN)
    ),
    "fope-no-noise": Case(FoPE(40, sigma=0.0, zero_sine=0.0)),
    "fope-no-noise-sine": Case(FoPE(40, sigma=0.0), fails=(NORM, ORIGIN)),
}


# One row a method, with the knobs that do most; the others take minutes together.
FAST_ROWS = (
    "nope",
    "rope-partial",
    "rope-dynamic-ntk",
    "rope-longrope",
    "rope-chain",
    "xpos-interleaved",
    "alibi",
    "t5",
    "kerple-power",
    "fire",
    "cope-heads",
    "dape",
    "by-layer-fope",
    "by-share-fope",
    "log-n-cope",
    "drope",
    "window",
    "chunks",
    "self-extend",
    "rerope-leaky",
    "sandwich",
    "pope-partial",
    "fox",
    "cable",
    "sinusoidal",
    "learned",
    "fope-official",
    "fope-normalised",
    "fope-yarn-after",
)

# One for each hook, and each whose parameters are learnt: what else there is adds constants to the
# logits, or turns q and k by other tables.
ONE_A_HOOK = (
    "rope-longrope",
    "xpos-interleaved",
    "t5",
    "kerple-power",
    "fire",
    "cope-heads",
    "dape",
    "by-share-fope",
    "log-n-cope",
    "self-extend",
    "pope-partial",
    "fox",
    "cable",
    "learned",
    "fope-official",
)


def every_case(test):
    rows = [n if n in FAST_ROWS else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
    return pytest.mark.parametrize("name", rows)(test)


def layer_of(method):
    """The layer that is tested: the last of a period, so that a mix-up shows."""
    return method.layers()[-1]


@partial(jax.jit, static_argnums=(0, 2))
def drawn(method, key, shape):
    return method.init(key, shape)


@cache
def variables_of(method, seed=3, shape=SHAPE):
    """The model's variables, and one layer's with them: of the second period."""
    owned = drawn(method, jax.random.key(seed), shape)
    return {**owned.model_params, **owned.model_constants}, owned.at_layer(1)


@cache
def inputs(batch=2, length=LENGTH, dtype=np.float32, shape=SHAPE):
    random = np.random.default_rng(7)

    def draw(*dims):
        return jnp.asarray(random.normal(size=(batch, length, *dims)), dtype)

    x = draw(shape.d_model)
    return x, draw(shape.num_heads, shape.head_dim), draw(shape.num_kv_heads, shape.head_dim)


def turned(method, variables, q, k, positions):
    """q and k of the tested layer, rotated at ``positions``."""
    own, own_variables = own_of(method, variables)
    tables = tables_of(method, variables, positions, q.shape[-1])
    q, k = own.rotate(own_variables, tables, q, k)
    scale = layer_of(method).logit_scale
    if scale is None or has_hook(own, "contextual_bias"):  # its bias is of logits without a factor
        return q, k
    return scale_queries(q, scale(positions)), k


@partial(jax.jit, static_argnums=0)
def embedded_and_turned(method, variables, x, q, k, positions):
    """``x`` as embedded, q and k as rotated, and the tables of it: one program a dtype."""
    x = embed_tokens(method, variables[0], x, positions)
    return x, turned(method, variables, q, k, positions), tables_of(method, variables, positions)


def tables_of(method, variables, positions, head_dim=SHAPE.head_dim):
    layer = layer_of(method)
    return layer.method.tables(layer.select(variables[0]), positions, head_dim)


def own_of(method, variables):
    """The method of the tested layer and its variables."""
    return layer_of(method).method, layer_of(method).select(variables[1])


def scores_of(layer, variables, q, k, q_index, k_index, increments=None):
    """Logits ``[B, N, T, S]`` of rotated q and k, 0 where the query does not see the key.

    ``variables`` are the layer's; ``q_index, k_index`` are pairs of positions and segments;
    ``increments [B, S, N]`` of the keys' tokens are those of a running bias. What attention sees of
    a layer is written here once more, with all keys at hand: a window, chunks, a second version of
    far keys, sums of increments by position. Only logits of contextual methods are scaled.
    """
    method, (q_positions, q_segments), (k_positions, k_segments) = layer.method, q_index, k_index
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    same_segment = q_segments[:, :, None] == k_segments[:, None, :]
    seen = same_segment & (distance >= 0)
    if layer.window is not None:
        seen &= distance < layer.window
    if layer.chunk is not None:
        chunks = q_positions // layer.chunk, k_positions // layer.chunk
        seen &= chunks[0][:, :, None] == chunks[1][:, None, :]
    seen = seen[:, None]
    scores = scores_of_versions(layer, q, k, distance)
    if has_hook(method, "bias"):
        scores = scores + bias_of_heads(method, variables, q_positions, k_positions)
    if has_hook(method, "running_bias"):
        q_sums, k_sums = (sums_at(*index, k_index, increments) for index in (q_index, k_index))
        scores = scores + q_sums[..., None] - k_sums[:, :, None]
    if has_hook(method, "contextual_bias"):
        order = jnp.argsort(k_positions, axis=-1)[:, None, None]
        scaled = jnp.where(seen, scores * SHAPE.head_dim**-0.5, -jnp.inf)
        ordered = jnp.take_along_axis(scaled, jnp.broadcast_to(order, scaled.shape), axis=-1)
        bias = method.contextual_bias(variables, q, ordered)
        if layer.logit_scale is not None:
            scores = scores * layer.logit_scale(q_positions)[:, None, :, None]
        back = jnp.argsort(jnp.broadcast_to(order, scaled.shape), axis=-1)
        scores = scores + jnp.take_along_axis(bias, back, axis=-1)
    return jnp.where(seen, scores, 0.0)


def versions(layer, x):
    """The near and the far version of a rotated q or k; one where the layer has one."""
    return [x] if layer.far_from is None else jnp.split(x, 2, axis=-1)


def scores_of_versions(layer, q, k, distance):
    """q.k ``[B, N, T, S]``, of the far versions where ``distance [B, T, S]`` says so."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    near, *far = (
        jnp.einsum("btnh,bsnh->bnts", *pair, precision="highest")
        for pair in zip(versions(layer, q), versions(layer, k), strict=True)
    )
    return jnp.where((distance >= layer.far_from)[:, None], far[0], near) if far else near


def sums_at(positions, segments, index, increments):
    """Sums ``[B, N, T]`` of the increments of a segment's tokens up to each position."""
    within = (index[0][:, None, :] <= positions[:, :, None]) & (
        index[1][:, None, :] == segments[:, :, None]
    )
    return jnp.einsum("bts,bsn->bnt", within.astype(jnp.float32), increments, precision="highest")


def increments_of(layer, variables, x):
    """What the layer's running bias sums, ``[B, T, N]``; None if it has none."""
    if not has_hook(layer.method, "running_bias"):
        return None
    return layer.method.running_bias(layer.select(variables[1]), x)


def logits_eagerly(method, variables, x, q, k, positions, segments=None):
    """Attention logits of the tested layer: embed moves x, and q, k gain a fixed share of it."""
    x = embed_tokens(method, variables[0], x, positions)
    q = q + x[..., None, : q.shape[-1]]
    k = k + x[..., None, : k.shape[-1]]
    q, k = turned(method, variables, q, k, positions)
    index = positions, jnp.ones_like(positions) if segments is None else segments
    layer = layer_of(method)
    own_variables, increments = own_of(method, variables)[1], increments_of(layer, variables, x)
    return scores_of(layer, own_variables, q, k, index, index, increments)


compiled_logits = jax.jit(logits_eagerly, static_argnums=0)


def logits(method, variables, x, q, k, positions, segments=None):
    """``logits_eagerly``, one program a method for all tests that have the same shapes."""
    if segments is None:
        segments = jnp.ones_like(positions)
    return compiled_logits(method, variables, x, q, k, positions, segments)


def arange(length=LENGTH, start=0, batch=2):
    row = jnp.arange(start, start + length, dtype=jnp.int32)[None]
    return jnp.broadcast_to(row, (batch, length))


def one_segment(positions):
    """Positions and segments of tokens that are one document."""
    return positions, jnp.ones_like(positions)


def difference(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


# Defined for keys at the query's position or before it only: CoPE counts up to the query, xPos
# grows after it, T5's causal buckets end there, log_n takes a position for a number of keys,
# windows and chunks hide later keys, and a forget gate would favour them.
NEED_A_CAUSAL_MASK = {
    "xpos",
    "xpos-interleaved",
    "t5",
    "t5-layers",
    "cope",
    "cope-heads",
    "by-layer-cope",
    "dape",
    "log-n",
    "log-n-alibi",
    "log-n-sinusoidal",
    "log-n-cope",
    "window",
    "chunks",
    "fox",
    "fox-pope",
    "cable",
    "self-extend",
    "rerope-leaky",
    "drope",
}


@every_case
def test_which_methods_need_a_causal_mask(name):
    assert CASES[name].method.limits.needs_causal_mask == (name in NEED_A_CAUSAL_MASK)
    layer = LogitScaling(ByShare((NoPE(), XPos()), (0.5, 0.5)), form="yarn", factor=2.0)
    assert layer.limits.needs_causal_mask


def holds_or_fails(name, property_name, assertion, tolerance):
    """``assertion(atol=...)`` holds; where the table says that it must not, not even 30 times."""
    if property_name not in CASES[name].fails:
        assertion(atol=tolerance)
        return
    with pytest.raises(AssertionError):
        assertion(atol=30 * tolerance)


def test_every_method_has_a_row():
    assert {type(CASES[name].method) for name in FAST_ROWS} == set(METHODS.values())
    scalings = {
        type(step) for case in CASES.values() for step in getattr(case.method, "scaling", ())
    }
    assert scalings == set(SCALINGS.values())


@every_case
def test_shift(name):
    """q.k at (m + 150, n + 150) equals q.k at (m, n), to phases of 190 radians in float32."""
    method = CASES[name].method
    run = partial(logits, method, variables_of(method), *inputs())
    holds_or_fails(name, SHIFT, partial(testing.assert_shift_invariant, run, arange()), 1e-3)


@every_case
def test_norm(name):
    method = CASES[name].method
    x, q, k = inputs()
    turned_q, turned_k = embedded_and_turned(method, variables_of(method), x, q, k, arange())[1]
    k = np.repeat(k, turned_k.shape[2] // k.shape[2], axis=2)
    before, after = (np.concatenate(pair, axis=2) for pair in ((q, k), (turned_q, turned_k)))

    def are_kept(atol):
        for version in versions(layer_of(method), after):
            testing.assert_norm_kept(lambda _: version, before, atol=atol)  # noqa: B023

    holds_or_fails(name, NORM, are_kept, 1e-5)


@every_case
def test_origin(name):
    method = CASES[name].method
    variables = variables_of(method)
    x, q, k = inputs()
    zero = jnp.zeros((2, LENGTH), jnp.int32)
    embedded, (turned_q, turned_k), _ = embedded_and_turned(method, variables, x, q, k, zero)
    k = np.repeat(k, turned_k.shape[2] // k.shape[2], axis=2)
    layer = layer_of(method)

    def is_identity(atol):
        assert difference(embedded, x) < atol
        for after, before in ((turned_q, q), (turned_k, k)):
            for version in versions(layer, after):
                assert version.shape == before.shape
                assert difference(version, before) < atol

    holds_or_fails(name, ORIGIN, is_identity, 1e-6)


@pytest.mark.fast(*ONE_A_HOOK)
@every_case
def test_prefix(name):
    """Hooks see positions, never the length of the array; rows of one token, below, show it too."""
    method = CASES[name].method
    variables = variables_of(method)

    def run(parts, positions):
        return jnp.moveaxis(logits(method, variables, *parts, positions), 1, 3)  # [B, T, S, N]

    assertion = partial(
        testing.assert_prefix_unchanged, run, inputs(), arange(), prefix=17, key_axis=2
    )
    holds_or_fails(name, CAUSAL, assertion, LOGIT)


@every_case
def test_packed_equals_separate(name):
    """Two documents in one row: the logits within each are those of it alone, with padding."""
    method = CASES[name].method
    variables = variables_of(method)

    def run(parts, positions, segments):
        return jnp.moveaxis(logits(method, variables, *parts, positions, segments), 1, 3)

    assertion = partial(
        testing.assert_packed_equals_separate, run, inputs(), (17, LENGTH - 17), key_axis=2
    )
    holds_or_fails(name, PACKED, assertion, LOGIT)


@every_case
def test_order_of_storage_does_not_matter(name):
    """Permuting the tokens with their positions permutes the logits: context-parallel shards."""
    method = CASES[name].method
    variables = variables_of(method)
    x, q, k = inputs()
    order = np.random.default_rng(0).permutation(LENGTH)
    permuted = logits(method, variables, x[:, order], q[:, order], k[:, order], arange()[:, order])
    whole = logits(method, variables, x, q, k, arange())
    assert difference(permuted, whole[..., order, :][..., order]) < LOGIT


@pytest.mark.slow
@every_case
def test_vmap(name):
    method = CASES[name].method
    run = partial(logits_eagerly, method, variables_of(method))
    one_row = jax.jit(jax.vmap(lambda *row: run(*(leaf[None] for leaf in row))[0]))
    rows = *inputs(), arange()
    assert difference(logits(method, variables_of(method), *rows), one_row(*rows)) < LOGIT


@every_case
def test_one_trace_for_all_positions(name):
    method = CASES[name].method
    run = partial(logits, method, variables_of(method), *inputs())
    run(arange())
    traces = compiled_logits._cache_size()
    for start in (1, 77, 150):
        run(arange(start=start))
    assert compiled_logits._cache_size() == traces


@every_case
def test_decoding_with_cached_keys(name):
    """Each token alone at its own position, its rotated key kept: the logits of the whole.

    Every token is a row of length 1, and the keys of its cache that come after it are zero.
    """
    method = CASES[name].method
    variables = variables_of(method)
    x, q, k = inputs()
    whole = logits(method, variables, x, q, k, arange())

    @jax.jit
    def decoded(x, q, k, positions):
        """``[B T, 1, ...]`` to logits ``[B T, N, 1, S]``."""
        x = embed_tokens(method, variables[0], x, positions)
        q, k = (a + x[..., None, : a.shape[-1]] for a in (q, k))
        q, k = turned(method, variables, q, k, positions)
        keys = jnp.repeat(k.reshape(2, LENGTH, *k.shape[2:]), LENGTH, axis=0)
        written = jnp.arange(LENGTH)[None] <= positions
        keys = jnp.where(written[:, :, None, None], keys, 0.0)
        layer, own_variables = layer_of(method), own_of(method, variables)[1]
        increments = increments_of(layer, variables, x)
        if increments is not None:
            increments = jnp.repeat(increments.reshape(2, LENGTH, -1), LENGTH, axis=0)
            increments = jnp.where(written[..., None], increments, 0.0)
        q_index, k_index = one_segment(positions), one_segment(arange(batch=2 * LENGTH))
        return scores_of(layer, own_variables, q, keys, q_index, k_index, increments)

    rows = decoded(*(a.reshape(2 * LENGTH, 1, *a.shape[2:]) for a in (x, q, k, arange())))
    rows = np.asarray(rows).reshape(2, LENGTH, *rows.shape[1:])[:, :, :, 0].swapaxes(1, 2)

    def are_the_whole(atol):
        assert difference(rows, whole) < atol

    holds_or_fails(name, DECODE, are_the_whole, LOGIT)


@pytest.mark.slow  # a loop over tokens under jit, of what the test above does at once
@every_case
def test_decoding_one_token_after_the_other(name):
    method = CASES[name].method
    variables = variables_of(method)
    parts = inputs()

    def full(parts):
        return jnp.moveaxis(logits(method, variables, *parts, arange()), 1, 3)

    @jax.jit
    def step(cache, parts, t):
        """The logits of token t, and the cache with its key."""
        x, q, k = parts
        position = jnp.full((2, 1), t, jnp.int32)
        x = embed_tokens(method, variables[0], x, position)
        q, k = (a + x[..., None, : a.shape[-1]] for a in (q, k))
        q, k = turned(method, variables, q, k, position)
        layer, own_variables = layer_of(method), own_of(method, variables)[1]
        new = k, increments_of(layer, variables, x)
        cache = jax.tree.map(
            lambda held, row: jax.lax.dynamic_update_slice_in_dim(held, row, t, axis=1), cache, new
        )
        index = one_segment(position), one_segment(arange())
        row = scores_of(layer, own_variables, q, cache[0], *index, cache[1])
        return jnp.moveaxis(row, 1, 3), cache

    x, q, k = parts
    made = jax.eval_shape(partial(turned, method), variables, q, k, arange())[1]
    sums = jax.eval_shape(partial(increments_of, layer_of(method)), variables, x)
    cache = jax.tree.map(lambda held: jnp.zeros(held.shape, held.dtype), (made, sums))
    assertion = partial(testing.assert_cached_equals_full, full, step, parts, cache)
    holds_or_fails(name, DECODE, assertion, LOGIT)


@every_case
def test_rows_that_share_positions_share_all_that_is_made_of_them(name):
    """Of positions ``[1, T]`` tables and biases have a batch axis of 1."""
    method = CASES[name].method
    variables = variables_of(method)
    shared = arange(batch=1)
    for leaf in jax.tree.leaves(jax.eval_shape(partial(tables_of, method), variables, shared)):
        assert leaf.shape[0] == 1
    own, own_variables = own_of(method, variables)
    if has_hook(own, "bias"):
        bias = jax.eval_shape(partial(bias_of_heads, own), own_variables, shared, shared)
        assert bias.shape == (1, 4, LENGTH, LENGTH)


@pytest.mark.fast(*ONE_A_HOOK, "sinusoidal")
@every_case
def test_positions_given_once_give_the_numbers_of_all_rows(name):
    method = CASES[name].method
    variables, parts = variables_of(method), inputs()
    one = logits(method, variables, *parts, arange(batch=1))
    assert difference(one, logits(method, variables, *parts, arange())) < LOGIT


@every_case
def test_positions_to_a_million(name):
    """The last positions of the contract: as near ones where distance decides, else in float64."""
    method, fails = CASES[name].method, CASES[name].fails
    variables = variables_of(method)
    x, q, k = inputs()
    far = arange(start=FAR - LENGTH)
    limit = method.limits.max_length
    if limit is not None:
        assert limit < FAR
        if method.kind != "absolute":  # Learned refuses in embed, see errors_test
            assert np.isnan(logits(method, variables, x, q, k, far)).any()
        return
    result = logits(method, variables, x, q, k, far)
    assert np.isfinite(result).all()
    if SHIFT not in fails:
        assert difference(result, logits(method, variables, x, q, k, arange())) < 5e-3
        return
    if isinstance(method, FoPE):
        inv_freq = method.frequencies(SHAPE.head_dim)

        @jax.jit
        def tables(positions):
            both = tables_of(method, variables, positions)
            return [table[..., : len(inv_freq)] for table in both]

        testing.assert_phases_accurate(tables, inv_freq, longest=FAR)


@pytest.mark.slow
@every_case
def test_random_shapes(name):
    """Any heads, groups, head sizes, lengths and offsets: finite, and rows know only themselves.

    Outside jit: so the numbers of a program are compared with those of its operations as well.
    """
    method = CASES[name].method

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(
        head_dim=st.sampled_from([12, 24, 48]),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 4),
        length=st.integers(1, 9),
        start=st.sampled_from([0, 7, 100]),
    )
    def run(head_dim, kv_heads, group, length, start):
        shape = ModelShape(48, 6, kv_heads * group, kv_heads, head_dim)
        try:
            method.check(shape)
        except ValueError:
            assume(False)
        variables, parts = variables_of(method, shape=shape), inputs(2, length, shape=shape)
        positions = arange(length, start)
        reversed_parts = [np.asarray(part)[::-1] for part in parts]
        with jax.disable_jit():
            whole = logits_eagerly(method, variables, *parts, positions)
            reversed_rows = logits_eagerly(method, variables, *reversed_parts, positions)
        assert whole.shape == (2, shape.num_heads, length, length)
        assert whole.dtype == jnp.float32 and np.isfinite(whole).all()
        assert difference(reversed_rows, whole[::-1]) < LOGIT

    run()
    variables = variables_of(method)
    with jax.disable_jit():
        plain = logits_eagerly(method, variables, *inputs(), arange())
    assert difference(plain, logits(method, variables, *inputs(), arange())) < LOGIT


@pytest.mark.fast(*ONE_A_HOOK)
@every_case
def test_gradients_are_finite_and_right(name):
    """Against central differences along a random direction, inputs and everything learnable."""
    method = CASES[name].method
    owned = drawn(method, jax.random.key(3), SHAPE)
    layer_params = {name: value[1] for name, value in owned.layer_params.items()}
    model, layer = variables_of(method)
    x, q, k = inputs(length=9)

    def loss(x, q, k, model_params, layer_params):
        merged = ({**model, **model_params}, {**layer, **model_params, **layer_params})
        return jnp.mean(jnp.square(logits_eagerly(method, merged, x, q, k, arange(9, start=5))))

    parts = (x, q, k, owned.model_params, layer_params)
    # CoPE is linear between whole counts only: short steps, whose differences float32 blurs. Its
    # gradients are compared in float64 in contextual_test.
    step, rtol = (1e-3, 3e-2) if "cope" in name else (1e-2, 1e-2)
    testing.assert_gradients(loss, *parts, step=step, rtol=rtol, seed=1)


@pytest.mark.fast(*ONE_A_HOOK, "rope-chain", "sinusoidal", "fope-normalised")
@every_case
def test_bfloat16(name):
    """Inputs of 8 bits keep their dtype; what comes out is float32's, rounded once."""
    method = CASES[name].method
    variables = variables_of(method)
    x, q, k = inputs(dtype=jnp.bfloat16)
    embedded, half, tables = embedded_and_turned(method, variables, x, q, k, arange())
    wide = (a.astype(jnp.float32) for a in (x, q, k))
    expected, full, _ = embedded_and_turned(method, variables, *wide, arange())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tables))
    assert embedded.dtype == jnp.bfloat16
    embedded = np.asarray(embedded, np.float32)
    np.testing.assert_allclose(embedded, expected, rtol=2**-8, atol=1e-6)
    # A factor on the logits rounds a second time.
    rtol = 2**-7 if isinstance(method, LogitScaling) else 2**-8
    for a, b in zip(half, full, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=rtol, atol=1e-6)
    own, own_variables = own_of(method, variables)
    if has_hook(own, "bias"):
        bias = jax.eval_shape(partial(bias_of_heads, own), own_variables, arange(), arange())
        assert bias.dtype == jnp.float32
    if has_hook(own, "running_bias"):
        increments = jax.eval_shape(own.running_bias, own_variables, x)
        assert increments.shape == (2, LENGTH, 4) and increments.dtype == jnp.float32
    if has_hook(own, "contextual_bias"):
        scores = jnp.zeros((2, 4, LENGTH, LENGTH), jnp.float32)
        bias = jax.eval_shape(own.contextual_bias, own_variables, q, scores)
        assert bias.dtype == jnp.float32


@every_case
def test_grouped_queries_read_the_keys_of_their_group(name):
    """A change of one key-value head reaches the query heads of its group, and no other."""
    method = CASES[name].method
    variables = variables_of(method)
    x, q, k = inputs()
    before = np.asarray(logits(method, variables, x, q, k, arange()))
    after = np.asarray(logits(method, variables, x, q, k.at[:, :, 1].add(1.0), arange()))
    if isinstance(own_of(method, variables)[0], DAPE):  # a network over all heads
        assert difference(before[:, :2], after[:, :2]) > 0.01
        return
    assert difference(before[:, :2], after[:, :2]) == 0
    for head in (2, 3):
        assert difference(before[:, head], after[:, head]) > 1e-2
    after = np.asarray(logits(method, variables, x, q.at[:, :, 2].add(1.0), k, arange()))
    moved = [difference(before[:, head], after[:, head]) > 1e-2 for head in range(4)]
    assert moved == [False, False, True, False]
    turned_q, turned_k = jax.eval_shape(partial(turned, method), variables, q, k, arange())
    assert turned_q.shape[:3] == q.shape[:3] and turned_k.shape[2] in (2, 4)
    assert turned_q.shape[3] == turned_k.shape[3] and turned_q.dtype == turned_k.dtype == q.dtype


DRAWN = ("fope", "learned", "t5", "kerple", "fire", "cope", "dape", "pope-uniform", "fox", "cable")
DRAWN_WITHOUT_NOISE = ("fope-clip-only", "fope-no-noise", "fope-no-noise-sine")


@every_case
def test_init_is_a_function_of_the_key(name):
    method = CASES[name].method
    keys = (jax.random.key(seed) for seed in (0, 0, 1))
    leaves = [jax.tree.leaves(drawn(method, key, SHAPE)) for key in keys]
    for a, b in zip(*leaves[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    random_draw = any(part in name for part in DRAWN) and name not in DRAWN_WITHOUT_NOISE
    same_draw = all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))
    assert same_draw != random_draw


@every_case
def test_knobs_are_hashable_and_compare(name):
    """Frozen dataclasses go into jit as static arguments."""
    method = CASES[name].method
    twin = dataclasses.replace(method)
    assert twin is not method and twin == method and hash(twin) == hash(method)
