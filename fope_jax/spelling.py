"""The known name that an unknown one was meant to be, where it looks like a slip of the hand."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LIKENESS = 0.75  # of difflib: "roap" and "rope" have as much
_BETWEEN_WORDS = re.compile(r"[._\- ]")
_NO_LETTER = re.compile(r"[^a-z]")


def likely(name: str, known: Iterable[str]) -> str | None:
    """The known name that is spelled almost as ``name``, or None: a hint must not mislead.

    They must have as many words, each like the other's, with the same first letter and the same
    digits and signs, which slips of the hand seldom hit. What differs by more is a name with a
    meaning of its own: ``attn_factor`` is no ``attention_factor``, ``hope`` no ``rope``, ``run_2``
    no ``run_1``.

    >>> likely("beta_fats", ["beta_fast", "beta_slow"]), likely("attn_factor", ["attention_factor"])
    ('beta_fast', None)
    """
    near = [other for other in known if _alike(name, other)]
    return next(iter(difflib.get_close_matches(name, near, n=1, cutoff=0.0)), None)


def _alike(name: str, other: str) -> bool:
    ours, theirs = (_BETWEEN_WORDS.split(words.lower()) for words in (name, other))
    return len(ours) == len(theirs) and all(
        a[:1] == b[:1]
        and _NO_LETTER.findall(a) == _NO_LETTER.findall(b)
        and difflib.SequenceMatcher(None, a, b).ratio() >= _LIKENESS
        for a, b in zip(ours, theirs, strict=True)
    )
