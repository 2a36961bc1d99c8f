"""The retrieval tasks by name."""

from __future__ import annotations

from typing import Any

from fope_jax.data.retrieval import TASKS
from fope_jax.data.retrieval.base import Task
from fope_jax.data.retrieval.needles import (
    CommonWords,
    MultiKey,
    MultiQuery,
    MultiValue,
    VariableTracking,
)
from fope_jax.data.retrieval.passkey import Passkey
from fope_jax.data.retrieval.text_task import Haystack, NoiseHaystack
from fope_jax.data.retrieval.token_tasks import Copy, Recall

ALONE: dict[str, Any] = {"recall": Recall, "copy": Copy, "passkey": Passkey}
NEEDLES = {
    cls.name: cls for cls in (MultiKey, MultiValue, MultiQuery, VariableTracking, CommonWords)
}


def make_task(name: str, tokenizer: Any, haystack: Haystack | None = None) -> Task:
    """The task of one name for one tokenizer.

    Args:
      name: of ``TASKS``.
      tokenizer: of the model.
      haystack: what needles are hidden in; None is noise. Passkeys have a filler of their own.

    Raises:
      ValueError: there is no such task, or the tokenizer has too few tokens for it.
    """
    if name not in TASKS:
        raise ValueError(f"retrieval task {name!r}; accepted: {', '.join(TASKS)}")
    if name in ALONE:
        return ALONE[name].from_tokenizer(tokenizer)
    return NEEDLES[name](tokenizer, haystack or NoiseHaystack.from_tokenizer(tokenizer))
