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
# # Train, look, extend
#
# A small transformer learns to recall values by their keys in windows of 64 tokens, once with RoPE
# and once with FoPE. Then: what does it find beyond that length, where does it look, and does an
# extension mend it? With `STEPS = 1500` the task is learned (a minute a method on one CPU core);
# fewer show how it goes.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import fope_jax as fj

STEPS = int(os.environ.get("STEPS", "1500"))
RUNS = os.environ.get("RUNS", "runs/notebook")
CONFIG = "configs/recall.py"

# %% [markdown]
# ## Train
#
# The same call again goes on from the newest checkpoint, or returns at once. `verbose=True` shows
# messages and a progress bar; interrupting the cell saves the step under way.

# %%
rope = fj.train(f"{CONFIG}:position=rope", f"{RUNS}/rope_{STEPS}", train_steps=STEPS)
fope = fj.train(f"{CONFIG}:position=fope", f"{RUNS}/fope_{STEPS}", train_steps=STEPS)
print(rope)
print(fope)

# %%
for run in (rope, fope):
    rows = run.rows("train")
    plt.plot(rows["step"], rows["loss"], label=run.name)
plt.xlabel("step"), plt.ylabel("loss (nats per token)"), plt.legend()
# %% [markdown]
# ## Measure
#
# Contexts are multiples of the training length. The table is a data frame.

# %%
table = fj.evaluate([rope, fope], contexts=[1, 2, 4], passkey_trials=10)
print(table.pivot_table("accuracy", ["data", "run"], "context").round(2))

# %% [markdown]
# ## Look
#
# An observer sees queries and keys of each layer after the rotation. Here: how much attention the
# last token pays to each token before it, at four times the training length.


# %%
def attention(run, tokens):
    """Attention weights ``[L, N, T, T]`` of one window."""
    places = jnp.arange(len(tokens))[None]
    model = run.model
    _, (q, k) = model.forward(
        jnp.asarray(tokens)[None],
        places,
        jnp.ones_like(places),
        observer=lambda layer: (layer.rotated_q[0], layer.rotated_k[0]),
    )
    logits = jnp.einsum("ltnh,lsnh->lnts", q, k) / q.shape[-1] ** 0.5
    is_past = places[0][:, None] >= places[0]
    return jax.nn.softmax(jnp.where(is_past, logits, -jnp.inf), axis=-1)


tokens = np.random.default_rng(0).integers(0, 256, 4 * rope.length)
figure, panels = plt.subplots(2, 1, figsize=(7, 4), sharex=True)
for axes, run in zip(panels, (rope, fope), strict=True):
    weights = attention(run, tokens)[-1, :, -1]
    axes.imshow(weights, aspect="auto", cmap="cividis")
    axes.axvline(len(tokens) - run.length, color="white")  # the training length
    axes.set(ylabel=f"{run.name}, head")
panels[-1].set_xlabel("token that is attended to")
# %% [markdown]
# The frequencies that turn: FoPE leaves out those that never complete a period in training.

# %%
for run in (rope, fope):
    head_dim = run.model.config.shape.head_dim
    turns = run.model.position.frequencies(head_dim) * run.length / (2 * np.pi)
    print(f"{run.name}: turns within {run.length} tokens:", np.round(np.sort(turns)[::-1], 3))

# %% [markdown]
# ## Ask the model
#
# A prompt of ids gives ids, a prompt of text gives text.

# %%
print(fope.generate(tokens[:48], max_new_tokens=4))

# %% [markdown]
# ## Extend
#
# Go on from the RoPE run at twice the length with YaRN's frequencies. The new run keeps its
# lineage: the parent, what was changed, the loss before and after.

# %%
yarn = fj.extend(
    rope,
    method="yarn",
    length=2 * rope.length,
    workdir=f"{RUNS}/yarn_{STEPS}",
    train_steps=max(2, STEPS // 10),
)
after = fj.evaluate(yarn, contexts=[1, 2], passkey_trials=10)
print(after.pivot_table("accuracy", ["data", "run"], "context").round(2))

# %% [markdown]
# ## Report
#
# One HTML page about the three runs.

# %%
print(fj.report([rope, fope, yarn], f"{RUNS}/report"))
