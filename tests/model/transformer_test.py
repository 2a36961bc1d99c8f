import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.model import context_parallel
from fope_jax.model.config import TransformerConfig
from fope_jax.model.layers import rms_norm
from fope_jax.model.losses import loss_sums
from fope_jax.model.presets import PRESETS
from fope_jax.model.transformer import (
    PositionConstant,
    Transformer,
    check_batch,
    layer,
    merge,
    split,
)
from fope_jax.position import (
    ALiBi,
    FoPE,
    NoPE,
    PositionEmbedding,
    PositionVariables,
    RoPE,
    Sinusoidal,
)
from fope_jax.position.base import Layer, Limits
from fope_jax.position.contextual import CoPE
from fope_jax.position.mixing import ByLayer
from fope_jax.position.relative_bias import T5Bias
from tests.model import rows

SIZES = {
    "vocab_size": 61,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 40,
    "qk_norm": "head",
    # Its programs compile in half of the time; attention_test has the chunked form.
    "attention": "reference",
    "attention_block": 16,
    # Larger than in training, so that attention is far from uniform and differences show.
    "init_std": 0.4,
}


@dataclass(frozen=True)
class EveryHook(PositionEmbedding):
    """Uses every hook, with parameters and constants of the model and of each layer."""

    def init(self, key, shape):
        keys = jax.random.split(key, 4)
        layers, heads = shape.num_layers, shape.num_heads
        return PositionVariables(
            model_params={"embed_scale": jax.random.normal(keys[0], (shape.d_model,))},
            model_constants={"frequency": jax.random.uniform(keys[1], ())},
            layer_params={"slope": jax.random.normal(keys[2], (layers, heads))},
            layer_constants={
                "gain": 1 + jax.random.uniform(keys[3], (layers, heads)),
                "layer": jnp.arange(layers, dtype=jnp.int32),
            },
        )

    def embed(self, variables, x, positions):
        wave = jnp.sin(positions.astype(jnp.float32) * variables["frequency"])
        scale = variables["embed_scale"][None, None]
        return x + (wave[..., None] * scale).astype(x.dtype)

    def tables(self, variables, positions, head_dim):
        return jnp.cos(positions.astype(jnp.float32) * variables["frequency"])

    def rotate(self, variables, tables, q, k):
        gain = tables[..., None, None] * variables["gain"][None, None, :, None]
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        return q * gain.astype(q.dtype), k * gain.astype(k.dtype)

    def bias(self, variables, q_positions, k_positions):
        distance = (q_positions - k_positions).astype(jnp.float32)
        rate = variables["slope"] / (1 + variables["layer"].astype(jnp.float32))
        return -jnp.abs(rate) * distance

    def variable_axes(self, name):
        return ("heads",) if name in ("slope", "gain") else ()


@dataclass(frozen=True)
class AtMostTen(PositionEmbedding):
    @property
    def limits(self):
        return Limits(max_length=10)


def make(position, **changes):
    return Transformer(TransformerConfig(**(SIZES | changes)), position, rngs=nnx.Rngs(3))


def packed(lengths, length):
    """One row of documents and padding: tokens, positions, segments, weights."""
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, length))
    positions, segments = rows.packed([lengths], length)
    return tokens.astype(np.int32), positions, segments, (segments != 0).astype(np.float32)


compiled = functools.partial(jax.jit, static_argnames="graphdef")


@compiled
def hidden_of(graphdef, params, constants, tokens, positions, segments):
    return merge(graphdef, params, constants).hidden(tokens, positions, segments)


@compiled
def loss_and_gradient(graphdef, params, constants, tokens, positions, segments, weights):
    def loss(params):
        model = merge(graphdef, params, constants)
        hidden = model.hidden(tokens, positions, segments)
        targets = jnp.roll(tokens, -1, axis=1)
        sums = loss_sums(hidden, model.unembedding_matrix(), targets, weights, time_chunk=20)
        return sums.nats / sums.tokens

    return jax.value_and_grad(loss)(params)


def assert_close(tree, expected, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, expected
    )


def exact_logits(model, tokens, positions, segments):
    """The transformer in float64 and NumPy, with RoPE, one head after another."""
    config, shape = model.config, model.config.shape
    _, params, _ = split(model)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def norm_at(place, x, scale):
        return norm(x, scale) if config.norm == place else x

    def projected(y, w, name):
        """``[B, T, N, H]``, with a bias and normalised as the config says."""
        x = np.einsum("btd,dnh->btnh", y, w[name]) + w.get(f"{name}_bias", 0.0)
        scale = w.get(f"{name}_norm")
        if config.qk_norm == "width":
            return norm(x.reshape(*x.shape[:2], -1), scale).reshape(x.shape)
        return norm(x, scale) if config.qk_norm == "head" else x

    def turn(x):
        pairs = shape.head_dim // 2
        phase = positions[..., None] * 10_000.0 ** (-np.arange(pairs) / pairs)
        return np.concatenate(
            [
                x[..., :pairs] * np.cos(phase) - x[..., pairs:] * np.sin(phase),
                x[..., pairs:] * np.cos(phase) + x[..., :pairs] * np.sin(phase),
            ],
            axis=-1,
        )

    visible = (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, :, None]
    visible &= positions[:, :, None] >= positions[:, None]
    x = params["embedding"][tokens]
    for index in range(shape.num_layers):
        w = {name: value[index] for name, value in params["layers"].items()}
        y = norm_at("pre", x, w["attention_norm"])
        queries, keys = projected(y, w, "query"), projected(y, w, "key")
        values = np.einsum("btd,dnh->btnh", y, w["value"]) + w.get("value_bias", 0.0)
        added = np.zeros_like(x)
        for n in range(shape.num_heads):
            kv = n // (shape.num_heads // shape.num_kv_heads)
            q, k = turn(queries[:, :, n]), turn(keys[:, :, kv])
            scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(shape.head_dim)) * visible
            total = scores.sum(-1, keepdims=True)
            attended = scores / np.where(total == 0, 1, total) @ values[:, :, kv]
            added = added + attended @ w["out"][n]
        x = x + norm_at("post", added, w["attention_norm"])
        y = norm_at("pre", x, w["mlp_norm"])
        gate = y @ w["gate"]
        added = (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
        x = x + norm_at("post", added, w["mlp_norm"])
    unembedding = params["embedding"].T if config.tie_embeddings else params["unembedding"]
    return norm(x, params["final_norm"]) @ unembedding


BLOCKS = {
    "pre, heads": {},
    "pre, none, tied": {"qk_norm": "none", "tie_embeddings": True},
    "post, width, biases": {"norm": "post", "qk_norm": "width", "qkv_bias": True},
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_model_is_its_definition(block):
    model = make(RoPE(), **BLOCKS[block])
    # Scales of one would hide a norm that is left out or applied to the wrong thing.
    graphdef, params, constants = split(model)
    rng = np.random.default_rng(1)
    norms = [name for name in params["layers"] if name.endswith("_norm")]
    assert len(norms) == (2 if model.config.qk_norm == "none" else 4)
    for name in norms:
        scale = params["layers"][name]
        params["layers"][name] = jnp.asarray(rng.uniform(0.5, 1.5, scale.shape), jnp.float32)
    for name in [name for name in params["layers"] if name.endswith("_bias")]:
        shape = params["layers"][name].shape
        params["layers"][name] = jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32)
    model = merge(graphdef, params, constants)
    tokens, positions, segments, _ = packed([20, 17], 40)
    logits = jax.jit(lambda *batch: model(*batch))(tokens, positions, segments)
    assert logits.dtype == jnp.float32
    expected = exact_logits(model, tokens, positions, segments)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def looped():
    """A loop over layers that are recomputed, with the reference attention."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        model = make(EveryHook(), scan_layers=False, remat="full")
        return loss_and_gradient(*split(model), *packed([20, 17], 40))


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": True, "attention": "chunked"},
        pytest.param(
            {"scan_layers": True, "remat": "full", "attention": "chunked"}, marks=pytest.mark.slow
        ),
        pytest.param({"scan_layers": False, "attention": "chunked"}, marks=pytest.mark.slow),
    ],
    ids=["scan", "scan, remat", "loop"],
)
def test_every_way_to_run_the_layers_gives_the_same(looped, changes):
    loss, gradient = loss_and_gradient(*split(make(EveryHook(), **changes)), *packed([20, 17], 40))
    assert_close((loss, gradient), looped)
    smallest = min(np.abs(x).max() for x in jax.tree.leaves(looped[1]))
    assert smallest > 1e-3


@pytest.mark.slow
def test_tied_embeddings_have_the_gradient_of_both_uses():
    """Also after norms of the other kinds, in a loop over the layers."""
    batch = packed([20, 17], 40)
    changes = {"norm": "post", "qk_norm": "width", "scan_layers": False}
    tied = make(RoPE(), tie_embeddings=True, **changes)
    loss, gradient = loss_and_gradient(*split(tied), *batch)
    assert "unembedding" not in gradient
    smallest = min(np.abs(x).max() for x in jax.tree.leaves(gradient))
    assert smallest > 1e-3

    graphdef, params, constants = split(make(RoPE(), **changes | {"scan_layers": True}))
    params |= split(tied)[1] | {"unembedding": tied.embedding[...].T}
    expected, both = loss_and_gradient(graphdef, params, constants, *batch)
    both["embedding"] += both.pop("unembedding").T
    assert_close((loss, gradient), (expected, both))


def test_true_and_false_are_what_they_were_before_norms_had_names():
    for old, new in ((True, "head"), (False, "none")):
        config = TransformerConfig(**(SIZES | {"qk_norm": old}))
        assert config == TransformerConfig(**(SIZES | {"qk_norm": new}))
        assert config.qk_norm == new


@dataclass(frozen=True)
class SharedTable(PositionEmbedding):
    """A bias from one trained table of the model, which all layers read, each at its own rate."""

    def init(self, key, shape):
        return PositionVariables(
            model_params={"table": jax.random.normal(key, (32, shape.num_heads))},
            layer_constants={"rate": 1.0 + jnp.arange(shape.num_layers, dtype=jnp.float32)},
        )

    def bias(self, variables, q_positions, k_positions):
        distance = jnp.abs(q_positions - k_positions)
        return variables["table"][jnp.minimum(distance, 31)] * variables["rate"]

    def variable_axes(self, name):
        return (None, "heads") if name == "table" else ()


@pytest.mark.slow
def test_gradients_of_a_table_that_layers_share_add_up():
    batch = packed([20, 17], 40)
    parts = split(make(SharedTable()))
    loss, gradient = loss_and_gradient(*parts, *batch)

    # A table a layer: the shared one's gradient is the sum of theirs.
    @dataclass(frozen=True)
    class OwnTables(SharedTable):
        def init(self, key, shape):
            drawn = super().init(key, shape)
            table = drawn.model_params["table"]
            own = {"table": jnp.broadcast_to(table, (shape.num_layers, *table.shape))}
            return PositionVariables(layer_params=own, layer_constants=drawn.layer_constants)

    own_loss, own = loss_and_gradient(*split(make(OwnTables())), *batch)
    np.testing.assert_allclose(own_loss, loss, rtol=1e-6)
    tables = own["position_layers"]["table"]
    smallest = np.abs(tables).max(axis=(1, 2)).min()
    assert smallest > 1e-3, "each layer has a part in it"
    np.testing.assert_allclose(
        gradient["position_model"]["table"], tables.sum(0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_gradients_of_a_table_that_layers_share_add_up_in_blocks():
    batch = packed([20, 17], 40)
    chunked, reference = (
        loss_and_gradient(*split(make(SharedTable(), attention=attention)), *batch)
        for attention in ("chunked", "reference")
    )
    assert_close(chunked, reference)


SHARED = [FoPE(16, learnable=True), CoPE(init_std=0.5), EveryHook()]
FEWER_HOOKS = (RoPE(), FoPE(16), FoPE(16, heads="query"), ALiBi(), T5Bias())
SHARED += [pytest.param(position, marks=pytest.mark.slow) for position in FEWER_HOOKS]


@pytest.mark.slow  # attention_test has it of attention
@pytest.mark.parametrize("position", SHARED, ids=lambda position: type(position).__name__)
def test_positions_that_all_rows_share_may_be_given_once(position):
    parts = split(make(position, num_layers=1))  # in blocks: ``attention_test``, for every bias
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SIZES["vocab_size"], (3, 40)).astype(np.int32)
    positions, segments, weights = (np.repeat(x, 3, axis=0) for x in packed([20, 17], 40)[1:])
    if isinstance(position, EveryHook) or getattr(position, "learnable", False):
        expected = loss_and_gradient(*parts, tokens, positions, segments, weights)
        shared = loss_and_gradient(*parts, tokens, positions[:1], segments, weights)
    else:
        expected = hidden_of(*parts, tokens, positions, segments)
        shared = hidden_of(*parts, tokens, positions[:1], segments)
    assert_close(shared, expected, atol=2e-5)


@dataclass(frozen=True)
class Tilt(PositionEmbedding):
    """A bias with a trained slope of the layer, a trained one of the model, and a constant."""

    def init(self, key, shape):
        one, two = jax.random.split(key)
        layers, heads = shape.num_layers, shape.num_heads
        return PositionVariables(
            model_params={"shared": jax.random.normal(one, (heads,))},
            layer_params={"slope": jax.random.normal(two, (layers, heads))},
            layer_constants={"least": jnp.arange(layers, dtype=jnp.int32) * 3},
        )

    def bias(self, variables, q_positions, k_positions):
        distance = jnp.maximum(q_positions - k_positions, variables["least"])
        rate = jnp.abs(variables["slope"] * variables["shared"])
        return -rate * distance.astype(jnp.float32)

    def variable_axes(self, name):
        return () if name == "least" else ("heads",)


MIXES = {
    "two kinds of bias": (Tilt(), RoPE()),
    "matrices": (FoPE(16, learnable=True), CoPE(init_std=0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("two kinds of bias", {"remat": "full"}),
        pytest.param("two kinds of bias", {"scan_layers": False}, marks=pytest.mark.slow),
        pytest.param("matrices", {"scan_layers": False}, marks=pytest.mark.slow),
        pytest.param("matrices", {"remat": "full"}, marks=pytest.mark.slow),
    ],
)
def test_mixed_layers_have_the_same_gradients_however_they_are_run(name, changes):
    batch, mixed = packed([20, 17], 40), ByLayer(MIXES[name])
    loss, gradient = loss_and_gradient(*split(make(mixed, num_layers=4, init_std=0.3)), *batch)
    smallest = min(np.abs(x).max() for x in jax.tree.leaves(gradient))
    assert smallest > 1e-4
    other = split(make(mixed, num_layers=4, init_std=0.3, **changes))
    assert_close(loss_and_gradient(*other, *batch), (loss, gradient))


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXES)
def test_methods_mixed_over_layers_are_those_methods(name):
    """Scanned periods equal a loop over the layers written here."""
    methods = MIXES[name]
    batch = packed([20, 17], 40)
    model = make(ByLayer(methods), num_layers=4, init_std=0.3)
    graphdef, params, constants = split(model)

    def own(index, level):
        """The variables of the method of layer ``index``, as its init named them."""
        found = params.get(level, {}) | constants.get(level, {})
        prefix = f"{index % 2}."
        return {
            key.removeprefix(prefix): x if level == "position_model" else x[index // 2]
            for key, x in found.items()
            if key.startswith(prefix)
        }

    @jax.jit
    def hidden(tokens, positions, segments):
        x = params["embedding"][tokens]
        for index in range(4):
            method = methods[index % 2]
            of_model = own(index, "position_model")
            variables = own(index, "position_layers") | of_model
            tables = method.tables(of_model, positions, 8)
            weights = {key: x[index] for key, x in params["layers"].items()}
            inputs = (x, positions, segments)
            x, _ = layer(model.config, Layer(method), weights, {}, variables, tables, *inputs)
        return rms_norm(x, params["final_norm"], model.config.norm_eps)

    expected = hidden_of(graphdef, params, constants, *batch[:3])
    np.testing.assert_allclose(hidden(*batch[:3]), expected, rtol=1e-4, atol=1e-4)


def test_only_parameters_reach_attention_as_trained(monkeypatch):
    seen = []
    real = context_parallel.attend

    def recorder(*args, **kwargs):
        names = [sorted(kwargs[side]) for side in ("bias_variables", "bias_constants")]
        seen.append(names)
        return real(*args, **kwargs)

    monkeypatch.setattr(context_parallel, "attend", recorder)
    batch = packed([12], 12)[:3]
    for position in (ALiBi(), ByLayer((ALiBi(), Tilt()))):
        model = make(position)
        jax.eval_shape(lambda *batch, model=model: model.hidden(*batch), *batch)
    assert seen == [[[], ["slopes"]], [[], ["slopes"]], [["shared", "slope"], ["least"]]]


def test_a_period_that_does_not_divide_the_layers_is_named():
    @dataclass(frozen=True)
    class EveryThree(PositionEmbedding):
        def layers(self):
            return (Layer(self),) * 3

    with pytest.raises(ValueError, match="EveryThree repeats after 3 layers: num_layers=2"):
        make(EveryThree())


def test_packed_documents_are_separate_documents_and_padding_is_nothing():
    parts = split(make(EveryHook()))
    lengths = [13, 19, 5]
    tokens, positions, segments, weights = packed(lengths, 40)
    hidden = hidden_of(*parts, tokens, positions, segments)
    start = 0
    for size in lengths:
        alone = packed([size], 40)
        alone[0][0, :size] = tokens[0, start : start + size]
        separate = hidden_of(*parts, *alone[:3])
        np.testing.assert_allclose(
            hidden[:, start : start + size], separate[:, :size], rtol=1e-4, atol=1e-5
        )
        start += size
    loss, gradient = loss_and_gradient(*parts, tokens, positions, segments, weights)
    tokens = np.where(segments == 0, (tokens + 1) % 61, tokens)
    tokens[0, start] = tokens[0, start] - 1  # it is the target of the last scored token
    again, same_gradient = loss_and_gradient(*parts, tokens % 61, positions, segments, weights)
    assert loss == again
    assert_close(gradient, same_gradient, rtol=1e-6, atol=1e-7)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_a_prefix_is_unaffected_by_what_follows():
    parts = split(make(EveryHook()))
    tokens, positions, segments, _ = packed([40], 40)
    hidden = hidden_of(*parts, tokens, positions, segments)
    other = tokens.copy()  # the computation above may not have read its input yet
    other[0, 23:] = (tokens[0, 23:] + 7) % 61
    changed = hidden_of(*parts, other, positions, segments)
    np.testing.assert_array_equal(hidden[:, :23], changed[:, :23])
    assert np.abs(hidden[:, 23:] - changed[:, 23:]).min(axis=-1).max() > 0


def test_storage_order_does_not_matter():
    parts = split(make(EveryHook()))
    tokens, positions, segments, _ = packed([20, 17], 40)
    order = np.random.default_rng(2).permutation(40)
    hidden = hidden_of(*parts, tokens, positions, segments)
    shuffled = hidden_of(*parts, tokens[:, order], positions[:, order], segments[:, order])
    np.testing.assert_allclose(shuffled, hidden[:, order], rtol=1e-4, atol=1e-5)


def test_jit_changes_nothing():
    model = make(EveryHook())
    tokens, positions, segments, _ = packed([20, 17], 40)
    eager = model.hidden(tokens, positions, segments)
    compiled = hidden_of(*split(model), tokens, positions, segments)
    np.testing.assert_allclose(eager, compiled, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_to_float32():
    batch = packed([20, 17], 40)
    # At a smaller spread: a large one makes attention one-hot, where rounding picks the key.
    exact, low = (make(EveryHook(), init_std=0.1, dtype=d) for d in ("float32", "bfloat16"))
    hidden, expected = (hidden_of(*split(model), *batch[:3]) for model in (low, exact))
    assert hidden.dtype == jnp.bfloat16
    difference = np.linalg.norm(hidden.astype(jnp.float32) - expected)
    assert 1e-4 < difference / np.linalg.norm(expected) < 0.02
    _, gradient = loss_and_gradient.eval_shape(*split(low), *batch)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_tables_and_embed_run_once_and_qk_norm_comes_before_the_rotation():
    calls, norms = [], []

    @dataclass(frozen=True)
    class Recorder(EveryHook):
        def embed(self, variables, x, positions):
            calls.append(("embed", sorted(variables)))
            return super().embed(variables, x, positions)

        def tables(self, variables, positions, head_dim):
            calls.append(("tables", head_dim))
            return super().tables(variables, positions, head_dim)

        def rotate(self, variables, tables, q, k):
            calls.append(("rotate", {n: x.shape for n, x in variables.items()}))
            for x in (q, k):
                jax.debug.callback(lambda x: norms.append((x**2).mean(-1)), x)
            return super().rotate(variables, tables, q, k)

    model = make(Recorder(), scan_layers=False)
    jax.jit(lambda *batch: model.hidden(*batch))(*packed([12], 12)[:3])
    jax.effects_barrier()
    own = {"slope": (4,), "gain": (4,), "layer": (), "embed_scale": (24,), "frequency": ()}
    layer = ("rotate", own)
    np.testing.assert_allclose(np.concatenate(norms, axis=-1), 1, rtol=1e-3)
    assert calls == [("embed", ["embed_scale", "frequency"]), ("tables", 8)] + [layer] * 2


@pytest.mark.parametrize(
    ("name", "layers", "d_model"), [("60m", 8, 512), ("180m", 8, 1024), ("1200m", 16, 2048)]
)
def test_paper_sizes_have_their_parameters(name, layers, d_model):
    """Attention, three matrices of the SwiGLU, two embeddings, two norms a layer and the last."""
    config = TransformerConfig(**PRESETS[name])
    model = nnx.eval_shape(lambda: Transformer(config, FoPE(512), rngs=nnx.Rngs(0)))
    _, params, constants = split(model)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    attention, mlp = 4 * d_model**2, 3 * d_model * (4 * d_model)
    assert count == layers * (attention + mlp) + 2 * 50_304 * d_model + (2 * layers + 1) * d_model
    assert count == {"60m": 85_074_432, "180m": 237_257_728, "1200m": 1_279_854_592}[name]
    assert config.shape.head_dim == {"60m": 64, "180m": 128, "1200m": 128}[name]
    assert jax.tree.leaves(constants)


def test_small_presets_build():
    for name in ("tiny", "demo"):
        config = TransformerConfig(**PRESETS[name])
        _, params, _ = split(
            nnx.eval_shape(lambda config=config: Transformer(config, NoPE(), rngs=nnx.Rngs(0)))
        )
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) < 2_000_000


def test_constants_are_no_parameters_and_survive_a_round_trip():
    model = make(EveryHook())
    graphdef, params, constants = split(model)
    assert constants.keys() == {"position_model", "position_layers"}
    assert constants["position_layers"].keys() == {"gain", "layer"}
    assert params["position_layers"].keys() == {"slope"}
    assert constants["position_layers"]["gain"].shape == (2, 4)
    assert all(type(x) in (dict,) for x in (params, constants, params["layers"]))
    assert isinstance(model.position_layers["gain"], PositionConstant)
    again = split(merge(graphdef, params, constants))
    assert again[0] == graphdef and hash(again[0]) == hash(graphdef)
    jax.tree.map(np.testing.assert_array_equal, again[1:], (params, constants))
    assert split(make(NoPE()))[2] == {}


@pytest.mark.slow
def test_two_tokens_at_one_position_differ_where_the_first_layer_reads_them():
    """Sinusoids at their defaults: cosine 1/3, as with embeddings of deviation 1, not 0.999."""
    changes = {"d_model": 256, "init_std": TransformerConfig.init_std}
    model = nnx.jit(lambda: make(Sinusoidal(), **changes))()
    tokens = jnp.arange(60, dtype=jnp.int32).reshape(2, 30)
    one, other = np.asarray(model.embed(tokens, jnp.arange(30, dtype=jnp.int32)[None]))
    cosine = np.sum(one * other, -1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    np.testing.assert_allclose(cosine.mean(), 1 / 3, atol=0.05)


def test_weights_of_a_seed_are_the_same_under_every_method():
    plain, every = split(make(NoPE()))[1], split(make(EveryHook()))[1]
    jax.tree.map(np.testing.assert_array_equal, plain, {name: every[name] for name in plain})
    assert np.abs(plain["layers"]["query"][0] - plain["layers"]["query"][1]).max() > 0


def test_initial_loss_is_ln_v():
    tokens, positions, segments, weights = packed([20, 17], 40)
    logits = exact_logits(make(RoPE(), init_std=0.02), tokens, positions, segments)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, np.roll(tokens, -1, axis=1)[..., None], -1)[..., 0]
    assert (nats * weights).sum() / weights.sum() == pytest.approx(math.log(61), rel=0.02)


def test_a_window_longer_than_the_method_is_named_when_traced():
    model = make(AtMostTen())
    with pytest.raises(ValueError, match="12 tokens: AtMostTen is defined for at most 10"):
        jax.eval_shape(lambda *batch: model.hidden(*batch), *packed([12], 12)[:3])
    assert jax.eval_shape(lambda *b: model.hidden(*b), *packed([9], 10)[:3]).shape == (1, 10, 24)


def test_tokens_outside_the_vocabulary_are_named_on_the_host_and_nan_on_the_device():
    with pytest.raises(ValueError, match="token ids 0 to 61: vocab_size=61 accepts 0 to 60"):
        check_batch(np.array([[0, 61]]), 61)
    with pytest.raises(ValueError, match="token ids -1 to 4"):
        check_batch(np.array([[-1, 4]]), 61)
    check_batch(np.array([[0, 60]]), 61)
    check_batch(np.zeros((0, 4), np.int32), 61)
    parts = split(make(NoPE()))
    tokens, positions, segments, _ = packed([40], 40)
    tokens[0, 30] = 61
    hidden = np.asarray(hidden_of(*parts, tokens, positions, segments))
    assert np.isnan(hidden[:, 30:]).all()


def test_names_of_parameters_and_constants_must_differ():
    class Clash(PositionEmbedding):
        def init(self, key, shape):
            return PositionVariables(
                layer_params={"a": jnp.ones(3)}, layer_constants={"a": jnp.ones(3)}
            )

    with pytest.raises(ValueError, match=r"\['a'\]: both parameter and constant"):
        make(Clash())

    class Across(PositionEmbedding):
        def init(self, key, shape):
            return PositionVariables(
                model_params={"b": jnp.ones(3)}, layer_constants={"b": jnp.ones((2, 3))}
            )

    with pytest.raises(ValueError, match=r"\['b'\]: both of the model and of the layers"):
        make(Across())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0: a size of the model must be 1 or more"),
        ({"num_kv_heads": 0}, "num_kv_heads=0: .* must be 1 or more"),
        ({"num_layers": 1.5}, "num_layers=1.5: a size of the model, a whole number"),
        ({"num_kv_heads": 3}, "num_kv_heads=3: expected a divisor of num_heads=4"),
        ({"head_dim": None, "num_heads": 5, "num_kv_heads": None}, "d_model=24.*num_heads=5"),
        ({"attention": "flash"}, "attention='flash': expected one of auto, reference"),
        ({"attention_block": 0}, "attention_block=0"),
        ({"derivatives": "any"}, "derivatives='any': expected one of reverse, all"),
        ({"dtype": "float16"}, "dtype='float16': expected one of float32, bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype='int8'"),
        ({"init_std": -1.0}, "init_std=-1.0: a standard deviation is finite, 0 or more"),
        ({"init_std": math.inf}, "init_std=inf"),
        ({"norm_eps": math.nan}, "norm_eps=nan: .* above 0, and finite"),
        ({"norm_eps": math.inf}, "norm_eps=inf"),
        ({"norm_eps": 0.0}, "norm_eps=0.0: .* above 0"),
        ({"norm": "both"}, "norm='both': expected one of pre, post"),
        ({"tie_embeddings": "no"}, "tie_embeddings='no': expected True or False"),
        ({"scan_layers": "false"}, "scan_layers='false': expected True or False"),
        ({"qk_norm": "heads"}, "qk_norm='heads': expected one of none, head, width"),
    ],
)
def test_a_config_that_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SIZES | change))


@pytest.mark.parametrize("qk_norm", ["none", "width"])
def test_a_batch_of_no_rows_has_no_logits(qk_norm):
    model, nothing = make(RoPE(), qk_norm=qk_norm), np.zeros((0, 5), np.int32)
    assert model(nothing, nothing, nothing).shape == (0, 5, SIZES["vocab_size"])


def test_the_position_embedding_is_asked_about_the_shape():
    with pytest.raises(ValueError, match="head_dim=7"):
        make(RoPE(), head_dim=7)


@pytest.mark.slow  # attention_test has those of attention
@pytest.mark.parametrize(
    ("position", "attention"),
    [
        (FoPE(8), "reference"),
        pytest.param(FoPE(8), "chunked", marks=pytest.mark.slow),
        pytest.param(CoPE(init_std=0.5), "chunked", marks=pytest.mark.slow),
    ],
    ids=["fope", "fope, chunked", "cope, chunked"],
)
def test_all_derivatives_of_the_model_and_its_loss(position, attention):
    """Forward mode is the gradient's, and the Hessian symmetric."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)), jnp.int32)
    at = jnp.arange(11, dtype=jnp.int32)[None]

    def loss_of(derivatives):
        changes = {"derivatives": derivatives, "num_layers": 1, "attention": attention}
        model = Transformer(TransformerConfig(**SIZES | changes), position, rngs=nnx.Rngs(1))
        graphdef, params, constants = split(model)

        def loss(params):
            model = merge(graphdef, params, constants)
            hidden = model.hidden(tokens[:, :-1], at, jnp.ones_like(at))
            return loss_sums(
                hidden,
                model.unembedding_matrix(),
                tokens[:, 1:],
                jnp.ones((2, 11)),
                time_chunk=4,
                derivatives=derivatives,
            ).nats

        return loss, params

    def product(one, other):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return sum(np.vdot(x, y) for x, y in pairs)

    (loss, params), (trained, _) = loss_of("all"), loss_of("reverse")
    first, second = (
        jax.tree.map(
            lambda x, seed=seed: jax.random.normal(jax.random.key(seed + x.size), x.shape), params
        )
        for seed in (0, 1)
    )
    forward = jax.jit(lambda params, along: jax.jvp(loss, (params,), (along,)))
    curve = jax.jit(lambda params, along: jax.jvp(jax.grad(loss), (params,), (along,)))
    value, slope = forward(params, first)
    expected, gradient = jax.jit(jax.value_and_grad(trained))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, product(gradient, first), rtol=1e-4)
    same, along_first = curve(params, first)
    np.testing.assert_allclose(product(same, second), product(gradient, second), rtol=1e-4)
    _, along_second = curve(params, second)
    np.testing.assert_allclose(
        product(along_first, second), product(along_second, first), rtol=1e-3
    )
    assert abs(product(along_first, second)) > 1.0
