"""The five data sets of LongBench that the FoPE paper's Table 1 has, read from their files.

The files are those of ``data.zip`` at huggingface.co/datasets/THUDM/LongBench: a line is an object
with ``input, context, answers, length, dataset, language, all_classes, _id``. Files whose names end
in ``_e`` (LongBench-E) have as many items in each range of length, and are taken where both are
there. Prompts are read from the benchmark's own ``dataset2prompt.json`` (in its repository
github.com/THUDM/LongBench, folder ``LongBench/config``): scores compare only where they are the
same to the letter.

Tokens to write, metrics and ranges are those of ``LongBench/pred.py`` and ``eval.py`` at 2e00731.

Reference: Bai et al. 2024, "LongBench: A Bilingual, Multitask Benchmark for Long Context
Understanding"; Hua et al. 2025, "Fourier Position Embedding", Section 5.4.
"""

from __future__ import annotations

import hashlib
import logging
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.evaluate.downstream.items import Item, ItemTask, read_objects, read_text, read_texts
from fope_jax.evaluate.downstream.metrics import Metric, classification, f1, rouge_l
from fope_jax.extras import require
from fope_jax.storage.files import file_sha256, read_json

log = logging.getLogger(__name__)

LONGBENCH = "longbench"
PROMPTS = "dataset2prompt.json"
DATA_PLACES = (".", "data")
PROMPT_PLACES = (".", "config", "LongBench/config", "data")
WORDS = (4000, 8000)  # where ranges of length begin, in words
HELP = (
    "It holds the files of data.zip, unpacked, from huggingface.co/datasets/THUDM/LongBench, and "
    f"{PROMPTS} from github.com/THUDM/LongBench, folder LongBench/config. Name it: "
    "--tasks longbench=DIR"
)


class DataSet(NamedTuple):
    """A data set's metric, most tokens to write, and the checksum of its official prompt.

    ``is_few_shot``: the prompt is a list of examples, and only the first line written counts.
    """

    metric: str
    count: int
    prompt: str
    is_few_shot: bool = False


DATA_SETS = {
    "gov_report": DataSet("rouge_l", 512, "91c25d585b189ced"),
    "multi_news": DataSet("rouge_l", 512, "2af3f28c40b902e6"),
    "trec": DataSet("classification", 64, "0eff8bebdba99d91", is_few_shot=True),
    "triviaqa": DataSet("f1", 32, "00a802e6377e72fc", is_few_shot=True),
    "samsum": DataSet("rouge_l", 128, "a68d884234907eef", is_few_shot=True),
}
ENDS_AT_LINE_BREAK = ("samsum",)


def metrics_of(metric: str) -> Any:
    """item -> its one metric, by name."""

    def metrics(item: Item) -> dict[str, Metric]:
        of_classes = classification(item.classes)
        return {metric: {"rouge_l": rouge_l, "f1": f1, "classification": of_classes}[metric]}

    return metrics


def read_longbench(directory: Path, most: int | None = None) -> list[ItemTask]:
    """The data sets of Table 1 that are in a directory; those that are not are named in a warning.

    Args:
      directory: holds the files, or a folder ``data`` with them, and the prompts.
      most: number of items of each data set, from the first on; None takes all.

    Raises:
      ValueError: nothing is there, or a line or prompt is not of the published form; names file,
        line and key.
      ImportError: the package ``rouge`` is not installed; the message holds the pip line.
    """
    files = {name: _find_data(directory, name) for name in DATA_SETS}
    found = {name: path for name, path in files.items() if path is not None}
    if not found:
        what = "has no data set" if directory.is_dir() else "is not there"
        what = "is a file, no directory" if directory.is_file() else what
        raise ValueError(
            f"LongBench: {directory} {what}; accepted: a directory with NAME_e.jsonl or NAME.jsonl "
            f"of one or more of {', '.join(DATA_SETS)}. {HELP}"
        )
    if missing := [name for name in files if name not in found]:
        log.warning("LongBench: %s not in %s, left out", ", ".join(missing), directory)
    if any(DATA_SETS[name].metric == "rouge_l" for name in found):
        require("rouge", "downstream")
    prompts = _read_prompts(directory, list(found))
    return [_read_data_set(name, path, prompts[name], most) for name, path in found.items()]


def words_range(words: int) -> tuple[int, int | None]:
    """The range of length of an item, in words, as LongBench-E has it; None is no end.

    >>> words_range(3999), words_range(4000), words_range(20000)
    ((0, 4000), (4000, 8000), (8000, None))
    """
    edges = (0, *WORDS, None)
    index = sum(words >= edge for edge in WORDS)
    return edges[index] or 0, edges[index + 1]


def _find_data(directory: Path, name: str) -> Path | None:
    paths = (
        directory / place / f"{name}{end}.jsonl" for end in ("_e", "") for place in DATA_PLACES
    )
    return next((path for path in paths if path.is_file()), None)


def _read_prompts(directory: Path, names: Sequence[str]) -> dict[str, str]:
    paths = [directory / place / PROMPTS for place in PROMPT_PLACES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"LongBench: there is no {PROMPTS} in {directory}. {HELP}")
    prompts = read_json(path)
    for name in names:
        prompt = read_text(prompts, name, str(path))
        _check_prompt(prompt, f"{path}: the prompt of {name!r}")
        if _checksum(prompt) != DATA_SETS[name].prompt:
            log.warning(
                "%s: the prompt of %s is not the one LongBench published; its scores compare with "
                "those under the same prompt alone",
                path,
                name,
            )
    return {name: prompts[name] for name in names}


def _check_prompt(prompt: str, what: str) -> None:
    """Raises ValueError unless a prompt is filled with whole texts, ``{context}`` among them."""
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"{what} cannot be filled: {error}; a brace itself is doubled") from error
    fields = [(name, form, mark) for _, name, form, mark in parts if name is not None]
    for name, form, conversion in fields:
        if name not in ("context", "input") or form or conversion:
            field = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(
                f"{what} names something else than {{context}} and {{input}}: {{{field}}}"
            )
    if "context" not in [name for name, *_ in fields]:
        raise ValueError(f"{what} has no {{context}}")


def _read_data_set(name: str, path: Path, prompt: str, most: int | None) -> ItemTask:
    data_set, items = DATA_SETS[name], []
    for where, row in read_objects(path):
        text = {key: read_text(row, key, where) for key in ("input", "context")}
        answers = read_texts(row, "answers", where, may_be_empty=True)
        if not any(answer.strip() for answer in answers):
            raise ValueError(f"{where}: 'answers' is {list(answers)!r:.60}, empty: no score but 0")
        words = row.get("length")
        if isinstance(words, bool) or not isinstance(words, int) or words < 0:
            raise ValueError(f"{where}: 'length' is {words!r:.60}; accepted: a number of words")
        classes: tuple[str, ...] = ()
        if data_set.metric == "classification":
            classes = read_texts(row, "all_classes", where, least=2)
            if not set(answers) & set(classes):
                raise ValueError(
                    f"{where}: 'answers' is {list(answers)!r:.60}, none of 'all_classes': no score "
                    "but 0"
                )
        stated = row.get("dataset", name)
        if stated not in (name, f"{name}_e"):
            raise ValueError(f"{where}: 'dataset' is {stated!r:.60}, in a file of {name!r}")
        identity = str(row.get("_id", where.rpartition(" ")[2]))
        items.append(Item(identity, prompt.format(**text), answers, (), classes, words))
    settings = {
        "file": file_sha256(path)[:16],
        "items": len(items[:most]),
        "prompt": _checksum(prompt),
        "max_new_tokens": data_set.count,
    }
    return ItemTask(
        LONGBENCH,
        name,
        tuple(items[:most]),
        metrics_of(data_set.metric),
        data_set.count,
        data_set.is_few_shot,
        name in ENDS_AT_LINE_BREAK,
        settings,
    )


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
