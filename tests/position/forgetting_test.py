"""FoX and Cable: the numbers of others, what they are special cases of, and bad input."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.model import attention
from fope_jax.model.config import TransformerConfig
from fope_jax.model.running_sums import running_sums
from fope_jax.model.transformer import Transformer
from fope_jax.position import (
    ALiBi,
    ByLayer,
    ByShare,
    Cable,
    DynamicNTK,
    FoX,
    Learned,
    LogitScaling,
    ModelShape,
    NoPE,
    RoPE,
    SlidingWindow,
    from_spec,
    log_forget_gate,
    make,
    to_spec,
)

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "forgetting.npz")
SHAPE = ModelShape(d_model=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6)


def golden(case, *names):
    return [jnp.asarray(GOLDENS[f"{case}/{name}"]) for name in names]


def gates(weight, bias):
    return {"gate_weight": weight, "gate_bias": bias}


@partial(jax.jit, static_argnums=0, static_argnames="window")
def attend(method, variables, x, q, k, v, window=None):
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    sums = running_sums(method.running_bias(variables, x))
    index = {f"{side}_positions": positions for side in "qk"}
    index |= {f"{side}_segments": jnp.ones_like(positions) for side in "qk"}
    return attention.attend(
        q, k, v, q_sums=sums, k_sums=sums, window=window, backend="chunked", block=8, **index
    )


@pytest.mark.parametrize(("name", "window"), [("out", None), ("window_7", 7)])
def test_numbers_of_flash_linear_attention(name, window):
    """Two query heads a key, in blocks that do not divide the length, with and without a window."""
    x, weight, bias, q, k, v, log_gates, out = golden(
        "fla", "x", "weight", "bias", "q", "k", "v", "log_gates", name
    )
    np.testing.assert_allclose(log_forget_gate(x, weight, bias), log_gates, rtol=1e-5, atol=1e-6)
    found = attend(FoX(), gates(weight, bias), x, q, k, v, window=window)
    np.testing.assert_allclose(found, out, atol=1e-5)


def test_numbers_of_x_transformers():
    """The bias itself, which is a difference of running sums there too."""
    x, weight, bias, expected = golden("x_transformers", "x", "weight", "bias", "logits_bias")
    sums = np.asarray(running_sums(FoX().running_bias(gates(weight, bias), x))).sum(-1)
    sums = sums.transpose(0, 2, 1)
    np.testing.assert_allclose(sums[..., None] - sums[:, :, None], expected, atol=2e-6)


def test_numbers_of_the_authors_of_cable():
    """They do not divide q.k by sqrt(H), so q is multiplied by it here."""
    x, weight, bias, q, k, v, out = golden("cable", "x", "weight", "bias", "q", "k", "v", "out")
    found = attend(Cable(), gates(weight, bias), x, q * math.sqrt(q.shape[-1]), k, v)
    np.testing.assert_allclose(found, out, atol=2e-5)


def test_cable_is_fox_with_its_gates_negated():
    x, weight, bias = golden("fla", "x", "weight", "bias")
    np.testing.assert_array_equal(
        Cable().running_bias(gates(weight, bias), x), FoX().running_bias(gates(-weight, -bias), x)
    )


def model_of(method, **variables):
    config = TransformerConfig(
        vocab_size=31,
        d_model=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mlp_dim=32,
        init_std=0.4,
    )
    model = Transformer(config, method, rngs=nnx.Rngs(1))
    for name, value in variables.items():
        model.position_layers[name][...] = value
    return model


@jax.jit
def hidden_of(model):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 31, (2, 25)), jnp.int32)
    positions = jnp.concatenate([jnp.arange(14), jnp.arange(11)])[None].astype(jnp.int32)
    segments = jnp.asarray(np.repeat([[1, 2]], [14, 11], axis=1), jnp.int32)
    return model.hidden(tokens, positions, segments)


@pytest.mark.slow
@pytest.mark.parametrize("rotation", [NoPE(), RoPE(theta=100.0)])
def test_open_gates_leave_the_rotation_alone(rotation):
    """In packed rows of a model: sigmoid(40) is 1 in float32."""
    weight = jnp.zeros((2, 4, 24))
    model = model_of(FoX(rotation=rotation, bias_init=40.0), gate_weight=weight)
    np.testing.assert_allclose(hidden_of(model), hidden_of(model_of(rotation)), atol=1e-5)


@pytest.mark.slow
def test_gates_that_are_the_same_everywhere_are_alibi():
    """log f = -slope, so the bias is minus slope times distance."""
    slopes = np.array([0.5, 0.25, 0.125, 0.0625])
    bias = -np.log(np.expm1(slopes))  # of sigmoid(b) = exp(-slope)
    model = model_of(
        FoX(), gate_weight=jnp.zeros((2, 4, 24)), gate_bias=jnp.asarray([bias] * 2, jnp.float32)
    )
    expected = hidden_of(model_of(ALiBi(slopes=tuple(slopes))))
    np.testing.assert_allclose(hidden_of(model), expected, atol=2e-5)
    assert np.abs(expected - hidden_of(model_of(NoPE()))).max() > 1e-2


def test_draws_and_names():
    """Weights a layer, head and dimension; the rotation's own variables beside them."""
    method = FoX(init_std=0.1, bias_init=2.0, rotation=RoPE(learnable=True))
    drawn = method.init(jax.random.key(0), SHAPE)
    assert drawn.layer_params["gate_weight"].shape == (2, 4, 24)
    assert abs(float(jnp.std(drawn.layer_params["gate_weight"])) - 0.1) < 0.02
    np.testing.assert_array_equal(drawn.layer_params["gate_bias"], np.full((2, 4), 2.0))
    assert set(drawn.model_params) == {"rotation.log_ratio"}
    assert method.variable_axes("gate_weight") == ("heads", "embed")
    assert method.variable_axes("rotation.log_ratio") == ()
    assert from_spec(to_spec(method)) == method
    assert make("fox", rotation={"method": "rope", "theta": 100.0}).frequencies(6)[1] < 0.3
    follows = FoX(rotation=RoPE(scaling=(DynamicNTK(4.0, 8),))).limits
    assert follows.needs_causal_mask and follows.follows_length


ERRORS = {
    "spread": (lambda: FoX(init_std=-1.0), "init_std=-1.0"),
    "spread of cable": (lambda: Cable(init_std=math.nan), "init_std=nan"),
    "start": (lambda: FoX(bias_init=math.inf), "bias_init=inf: the start of b must be finite"),
    "name": (lambda: FoX(rotation="rope"), r"rotation='rope': expected a method such as RoPE\(\)"),
    "a bias": (lambda: FoX(rotation=ALiBi()), "rotation=ALiBi: expected a method that only rot"),
    "vectors": (lambda: FoX(rotation=Learned(64)), "rotation=Learned"),
    "itself": (lambda: FoX(rotation=FoX()), "rotation=FoX"),
    "a window": (
        lambda: FoX(rotation=SlidingWindow(RoPE(), 8)),
        "rotation=SlidingWindow: .*a window or a logit scaling is put around FoX",
    ),
    "a factor": (lambda: FoX(rotation=LogitScaling(RoPE(), training_length=8)), "LogitScaling"),
    "layers": (lambda: FoX(rotation=ByLayer((RoPE(), NoPE()))), "the same in all layers"),
    "odd head": (lambda: FoX(rotation=RoPE()).check(SHAPE._replace(head_dim=5)), "head_dim=5"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_windows_factors_and_shares_go_around_it():
    (layer,) = SlidingWindow(LogitScaling(FoX(rotation=RoPE()), training_length=8), 4).layers()
    assert isinstance(layer.method, FoX) and layer.window == 4 and layer.logit_scale is not None
    with pytest.raises(ValueError, match="methods holds FoX: only a method that rotates"):
        ByShare((FoX(), NoPE()), (0.5, 0.5))
