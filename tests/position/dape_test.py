"""DAPE: its authors' numbers, and what its counted positions are."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import DAPE, FIRE, ALiBi, CoPE, Kerple, ModelShape, RoPE, T5Bias
from fope_jax.position.base import bias_of_heads

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "dape.npz")
SHAPE = ModelShape(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
INNER = {
    "alibi": (ALiBi(), {"slopes": "slopes"}),
    "kerple": (Kerple(), {"r1": "bias_p", "r2": "bias_a"}),
}
NETWORK = {
    "hidden_weight": "mlp2.0.weight",
    "hidden_bias": "mlp2.0.bias",
    "out_weight": "mlp2.2.weight",
    "out_bias": "mlp2.2.bias",
}


def causal(logits):
    size = logits.shape[-1]
    return jnp.where(np.tri(size, dtype=bool)[-logits.shape[-2] :], logits, -jnp.inf)


@pytest.mark.parametrize("name", INNER)
def test_the_authors_scores(name):
    inner, of_inner = INNER[name]
    variables = {
        f"inner.{ours}": GOLDENS[f"{name}/{key}"].ravel() for ours, key in of_inner.items()
    }
    variables |= {ours: GOLDENS[f"{name}/{key}"].T for ours, key in NETWORK.items()}
    method, scores = DAPE(inner, mlp_width=16), GOLDENS["scores"]
    method.check(SHAPE)
    drawn = method.init(jax.random.key(0), SHAPE).at_layer(1)
    assert {key: x.shape for key, x in drawn.items()} == {k: x.shape for k, x in variables.items()}
    bias = jax.jit(method.contextual_bias)(variables, jnp.zeros(0), causal(scores))
    found = scores + bias
    seen = np.tri(scores.shape[-1], dtype=bool)
    np.testing.assert_allclose(
        np.asarray(found)[..., seen], GOLDENS[f"{name}/scores"][..., seen], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "inner",
    [
        FIRE(init_length=8.0),  # reads the position of the query and not the distance alone
        pytest.param(T5Bias(num_buckets=8, max_distance=16, init_std=1.0), marks=pytest.mark.slow),
    ],
)
def test_without_the_network_it_is_the_bias_inside(inner):
    method = DAPE(inner, mlp_width=4)
    variables = method.init(jax.random.key(1), SHAPE).at_layer(0)
    variables |= {key: jnp.zeros_like(variables[key]) for key in ("out_weight", "out_bias")}
    own = {key.removeprefix("inner."): x for key, x in variables.items() if "inner." in key}
    logits = causal(jax.random.normal(jax.random.key(2), (2, 4, 20, 20)))
    found = jax.jit(method.contextual_bias)(variables, jnp.zeros(0), logits)
    positions = np.arange(20)[None]
    expected = jnp.broadcast_to(bias_of_heads(inner, own, positions, positions), logits.shape)
    seen = np.isfinite(logits)
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-6)
    assert np.ptp(np.asarray(expected)[seen]) > 0.1 and np.isfinite(found).all()


def test_what_it_cannot_do_is_refused():
    for inner in (RoPE(), CoPE(), "kerple"):
        with pytest.raises(ValueError, match="expected a method that adds a bias alone"):
            DAPE(inner)
    with pytest.raises(ValueError, match="mlp_width=0"):
        DAPE(mlp_width=0)
    with pytest.raises(ValueError, match="slopes has 2 entries: the model has 4 heads"):
        DAPE(ALiBi(slopes=(0.5, 0.25))).check(SHAPE)
    variables = DAPE().init(jax.random.key(0), SHAPE).at_layer(0)
    half = {key: x[:2] if x.shape == (4,) else x for key, x in variables.items()}
    with pytest.raises(ValueError, match=r"hidden_weight \(8, 32\) for 2 heads: .*mesh.tensor = 1"):
        DAPE().contextual_bias(half, jnp.zeros(0), jnp.zeros((1, 2, 3, 3)))
