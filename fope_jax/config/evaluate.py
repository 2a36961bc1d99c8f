"""The section ``evaluate`` of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fope_jax.config.fields import check_fields
from fope_jax.data.config import SPLITS
from fope_jax.data.held_out import text_name
from fope_jax.data.retrieval import PASSKEY_TEMPLATES, TASKS
from fope_jax.storage.protocol_names import PROTOCOLS


@dataclass(frozen=True)
class EvaluateConfig:
    """What `fope evaluate` measures. Lengths are multiples of ``train.length``, 0.25 or 1.5 too.

    Attributes:
      protocols: "all", or some of "same-tokens", "sliding-window", "chunks", "document-resets",
        "no-resets", "long-window", "from-start", "passkey" and "retrieval".
      lengths: contexts of the protocols on text.
      scored_tokens: tokens scored at the end of a window; None is half the training length.
      stride: tokens that the sliding window moves by; None is half the training length.
      num_windows: windows of "same-tokens"; the same ones at every length.
      training_windows: the same for evaluation during training, see ``train.evaluate_every``.
      position_windows: windows, blocks or documents at the longest length of other protocols.
      passkey_lengths: contexts for passkey retrieval.
      passkey_depths: position of the key in the context, from 0 (beginning) to 1 (end).
      passkey_trials: trials for each length and depth.
      trial_seed: of the passkeys and tasks that are drawn. Variants that are compared need the
        same; with another one for each seed of a sweep, its intervals hold the draw of the trials
        as well.
      passkey_templates: wordings: "standard" as in the literature, "compact" for small models.
      retrieval_tasks: more tasks with these lengths, depths and trials: "recall" (of 16
        keys, "recall_64_keys" of 64) and "copy" of token ids for small models; "multi_key",
        "multi_value", "multi_query", "every_key", "variable_tracking" and "common_words" after
        RULER. "every_key" has ten depths of its own, all asked for after one window:
        passkey_trials are windows.
      needle_haystack: haystack of the RULER tasks: "corpus" (the first of ``splits``, or without
        any of ``texts``) or "noise" (a few repeated sentences).
      batch_tokens: most tokens in one forward pass.
      splits: corpus splits to measure perplexity on; none to measure on ``texts`` alone, which
        needs no token cache.
      bos_token: BOS token of the tokenizer, set by `fope import`; None for models trained here.
      add_bos_token: replace the first token of every window, document and prompt by BOS. Rows with
        and without it are not compared.
      random_positions: read text, passkeys and retrieval tasks at positions drawn as in training,
        see ``train.position_range``, in place of 0, 1, 2, ..; contexts beyond the range are
        refused. Downstream tasks and generation count from 0.
      texts: more text, tokenized for the run: "web" (119 pages labelled C4) and "news" (3,824
        articles), downloaded once, or ``NAME=GLOB`` for files of the kinds of ``data.train_files``.
      text_field: field of a line or column of a .parquet of ``texts`` that holds the text.
    """

    protocols: tuple[str, ...] = ("same-tokens", "long-window", "passkey", "retrieval")
    lengths: tuple[int | float, ...] = (1, 2, 4, 8, 16)
    scored_tokens: int | None = None
    stride: int | None = None
    num_windows: int = 256
    training_windows: int = 16
    position_windows: int = 32
    passkey_lengths: tuple[int | float, ...] = (1, 2, 4, 8, 16)
    passkey_depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    passkey_trials: int = 20
    trial_seed: int = 0
    passkey_templates: tuple[str, ...] = ("compact", "standard")
    retrieval_tasks: tuple[str, ...] = ()
    needle_haystack: Literal["corpus", "noise"] = "corpus"
    batch_tokens: int = 16_384
    splits: tuple[str, ...] = ("validation",)
    bos_token: str | None = None
    add_bos_token: bool = False
    random_positions: bool = False
    texts: tuple[str, ...] = ()
    text_field: str = "text"

    def __post_init__(self):
        tasks = [name for name in TASKS if name != "passkey"]  # set by passkey_templates
        check_fields(
            self,
            (
                "lengths passkey_lengths",
                lambda ns: all(0 < n < math.inf for n in ns),
                "multiples above 0",
            ),
            (
                "num_windows training_windows position_windows passkey_trials trial_seed",
                lambda n: n >= 0,
                "0 or more",
            ),
            ("batch_tokens", lambda n: n >= 1, "1 or more"),
            ("scored_tokens stride", lambda n: n is None or n >= 1, "1 or more, or None"),
            ("passkey_depths", lambda xs: all(0 <= x <= 1 for x in xs), "each 0 <= value <= 1"),
            (
                "passkey_depths passkey_templates retrieval_tasks",
                lambda values: len(set(values)) == len(values),
                "each once",
            ),
            (
                "protocols",
                lambda names: set(names) <= {*PROTOCOLS, "all"},
                f"some of {', '.join(PROTOCOLS)}, or all of them: all",
            ),
            (
                "passkey_templates",
                lambda names: set(names) <= set(PASSKEY_TEMPLATES),
                f"some of {', '.join(PASSKEY_TEMPLATES)}",
            ),
            ("splits", lambda names: set(names) <= set(SPLITS), f"some of {', '.join(SPLITS)}"),
            ("retrieval_tasks", lambda names: set(names) <= set(tasks), f"some of {tasks}"),
            (
                "add_bos_token",
                lambda adds: not adds or self.bos_token is not None,
                "False where bos_token is None: name the token, such as bos_token = '<s>'",
            ),
            (
                "texts",
                lambda texts: len(set(map(text_name, texts))) == len(texts),
                "each name once",
            ),
        )
