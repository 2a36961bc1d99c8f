# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Position embeddings in your own Flax model
#
# `fope_jax.position` has the methods as functions of integer positions `[B, T]`. This notebook puts
# three of them into an attention layer written here in Flax NNX, trains a tiny model on sequences
# that repeat with a period of five tokens, and looks at what happens beyond the length it was
# trained on. It runs in half a minute on a CPU; open it with `jupytext --to notebook`, or run it as
# a script.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from fope_jax.position import (
    alibi_bias,
    alibi_slopes,
    angles,
    clip_floor,
    fourier_coefficients,
    fourier_tables,
    inverse_frequencies,
    rotate,
)

VOCAB, D_MODEL, HEADS, HEAD_DIM = 64, 64, 4, 16
LENGTH, STEPS = 32, 150

# %% [markdown]
# ## Three methods
#
# Each takes the queries and keys `[B, T, N, H]` and the positions, and returns them rotated, with
# a bias that is added to the attention logits. Frequencies stay NumPy arrays: phases are then
# exact to a million tokens. FoPE's coefficients are drawn once and never trained.


# %%
def rope(q, k, positions):
    phases = angles(positions, inverse_frequencies(HEAD_DIM))
    cos, sin = jnp.cos(phases), jnp.sin(phases)
    return rotate(q, cos, sin), rotate(k, cos, sin), 0.0


frequencies = clip_floor(inverse_frequencies(HEAD_DIM, theta=100.0), training_length=LENGTH)
frequencies = frequencies[frequencies > 0]  # those that turn fully within the training length
coefficients = fourier_coefficients(
    jax.random.key(0), HEADS, len(frequencies), num_outputs=len(frequencies), sigma=0.3
)


def fope(q, k, positions):
    cos, sin = fourier_tables(positions, frequencies, *coefficients, head_dim=HEAD_DIM)
    return rotate(q, cos, sin), rotate(k, cos, sin), 0.0


def alibi(q, k, positions):
    return q, k, alibi_bias(positions, positions, alibi_slopes(HEADS))


# %% [markdown]
# ## A model that is yours


# %%
class Attention(nnx.Module):
    def __init__(self, position, *, rngs):
        self.position = position
        self.qkv = nnx.LinearGeneral(D_MODEL, (3, HEADS, HEAD_DIM), rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), D_MODEL, axis=(-2, -1), rngs=rngs)

    def __call__(self, x, positions):
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        q, k, bias = self.position(q, k, positions)
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) / HEAD_DIM**0.5 + bias
        is_past = positions[:, None, :, None] >= positions[:, None, None, :]
        weights = jax.nn.softmax(jnp.where(is_past, logits, -jnp.inf), axis=-1)
        return self.out(jnp.einsum("bnts,bsnh->btnh", weights, v))


class Model(nnx.Module):
    def __init__(self, position, *, rngs):
        self.embed = nnx.Embed(VOCAB, D_MODEL, rngs=rngs)
        self.attention = nnx.List([Attention(position, rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.RMSNorm(D_MODEL, rngs=rngs) for _ in range(3)])
        self.unembed = nnx.Linear(D_MODEL, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens, positions):
        x = self.embed(tokens)
        for attention, norm in zip(self.attention, self.norms[:2], strict=True):
            x = x + attention(norm(x), positions)
        return self.unembed(self.norms[2](x))


# %% [markdown]
# ## Sequences that repeat
#
# After the first five tokens each token is the one five places before it.


# %%
def sequences(seed, rows, length):
    period = np.random.default_rng(seed).integers(0, VOCAB, (rows, 5))
    tokens = np.tile(period, length // 5 + 2)[:, : length + 1]
    return jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])


def loss_of(model, tokens, targets):
    positions = jnp.arange(tokens.shape[1])[None]
    losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens, positions), targets)
    return losses[:, 5:].mean()


@nnx.jit
def update(model, optimizer, tokens, targets):
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens, targets)
    optimizer.update(model, gradients)
    return loss


def train(position):
    model = Model(position, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for step in range(STEPS):
        update(model, optimizer, *sequences(step, 32, LENGTH))
    return model


# %% [markdown]
# ## At the training length, and beyond

# %%
measure = nnx.jit(loss_of)
models = {position.__name__: train(position) for position in (rope, fope, alibi)}
losses = {
    name: [float(measure(model, *sequences(10**6, 64, LENGTH * m))) for m in (1, 2, 4)]
    for name, model in models.items()
}
for name, values in losses.items():
    print(f"{name:6}", *(f"{value:8.3f}" for value in values), "nats a token at L, 2L, 4L")

# %%
figure, axes = plt.subplots(figsize=(5, 3))
for name, values in losses.items():
    axes.plot([LENGTH, 2 * LENGTH, 4 * LENGTH], values, marker="o", label=name)
axes.set(xscale="log", xlabel="sequence (tokens)", ylabel="loss (nats per token)")
axes.legend()

# %% [markdown]
# Nothing in the model changes with the length: positions are an argument. The same holds for packed
# documents (positions that begin again) and for a key cache (positions of the keys kept).
# `fope_jax.interop.nnx` and `.linen` hold the same methods for Flax's own attention layers.
