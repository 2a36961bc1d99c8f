"""What a protocol is: something to measure on one checkpoint, and the rows that are its."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.perplexity import Progress
from fope_jax.evaluate.windows import Windows

NO_BOS = "no BOS token is added"


@dataclass(frozen=True)
class Protocol:
    """One thing to measure.

    Attributes:
      kind: of its rows.
      identity: fields that all its rows share and no other protocol's of that kind.
      settings: everything else that its numbers depend on, JSON values.
      run: scorer -> (rows, where its windows are or None).
      answers: ``run`` gets an ``Answerer`` in place of a scorer.
      bos: what stands before the first token of a window, for people.
      bos_token: the name of the BOS token that windows begin with; None where there is none.
    """

    kind: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    run: Callable[[Any, Progress], tuple[list[Row], Windows | None]]
    answers: bool = False
    bos: str = NO_BOS
    bos_token: str | None = None

    @property
    def row_fields(self) -> dict[str, Any]:
        """Fields of all its rows; those with and without a BOS token are no points of one curve."""
        return self.identity | ({"bos_token": self.bos_token} if self.bos_token else {})

    @property
    def label(self) -> str:
        """For people: ``same-tokens (validation)``."""
        name, detail = self.identity.values()
        return f"{name} ({detail})"

    def owns(self, row: Row, step: int) -> bool:
        """Whether ``row`` is one of this protocol's at ``step``, with or without a BOS token."""
        return (
            row.get("kind") in (self.kind, "protocol")
            and row.get("step") == step
            and all(row.get(key) == value for key, value in self.identity.items())
        )
