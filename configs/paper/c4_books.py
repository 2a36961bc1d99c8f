"""The paper's pretraining runs: three sizes, two lengths, two corpora, any position embedding.

Question   How does a position embedding chosen at pretraining change perplexity and passkey
           retrieval from 512 to 8,192 tokens?
Paper      Hua et al. 2025, "Fourier Position Embedding" (FoPE), sections 5.1 and A.3, and its
           released code.
Command    fope data build --config configs/paper/c4_books.py:data=c4
           fope train --config configs/paper/c4_books.py:size=60m,position=fope --workdir runs/fope
           Arguments: size=60m|180m|1200m, length=512|1024, data=c4|c4-files|dolma|books,
           batch=code|paper, position=fope|rope|alibi|nope|..., repeats=32 (0: every row counts),
           seed=6198, smoke (a few small steps).
Hardware   The paper: 4 GPUs of 48 GB for 10, 20 and 100 hours (60m, 180m, 1200m). Compiled to fit:
           TPU v5e 4x4 for 60m and 180m, v5p 4x4x4 for 1200m (experiments/tpu_plan). Where a batch
           does not fit, --config.train.accumulate=16 computes the same update in 16 pieces.
Not run    Here only that each combination builds is tested, not the score.

Where text and code of the paper differ, this follows the code:
  batch    1,024 sequences at length 512 and 512 at length 1,024, hence 524,288 tokens an update
           both times; the text says 1,024 sequences "in all experiments" (batch=paper).
  decay    weight decay on norms and embeddings too; the text is silent.
  FoPE     its preset "official" with the sigma of Table 3; --config.position.preset=equations
           follows the equations.
  filter   rows that repeat up to 13 tokens 32 times have weight 0, as OLMo's instance filter in
           the released configs; the text does not name it (repeats=0).
  amount   the text says 10 B tokens of C4; the released configs list all 138 B of it and no end.
           This builds 10 B, data.max_tokens, which are 19,073 updates.

Where it departs from the released configs, and how not to:
  corpus   C4 in English, not Dolma's copy of it, which was filtered once more: data=dolma reads
           that, the c4-*.json.gz of Dolma v1.6 in dolma/.
  tokens   GPT-NeoX's tokenizer.json, not OLMo's of the same merges with three more special tokens
           (allenai/gpt-neox-olmo-dolma-v1_5): data=dolma takes that; either file is yours to place.
  order    windows of the whole corpus are shuffled, also there, by another generator of numbers.

Data: c4 comes prepared by TFDS from --config.data.tfds_data_dir (a bucket will do); c4-files are
the first 80 of the public c4-train.*.json.gz, which hold more than 10 B tokens, and need no
TensorFlow. The paper's books are files of your own, one {"text": ...} a line. All are scored on
C4's validation. The 5.256 B tokens of books are 10,025 updates, so its warmup of 10,000 lasts
nearly all of that run, as in the paper.
"""

from ml_collections import ConfigDict

from fope_jax.config import ConfigError, parse_arg
from fope_jax.model.presets import PRESETS

# A slice that each size fits without computing anything again (`fope plan`).
SLICES = {"60m": "v5e:4x4", "180m": "v5e:4x4", "1200m": "v5p:4x4x4"}
SIGMA = {"60m": 0.3, "180m": 0.4, "1200m": 0.6}
C4_TOKENS, BOOKS_TOKENS = 10_000_000_000, 5_256_000_000
BATCH_SIZE = {"code": {512: 1024, 1024: 512}, "paper": {512: 1024, 1024: 1024}}
VALIDATION = ("c4/c4-validation.*.json.gz",)
CORPUS = {
    "c4": {
        "corpus": "c4",
        "tfds_data_dir": "tensorflow_datasets",
        "tfds_name": "c4/en:3.0.1",
        "max_tokens": C4_TOKENS,
    },
    "c4-files": {
        "corpus": "c4",
        "train_files": ("c4/c4-train.000[0-7]?-of-01024.json.gz",),
        "validation_files": VALIDATION,
        "max_tokens": C4_TOKENS,
    },
    "dolma": {
        "corpus": "text",
        "train_files": ("dolma/c4-*.json.gz",),
        "validation_files": VALIDATION,
        "max_tokens": C4_TOKENS,
        "tokenizer": "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json",
    },
    "books": {
        "corpus": "text",
        "train_files": ("books/*.json.gz",),
        "validation_files": VALIDATION,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg,
        size="60m",
        length=512,
        data="c4",
        batch="code",
        position="fope",
        repeats=32,
        seed=6198,
        smoke=False,
    )
    for name, accepted in (
        ("size", SIGMA),
        ("length", BATCH_SIZE["code"]),
        ("data", CORPUS),
        ("batch", BATCH_SIZE),
    ):
        if arg[name] not in accepted:
            raise ConfigError(f"argument {name} = {arg[name]!r}; accepted: {list(accepted)}")
    tokens = CORPUS[arg.data].get("max_tokens", BOOKS_TOKENS)
    batch_size = 8 if arg.smoke else BATCH_SIZE[arg.batch][arg.length]

    config = ConfigDict()
    config.name = f"{arg.position}_{arg.size}_{arg.length}_{arg.data}"
    config.seed = arg.seed
    config.data = {
        "tokenizer": "tokenizers/gpt_neox.json",
        **CORPUS[arg.data],
        "max_repeats": arg.repeats or None,
        # Windows of the token stream: documents in one window see one another, as in the paper.
        "packing": "windows",
    }
    config.model = {
        **PRESETS[arg.size],
        "dtype": "bfloat16",
        # In a row layers move 40% fewer bytes than in a scan, which copies what each of them keeps,
        # and take half the memory; compiling takes longer (experiments/tpu_plan).
        "scan_layers": False,
    }
    config.position = {"method": arg.position}
    if arg.position == "fope":
        config.position.sigma = SIGMA[arg.size]
    if arg.position == "learned":
        config.position.table_length = arg.length
    config.train = {
        "steps": 20 if arg.smoke else tokens // (batch_size * arg.length),
        "batch_size": batch_size,
        "length": arg.length,
        "learning_rate": 6e-4,
        "warmup_steps": 5 if arg.smoke else 10_000,
        "schedule": "cosine",
        "final_learning_rate_fraction": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "gradient_clip": 1.0,
        "save_every": 10 if arg.smoke else 1_000,
    }
    longest = 8192 // arg.length
    config.evaluate = {
        # "chunks" is the paper's perplexity; "same-tokens" tells what the context alone does.
        "protocols": ("same-tokens", "chunks", "long-window", "passkey"),
        "lengths": tuple(m for m in (1, 2, 4, 8, 16) if m <= longest),
        "passkey_lengths": tuple(m for m in (1, 2, 4, 8, 16) if m <= longest),
        # Five depths with 200 trials each are the paper's 1,000 trials a length.
        "passkey_trials": 2 if arg.smoke else 200,
        "passkey_templates": ("standard",),
    }
    return config
