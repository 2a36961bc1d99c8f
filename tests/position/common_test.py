"""The property table: what holds for each method and preset, and what must not.

A new method adds one row to ``CASES``. Each property is a theorem with a tolerance at non-trivial
settings; a method listed under ``fails`` must violate it visibly, so the test of a property that
nothing could violate does not go unnoticed.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import (
    METHODS,
    ALiBi,
    FoPE,
    Learned,
    ModelShape,
    NoPE,
    PositionEmbedding,
    RoPE,
    Sinusoidal,
)

SHAPE = ModelShape(d_model=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=24)
LENGTH = 40
LOGIT = 5e-5  # float32 rounding of sums over head_dim whose size is about 50

SHIFT = "logits depend on distances only"
NORM = "rotation keeps the norm of q and k"
ORIGIN = "position 0 is the identity"


@dataclass(frozen=True)
class Case:
    method: PositionEmbedding
    fails: tuple[str, ...] = field(default=())


CASES = {
    "nope": Case(NoPE()),
    "rope": Case(RoPE(theta=100.0)),
    "rope-interleaved": Case(RoPE(theta=100.0, interleaved=True)),
    "alibi": Case(ALiBi()),
    "alibi-slopes": Case(ALiBi(slopes=(0.5, 0.1, 0.3, 0.0))),
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
    "fope-no-noise": Case(FoPE(40, sigma=0.0, zero_sine=0.0)),
    "fope-no-noise-sine": Case(FoPE(40, sigma=0.0), fails=(NORM, ORIGIN)),
}


def every_case(test):
    return pytest.mark.parametrize("name", CASES)(test)


def variables_of(method, seed=3):
    """The model's variables, and one layer's: of the middle layer, so a layer mix-up shows."""
    owned = method.init(jax.random.key(seed), SHAPE)
    layers = {**owned.layer_params, **owned.layer_constants}
    return (
        {**owned.model_params, **owned.model_constants},
        {name: value[1] for name, value in layers.items()},
    )


def inputs(batch=2, length=LENGTH, dtype=np.float32, shape=SHAPE):
    random = np.random.default_rng(7)

    def draw(*dims):
        return jnp.asarray(random.normal(size=(batch, length, *dims)), dtype)

    x = draw(shape.d_model)
    return x, draw(shape.num_heads, shape.head_dim), draw(shape.num_kv_heads, shape.head_dim)


def logits(method, variables, x, q, k, positions):
    """Attention logits of one head layout: embed moves x, and q, k gain a fixed share of it."""
    model, layer = variables
    x = method.embed(model, x, positions)
    q = q + x[..., None, : q.shape[-1]]
    k = k + x[..., None, : k.shape[-1]]
    q, k = method.rotate(layer, method.tables(model, positions, q.shape[-1]), q, k)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    if method.has_bias:
        scores = scores + method.bias(layer, positions, positions)
    return scores


def arange(length=LENGTH, start=0, batch=2):
    row = jnp.arange(start, start + length, dtype=jnp.int32)[None]
    return jnp.broadcast_to(row, (batch, length))


def difference(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def holds_or_fails(name, property_name, error, tolerance):
    if property_name in CASES[name].fails:
        assert error > 30 * tolerance, f"{name} should violate: {property_name} ({error=})"
    else:
        assert error < tolerance, f"{name} should satisfy: {property_name} ({error=})"


def test_every_method_has_a_row():
    assert {type(case.method) for case in CASES.values()} == set(METHODS.values())


@every_case
def test_shift(name):
    """q.k at (m + 150, n + 150) equals q.k at (m, n), to phases of 190 radians in float32."""
    method = CASES[name].method
    run = partial(logits, method, variables_of(method), *inputs())
    holds_or_fails(name, SHIFT, difference(run(arange()), run(arange(start=150))), 1e-3)


@every_case
def test_norm(name):
    method = CASES[name].method
    model, layer = variables_of(method)
    _, q, k = inputs()
    turned = method.rotate(layer, method.tables(model, arange(), SHAPE.head_dim), q, k)
    k = jnp.repeat(k, turned[1].shape[2] // k.shape[2], axis=2)
    error = max(
        difference(jnp.linalg.norm(a, axis=-1), jnp.linalg.norm(b, axis=-1))
        for a, b in zip((q, k), turned, strict=True)
    )
    holds_or_fails(name, NORM, error, 1e-5)


@every_case
def test_origin(name):
    method = CASES[name].method
    model, layer = variables_of(method)
    x, q, k = inputs()
    zero = jnp.zeros((2, LENGTH), jnp.int32)
    turned_q, turned_k = method.rotate(layer, method.tables(model, zero, SHAPE.head_dim), q, k)
    k = jnp.repeat(k, turned_k.shape[2] // k.shape[2], axis=2)
    error = max(
        difference(method.embed(model, x, zero), x),
        difference(turned_q, q),
        difference(turned_k, k),
    )
    holds_or_fails(name, ORIGIN, error, 1e-6)


@every_case
def test_prefix(name):
    """What follows a prefix changes nothing in it: hooks see positions, never the length."""
    method = CASES[name].method
    variables = variables_of(method)
    x, q, k = inputs()
    whole = logits(method, variables, x, q, k, arange())[..., :13, :13]
    part = logits(method, variables, x[:, :13], q[:, :13], k[:, :13], arange(13))
    assert difference(whole, part) < LOGIT


@every_case
def test_packed_equals_separate(name):
    """Two documents in one row: the logits within each are those of the document alone."""
    method = CASES[name].method
    variables = variables_of(method)
    x, q, k = inputs()
    packed = jnp.concatenate([arange(17), arange(LENGTH - 17)], axis=1)
    together = logits(method, variables, x, q, k, packed)
    for rows in (slice(0, 17), slice(17, LENGTH)):
        alone = logits(
            method, variables, x[:, rows], q[:, rows], k[:, rows], arange(rows.stop - rows.start)
        )
        assert difference(together[..., rows, rows], alone) < LOGIT


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


@every_case
def test_jit_and_vmap(name):
    method = CASES[name].method
    variables = variables_of(method)
    x, q, k = inputs()
    run = partial(logits, method, variables)
    plain = run(x, q, k, arange())
    assert difference(plain, jax.jit(run)(x, q, k, arange())) < LOGIT
    mapped = jax.vmap(lambda *row: run(*(leaf[None] for leaf in row))[0])(x, q, k, arange())
    assert difference(plain, mapped) < LOGIT


@every_case
def test_one_trace_for_all_positions(name):
    method = CASES[name].method
    variables = variables_of(method)
    traces = []

    @jax.jit
    def run(positions):
        traces.append(1)
        return logits(method, variables, *inputs(), positions)

    for start in (0, 1, 77, 150):
        run(arange(start=start)).block_until_ready()
    assert len(traces) == 1


@every_case
def test_gradients_are_finite_and_right(name):
    """Against central differences along a random direction, inputs and everything learnable."""
    method = CASES[name].method
    owned = method.init(jax.random.key(3), SHAPE)
    layer_params = {name: value[1] for name, value in owned.layer_params.items()}
    model, layer = variables_of(method)
    x, q, k = inputs(length=9)

    def loss(parts):
        x, q, k, model_params, layer_params = parts
        merged = ({**model, **model_params}, {**layer, **layer_params})
        return jnp.mean(jnp.square(logits(method, merged, x, q, k, arange(9, start=5))))

    parts = (x, q, k, owned.model_params, layer_params)
    gradient = jax.grad(loss)(parts)
    chex.assert_tree_all_finite(gradient)
    random = np.random.default_rng(1)
    direction = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), p.dtype), parts)
    step = 1e-2

    def moved(by):
        return loss(jax.tree.map(lambda p, d: p + np.float32(by) * d, parts, direction))

    slope = sum(
        float(jnp.vdot(g, d))
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose((moved(step) - moved(-step)) / (2 * step), slope, rtol=1e-2)


@every_case
def test_bfloat16(name):
    """Inputs of 8 bits keep their dtype; what comes out is float32's, rounded once."""
    method = CASES[name].method
    model, layer = variables_of(method)
    x, q, k = inputs(dtype=jnp.bfloat16)
    tables = method.tables(model, arange(), SHAPE.head_dim)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tables))
    assert method.embed(model, x, arange()).dtype == jnp.bfloat16
    embedded = method.embed(model, x.astype(jnp.float32), arange())
    np.testing.assert_allclose(
        np.asarray(method.embed(model, x, arange()), np.float32), embedded, rtol=2**-8, atol=1e-6
    )
    half = method.rotate(layer, tables, q, k)
    full = method.rotate(layer, tables, q.astype(jnp.float32), k.astype(jnp.float32))
    for a, b in zip(half, full, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-6)


@every_case
def test_grouped_queries_read_the_keys_of_their_group(name):
    """Shapes with grouped heads, and each head equal to itself computed alone with its key."""
    method = CASES[name].method
    model, layer = variables_of(method)
    _, q, k = inputs()
    tables = method.tables(model, arange(), SHAPE.head_dim)
    turned_q, turned_k = method.rotate(layer, tables, q, k)
    assert turned_q.shape == q.shape
    assert turned_k.shape[2] in (SHAPE.num_kv_heads, SHAPE.num_heads)
    assert turned_k.shape[:2] + turned_k.shape[3:] == k.shape[:2] + k.shape[3:]
    # Each query head with the key it reads, alone: heads 0, 1 read key 0; heads 2, 3 read key 1.
    for head in range(SHAPE.num_heads):
        group = head // 2
        matrix = {SHAPE.num_heads: head, SHAPE.num_kv_heads: group}
        own = {
            label: value[matrix[len(value)]][None] if value.ndim == 3 else value
            for label, value in layer.items()
        }
        alone_q, alone_k = method.rotate(
            own, tables, q[:, :, head : head + 1], k[:, :, group : group + 1]
        )
        assert difference(alone_q[:, :, 0], turned_q[:, :, head]) < 1e-6
        key = head if turned_k.shape[2] == SHAPE.num_heads else group
        assert difference(alone_k[:, :, 0], turned_k[:, :, key]) < 1e-6


@every_case
def test_init_is_a_function_of_the_key(name):
    method = CASES[name].method
    one, same, other = (method.init(jax.random.key(seed), SHAPE) for seed in (0, 0, 1))
    leaves = [jax.tree.leaves(vars(drawn)) for drawn in (one, same, other)]
    for a, b in zip(*leaves[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    random_draw = isinstance(method, Learned) or (
        isinstance(method, FoPE) and method.series and method.sigma > 0
    )
    same_draw = all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))
    assert same_draw != random_draw


@every_case
def test_knobs_are_hashable_and_compare(name):
    """Frozen dataclasses go into jit as static arguments."""
    method = CASES[name].method
    twin = dataclasses.replace(method)
    assert twin is not method and twin == method and hash(twin) == hash(method)
