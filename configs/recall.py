"""Recall: does a model find what it read, at many times the length it was trained on?

Question   A small transformer learns key-value recall and copying in windows of 64 tokens. Which
           position embedding still recalls at 16 times that length, and from which depth?
Paper      Hua et al. 2025 (FoPE), figure 1 and its passkey experiments, with a task that a model of
           this size learns, after Arora et al. 2023, "Zoology", and Jelassi et al. 2024, "Repeat
           After Me".
Command    fope train --config configs/recall.py:position=fope --workdir runs/recall_fope
           fope evaluate runs/recall_fope
           Arguments: position=rope|alibi|nope|fope|..., seed=0, smoke (a few steps, to see it run).
           There is no text and no token cache to build.
Hardware   1 CPU core, 1 GB of memory.
Time       57 s of training and 37 s of evaluation a method.
Score      RoPE, one seed: of 200 recalled values 199 are right at 64 tokens, 19 at 128 and 2 at
           1,024 (chance is 2%, and 6% among the window's own values); of 200 spans of 8 copied
           tokens 198 at 64 and none beyond. experiments/tournament has all methods.
Learning   Copying comes first: its windows are dense, and what finds the place in the source finds
           a value as well. With three quarters of recall instead the model learns which values a
           window has, and to find them only slowly (43% at 64 tokens after 2.7 times the tokens).
"""

from ml_collections import ConfigDict

from fope_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, position="fope", seed=0, smoke=False)
    config = ConfigDict()
    config.name = arg.position
    config.seed = arg.seed
    config.data = {
        "corpus": "none",
        "tokenizer": "bytes",
        "tasks": ("recall=0.25", "copy=0.75"),
        "packing": "windows",
    }
    config.model = {
        "vocab_size": 259,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "mlp_dim": 128,
        "init_std": 0.06,
    }
    config.position = {"method": arg.position}
    config.train = {
        "steps": 20 if arg.smoke else 1500,
        "batch_size": 32,
        "length": 64,
        "learning_rate": 5e-3,
        "warmup_steps": 5 if arg.smoke else 100,
        "log_every": 5 if arg.smoke else 100,
        "save_every": 10 if arg.smoke else 750,
    }
    config.evaluate = {
        "num_windows": 0,  # there is no text
        "position_windows": 0,
        "passkey_templates": (),
        "passkey_trials": 2 if arg.smoke else 40,
        "retrieval_tasks": ("recall", "copy"),
        "batch_tokens": 16_384,
    }
    return config
