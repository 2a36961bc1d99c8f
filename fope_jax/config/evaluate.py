"""What is measured of a run: the section ``evaluate`` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fope_jax.config.fields import check_value
from fope_jax.data.held_out import text_name
from fope_jax.data.retrieval import TASKS


@dataclass(frozen=True)
class EvaluateConfig:
    """What `fope evaluate` measures. Lengths are multiples of ``train.length``.

    Attributes:
      protocols: what runs, by name, or "all". Of text: "same-tokens", "sliding-window", "chunks",
        "document-resets", "no-resets", "long-window", "from-start"; and "passkey" and
        "retrieval". All of text take about twice as long as the default ones.
      lengths: contexts of the protocols on text.
      scored_tokens: scored at the end of each window; None is half the training length.
      stride: tokens that the sliding window moves by; None is half the training length.
      num_windows: windows of "same-tokens"; the same ones at every length.
      training_windows: the same inside training, where ``train.evaluate_every`` asks for it.
      position_windows: windows, stretches, blocks or documents of the longest length of the others.
      passkey_lengths: contexts for passkey retrieval.
      passkey_depths: where the key stands in the context, 0 the beginning and 1 the end.
      passkey_trials: trials for each length and depth.
      passkey_templates: wordings, "standard" (the literature's) and "compact" (small models).
      retrieval_tasks: further tasks at the lengths, depths and trials of passkeys: "recall" and
        "copy" of token ids, for models too small for language; "multi_key", "multi_value",
        "multi_query", "variable_tracking" and "common_words" after RULER.
      needle_haystack: what those after RULER hide their needles in: "corpus", a stretch of the
        first of ``splits``, or "noise", a few sentences that are repeated.
      batch_tokens: upper bound of the tokens in one forward pass.
      splits: the corpus splits perplexity is measured on.
      bos_token: name of the tokenizer's token for the beginning of a sequence, BOS. `fope import`
        takes it from the files of the checkpoint; None where there is none, as in models that were
        trained here on documents which an end-of-document token joins.
      add_bos_token: whether every window, document and prompt that is evaluated begins with it, as
        in the training of imported models whose files say so. It takes the place of the window's
        first token. What it is makes rows of their own: they are compared with their like alone.
      texts: other text that it is measured on, cut by the tokenizer of the run: "web" (119 pages
        labelled C4), "news" (3,824 articles), both downloaded once, or ``NAME=GLOB`` of your own
        .txt or .jsonl files.
    """

    protocols: tuple[str, ...] = ("same-tokens", "long-window", "passkey", "retrieval")
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    scored_tokens: int | None = None
    stride: int | None = None
    num_windows: int = 256
    training_windows: int = 16
    position_windows: int = 32
    passkey_lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    passkey_depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    passkey_trials: int = 20
    passkey_templates: tuple[str, ...] = ("compact", "standard")
    retrieval_tasks: tuple[str, ...] = ()
    needle_haystack: Literal["corpus", "noise"] = "corpus"
    batch_tokens: int = 16_384
    splits: tuple[str, ...] = ("validation",)
    bos_token: str | None = None
    add_bos_token: bool = False
    texts: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("lengths", "passkey_lengths"):
            value = getattr(self, name)
            check_value(name, value, all(n >= 1 for n in value), "multiples of 1 or more")
        for name in ("num_windows", "training_windows", "position_windows", "passkey_trials"):
            check_value(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check_value("batch_tokens", self.batch_tokens, self.batch_tokens >= 1, "1 or more")
        for name in ("scored_tokens", "stride"):
            value = getattr(self, name)
            check_value(name, value, value is None or value >= 1, "1 or more, or None")
        depths = self.passkey_depths
        check_value(
            "passkey_depths", depths, all(0 <= d <= 1 for d in depths), "each 0 <= value <= 1"
        )
        tasks = [name for name in TASKS if name != "passkey"]  # which passkey_templates measure
        wrong = [name for name in self.retrieval_tasks if name not in tasks]
        check_value("retrieval_tasks", self.retrieval_tasks, not wrong, f"some of {tasks}")
        named = self.bos_token is not None or not self.add_bos_token
        check_value(
            "add_bos_token",
            self.add_bos_token,
            named,
            "False where bos_token is None: name the token, such as bos_token = '<s>'",
        )
        haystacks = ("corpus", "noise")
        check_value(
            "needle_haystack",
            self.needle_haystack,
            self.needle_haystack in haystacks,
            f"one of {haystacks}",
        )
        names = [text_name(source) for source in self.texts]
        check_value("texts", self.texts, len(set(names)) == len(names), "each name once")
