"""The demo: who still finds what it read, and who still reads, beyond the training length?

    make demo        or, in an environment of your own:

    fope data build --config configs/quickstart.py
    fope sweep experiments/demo/sweep.py --workdir runs/demo --jobs 2

Arguments: seeds=1; with 5 the verdict says which differences are significant.

Each method is trained twice, on key-value recall in windows of 64 tokens and on books in windows of
128, and is asked at up to 16 times that. Sizes are about the least that show what configs/recall.py
and configs/quickstart.py show with more updates (experiments/tournament).

Hardware   2 CPU cores, no accelerator, 2 GB of memory.
Time       485 core-seconds: 6 minutes measured beside other work, some 4 on two idle cores.
Score      Recall at 64 and 128 tokens, one seed: FoPE 100% and 81%, RoPE 98% and 8%. Perplexity of
           books at 128 and 2,048: RoPE 131 and 160, FoPE 131 and 154, ALiBi 157 and 156, NoPE 148
           and 149.
"""

from fope_jax.config import parse_arg
from fope_jax.sweep import Train, product

METHODS = ("rope", "fope", "alibi", "nope")
COMMON = (
    "model.scan_layers=False",  # faster to compile and to run for so few layers
    "train.evaluate_every=None",
)
RECALL = (
    *COMMON,
    "train.steps=900",
    "train.learning_rate=7e-3",
    "train.warmup_steps=50",
    "train.save_every=900",
    "evaluate.retrieval_tasks=recall",
    "evaluate.passkey_trials=20",
)
# No passkeys: at this size no method finds them at its training length.
BOOKS = (
    *COMMON,
    "model.num_layers=2",
    "train.steps=500",
    "train.batch_size=8",
    "train.learning_rate=4e-3",
    "train.save_every=500",
    "evaluate.protocols=same-tokens",
    "evaluate.num_windows=32",
)


def get_sweep(arg=""):
    arg = parse_arg(arg, seeds=1)
    tasks = {"books": ("configs/quickstart.py", BOOKS), "recall": ("configs/recall.py", RECALL)}
    return [  # the longest first, so that the cores end together
        Train(f"{task}_{method}_{seed}", f"{config}:position={method},seed={seed}", overrides)
        for seed, (task, (config, overrides)), method in product(
            seed=range(arg.seeds), task=tasks.items(), method=METHODS
        )
    ]
