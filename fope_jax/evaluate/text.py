"""The protocols that score held-out text, by name, under the settings of an experiment."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fope_jax.config import Experiment
from fope_jax.data.bos import Bos
from fope_jax.evaluate.joined import check_chunks, score_chunks, score_resets
from fope_jax.evaluate.perplexity import (
    Progress,
    score_from_start,
    score_positions,
    score_same_tokens,
)
from fope_jax.evaluate.protocol import NO_BOS, Protocol
from fope_jax.evaluate.scoring import Scorer
from fope_jax.evaluate.sliding import check_stride, score_sliding
from fope_jax.evaluate.windows import place_blocks

FIRST_TOKEN = f"{NO_BOS}; the first token of a window is read and not scored"
# What stands before the first token of a window where a BOS token is added.
_BEGINNINGS = {
    "document-resets": "every chunk begins with {}, in place of its first token, and every "
    "document in it, in place of the end-of-document token before it",
    "from-start": "every document is read after {}",
}
_BEGINNING = "every window begins with {}, in place of its first token"


@dataclass(frozen=True)
class TextProtocol:
    """How one protocol is made.

    Attributes:
      kind: of its rows.
      score: (scorer, cache, batch_tokens, progress, **settings) -> (rows, windows).
      settings: (experiment, cache, contexts) -> what ``score`` depends on, checked before any
        device work.
      amount: the setting that counts windows; 0 leaves the protocol out.
    """

    kind: str
    score: Callable[..., Any]
    settings: Callable[[Experiment, Any, list[int]], dict[str, Any]]
    amount: str = "num_windows"


def _same_tokens(experiment: Experiment, cache: Any, contexts: list[int]) -> dict[str, Any]:
    settings = experiment.evaluate
    return {
        "contexts": contexts,
        "scored": settings.scored_tokens,
        "num_windows": settings.num_windows,
    }


def _sliding_window(experiment: Experiment, cache: Any, contexts: list[int]) -> dict[str, Any]:
    settings = experiment.evaluate
    stride = settings.stride or max(1, experiment.train.length // 2)
    check_stride(stride, contexts)
    return {"contexts": contexts, "stride": stride, "num_windows": settings.position_windows}


def _chunks(experiment: Experiment, cache: Any, contexts: list[int]) -> dict[str, Any]:
    check_chunks(contexts)
    return {"contexts": contexts, "num_blocks": experiment.evaluate.position_windows}


def _resets(reset: bool, experiment: Experiment, cache: Any, contexts: list[int]) -> dict[str, Any]:
    blocks = experiment.evaluate.position_windows
    if blocks:
        place_blocks(cache.documents, length=math.lcm(*contexts), total=blocks, meeting=True)
    return {"contexts": contexts, "num_blocks": blocks, "reset": reset}


def _longest(amount: str, experiment: Experiment, cache: Any, contexts: list[int]) -> dict:
    return {
        "context": max(contexts),
        "training_length": experiment.train.length,
        amount: experiment.evaluate.position_windows,
    }


TEXT_PROTOCOLS: dict[str, TextProtocol] = {
    "same-tokens": TextProtocol("perplexity", score_same_tokens, _same_tokens),
    "sliding-window": TextProtocol("perplexity", score_sliding, _sliding_window),
    "chunks": TextProtocol("perplexity", score_chunks, _chunks, "num_blocks"),
    "document-resets": TextProtocol(
        "perplexity", score_resets, functools.partial(_resets, True), "num_blocks"
    ),
    "no-resets": TextProtocol(
        "perplexity", score_resets, functools.partial(_resets, False), "num_blocks"
    ),
    "long-window": TextProtocol(
        "position", score_positions, functools.partial(_longest, "num_windows")
    ),
    "from-start": TextProtocol(
        "position", score_from_start, functools.partial(_longest, "num_documents"), "num_documents"
    ),
}


def text_protocol(
    name: str,
    experiment: Experiment,
    cache: Any,
    split: str,
    contexts: list[int],
    bos: Bos | None = None,
) -> Protocol | None:
    """The protocol ``name`` on one split.

    Args:
      name: a key of ``TEXT_PROTOCOLS``.
      experiment: of the run.
      cache: the split's tokens.
      split: its name.
      contexts: tokens of the windows, in order.
      bos: the token that they begin with.

    Returns:
      The protocol; None where the experiment asks for none of its windows.

    Raises:
      ValueError: settings that the protocol cannot have.
    """
    made = TEXT_PROTOCOLS[name]
    settings = made.settings(experiment, cache, contexts)
    if not settings[made.amount]:
        return None

    def run(scorer: Scorer, progress: Progress) -> Any:
        return made.score(
            scorer,
            cache,
            **settings,
            batch_tokens=experiment.evaluate.batch_tokens,
            progress=progress,
            bos=bos and bos.id,
        )

    identity = {"protocol": name, "split": split}
    stated = settings | {"cache": cache.fingerprint}
    if bos is None:
        return Protocol(made.kind, identity, stated, run, bos=FIRST_TOKEN)
    first = _BEGINNINGS.get(name, _BEGINNING).format(bos.token) + "; it is read and not scored"
    stated |= {"bos_token": bos.token}
    return Protocol(made.kind, identity, stated, run, bos=first, bos_token=bos.token)
