"""Position embeddings inside ``flax.nnx.MultiHeadAttention``, through its public hook."""

import difflib
import inspect
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fope_jax.gallery.examples import examples
from fope_jax.interop.nnx import PositionAttention, PositionEmbed, Rotary
from fope_jax.model.transformer import PositionConstant
from fope_jax.position import (
    ALiBi,
    ByLayer,
    DynamicNTK,
    FoPE,
    Learned,
    LocalChunks,
    LogitScaling,
    NoPE,
    PositionEmbedding,
    RoPE,
    SelfExtend,
    Sinusoidal,
    SlidingWindow,
    T5Bias,
    XPos,
    YaRN,
)
from fope_jax.position.base import has_hook

HEADS, KV_HEADS, HEAD_DIM, WIDTH, LENGTH = 4, 2, 8, 32, 12
CASES = {
    name: method
    for name, method in examples(LENGTH, HEAD_DIM).items()
    if method.kind != "absolute"
    and len(method.layers()) == 1
    and "+" not in name
    and not has_hook(method.layers()[0].method, "running_bias")  # see layers_test
}
CASES["rope-yarn"] = RoPE(scaling=(YaRN(4.0, LENGTH),))
CASES["fope-query"] = FoPE(LENGTH, heads="query")
CASES["fope-learnable"] = FoPE(LENGTH, learnable=True)
CASES["by-layer-of-one"] = ByLayer((FoPE(LENGTH),))


SOME = ("fope-query", "alibi", "fire", "xpos", "cope", "logit_scaling")  # of each kind of hook


DECODED = ("fope-query", "cope")


def slow_but(fast, names=CASES):
    """Fast cases, and slow ones of methods that go the same way as one of them."""
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in names]


class Before(nnx.Module):
    """A language model of Flax's own layers."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.out = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, mask=nnx.make_causal_mask(tokens))
        return self.out(x)


class After(nnx.Module):
    """A language model of Flax's own layers."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 32, rngs=rngs)
        fope = PositionAttention(FoPE(16), num_heads=4, head_dim=8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=fope, rngs=rngs)
        self.out = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, mask=nnx.make_causal_mask(tokens))
        return self.out(x)


def test_three_lines_change():
    """The import is the third."""
    before, after = (inspect.getsource(model).splitlines()[1:] for model in (Before, After))
    new = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert len(new) == 2 and all("fope" in line for line in new)


def train(model, steps):
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            logits = model(tokens[:, :-1])
            targets = jax.nn.one_hot(tokens[:, 1:], 16)
            return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    # Two tokens that alternate in one half, a cycle of three in the other: order is all there is.
    cycle = jnp.stack([jnp.arange(24) % 2, jnp.arange(24) % 3 + 2, -jnp.arange(24) % 3 + 2])
    return [float(step(model, optimizer, cycle)) for _ in range(steps)]


@pytest.mark.slow  # trains two models; tests/train has it for ours
def test_trains_and_leaves_the_coefficients_alone():
    """Loss falls, Adam with weight decay does not move the coefficients, and order is used.

    The cycles 2 3 4 and 4 3 2 have the same tokens: without positions one layer cannot tell what
    comes next from a set, so it stays above what the model with FoPE reaches.
    """
    after, before = After(nnx.Rngs(0)), Before(nnx.Rngs(0))
    drawn = nnx.to_pure_dict(nnx.state(after, PositionConstant))
    kept = jax.tree.map(np.asarray, drawn)
    losses = train(after, 40)
    assert losses[-1] < 0.4 * losses[0]
    assert losses[-1] < train(before, 40)[-1] - 0.05
    trained = nnx.to_pure_dict(nnx.state(after, PositionConstant))
    assert len(jax.tree.leaves(kept)) == 2
    jax.tree.map(np.testing.assert_array_equal, trained, kept)


def test_parameters_are_those_of_the_model_before():
    before, after = (
        nnx.to_flat_state(nnx.state(model(nnx.Rngs(0)), nnx.Param)) for model in (Before, After)
    )
    assert [path for path, _ in before] == [path for path, _ in after]


def test_order_is_seen():
    """The last of a set of tokens: the same without positions, another with them."""
    tokens = jnp.array([[3, 1, 4, 1, 5, 9], [1, 5, 4, 3, 1, 9]])
    without, with_fope = (
        np.asarray(nnx.jit(lambda model: model(tokens))(model(nnx.Rngs(0)))[:, -1])
        for model in (Before, After)
    )
    np.testing.assert_allclose(without[0], without[1], atol=1e-6)
    assert np.abs(with_fope[0] - with_fope[1]).max() > 1e-3


def attention(method, *, decode=False, kv_heads=KV_HEADS, dtype=None, **options):
    inner = PositionAttention(
        method,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        decode=decode,
        rngs=nnx.Rngs(1),
        **options,
    )
    return nnx.MultiHeadAttention(
        HEADS,
        WIDTH,
        num_kv_heads=kv_heads,
        decode=decode,
        dtype=dtype,
        attention_fn=inner,
        rngs=nnx.Rngs(2),
    )


def drawn_variables(layer):
    return {name: value[...] for name, value in layer.attention_fn.variables.items()}


def inputs(length=LENGTH, batch=3):
    return jax.random.normal(jax.random.key(5), (batch, length, WIDTH))


CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))[None, None]


def through(layer, expected, x, positions, mask=CAUSAL):
    """The layer's projections around attention computed from the hooks."""
    heads = (layer.query(x), layer.key(x), layer.value(x))
    method = layer.attention_fn.method
    return layer.out(expected(method, drawn_variables(layer), *heads, positions, mask))


@nnx.jit
def causal(layer, x):
    return layer(x, is_causal=True)


@pytest.mark.fast(
    "fope-query-True", "alibi-True", "fire-True", "cope-True", "logit_scaling-True", "cope-False"
)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_hooks(name, compiled, expected):
    """With two query heads a key-value head, and both ways that Flax has to say causal."""
    layer, x = attention(CASES[name]), inputs()
    right = through(layer, expected, x, jnp.arange(LENGTH)[None])

    def both(layer, x):
        return layer(x, mask=jnp.asarray(CAUSAL)), layer(x, is_causal=True)

    for out in (nnx.jit(both) if compiled else both)(layer, x):
        np.testing.assert_allclose(out, right, atol=2e-5)


@pytest.mark.parametrize("name", slow_but(("cope",)))
def test_packed_documents(name, expected):
    """Positions that start anew, other ones in each row, held as state that jit passes on."""
    layer, x = attention(CASES[name], positions=jnp.arange(LENGTH)), inputs()
    starts = np.array([5, 8, 3])
    index = np.arange(LENGTH)
    positions = np.where(index < starts[:, None], index, index - starts[:, None])
    segments = index >= starts[:, None]
    mask = CAUSAL & (segments[:, None, :, None] == segments[:, None, None, :])
    right = through(layer, expected, x, jnp.asarray(positions), mask)

    @nnx.jit
    def run(layer, x, positions):
        layer.attention_fn.set_positions(positions)
        return layer(x, mask=jnp.asarray(mask))

    layer.attention_fn.set_positions(jnp.asarray(positions))
    np.testing.assert_allclose(run(layer, x, jnp.asarray(positions)), right, atol=2e-5)
    if name == "fope-query":
        np.testing.assert_allclose(layer(x, mask=jnp.asarray(mask)), right, atol=2e-5)
    alone = causal(attention(CASES[name]), x[:1, 5:])
    np.testing.assert_allclose(right[:1, 5:], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [
        *(pytest.param(*case.values, True, marks=case.marks) for case in slow_but(DECODED)),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("cope", "fope")),
    ],
)
def test_decoding_with_the_key_cache_of_flax(name, is_causal):
    """One token at a time, in a cache longer than the sequence, equals all at once.

    Whichever flag is passed: the triangle that Flax makes of ``is_causal`` would leave key 0 alone.
    """
    layer, x = attention(CASES[name], decode=True), inputs()
    full = causal(attention(CASES[name]), x)
    layer.init_cache((3, LENGTH + 4, WIDTH))
    step = nnx.jit(lambda layer, x: layer(x, is_causal=is_causal))
    steps = [step(layer, x[:, index : index + 1]) for index in range(LENGTH)]
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), full, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    slow_but(("fope-query",), ("fope", "fope-query", "fope-learnable", "alibi", "t5", "cope")),
)
def test_bfloat16_and_gradients(name):
    """Gradients reach all that is trained and nothing else; 8 bits change little."""
    layer, x = attention(CASES[name]), inputs()

    def loss(layer):
        return jnp.mean(jnp.square(layer(x, is_causal=True)))

    gradient = nnx.to_flat_state(nnx.jit(nnx.grad(loss))(layer))
    own = [(path, value) for path, value in gradient if "variables" in path]
    params = nnx.to_flat_state(nnx.state(layer.attention_fn, nnx.Param))
    assert len(own) == len(params)
    assert all(np.isfinite(value[...]).all() for _, value in gradient)
    assert not own or any(np.abs(value[...]).max() > 0 for _, value in own)
    half = causal(attention(CASES[name], dtype=jnp.bfloat16), x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    whole = causal(layer, x)
    assert np.abs(np.asarray(half, np.float32) - whole).max() < 0.05 * np.abs(whole).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ALiBi(),
        pytest.param(FoPE(LENGTH), marks=pytest.mark.slow),
        pytest.param(RoPE(), marks=pytest.mark.slow),
        pytest.param(NoPE(), marks=pytest.mark.slow),
    ],
    ids=lambda m: str(m)[:5],
)
def test_batch_axes_dropout_and_weights(method):
    """Two batch axes, attention weights sown, dropout: all that Flax passes along."""
    layer, x = attention(method, kv_heads=HEADS), inputs(batch=6)
    flat = causal(layer, x)
    deep = causal(layer, x.reshape(2, 3, LENGTH, WIDTH))
    np.testing.assert_allclose(deep.reshape(flat.shape), flat, atol=1e-5)
    mask = jnp.broadcast_to(CAUSAL, (6, 1, LENGTH, LENGTH))
    np.testing.assert_allclose(layer(x, mask=mask, sow_weights=True), flat, atol=1e-5)
    (weights,) = jax.tree.leaves(nnx.pop(layer, nnx.Intermediate))
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    noisy = nnx.MultiHeadAttention(
        HEADS,
        WIDTH,
        decode=False,
        dropout_rate=0.5,
        attention_fn=layer.attention_fn,
        rngs=nnx.Rngs(2, dropout=3),
    )
    first, second = (noisy(x, is_causal=True, deterministic=False) for _ in range(2))
    assert np.abs(first - second).max() > 1e-2
    np.testing.assert_allclose(noisy(x, is_causal=True, deterministic=True), flat, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(FoPE(LENGTH), marks=pytest.mark.slow),
        LogitScaling(FoPE(LENGTH), training_length=4),
    ],
    ids=lambda method: type(method).__name__,
)
def test_rotary_equals_rotate(method):
    """Default, shared and row-wise positions, and keys that stand elsewhere than queries."""
    rotary = Rotary(
        method, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(0)
    )
    variables = {name: value[...] for name, value in rotary.variables.items()}
    q = jax.random.normal(jax.random.key(0), (3, LENGTH, HEADS, HEAD_DIM))
    k = jax.random.normal(jax.random.key(1), (3, LENGTH, KV_HEADS, HEAD_DIM))
    rows = jax.random.randint(jax.random.key(2), (3, LENGTH), 0, 5000)
    (layer,) = method.layers()
    own = layer.select(variables)
    for given, full in ((None, jnp.arange(LENGTH)[None]), (rows[0], rows[:1]), (rows, rows)):
        right = layer.method.rotate(own, layer.method.tables(own, full, HEAD_DIM), q, k)
        if layer.logit_scale is not None:
            right = right[0] * layer.logit_scale(full)[:, :, None, None], right[1]
        for ours, theirs in zip(rotary(q, k, given), right, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    right_q, right_k = rotary(q, k, rows)
    part_q, part_k = rotary(q[:, 3:5], k, rows[:, 3:5], rows)
    np.testing.assert_allclose(part_q, right_q[:, 3:5], atol=1e-6)
    np.testing.assert_allclose(part_k, right_k, atol=1e-6)
    assert not nnx.to_flat_state(nnx.state(rotary, nnx.Param))


def test_embed():
    x = inputs()
    for method in (Sinusoidal(), Learned(table_length=40)):
        embed = PositionEmbed(method, d_model=WIDTH, rngs=nnx.Rngs(0))
        variables = {name: value[...] for name, value in embed.variables.items()}
        rows = jnp.arange(7, 7 + LENGTH)
        right = method.embed(variables, x, rows[None])
        np.testing.assert_array_equal(embed(x, rows), right)
        assert np.abs(embed(x) - right).max() > 0.01
    with pytest.raises(ValueError, match="sequence of 41 tokens.*defined for 40 at most"):
        embed(inputs(length=41))


def built(method, **options):
    return PositionAttention(
        method, num_heads=HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(0), **options
    )


def called(layer, queries=LENGTH, keys=LENGTH, heads=HEADS, **options):
    q, k = (jnp.ones((2, length, heads, HEAD_DIM)) for length in (queries, keys))
    return layer(q, k, k, **options)


ERRORS = {
    "absolute": (lambda: built(Sinusoidal()), "Sinusoidal.*use PositionEmbed"),
    "pattern": (lambda: built(ByLayer((RoPE(), NoPE()))), "ByLayer.*differ by layer"),
    "odd head_dim": (
        lambda: PositionAttention(RoPE(), num_heads=2, head_dim=7, rngs=nnx.Rngs(0)),
        "head_dim=7.*even",
    ),
    "embed of a rotation": (
        lambda: PositionEmbed(RoPE(), d_model=8, rngs=nnx.Rngs(0)),
        "RoPE.*use PositionAttention",
    ),
    "embed of a window": (
        lambda: PositionEmbed(SlidingWindow(Sinusoidal(), 4), d_model=8, rngs=nnx.Rngs(0)),
        "SlidingWindow.*also hides keys.*PositionAttention for the rest, around NoPE",
    ),
    "embed of a chunk": (
        lambda: PositionEmbed(LocalChunks(Learned(40), 4), d_model=8, rngs=nnx.Rngs(0)),
        "LocalChunks.*also hides keys",
    ),
    "embed of a logit scale": (
        lambda: PositionEmbed(
            LogitScaling(Sinusoidal(), training_length=8), d_model=8, rngs=nnx.Rngs(0)
        ),
        "LogitScaling.*also scales logits",
    ),
    "a bias of another shape": (
        lambda: called(built(ALiBi()), bias=jnp.ones((2, LENGTH, LENGTH))),
        r"bias has shape \(2, 12, 12\): expected what broadcasts to \(2, 4, 12, 12\)",
    ),
    "rotary of a bias": (
        lambda: Rotary(ALiBi(), num_heads=2, head_dim=8, rngs=nnx.Rngs(0)),
        "ALiBi.*has a bias.*use PositionAttention",
    ),
    "rotary of a bias whose logits are scaled": (
        lambda: Rotary(
            LogitScaling(ALiBi(), training_length=8), num_heads=2, head_dim=8, rngs=nnx.Rngs(0)
        ),
        "ALiBi.*has a bias.*use PositionAttention",
    ),
    "rotary of a contextual layer": (
        lambda: Rotary(ByLayer((CASES["cope"],)), num_heads=2, head_dim=8, rngs=nnx.Rngs(0)),
        "CoPE.*has a bias.*use PositionAttention",
    ),
    "a name in place of a method": (
        lambda: Rotary("rope", num_heads=2, head_dim=8, rngs=nnx.Rngs(0)),
        r"method='rope': expected a position embedding, such as RoPE\(\)",
    ),
    "key-value heads that do not divide": (
        lambda: Rotary(RoPE(), num_heads=4, num_kv_heads=3, head_dim=8, rngs=nnx.Rngs(0)),
        "num_heads=4, num_kv_heads=3: expected a multiple",
    ),
    "heads": (
        lambda: called(built(RoPE()), heads=2),
        "num_heads, num_kv_heads, head_dim = 2, 2, 8 come in: 4, 4, 8 were declared",
    ),
    "one query": (
        lambda: called(built(RoPE()), queries=1),
        "1 queries and 12 keys.*pass positions.*decode=True",
    ),
    "decoding without a mask": (
        lambda: called(built(RoPE(), decode=True), queries=1),
        "1 queries and 12 keys.*pass positions",
    ),
    "fewer queries": (
        lambda: called(built(RoPE()), queries=3),
        "3 queries and 12 keys.*positions$",
    ),
    "positions": (
        lambda: called(built(RoPE(), positions=jnp.arange(5))),
        r"positions has shape \(5,\): expected \(12,\), \(1, 12\) or \(2, 12\)",
    ),
    "positions that are no integers": (
        lambda: called(built(RoPE(), positions=jnp.arange(12.0))),
        "positions has dtype float32.*integers",
    ),
    "positions beyond 32 bits": (
        lambda: built(RoPE(), positions=np.arange(12) + 2**32),
        "position 4294967307 does not fit 32 bits",
    ),
    "positions beyond 32 bits, set later": (
        lambda: built(RoPE()).set_positions(np.arange(12, dtype=np.uint64) + 2**63),
        "does not fit 32 bits",
    ),
    "keys without queries": (
        lambda: Rotary(RoPE(), num_heads=2, head_dim=8, rngs=nnx.Rngs(0))(
            jnp.ones((1, 3, 2, 8)), jnp.ones((1, 3, 2, 8)), key_positions=jnp.arange(3)
        ),
        "key_positions are given, positions are not",
    ),
    "contextual without a mask": (
        lambda: called(built(CASES["cope"])),
        "mask is None.*pass a causal mask",
    ),
    "T5's decoder without a mask": (lambda: called(built(T5Bias())), "T5Bias.*pass a causal mask"),
    "xPos without a mask": (lambda: called(built(XPos())), "XPos.*pass a causal mask"),
    "log n without a mask": (
        lambda: called(built(LogitScaling(RoPE(), training_length=8))),
        "LogitScaling.*pass a causal mask",
    ),
    "a mask that shows what follows": (
        lambda: called(built(T5Bias()), mask=jnp.ones((2, 1, LENGTH, LENGTH))),
        "T5Bias.*the mask shows a query a key after it",
    ),
    "packed documents in one triangle": (
        lambda: called(built(RoPE(), positions=jnp.arange(LENGTH) % 7), is_causal=True),
        "positions repeat within a row and mask is None.*keeps them apart",
    ),
    "a mask of another shape": (
        lambda: called(built(RoPE()), mask=jnp.ones((2, LENGTH, LENGTH))),
        r"mask has shape \(2, 12, 12\): expected what broadcasts to \(2, 4, 12, 12\)",
    ),
    "the mask of the whole in a step": (
        lambda: called(built(RoPE(), decode=True), queries=1, mask=jnp.asarray(CAUSAL)),
        "mask has shape.*a key cache takes the mask of its one query",
    ),
    "no bias argument": (
        lambda: called(built(ALiBi(), attention_fn=lambda query, key, value: query)),
        "takes no 'bias'",
    ),
    "no mask argument": (
        lambda: called(
            built(RoPE(), attention_fn=lambda query, key, value: query), mask=jnp.asarray(CAUSAL)
        ),
        "takes no 'mask'",
    ),
    "frequencies that follow the length": (
        lambda: called(
            built(RoPE(scaling=(DynamicNTK(2.0, 4),)), decode=True),
            queries=1,
            mask=jnp.ones((2, 1, 1, LENGTH)),
        ),
        "DynamicNTK.*follow the length.*give the scaling a length",
    ),
}


@pytest.mark.fast(
    "absolute",
    "pattern",
    "odd head_dim",
    "a name in place of a method",
    "key-value heads that do not divide",
    "heads",
    "one query",
    "positions",
    "contextual without a mask",
    "a mask that shows what follows",
    "a mask of another shape",
    "no bias argument",
    "no mask argument",
)
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_another_attention_function():
    """One with no options but the bias, and one that takes everything."""
    seen = {}

    def plain(query, key, value, bias=None):
        return jax.nn.dot_product_attention(query, key, value, bias=bias, is_causal=True)

    def all_options(query, key, value, **options):
        seen.update(options)
        return query

    x = inputs()
    np.testing.assert_allclose(
        attention(ALiBi(), kv_heads=HEADS, attention_fn=plain)(x),
        attention(ALiBi(), kv_heads=HEADS)(x, is_causal=True),
        atol=1e-5,
    )
    attention(ALiBi(), kv_heads=HEADS, attention_fn=all_options)(x, is_causal=True)
    assert seen["is_causal"] and seen["bias"].shape == (1, HEADS, LENGTH, LENGTH)


@pytest.mark.parametrize("name", slow_but(("cope",), SOME[:5]))
def test_a_permutation_of_tokens_and_positions_permutes_the_output(name):
    """Packed documents and a token of padding too; by a mask, and by the flag with a mask."""
    layer, x = attention(CASES[name]), inputs()
    order = np.random.default_rng(4).permutation(LENGTH)
    positions = np.r_[np.arange(7), np.arange(LENGTH - 7)].astype(np.int32)
    segments = np.r_[np.full(7, 1), np.full(LENGTH - 8, 2), 0]
    apart = jnp.asarray(segments[:, None] == segments[None, :])[None, None]
    mask = jnp.asarray(positions[:, None] >= positions[None, :])[None, None] & apart

    def run(order, positions, mask, is_causal=False):
        layer.attention_fn.set_positions(jnp.asarray(positions[order]))
        mask = None if mask is None else mask[:, :, order][..., order]
        return layer(x[:, order], mask=mask, is_causal=is_causal)

    stored = np.arange(LENGTH)
    expected = run(stored, positions, mask)
    np.testing.assert_allclose(run(order, positions, mask), expected[:, order], atol=2e-5)
    np.testing.assert_allclose(run(order, positions, apart, True), expected[:, order], atol=2e-5)
    alone = run(stored, stored, None, True)
    np.testing.assert_allclose(run(order, stored, None, True), alone[:, order], atol=2e-5)


def test_permuted_tokens_under_jit():
    """Positions are traced there, so that no order is known."""
    layer, x = attention(CASES["cope"], positions=jnp.arange(LENGTH)), inputs()
    order = np.random.default_rng(4).permutation(LENGTH)

    @nnx.jit
    def run(layer, x, positions):
        layer.attention_fn.set_positions(positions)
        return layer(x, is_causal=True)

    expected = causal(attention(CASES["cope"]), x)
    np.testing.assert_allclose(run(layer, x[:, order], order), expected[:, order], atol=2e-5)


@pytest.mark.fast("cope")
@pytest.mark.parametrize("name", ["fope", "alibi", "cope"])
def test_causal_goes_by_positions_where_queries_are_fewer(name):
    """A piece of a prompt among the keys of all of it: Flax's triangle starts at key 0."""
    q = jax.random.normal(jax.random.key(0), (2, LENGTH, HEADS, HEAD_DIM))
    run = nnx.jit(lambda layer, q, k: layer(q, k, k, is_causal=True))
    whole = run(built(CASES[name]), q, q)
    piece = run(built(CASES[name], positions=jnp.arange(5, 9)), q[:, 5:9], q)
    np.testing.assert_allclose(piece, whole[:, 5:9], atol=1e-5)


def plain_attention(q, k, v, bias):
    """``[B, T, N, H]`` float64, every key seen."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def test_alibi_and_t5_look_both_ways_without_a_mask():
    """ALiBi as in the authors' encoder variant, by the size of the distance; T5 as its encoder."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, LENGTH, HEADS, HEAD_DIM)) for i in range(3))
    apart = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))  # query minus key
    slopes = np.array([0.25, 0.0625, 0.015625, 0.00390625])[:, None, None]
    expected = plain_attention(q, k, v, -slopes * np.abs(apart))
    np.testing.assert_allclose(built(ALiBi())(q, k, v), expected, atol=1e-5)
    layer = built(T5Bias(num_buckets=8, max_distance=9, init_std=2.0, bidirectional=True))
    table = np.asarray(layer.variables["bias_table"][...], np.float64)
    # Of four buckets each way, two hold one distance each; 4 = 2 sqrt(9 / 2) starts the last.
    size = np.abs(apart)
    bucket = np.select([size < 2, 2.0 * (size / 2) ** 2 < 9], [size, 2], 3) + 4 * (apart < 0)
    expected = plain_attention(q, k, v, np.moveaxis(table[bucket], -1, 0))
    np.testing.assert_allclose(layer(q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, LENGTH), (HEADS, 1, LENGTH), (2, HEADS, LENGTH, LENGTH)])
@pytest.mark.parametrize(
    "method",
    [RoPE(), ALiBi(), SelfExtend(RoPE(), 2, 3), LogitScaling(ALiBi(), training_length=4)],
    ids=lambda method: type(method).__name__,
)
def test_a_bias_of_the_caller_is_added_to_that_of_the_method(method, shape):
    """Equal to a mask where it is -inf, and it leaves what a constant of all keys leaves."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, LENGTH, HEADS, HEAD_DIM)) for i in range(3))
    bias = 3.0 * jax.random.normal(jax.random.key(3), shape)
    logits = []  # of the method, with the caller's bias

    def recording(query, key, value, bias=0.0, mask=None, is_causal=False):
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
        logits.append(scores + bias)
        return value

    layer = built(method, attention_fn=recording)
    layer(q, k, v, is_causal=True)
    layer(q, k, v, is_causal=True, bias=bias)
    added = np.broadcast_to(np.asarray(bias), logits[0].shape)
    np.testing.assert_allclose(logits[1] - logits[0], added, atol=1e-5)


@pytest.mark.parametrize("name", ["cope", "rope", "alibi"])
def test_a_bias_of_minus_infinity_is_a_mask(name):
    """For contextual biases too: what is hidden is not counted."""
    layer = built(CASES.get(name, RoPE()))
    q, k, v = (jax.random.normal(jax.random.key(i), (2, LENGTH, HEADS, HEAD_DIM)) for i in range(3))
    is_shown = np.array(CAUSAL) & (np.arange(LENGTH) != 3)
    bias = jnp.where(jnp.asarray(is_shown), 0.0, -1e9).astype(jnp.bfloat16)
    expected = layer(q, k, v, mask=jnp.asarray(is_shown))
    found = layer(q, k, v, mask=jnp.asarray(CAUSAL), bias=bias)
    shown = np.arange(LENGTH) != 3
    np.testing.assert_allclose(found[:, shown], expected[:, shown], atol=1e-5)


@pytest.mark.fast("t5", "cope")
@pytest.mark.parametrize("name", ["t5", "xpos", "cope", "logit_scaling"])
def test_a_mask_that_shows_what_follows_is_nan_where_jit_hides_it(name):
    """The rows of the queries that look ahead and no other; a causal mask is as without jit."""
    layer, x = attention(CASES[name]), inputs()
    run = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
    np.testing.assert_allclose(run(layer, x, CAUSAL), layer(x, mask=CAUSAL), atol=2e-5)
    ahead = CAUSAL.copy()
    ahead[:, :, 4, 6] = True
    rows = np.isnan(run(layer, x, ahead)).all(axis=(0, 2))
    assert rows.tolist() == [row == 4 for row in range(LENGTH)]


@pytest.mark.slow  # Flax's cache is tried by decoding
@pytest.mark.parametrize("name", ("fope", "cope"))
def test_a_full_key_cache_refuses_another_token(name):
    """And gives NaN under jit; a cache that is made anew starts anew."""
    layer, x = attention(CASES[name], decode=True), inputs(length=3)
    jitted = nnx.jit(lambda layer, x: layer(x))
    for step in (layer, lambda x: jitted(layer, x)):
        layer.init_cache((3, 3, WIDTH))
        outs = [step(x[:, index : index + 1]) for index in range(3)]
        assert np.isfinite(outs).all()
        if step is layer:
            with pytest.raises(ValueError, match="key cache holds 3 tokens and all are used"):
                step(x[:, :1])
        else:
            assert np.isnan(step(x[:, :1])).all() and np.isnan(step(x[:, :1])).all()


MASKS = {
    "of queries and keys": CAUSAL[0, 0],
    "of one head": CAUSAL,
    "of each row": np.broadcast_to(CAUSAL, (3, 1, LENGTH, LENGTH)),
    "of each head": np.broadcast_to(CAUSAL, (1, HEADS, LENGTH, LENGTH)),
    "of numbers": CAUSAL.astype(np.float32),
}


@pytest.mark.fast("cope-of each row")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", slow_but(("cope",), ("fope", "cope")))
def test_masks_of_any_shape_that_fits(name, mask):
    layer, x = attention(CASES[name], kv_heads=HEADS), inputs()
    right = causal(layer, x)
    np.testing.assert_allclose(layer(x, mask=jnp.asarray(MASKS[mask])), right, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(2, 1), (1, 3), (1, 1), (2, 3)])
def test_a_mask_may_be_shared_along_one_of_two_batch_axes(rows):
    layer, x = attention(CASES["cope"], kv_heads=HEADS), inputs(batch=6)
    deep, mask = (
        x.reshape(2, 3, LENGTH, WIDTH),
        jnp.broadcast_to(CAUSAL, (*rows, *CAUSAL.shape[1:])),
    )
    right = causal(layer, x).reshape(deep.shape)
    np.testing.assert_allclose(layer(deep, mask=mask), right, atol=2e-5)


@dataclass(frozen=True)
class Constant(PositionEmbedding):
    """A bias without variables, the same for all heads."""

    def bias(self, variables, q_positions, k_positions):
        return -0.3 * jnp.abs(q_positions - k_positions).astype(jnp.float32)


@pytest.mark.slow
def test_a_bias_without_heads_is_the_bias_of_all_heads():
    x = inputs()
    right = causal(attention(ALiBi(slopes=(0.3,) * HEADS)), x)
    np.testing.assert_allclose(causal(attention(Constant()), x), right, atol=1e-5)
    np.testing.assert_allclose(attention(Constant())(x, mask=jnp.asarray(CAUSAL)), right, atol=1e-5)
    deep = causal(attention(Constant()), x.reshape(1, 3, LENGTH, WIDTH))
    np.testing.assert_allclose(deep[0], right, atol=1e-5)


@pytest.mark.slow
def test_positions_of_rows_with_two_batch_axes():
    layer, x = attention(FoPE(LENGTH)), inputs(batch=6)
    positions = np.arange(LENGTH) + np.arange(6)[:, None]
    layer.attention_fn.set_positions(positions)
    flat = causal(layer, x)
    layer.attention_fn.set_positions(positions.reshape(2, 3, LENGTH))
    deep = causal(layer, x.reshape(2, 3, LENGTH, WIDTH))
    np.testing.assert_allclose(deep.reshape(flat.shape), flat, atol=1e-5)
