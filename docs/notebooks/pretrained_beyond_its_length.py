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
# # A pretrained model beyond its length
#
# Weights of Llama, Mistral, Qwen, OLMo or SmolLM become a run: what does the model lose beyond the
# length it was trained on, and what does a scaling of its frequencies give back? `SOURCE` is a
# directory with `config.json` and `*.safetensors`, or a name such as
# `hf:HuggingFaceTB/SmolLM2-135M`. Without one a tiny random model stands in, so that every cell
# runs; what it measures means nothing.

# %%
import os
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import fope_jax as fj

SOURCE = os.environ.get("SOURCE", "")
RUNS = Path(os.environ.get("RUNS", "runs/pretrained"))
RUNS.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Text
#
# Any .txt files do: one file is one document. Those of `validation` are never trained on.

# %%
words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "old", "dog"]
for split, count in (("train", 8), ("validation", 3)):
    directory = RUNS / "text" / split
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        drawn = np.random.default_rng([count, number]).choice(words, 1500)
        (directory / f"{number}.txt").write_text(" ".join(drawn))

# %% [markdown]
# ## A model that stands in

# %%
if not SOURCE:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from fope_jax.interop.weights import export_weights
    from fope_jax.model.config import TransformerConfig
    from fope_jax.model.transformer import Transformer, split
    from fope_jax.position import RoPE

    SOURCE = str(RUNS / "tiny_llama")
    if not Path(SOURCE).exists():
        config = TransformerConfig(
            vocab_size=300, d_model=32, num_layers=2, num_heads=2, mlp_dim=64
        )
        model = Transformer(config, RoPE(), rngs=nnx.Rngs(0))
        export_weights(SOURCE, config, RoPE(), *split(model)[1:], length=64)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train([str(path) for path in (RUNS / "text/train").glob("*.txt")], trainer)
        tokenizer.save(f"{SOURCE}/tokenizer.json")

# %% [markdown]
# ## Load it
#
# Without `workdir` the weights are held in memory alone: enough for logits, losses and texts.

# %%
model = fj.load(SOURCE)
print(model)
print(model.fingerprint.summary)

# %%
prompt = "the cat sat on"
print(prompt + model.generate(prompt, max_new_tokens=12))
print(f"{model.loss((RUNS / 'text/validation/0.txt').read_text()[:200]):.3f} nats per token")

# %% [markdown]
# ## Measure it beyond its length
#
# With `workdir` it becomes a run, which keeps its results; `data_*` is the text to measure on, and
# `train_length` what contexts are multiples of.

# %%
text = {
    "data_corpus": "text",
    "data_train_files": [str(RUNS / "text/train/*.txt")],
    "data_validation_files": [str(RUNS / "text/validation/*.txt")],
    "data_cache_dir": str(RUNS / "cache"),
}
run = fj.load(SOURCE, workdir=RUNS / "imported", train_length=model.length, **text)
windows = {"num_windows": 24, "contexts": [1, 2, 4]}
table = fj.evaluate(run, "same-tokens", **windows)
print(table[["run", "context", "loss", "perplexity", "bits_per_byte"]])

# %% [markdown]
# ## Another scaling
#
# A few updates with YaRN at four times the length. `train_batch_size` and `train_steps` must be
# stated: imported weights have none.

# %%
yarn = fj.extend(
    run,
    method="yarn",
    length=4 * run.length,
    workdir=RUNS / "yarn",
    train_batch_size=4,
    train_steps=10,
)
after = fj.evaluate(yarn, "same-tokens", contexts=[1], num_windows=24)
print(after[["run", "context", "loss", "perplexity", "bits_per_byte"]])

# %%
plt.plot(table["context"], table["loss"], marker="o", label="as pretrained")
plt.plot(after["context"], after["loss"], marker="s", linestyle="", label="YaRN, trained on")
plt.xlabel("context (tokens)"), plt.ylabel("loss (nats per token)"), plt.legend()
assert jax.numpy.isfinite(table["loss"].to_numpy()).all()
