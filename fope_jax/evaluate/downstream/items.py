"""Items of a downstream task: prompts with accepted answers, from files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.evaluate.downstream.metrics import Metric, contains, exact_match, f1, normalize
from fope_jax.storage.content import HEAD_BYTES, detect_content
from fope_jax.storage.files import file_sha256

FILE = "file"  # the benchmark of a user's own file
KEYS = ("prompt", "answers", "choices", "id")


class Item(NamedTuple):
    """A prompt and its accepted answers.

    Attributes:
      name: of the item, for the file of what was written.
      choices: if any, the answers are some of them and nothing is written: each choice is scored.
      classes: class names of a classification.
      words: of the prompt's parts, as the benchmark counts them; None where it does not.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    words: int | None = None


class ItemTask(NamedTuple):
    """Items of one kind.

    Attributes:
      benchmark, name: as "longbench" and "trec"; together the name of its rows.
      items: at least one; all have choices, or none.
      metrics: item -> the metrics of what was written, by name.
      count: most tokens to write.
      is_one_line: whether only the first line of what was written is scored.
      ends_at_line_break: whether a line break ends the writing, and may not be its first token.
      settings: what else the scores depend on, as JSON values.
    """

    benchmark: str
    name: str
    items: tuple[Item, ...]
    metrics: Any  # Callable[[Item], dict[str, Metric]]
    count: int
    is_one_line: bool
    ends_at_line_break: bool
    settings: dict[str, Any]


def written_metrics(item: Item) -> dict[str, Metric]:
    """The metrics of a user's own items."""
    return {"contains": contains, "f1": f1, "exact_match": exact_match}


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``("FILE, line N", object)`` for each line of a file of JSON lines; blank lines are skipped.

    Raises:
      ValueError: the file is no text, has no lines, or a line is no JSON object, also a last one
        that was cut off.
    """
    stored, count = path.read_bytes(), 0
    if found := detect_content(stored[:HEAD_BYTES]):
        raise ValueError(f"{path} is {found.kind}; {found.advice}")
    # Of bytes: a text may hold other line separators, such as U+2028, inside of a string.
    for number, line in enumerate(stored.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON: {error}; one object a line is read") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object: {row!r:.60}")
        count += 1
        yield where, row
    if not count:
        raise ValueError(f"{path} is empty; one JSON object a line is read")


def read_text(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text of a key; ValueError for anything else."""
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is {value!r:.60}; accepted: a text")
    return value


def read_texts(
    row: Mapping[str, Any], key: str, where: str, least: int = 1, may_be_empty: bool = False
) -> tuple[str, ...]:
    """The texts of a key, ``least`` or more; ValueError for anything else, also an empty text."""
    values = row.get(key)
    if (
        not isinstance(values, list)
        or len(values) < least
        or not all(isinstance(x, str) and (may_be_empty or x.strip()) for x in values)
    ):
        amount = "one text or more" if least == 1 else f"{least} texts or more"
        raise ValueError(f"{where}: {key!r} is {values!r:.60}; accepted: a list of {amount}")
    return tuple(values)


def read_file(path: Path, count: int, most: int | None = None) -> ItemTask:
    """A user's own items: lines ``{"prompt": .., "answers": [..], "choices": [..], "id": ..}``.

    Args:
      path: of the file; ``choices`` (in every line or in none) and ``id`` may be left out.
      count: most tokens to write.
      most: number of items, from the first on; None takes all.

    Raises:
      ValueError: names file and line, the key, its value, and what is accepted.
      OSError: the file cannot be read.
    """
    items: list[Item] = []
    for where, row in read_objects(path):
        if unknown := sorted(set(row) - set(KEYS)):
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; accepted: {', '.join(KEYS)}")
        prompt, answers = read_text(row, "prompt", where), read_texts(row, "answers", where)
        if not prompt.strip():
            raise ValueError(f"{where}: 'prompt' is empty")
        choices = read_texts(row, "choices", where, least=2) if "choices" in row else ()
        if choices and (strange := [answer for answer in answers if answer not in choices]):
            raise ValueError(f"{where}: the answer {strange[0]!r:.60} is none of 'choices'")
        if choices and len(set(answers)) == len(set(choices)):
            raise ValueError(f"{where}: every one of 'choices' is an answer")
        if not choices and (lines := [answer for answer in answers if "\n" in answer.strip()]):
            raise ValueError(
                f"{where}: the answer {lines[0]!r:.60} has a line break; what a model writes is "
                "read to its first line break only"
            )
        if not choices and (empty := [answer for answer in answers if not normalize(answer)]):
            raise ValueError(
                f"{where}: the answer {empty[0]!r:.60} is empty as scores compare it, without "
                "punctuation and articles; accepted: answers with words, or 'choices'"
            )
        if items and bool(choices) != bool(items[0].choices):
            raise ValueError(f"{where}: 'choices' stand in every line or in none; make two files")
        name = str(row.get("id", where.rpartition(" ")[2]))
        items.append(Item(name, prompt, answers, choices))
    settings = {"file": file_sha256(path)[:16], "items": len(items[:most])}
    if not items[0].choices:
        settings["max_new_tokens"] = count
    return ItemTask(
        FILE, path.stem, tuple(items[:most]), written_metrics, count, True, False, settings
    )
