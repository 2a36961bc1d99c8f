"""Quickstart: which position embedding still reads books beyond the length it was trained on?

Question   One small transformer, trained on windows of 128 tokens of real books with RoPE, ALiBi,
           NoPE or FoPE: how do perplexity and passkey retrieval change up to 16 times that length?
Paper      Hua et al. 2025, "Fourier Position Embedding" (FoPE), figures 1 and 5, at a millionth
           of their compute.
Command    fope train --config configs/quickstart.py:position=fope --workdir runs/fope
           Arguments: position=rope|alibi|nope|fope|..., seed=0, smoke (a few steps, to see it run).
           `make demo-full` runs the four methods and writes the report.
Hardware   2 CPU cores, no accelerator, 2 GB of memory.
Time       95 s of training and 40 s of evaluation a method.
Score      Perplexity at 128 and 2,048 tokens, mean of three seeds: NoPE 112 and 113, ALiBi 100 and
           99, RoPE 95 and 133, FoPE 95 and 126. No passkey is found (experiments/quickstart).
"""

from ml_collections import ConfigDict

from fope_jax.config import parse_arg
from fope_jax.model.presets import PRESETS


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, position="fope", seed=0, smoke=False)
    config = ConfigDict()
    config.name = arg.position
    config.seed = arg.seed
    config.data = {"corpus": "gutenberg", "tokenizer": "sentencepiece", "vocab_size": 2048}
    config.model = dict(PRESETS["demo"])
    config.model.vocab_size = config.data.get_ref("vocab_size")
    config.position = {"method": arg.position}
    config.train = {
        "steps": 20 if arg.smoke else 500,
        "batch_size": 16,
        "length": 128,
        "learning_rate": 3e-3,
        "warmup_steps": 5 if arg.smoke else 50,
        "log_every": 5 if arg.smoke else 20,
        "save_every": 10 if arg.smoke else 250,
    }
    config.evaluate = {
        "num_windows": 8 if arg.smoke else 96,
        "position_windows": 2 if arg.smoke else 16,
        "passkey_trials": 1 if arg.smoke else 4,
        "batch_tokens": 4096,
    }
    return config
