"""The beginning-of-sequence (BOS) token that a checkpoint was trained with."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.data.tokenizers import Tokenizer, TokenizerError

log = logging.getLogger(__name__)

# Tokenizer classes of transformers whose ``add_bos_token`` defaults to true, and their BOS token.
ADDED_BY_DEFAULT = {
    "LlamaTokenizer": "<s>",
    "CodeLlamaTokenizer": "<s>",
    "GemmaTokenizer": "<bos>",
    "CohereTokenizer": "<BOS_TOKEN>",
}


class Bos(NamedTuple):
    """A BOS token: its name and id."""

    token: str
    id: int


def find_bos(tokenizer: Tokenizer, token: str | None) -> Bos | None:
    """The BOS token of that name, None for None; ValueError if the tokenizer lacks it."""
    if token is None:
        return None
    index = tokenizer.token_id(token)
    if index is None:
        raise ValueError(
            f"evaluate.bos_token = {token!r} is no token of the tokenizer, which has "
            f"{tokenizer.vocab_size}; accepted: the name of one of them, or none"
        )
    return Bos(token, index)


def encode_prompt(tokenizer: Tokenizer, text: str, bos: Bos | None) -> list[int]:
    """The tokens of a text that a model reads first, after ``bos`` where it is given."""
    if bos is not None:  # else a BOS token written in the text would count twice
        text = text.removeprefix(bos.token)
    first = [] if bos is None else [bos.id]
    return first + (list(tokenizer.encode(tokenizer.prefix + text)) if text else [])


class CheckpointBos(NamedTuple):
    """A checkpoint's BOS token or None, whether training texts began with it, and who says so."""

    token: str | None
    added: bool
    source: str


def read_bos(path: Path) -> CheckpointBos:
    """Reads the BOS token from a tokenizer.json and the configuration files beside it.

    The token is ``bos_token`` of tokenizer_config.json, or of special_tokens_map.json if the former
    has no ``added_tokens_decoder``; else the token that tokenizer.json puts first, or the
    ``bos_token_id`` of config.json. Texts begin with it according to the first of these that
    applies:

    1. ``add_bos_token`` of tokenizer_config.json is true or false;
    2. the post-processor of tokenizer.json is a template, with or without a token before the text;
    3. ``tokenizer_class`` is in ``ADDED_BY_DEFAULT``.

    A ``bos_token_id`` alone decides nothing: models trained without BOS have one too. transformers
    5 applies only rule 2 to a tokenizer.json, transformers 4 only rule 1 to the classes of rule 3.
    If rules 1 and 2 disagree, a warning is logged.

    Reference: ``tokenization_utils_base.py``, ``tokenization_utils_tokenizers.py`` and
    ``models/*/tokenization_*.py`` of Hugging Face transformers 5.24.0 and 4.57.1.
    """
    if not path.is_file():  # "bytes" and "sentencepiece" are not files
        return CheckpointBos(None, False, "no tokenizer.json")
    content = _read(path)
    if not content:
        return CheckpointBos(None, False, f"{path.name} cannot be read")
    files = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    config, names, model = (_read(path.with_name(name)) for name in files)
    try:
        first = _first_tokens(content.get("post_processor"))
        added_tokens = content.get("added_tokens") or ()
        vocabulary = content.get("model", {}).get("vocab", {})
        known = {entry if isinstance(entry, str) else entry[0] for entry in vocabulary}
        known |= {token["content"] for token in added_tokens}
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise TokenizerError(f"{path} is no tokenizer.json: {error!r}") from error
    if "added_tokens_decoder" not in config and "bos_token" in names:
        config = config | {"bos_token": names["bos_token"]}
    kind = str(config.get("tokenizer_class") or model.get("tokenizer_class")).removesuffix("Fast")
    default = ADDED_BY_DEFAULT.get(kind)
    token = config.get("bos_token", default if default in known else None)
    token = token.get("content") if isinstance(token, Mapping) else token
    token = token if isinstance(token, str) and token else None

    added = config.get("add_bos_token")
    if isinstance(added, bool):
        source = f"add_bos_token = {added} in tokenizer_config.json"
        if first is not None and bool(first) != added:
            log.warning(
                "%s: %s, but the post-processor of %s puts %s before a text; the former counts, "
                "and evaluate.add_bos_token can change it",
                path.parent,
                source,
                path.name,
                ", ".join(first) or "nothing",
            )
    elif first is not None:
        added, source = bool(first), f"the post-processor of {path.name}"
    elif "add_bos_token" not in config and default and token:
        added, source = True, f"the default of {kind}"
    else:
        added, source = False, "nothing beside the tokenizer says that it is"
    if first and len(first) > 1:
        log.warning(
            "%s puts %d tokens before a text (%s): one alone can be added, the one that "
            "evaluate.bos_token names",
            path,
            len(first),
            ", ".join(first),
        )
    if added and token is None:
        bos_id = model.get("bos_token_id")
        named = [entry["content"] for entry in added_tokens if entry.get("id") == bos_id]
        token = next(iter(first or named), None)
        if token is None:
            log.warning("%s: %s, but no file names a bos_token; none is added", path.parent, source)
            added = False
    if token is not None and token not in known:
        if added:
            raise TokenizerError(
                f"{path.parent}: {source}, but its bos_token {token!r} is not in {path.name}"
            )
        token = None
    return CheckpointBos(token, added, source)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if absent or unreadable, so that weights still import."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read; what it says of a BOS token is not known: %s", path, error)
        return {}
    return values if isinstance(values, dict) else {}


def _first_tokens(processor: Any) -> list[str] | None:
    """The tokens that a post-processor puts before a text; None if it is not a template."""
    if not isinstance(processor, Mapping):
        return None
    kind = processor.get("type")
    if kind == "Sequence":
        of_each = map(_first_tokens, processor.get("processors", ()))
        templates = [tokens for tokens in of_each if tokens is not None]
        # Each processor puts its tokens before those of the processors before it.
        return [token for tokens in reversed(templates) for token in tokens] if templates else None
    if kind == "TemplateProcessing":
        pieces = itertools.takewhile(lambda p: "SpecialToken" in p, processor.get("single", ()))
        special = processor.get("special_tokens", {})
        names = [piece["SpecialToken"]["id"] for piece in pieces]
        parts = [special.get(name, {}).get("tokens", [name]) for name in names]
        return [str(token) for part in parts for token in part]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [str(processor["cls"][0])]
    return None
