"""The files of a tokenizer in a Hugging Face checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.data.bos import find_bos, read_bos
from fope_jax.data.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
)
from fope_jax.data.tokenizers.tokenizer_json import PAD_NAMES
from fope_jax.interop.bpe_rules import bos_template
from fope_jax.interop.tokenizer_conversion import SPECIAL_TOKENS, to_tokenizer_json
from fope_jax.storage.files import read_json, write_json, write_text

log = logging.getLogger(__name__)

TOKENIZER, CONFIG, NAMES = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (TOKENIZER, CONFIG, NAMES, GENERATION)
_TEMPLATES = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


class BosPolicy(NamedTuple):
    """The BOS token that texts begin with; None if they begin with none."""

    token: str | None

    @classmethod
    def of_files(cls, tokenizer_json: Path) -> BosPolicy:
        """What a tokenizer.json and the files beside it say, see ``read_bos``."""
        stated = read_bos(tokenizer_json)
        return cls(stated.token if stated.added else None)


def write_tokenizer(
    directory: Path,
    tokenizer: Tokenizer | None,
    source: Path | None,
    bos: BosPolicy | None,
    length: int,
) -> str:
    """Writes the tokenizer of a run, and generation_config.json; returns a sentence about it.

    Args:
      directory: of the checkpoint.
      tokenizer: of the run; None if it cannot be read.
      source: its tokenizer.json, which is copied with the files beside it; None converts.
      bos: the policy of the run, if known; files that say otherwise are changed.
      length: ``model_max_length`` in tokens.
    """
    if source is not None and source.is_file():
        copy_tokenizer(source, directory)
        note = "tokenizer.json is the file that the run was made with."
    elif isinstance(tokenizer, BytesTokenizer | SentencePieceTokenizer):
        note = _write_converted(directory, tokenizer)
    else:
        note = "The tokenizer is not here: its file is missing."
        log.warning("%s", note)
    if tokenizer is None:
        return note
    _write_missing(directory, tokenizer, bos, length)
    if bos is not None and (directory / TOKENIZER).is_file() and not _states(directory, bos):
        _write_bos_policy(directory, tokenizer, bos)
        note += f" Texts begin with {bos.token or 'no BOS token'}, which it did not say."
    return note


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies a tokenizer.json and the files beside it."""
    for path in map(source.with_name, TOKENIZER_FILES):
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())


def special_ids(tokenizer: Tokenizer | None, bos: BosPolicy | None) -> dict[str, int | None]:
    """The ids that config.json and generation_config.json name."""
    if tokenizer is None:
        return {}
    found = find_bos(tokenizer, bos.token if bos else None)
    return {
        "bos_token_id": found and found.id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _write_converted(directory: Path, tokenizer: BytesTokenizer | SentencePieceTokenizer) -> str:
    """Writes tokenizer.json, or the SentencePiece model if that would not be exact."""
    try:
        write_text(directory / TOKENIZER, to_tokenizer_json(tokenizer))
    except ValueError as error:
        tokenizer.save(directory)
        note = (
            f"There is no tokenizer.json, since it would not be exact ({error}); tokenizer.model "
            "is the SentencePiece model that the run was trained with."
        )
        log.warning("%s", note)
        return note
    kind = "bytes" if isinstance(tokenizer, BytesTokenizer) else "a SentencePiece model"
    return (
        f"tokenizer.json gives the tokens of the run; it was converted from {kind} and compared on "
        "200 texts."
    )


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    if not isinstance(tokenizer, JsonTokenizer):
        return {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    pads = (name for name in PAD_NAMES if tokenizer.token_id(name) == tokenizer.pad_id)
    return {"eos_token": tokenizer.eos, "pad_token": next(pads, tokenizer.eos)}


def _write_missing(
    directory: Path, tokenizer: Tokenizer, bos: BosPolicy | None, length: int
) -> None:
    """Writes the configuration files that were not copied."""
    names = _special_names(tokenizer)
    if not (directory / CONFIG).is_file():
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # the name of a special token in a text is text
        }
        write_json(directory / CONFIG, described | names)
    if not (directory / NAMES).is_file():
        write_json(directory / NAMES, names)
    if not (directory / GENERATION).is_file():
        ids = special_ids(tokenizer, bos)
        write_json(directory / GENERATION, {name: i for name, i in ids.items() if i is not None})


def _states(directory: Path, bos: BosPolicy) -> bool:
    """Whether the files state this policy of BOS."""
    try:
        return BosPolicy.of_files(directory / TOKENIZER) == bos
    except TokenizerError:  # a BOS token that is no token: the run has none
        return False


def _write_bos_policy(directory: Path, tokenizer: Tokenizer, bos: BosPolicy) -> None:
    path = directory / TOKENIZER
    rules = json.loads(path.read_text(encoding="utf-8-sig"))
    rules["post_processor"] = _processor(rules.get("post_processor"), tokenizer, bos)
    write_text(path, json.dumps(rules, ensure_ascii=False, indent=1))
    policy: dict[str, Any] = {"add_bos_token": bos.token is not None}
    policy |= {"bos_token": bos.token} if bos.token else {}
    for name, values in ((CONFIG, policy), (NAMES, {"bos_token": bos.token} if bos.token else {})):
        write_json(directory / name, read_json(directory / name) | values)


def _processor(
    stated: dict[str, Any] | None, tokenizer: Tokenizer, bos: BosPolicy
) -> dict[str, Any] | None:
    """A post-processor that adds ``bos`` alone; processors that add no token are kept."""
    parts = [stated] if stated else []
    if stated and stated["type"] == "Sequence":
        parts = stated["processors"]
    kept = [part for part in parts if part["type"] not in _TEMPLATES]
    if found := find_bos(tokenizer, bos.token):
        kept.append(bos_template(found.token, found.id))
    return {"type": "Sequence", "processors": kept} if len(kept) > 1 else next(iter(kept), None)
