"""A trained model: its logits and losses, what it writes, and the rows of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fope_jax import position as positions
from fope_jax.config import Experiment
from fope_jax.data.bos import encode_prompt, find_bos
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.generation import model_sampler
from fope_jax.evaluate.metrics import METRICS, read_rows
from fope_jax.evaluate.scoring import model_scorer
from fope_jax.extras import require
from fope_jax.logs import quiet
from fope_jax.model.transformer import Transformer, check_batch, merge, split
from fope_jax.position import Fingerprint
from fope_jax.typing import Array

if TYPE_CHECKING:
    from pandas import DataFrame

Tokens = str | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Array


@dataclass(frozen=True, repr=False, eq=False)
class Run:
    """A trained model after ``step`` updates, from `train`, `load` or `extend`.

    Weights are read at the first use of ``model`` or of what computes with it.

    Attributes:
      experiment: the whole configuration.
      step: of the checkpoint.
      workdir: directory of the run; None for weights of Hugging Face that are held in memory alone.
      read_model, read_tokenizer: read the weights, and the tokenizer.
    """

    experiment: Experiment
    step: int
    workdir: Path | None
    read_model: Callable[[], Transformer]
    read_tokenizer: Callable[[], Tokenizer]

    @property
    def name(self) -> str:
        """The run's variant in tables and reports."""
        return self.experiment.name

    @property
    def method(self) -> str:
        """The position embedding's name, such as "fope"."""
        return positions.name_of(self.experiment.position)

    @property
    def length(self) -> int:
        """Tokens of a training sequence."""
        return self.experiment.train.length

    @cached_property
    def model(self) -> Transformer:
        """The Flax NNX module, on the first device."""
        with quiet():
            return self.read_model()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """``encode(text)`` to token ids, and ``decode(ids)``."""
        return self.read_tokenizer()

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Hash and summary of what the position embedding does to this model."""
        constants = split(self.model)[2]
        return checkpoint_fingerprint(self.model.position, self.model.config.shape, constants)[0]

    @cached_property
    def num_parameters(self) -> int:
        """Trained parameters, without constants of the position embedding."""
        config, position = self.experiment.model, self.experiment.position
        shapes = nnx.eval_shape(lambda: Transformer(config, position, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(split(shapes)[1]))

    def __repr__(self) -> str:
        where = "in memory" if self.workdir is None else repr(str(self.workdir))
        return (
            f"Run({self.name!r}, method={self.method}, step={self.step:,}, "
            f"parameters={self.num_parameters:,}, length={self.length:,}, {where})"
        )

    # ------------------------------------------------------------------ what it computes

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as the model reads it, with a BOS token where the run adds one."""
        settings = self.experiment.evaluate
        bos = find_bos(self.tokenizer, settings.bos_token) if settings.add_bos_token else None
        return encode_prompt(self.tokenizer, text, bos)

    def logits(self, tokens: Tokens) -> Array:
        """Logits ``[B, T, V]`` float32 of the next token after each token.

        Args:
          tokens: a text, or ids ``[T]`` or ``[B, T]``. Each shape is compiled once.

        Raises:
          ValueError: ids outside the vocabulary, rows of different lengths, or more tokens than the
            position embedding is defined for.
        """
        return self._forward(self._tokens(tokens))

    def loss(self, tokens: Tokens) -> float:
        """Mean nats per token of a text, or of ids ``[T]`` or ``[B, T]``.

        The first token of a row is read and not scored. Raises as `logits`, and ValueError for a
        single token.
        """
        ids = self._tokens(tokens)
        if ids.shape[1] < 2:
            raise ValueError(
                "1 token has no loss: the first of a row is read and not scored; accepted: 2 or "
                "more"
            )
        nats, _ = self._scorer(ids[:, :-1], ids[:, 1:])
        return float(np.asarray(nats, np.float64).mean())

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = 32, temperature: float = 0.0, seed: int = 0
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Sequence[int] | np.ndarray,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[int]: ...

    def generate(self, prompt, max_new_tokens=32, temperature=0.0, seed=0):
        """Continues a prompt; ends at the end-of-document token.

        Args:
          prompt: a text, or token ids ``[T]``.
          max_new_tokens: most tokens to write.
          temperature: 0 takes the most likely token, 1 draws from the model's distribution.
          seed: of the draws.

        Returns:
          The continuation alone: a text for a text, ids for ids.

        Raises:
          ValueError: as `logits`, a temperature below 0, a seed that is not 0 to 2**32 - 1, or no
            room for ``max_new_tokens``.
          NonFiniteError: logits are not finite.
        """
        is_number = isinstance(temperature, (int, float, np.number))
        if not is_number or not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature = {temperature!r}; accepted: a number, 0 or more")
        is_text = isinstance(prompt, str)
        # Of an empty text nothing is encoded: a document begins after the end of another.
        ids = (self.encode(prompt) or [self.tokenizer.eos_id]) if is_text else prompt
        rows = self._tokens(ids)
        if len(rows) > 1:
            raise ValueError(f"a prompt of {len(rows)} rows; accepted: one, token ids [T]")
        written = self._sampler(
            rows[0].tolist(),
            max_new_tokens,
            stop=self.tokenizer.eos_id,
            temperature=temperature,
            seed=seed,
        )
        return self.tokenizer.decode(written) if is_text else written

    # ------------------------------------------------------------------ its files

    def rows(self, kind: str | None = None) -> DataFrame:
        """The rows of metrics.jsonl, all or of one kind, such as "train" or "validation".

        Raises:
          ValueError: there are rows, but none of this kind; names the kinds.
        """
        rows = read_rows(workdir_of(self) / METRICS)
        kinds = sorted({row["kind"] for row in rows})
        if kind is not None and kind not in kinds:
            raise ValueError(f"kind {kind!r}; {self.workdir} has rows of: {', '.join(kinds)}")
        return data_frame([row for row in rows if kind in (None, row["kind"])])

    # ------------------------------------------------------------------ compiled once

    def _tokens(self, tokens: Tokens) -> np.ndarray:
        ids = self.encode(tokens) if isinstance(tokens, str) else tokens
        return as_token_ids(ids, self.experiment.model.vocab_size)

    @cached_property
    def _forward(self) -> Callable[[np.ndarray], Array]:
        graphdef, *arrays = split(self.model)

        @jax.jit
        def forward(arrays: Any, tokens: Array) -> Array:
            places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            return merge(graphdef, *arrays)(tokens, places, jnp.ones_like(places))

        return partial(forward, arrays)

    @cached_property
    def _scorer(self) -> Callable[..., Any]:
        return model_scorer(self.model)

    @cached_property
    def _sampler(self) -> Callable[..., list[int]]:
        return model_sampler(self.model)


def as_token_ids(tokens: Any, vocab_size: int) -> np.ndarray:
    """Token ids as ``[B, T]`` int32.

    >>> as_token_ids([3, 1], vocab_size=8)
    array([[3, 1]], dtype=int32)

    Raises:
      ValueError: no integers, none at all, not ``[T]`` or ``[B, T]``, or outside the vocabulary.
    """
    accepted = "accepted: a text, or integers [T] or [B, T], one token or more"
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise ValueError(f"tokens: rows of different lengths; {accepted}") from error
    if not ids.size or ids.ndim not in (1, 2):
        raise ValueError(f"tokens of shape {list(ids.shape)}; {accepted}")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"tokens of type {ids.dtype}; {accepted}")
    check_batch(ids, vocab_size)
    return np.atleast_2d(ids).astype(np.int32)


def workdir_of(run: Run) -> Path:
    """The run's directory; ValueError for weights that are held in memory alone."""
    if run.workdir is None:
        raise ValueError(
            f"{run.name} has no directory for results: its weights are held in memory alone; "
            "fope_jax.load(SOURCE, workdir=DIR) makes a run of them"
        )
    return run.workdir


def data_frame(records: Sequence[Mapping[str, Any]]) -> DataFrame:
    """The records as rows; without the column ``bucket`` where none has one."""
    frame: DataFrame = require("pandas", "train").DataFrame.from_records(records)
    has_buckets = any(record.get("bucket") for record in records)
    return frame if has_buckets else frame.drop(columns="bucket", errors="ignore")
