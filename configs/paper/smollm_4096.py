r"""SmolLM-1.7B goes on from 2,048 to 4,096 tokens: with FoPE, with YaRN or as it is.

Question   Does a model that was pretrained with RoPE read texts longer than its context better
           after fine-tuning at twice that length with FoPE than with RoPE?
Paper      Hua et al. 2025, "Fourier Position Embedding" (FoPE), sections 5.4 and A.3, table 1:
           350,000 samples, one epoch, AdamW, rate 3e-4, cosine, a tenth of it warmup, 4 hours.
Command    hf download HuggingFaceTB/SmolLM-1.7B --local-dir models/SmolLM-1.7B
           CONFIG=configs/paper/smollm_4096.py:weights=models/SmolLM-1.7B,method=fope
           fope data build --config $CONFIG
           fope extend hf:models/SmolLM-1.7B --method fope --length 4096 --config $CONFIG \
             --workdir runs/smollm_fope --config.position.preset=official
           Arguments: weights=DIR, of any model that `fope import` reads, whose length is doubled
           (the sizes of SmolLM-1.7B without it); method=fope|yarn|same|..., seed=0.
Hardware   Compiled to fit: TPU v5p 2x2x4, 18 GB a chip (experiments/tpu_plan).
Not run    Here only that it builds, and that the whole course works on a small model of random
           weights, is tested.

What the paper does not say is chosen here: 128 sequences an update; Adam's b2, decay and a rate of
zero at the end as Hugging Face's trainer has them; FoPE's sigma and D, which have their defaults
(--config.position.sigma=0.6 is the paper's for its largest model). It trains on the instructions
that SmolLM-1.7B-Instruct was made with and scores LongBench; here training text is files of your
own, one {"text": ...} a line, every token of which is a target, and scores are perplexities.
"""

from pathlib import Path

from ml_collections import ConfigDict

from fope_jax.config import experiment_to_dict, parse_arg
from fope_jax.extend.child import child_experiment
from fope_jax.interop.huggingface import from_config
from fope_jax.interop.run_import import imported_experiment
from fope_jax.interop.weights import import_config

SMOLLM = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SAMPLES, BATCH = 350_000, 128


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, weights="", method="fope", seed=0)
    directory = Path(arg.weights or "models/SmolLM-1.7B")
    config = import_config(directory) if arg.weights else from_config(SMOLLM)
    overrides = [] if arg.weights else [f"data.tokenizer={directory}/tokenizer.json"]
    parent = imported_experiment(directory, config, overrides)
    steps = SAMPLES // BATCH
    settings = {
        "seed": arg.seed,
        "data.corpus": "text",
        "data.train_files": "instructions/train*.jsonl.gz",
        "data.validation_files": "instructions/validation*.jsonl.gz",
        "model.dtype": "bfloat16",
        "model.remat": "dots",
        "train.steps": steps,
        "train.batch_size": BATCH,
        "train.accumulate": 4,
        "train.learning_rate": 3e-4,
        "train.warmup_steps": steps // 10,
        "train.final_learning_rate_fraction": 0.0,
        "train.b2": 0.999,
        "train.weight_decay": 0.0,
        "train.save_every": 100,
        "evaluate.lengths": "(1, 2, 4)",
        "evaluate.passkey_lengths": "(1, 2, 4)",
    }
    if arg.method == "fope":
        settings["position.preset"] = "official"
    child = child_experiment(
        parent,
        0,
        arg.method,
        2 * parent.train.length,
        "reset",
        [f"{key}={value}" for key, value in settings.items()],
        is_imported=True,
    )
    return ConfigDict(experiment_to_dict(child))
