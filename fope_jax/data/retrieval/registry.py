"""The retrieval tasks by name."""

from __future__ import annotations

from typing import Any

from fope_jax.data.retrieval import TASKS, needles
from fope_jax.data.retrieval.base import Task
from fope_jax.data.retrieval.passkey import Passkey
from fope_jax.data.retrieval.text_task import Haystack, NoiseHaystack
from fope_jax.data.retrieval.token_tasks import Copy, Recall, Recall64Keys

# These take no haystack; passkeys bring their filler.
WITHOUT_HAYSTACK: dict[str, Any] = {
    "recall": Recall,
    "recall_64_keys": Recall64Keys,
    "copy": Copy,
    "passkey": Passkey,
}
WITH_HAYSTACK = {
    cls.name: cls
    for cls in (
        needles.MultiKey,
        needles.MultiValue,
        needles.MultiQuery,
        needles.EveryKey,
        needles.VariableTracking,
        needles.CommonWords,
    )
}


def make_task(name: str, tokenizer: Any, haystack: Haystack | None = None) -> Task:
    """The task of that name; ``haystack`` None is noise. ValueError if unknown or V too small."""
    if name in WITHOUT_HAYSTACK:
        return WITHOUT_HAYSTACK[name].from_tokenizer(tokenizer)
    if name in WITH_HAYSTACK:
        return WITH_HAYSTACK[name](tokenizer, haystack or NoiseHaystack.from_tokenizer(tokenizer))
    raise ValueError(f"retrieval task {name!r}; accepted: {', '.join(TASKS)}")
