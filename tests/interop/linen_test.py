"""Position embeddings inside ``flax.linen.MultiHeadDotProductAttention``, by its public hook."""

import difflib
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fope_jax.gallery.examples import examples
from fope_jax.interop.linen import PositionAttention, PositionEmbed, Rotary
from fope_jax.position import (
    ALiBi,
    ByLayer,
    DynamicNTK,
    FoPE,
    Learned,
    ModelShape,
    NoPE,
    RoPE,
    Sinusoidal,
    T5Bias,
    YaRN,
)
from fope_jax.position.base import has_hook

HEADS, HEAD_DIM, WIDTH, LENGTH = 4, 8, 32, 12
CASES = {
    name: method
    for name, method in examples(LENGTH, HEAD_DIM).items()
    if method.kind != "absolute"
    and len(method.layers()) == 1
    and "+" not in name
    and not has_hook(method.layers()[0].method, "running_bias")  # see layers_test
}
CASES["rope-yarn"] = RoPE(scaling=(YaRN(4.0, LENGTH),))
CASES["fope-learnable"] = FoPE(LENGTH, learnable=True)
CASES["by-layer-of-one"] = ByLayer((FoPE(LENGTH),))


SOME = ("fope", "alibi", "cope", "fope-learnable")  # of each kind of hook


def slow_but(fast, names=CASES):
    """Fast cases, and slow ones of methods that go the same way as one of them."""
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in names]


class Before(nn.Module):
    """A language model of Flax's own layers."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 32)(tokens)
        mask = nn.make_causal_mask(tokens)
        attention = nn.MultiHeadDotProductAttention(4)
        return nn.Dense(16)(x + attention(x, mask=mask))


class After(nn.Module):
    """A language model of Flax's own layers."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 32)(tokens)
        mask = nn.make_causal_mask(tokens)
        fope = PositionAttention(FoPE(16))
        attention = nn.MultiHeadDotProductAttention(4, attention_fn=fope)
        return nn.Dense(16)(x + attention(x, mask=mask))


def test_three_lines_change():
    """The import is the third."""
    before, after = (inspect.getsource(model).splitlines()[1:] for model in (Before, After))
    new = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert len(new) == 2 and all("fope" in line for line in new)


# Two tokens that alternate, and two cycles of the same three tokens, one of them backwards.
CYCLES = jnp.stack([jnp.arange(24) % 2, jnp.arange(24) % 3 + 2, -jnp.arange(24) % 3 + 2])


def train(model, variables, steps):
    """The losses, and the variables after it: what is not in ``params`` is passed along."""
    rest = {name: value for name, value in variables.items() if name != "params"}
    optimizer = optax.adamw(1e-2, weight_decay=0.1)

    def loss(params):
        logits = model.apply({"params": params, **rest}, CYCLES[:, :-1])
        targets = jax.nn.one_hot(CYCLES[:, 1:], 16)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params, losses = variables["params"], []
    state = optimizer.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses


@pytest.mark.slow
def test_trains_and_uses_order():
    """The cycles 2 3 4 and 4 3 2 have the same tokens: the model before cannot tell them apart."""
    tokens = jnp.zeros((1, 4), jnp.int32)
    before, after = (model().init(jax.random.key(0), tokens) for model in (Before, After))
    losses = train(After(), after, 40)
    assert losses[-1] < 0.4 * losses[0]
    assert losses[-1] < train(Before(), before, 40)[-1] - 0.05


@pytest.mark.slow
def test_init_adds_nothing_to_the_parameters():
    """The coefficients are in a collection of their own, beside it all is as before."""
    tokens = jnp.zeros((1, 4), jnp.int32)
    before, after = (model().init(jax.random.key(0), tokens) for model in (Before, After))
    assert set(before) == {"params"} and set(after) == {"params", "position"}
    assert jax.tree.structure(before["params"]) == jax.tree.structure(after["params"])
    shapes = [leaf.shape for leaf in jax.tree.leaves(after["position"])]
    assert shapes == [(4, 1, 1)] * 2  # 1 of 4 frequencies turns fully in 16 tokens


@pytest.mark.slow
def test_order_is_seen():
    """The last of a set of tokens: the same without positions, another with them."""
    tokens = jnp.array([[3, 1, 4, 1, 5, 9], [1, 5, 4, 3, 1, 9]])
    last = []
    for model in (Before(), After()):
        last.append(np.asarray(model.init_with_output(jax.random.key(0), tokens)[0][:, -1]))
    np.testing.assert_allclose(last[0][0], last[0][1], atol=1e-6)
    assert np.abs(last[1][0] - last[1][1]).max() > 1e-3


def attention(method, decode=False, dtype=None, **options):
    inner = PositionAttention(method, decode=decode, **options)
    return nn.MultiHeadDotProductAttention(HEADS, decode=decode, dtype=dtype, attention_fn=inner)


def inputs(length=LENGTH, batch=3):
    return jax.random.normal(jax.random.key(5), (batch, length, WIDTH))


CAUSAL = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]


def own_variables(variables):
    params = variables["params"].get("attention_fn", {})
    return params | variables.get("position", {}).get("attention_fn", {})


def through(method, variables, expected, x, positions, mask=CAUSAL):
    """The layer's projections around attention computed from the hooks."""
    params = variables["params"]
    heads = (
        jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    out = expected(method, own_variables(variables), *heads, positions, mask)
    return jnp.einsum("btnh,nhd->btd", out, params["out"]["kernel"]) + params["out"]["bias"]


@pytest.mark.fast("cope")
@pytest.mark.parametrize("name", slow_but(SOME))
def test_equals_the_hooks(name, expected):
    """Positions counted, and row-wise ones of packed documents; jit gives the same."""
    method, x = CASES[name], inputs()
    layer = attention(method)
    variables = layer.init(jax.random.key(1), x, mask=CAUSAL)
    right = through(method, variables, expected, x, jnp.arange(LENGTH)[None])
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x, mask=CAUSAL), right, atol=2e-5)
    starts, index = np.array([5, 8, 3])[:, None], np.arange(LENGTH)
    positions = jnp.asarray(np.where(index < starts, index, index - starts))
    segments = index >= starts
    mask = CAUSAL & jnp.asarray(segments[:, None, :, None] == segments[:, None, None, :])

    @jax.jit
    def packed(variables, positions):
        return attention(method, positions=positions).apply(variables, x, mask=mask)

    right = through(method, variables, expected, x, positions, mask)
    np.testing.assert_allclose(packed(variables, positions), right, atol=2e-5)


@pytest.mark.fast("cope")
@pytest.mark.parametrize("name", ["fope", "cope"])
def test_decoding_with_the_key_cache_of_flax(name):
    """One token at a time, in a cache longer than the sequence, equals all at once."""
    x = inputs()
    layer = attention(CASES[name], decode=True)
    variables = jax.jit(layer.init)(
        jax.random.key(1), inputs(LENGTH + 4), mask=nn.make_causal_mask(jnp.ones((3, LENGTH + 4)))
    )
    cache = variables.pop("cache")
    full = jax.jit(attention(CASES[name]).apply)(variables, x, mask=CAUSAL)

    @jax.jit
    def step(cache, x):
        out, changed = layer.apply({**variables, "cache": cache}, x, mutable=["cache"])
        return out, changed["cache"]

    steps = []
    for index in range(LENGTH):
        out, cache = step(cache, x[:, index : index + 1])
        steps.append(out)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), full, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(("fope-learnable", "cope")))
def test_bfloat16_gradients_and_what_is_drawn(name):
    """Gradients reach all that is trained; constants and parameters are those of ``init``."""
    method, x = CASES[name], inputs()
    layer = attention(method)
    variables = layer.init(jax.random.key(1), x, mask=CAUSAL)
    drawn = method.init(jax.random.key(0), ModelShape(WIDTH, 1, HEADS, HEADS, HEAD_DIM))
    for collection, groups in (
        ("params", (drawn.model_params, drawn.layer_params)),
        ("position", (drawn.model_constants, drawn.layer_constants)),
    ):
        own = variables.get(collection, {}).get("attention_fn", {})
        assert set(own) == set(groups[0]) | set(groups[1])

    def loss(params):
        return jnp.mean(jnp.square(layer.apply({**variables, "params": params}, x, mask=CAUSAL)))

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    own = jax.tree.leaves(gradient.get("attention_fn", {}))
    assert not own or any(np.abs(leaf).max() > 0 for leaf in own)
    low = attention(method, dtype=jnp.bfloat16)
    half = jax.jit(low.apply)(variables, x, mask=CAUSAL)
    assert half.dtype == jnp.bfloat16
    whole = layer.apply(variables, x, mask=CAUSAL)
    assert np.abs(np.asarray(half, np.float32) - whole).max() < 0.05 * np.abs(whole).max()


def test_coefficients_are_one_draw_of_the_method():
    """Cosine and sine of one ``init``: FoPE without a sine of its own would show two."""
    variables = attention(FoPE(LENGTH)).init(jax.random.key(1), inputs(), mask=CAUSAL)
    other = attention(FoPE(LENGTH)).init(jax.random.key(2), inputs(), mask=CAUSAL)
    own = variables["position"]["attention_fn"]
    assert np.abs(own["cos_coef"] - own["sin_coef"]).max() > 1e-3
    assert np.abs(own["cos_coef"] - other["position"]["attention_fn"]["cos_coef"]).max() > 1e-3


def test_a_missing_collection_is_drawn_where_it_may_be():
    """Parameters of a model trained without FoPE: the constants are drawn on the first apply."""
    x, layer = inputs(), attention(FoPE(LENGTH))
    params = attention(NoPE()).init(jax.random.key(1), x, mask=CAUSAL)["params"]
    out, drawn = layer.apply(
        {"params": params}, x, mask=CAUSAL, mutable=["position"], rngs={"params": jax.random.key(3)}
    )
    again = layer.apply({"params": params, **drawn}, x, mask=CAUSAL)
    np.testing.assert_allclose(out, again, atol=1e-6)
    with pytest.raises(Exception, match="cos_coef"):
        layer.apply({"params": params}, x, mask=CAUSAL)


def test_weights_are_sown_and_dropped():
    x, layer = inputs(), attention(ALiBi())
    variables = layer.init(jax.random.key(1), x, mask=CAUSAL)
    out, sown = layer.apply(variables, x, mask=CAUSAL, sow_weights=True, mutable="intermediates")
    (weights,) = sown["intermediates"]["attention_weights"]
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(layer.apply(variables, x, mask=CAUSAL), out, atol=1e-6)
    noisy = nn.MultiHeadDotProductAttention(
        HEADS, dropout_rate=0.5, deterministic=False, attention_fn=PositionAttention(ALiBi())
    )
    one, two = (
        noisy.apply(variables, x, mask=CAUSAL, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert np.abs(one - two).max() > 1e-2


@pytest.mark.slow  # nnx_test has it
def test_rotary_equals_rotate():
    """Default, shared and row-wise positions, and keys that stand elsewhere than queries."""
    method, rotary = FoPE(LENGTH), Rotary(FoPE(LENGTH))
    q = jax.random.normal(jax.random.key(0), (3, LENGTH, HEADS, HEAD_DIM))
    k = jax.random.normal(jax.random.key(1), (3, LENGTH, 2, HEAD_DIM))
    variables = rotary.init(jax.random.key(3), q, k)
    assert set(variables) == {"position"}
    own = variables["position"]
    rows = jax.random.randint(jax.random.key(2), (3, LENGTH), 0, 5000)
    for given, full in ((None, jnp.arange(LENGTH)[None]), (rows[0], rows[:1]), (rows, rows)):
        right = method.rotate(own, method.tables(own, full, HEAD_DIM), q, k)
        for ours, theirs in zip(rotary.apply(variables, q, k, given), right, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    right_q, right_k = rotary.apply(variables, q, k, rows)
    part_q, part_k = rotary.apply(variables, q[:, 3:5], k, rows[:, 3:5], rows)
    np.testing.assert_allclose(part_q, right_q[:, 3:5], atol=1e-6)
    np.testing.assert_allclose(part_k, right_k, atol=1e-6)


def test_embed():
    x = inputs()
    for method, collections in ((Sinusoidal(), set()), (Learned(table_length=40), {"params"})):
        embed = PositionEmbed(method)
        variables = embed.init(jax.random.key(0), x)
        assert set(variables) == collections
        rows = jnp.arange(7, 7 + LENGTH)
        right = method.embed(variables.get("params", {}), x, rows[None])
        np.testing.assert_array_equal(embed.apply(variables, x, rows), right)
        assert np.abs(embed.apply(variables, x) - right).max() > 0.01


@pytest.mark.slow  # Flax's cache is tried by decoding
def test_a_full_key_cache_refuses_another_token():
    """And gives NaN under jit; the first cache again starts anew."""
    x, layer = inputs(length=3), attention(FoPE(LENGTH), decode=True)
    variables = jax.jit(layer.init)(jax.random.key(1), x, mask=nn.make_causal_mask(x[..., 0]))
    first = variables.pop("cache")

    def step(cache, x, mask=None):
        out, changed = layer.apply({**variables, "cache": cache}, x, mask=mask, mutable=["cache"])
        return out, changed["cache"]

    cache, compiled = first, jax.jit(step)
    for index in range(3):
        out, cache = compiled(cache, x[:, index : index + 1])
        assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="key cache holds 3 tokens and all are used"):
        step(cache, x[:, :1])
    assert np.isnan(compiled(cache, x[:, :1])[0]).all()
    # The causal mask of one token, kept while decoding, hides nothing; that of the whole is named.
    kept = nn.make_causal_mask(x[:, :1, 0])
    alone = compiled(first, x[:, :1])[0]
    np.testing.assert_allclose(step(first, x[:, :1], kept)[0], alone, atol=1e-6)
    with pytest.raises(ValueError, match="a key cache takes the mask of its one query"):
        step(first, x[:, :1], nn.make_causal_mask(x[..., 0]))


@pytest.mark.slow  # nnx_test has it
@pytest.mark.parametrize("name", ["alibi", "cope"])
def test_a_permutation_of_tokens_and_positions_permutes_the_output(name):
    q = jax.random.normal(jax.random.key(0), (2, LENGTH, HEADS, HEAD_DIM))
    order = np.random.default_rng(4).permutation(LENGTH)
    whole, variables = PositionAttention(CASES[name]).init_with_output(
        jax.random.key(1), q, q, q, mask=CAUSAL
    )
    moved, mask = q[:, order], CAUSAL[:, :, order][..., order]

    def run(positions):
        module = PositionAttention(CASES[name], positions=positions)
        return module.apply(variables, moved, moved, moved, mask=mask)

    for out in (run(order), jax.jit(run)(order)):
        np.testing.assert_allclose(out, whole[:, order], atol=1e-5)


def called(module, queries=LENGTH, keys=LENGTH, **options):
    q, k = (jnp.ones((2, length, HEADS, HEAD_DIM)) for length in (queries, keys))
    return module.init(jax.random.key(0), q, k, k, **options)


ERRORS = {
    "absolute": (lambda: called(PositionAttention(Sinusoidal())), "Sinusoidal.*use PositionEmbed"),
    "pattern": (
        lambda: called(PositionAttention(ByLayer((RoPE(), NoPE())))),
        "ByLayer.*differ by layer",
    ),
    "embed of a rotation": (
        lambda: PositionEmbed(RoPE()).init(jax.random.key(0), inputs()),
        "RoPE.*use PositionAttention",
    ),
    "rotary of a bias": (
        lambda: Rotary(ALiBi()).init(jax.random.key(0), *[jnp.ones((1, 3, 2, 8))] * 2),
        "ALiBi.*has a bias.*use PositionAttention",
    ),
    "one query": (
        lambda: called(PositionAttention(RoPE()), queries=1),
        "1 queries and 12 keys.*pass positions.*decode=True",
    ),
    "positions": (
        lambda: called(PositionAttention(RoPE(), positions=jnp.arange(5))),
        r"positions has shape \(5,\): expected \(12,\), \(1, 12\) or \(2, 12\)",
    ),
    "contextual without a mask": (
        lambda: called(PositionAttention(CASES["cope"])),
        "mask is None.*pass a causal mask",
    ),
    "T5's decoder without a mask": (
        lambda: called(PositionAttention(T5Bias())),
        "T5Bias.*pass a causal mask",
    ),
    "frequencies that follow the length": (
        lambda: called(
            PositionAttention(RoPE(scaling=(DynamicNTK(2.0, 4),)), decode=True),
            queries=1,
            mask=jnp.ones((2, 1, 1, LENGTH)),
        ),
        "DynamicNTK.*follow the length.*give the scaling a length",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_positions_of_queries_among_cached_keys():
    """Positions given, keys count from 0: the last rows of the whole."""
    q = jax.random.normal(jax.random.key(0), (2, LENGTH, HEADS, HEAD_DIM))
    for method in (FoPE(LENGTH), ALiBi()):
        module = PositionAttention(method)
        whole, variables = module.init_with_output(jax.random.key(1), q, q, q, mask=CAUSAL)
        for given in (
            {"positions": jnp.arange(9, 12)},
            {"positions": jnp.arange(9, 12), "key_positions": jnp.arange(12)},
        ):
            part = PositionAttention(method, **given).apply(
                variables, q[:, 9:], q, q, mask=CAUSAL[..., 9:, :]
            )
            np.testing.assert_allclose(part, whole[:, 9:], atol=1e-5)
