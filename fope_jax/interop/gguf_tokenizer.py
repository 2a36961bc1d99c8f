"""The tokenizer in a GGUF file: byte-level BPE, as tokenizer.json and tokenizer_config.json.

A file names the rule that cuts a text before any merge, ``tokenizer.ggml.pre``, and does not hold
it. The rules here are those of the tokenizer.json files that the names stand for.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.extras import require
from fope_jax.interop.bpe_rules import bos_template, bpe_rules
from fope_jax.interop.gguf import TOKENIZER as PREFIX
from fope_jax.interop.gguf import GGUFFile
from fope_jax.interop.tokenizer_files import CONFIG, TOKENIZER
from fope_jax.storage.files import write_json, write_text

# ``tokenizer.ggml.token_type``
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
_ADVICE = "give the model's own file, --config.data.tokenizer=PATH/tokenizer.json"

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class PreTokenizer(NamedTuple):
    """How a text is cut before the merges.

    Attributes:
      steps: of the pre-tokenizer, in tokenizer.json's form.
      nfc: whether a text is first composed, Unicode NFC.
      ignore_merges: whether a piece that is a token stays whole, whatever the merges say.
      adds_bos: whether texts begin with BOS where the file does not say.
    """

    steps: tuple[dict[str, Any], ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


def _split(numbers: str) -> tuple[dict[str, Any], ...]:
    """Words with the sign before them, numbers, signs, line ends and spaces."""
    words = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
    pattern = {"Regex": _CONTRACTIONS + words + numbers + _OTHERS}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return (cut, _BYTE_LEVEL | {"use_regex": False})


_GPT2 = (_BYTE_LEVEL | {"use_regex": True},)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_GPT2),
    "olmo": PreTokenizer(_GPT2, nfc=True),
    "smollm": PreTokenizer(({"type": "Digits", "individual_digits": True}, *_GPT2)),
    "qwen2": PreTokenizer(_split(r"\p{N}"), nfc=True),
    "llama-bpe": PreTokenizer(_split(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
}


def write_gguf_tokenizer(file: GGUFFile, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json of a file.

    Tokens of the types control and unknown are special: no text becomes one. User-defined tokens
    are matched in a text before anything else. Unused rows of the embedding have no token. The chat
    template is left out.

    Raises ValueError for a tokenizer that is no byte-level BPE or is cut by an unknown rule.
    """
    try:
        rules, config = tokenizer_rules(file.metadata)
        content = json.dumps(rules, ensure_ascii=False)
        require("tokenizers", "train").Tokenizer.from_str(content)
    except ImportError:
        raise
    except Exception as error:  # the library's exception does not name the file
        raise ValueError(f"{file.path}: the tokenizer cannot be rebuilt: {error}") from error
    write_text(directory / TOKENIZER, content)
    write_json(directory / CONFIG, config)


def tokenizer_rules(metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of tokenizer.json and tokenizer_config.json; ValueError for another tokenizer."""
    model, pre = metadata.get(f"{PREFIX}model"), metadata.get(f"{PREFIX}pre")
    if model != "gpt2":
        raise ValueError(f"{PREFIX}model={model!r}: expected 'gpt2', byte-level BPE; {_ADVICE}")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(map(repr, PRE_TOKENIZERS))
        raise ValueError(f"{PREFIX}pre={pre!r}: expected one of {known}; {_ADVICE}")
    if metadata.get(f"{PREFIX}add_space_prefix"):
        raise ValueError(f"{PREFIX}add_space_prefix=True: expected False; {_ADVICE}")
    tokens = _list_of(metadata, "tokens", str)
    merges = [merge.split(" ") for merge in _list_of(metadata, "merges", str)]
    types = [NORMAL] * len(tokens)
    if f"{PREFIX}token_type" in metadata:
        types = _list_of(metadata, "token_type", int)
    if len(types) != len(tokens):
        raise ValueError(f"{len(types):,} token types for {len(tokens):,} tokens")
    for index, merge in enumerate(merges):
        if len(merge) != 2:
            raise ValueError(f"{PREFIX}merges[{index}] is {' '.join(merge)!r}: expected two pieces")
    used = [(name, i) for i, name in enumerate(tokens) if types[i] != UNUSED]
    repeated = [name for name, count in Counter(name for name, _ in used).items() if count > 1]
    if repeated:
        raise ValueError(f"{PREFIX}tokens holds {repeated[0]!r} more than once")
    unknown_types = sorted({*types} - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED})
    if unknown_types:
        raise ValueError(f"{PREFIX}token_type holds {unknown_types}: expected 1 to 5")

    rule = PRE_TOKENIZERS[pre]
    bos, eos, pad, unknown = (
        _named(metadata, tokens, key) for key in ("bos", "eos", "padding", "unknown")
    )
    adds_bos = bool(metadata.get(f"{PREFIX}add_bos_token", rule.adds_bos and bos is not None))
    if adds_bos and bos is None:
        raise ValueError(f"{PREFIX}add_bos_token=True, but there is no {PREFIX}bos_token_id")
    rules = bpe_rules(
        dict(used),
        merges,
        added=[
            (i, name, types[i] != USER_DEFINED)
            for name, i in used
            if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        normalizer={"type": "NFC"} if rule.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": list(rule.steps)},
        post_processor=bos_template(bos, tokens.index(bos)) if adds_bos and bos else None,
        decoder=_BYTE_LEVEL | {"use_regex": True},
        unk_token=None,  # a byte without a token is left out, as llama.cpp does
        ignore_merges=rule.ignore_merges,
    )
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unknown}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
    }
    return rules, config | {name: token for name, token in names.items() if token is not None}


def _list_of(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(PREFIX + key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{PREFIX}{key} is {values!r:.80}: expected a list of {kind.__name__}")
    return values


def _named(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    """The token of ``tokenizer.ggml.NAME_token_id``, None if there is none."""
    index = metadata.get(f"{PREFIX}{name}_token_id")
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise ValueError(f"{PREFIX}{name}_token_id={index}: there are {len(tokens):,} tokens")
    return tokens[index]
