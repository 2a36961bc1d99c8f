"""What the files of a checkpoint say of a token for the beginning of a sequence."""

import json

import pytest

from fope_jax.data.bos import Bos, find_bos, read_bos
from fope_jax.data.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    TokenizerError,
    train_sentencepiece,
)

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}


def template(*first, last=()):
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in first]
    after = [{"SpecialToken": {"id": name, "type_id": 0}} for name in last]
    special = {name: {"id": name, "ids": [1], "tokens": [name]} for name in (*first, *last)}
    single = [*pieces, {"Sequence": {"id": "A", "type_id": 0}}, *after]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


def write(directory, processor=None, config=None, names=None, model=None, tokens=("<s>", "</s>")):
    """The files of a tokenizer whose added tokens have the ids 0, 1, ..."""
    added = [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, name in enumerate(tokens)
    ]
    vocab = {name: i for i, name in enumerate([*tokens, "a", "b"])}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": processor,
        "decoder": {k: v for k, v in BYTE_LEVEL.items()},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": config,
        "special_tokens_map.json": names,
        "config.json": model,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        if values is not None:
            (directory / name).write_text(json.dumps(values))
    return directory / "tokenizer.json"


LLAMA_3 = {"type": "Sequence", "processors": [BYTE_LEVEL, template("<s>")]}
AS_OBJECT = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True}
DECODER = {"added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}

CASES = {
    "stated": (dict(config={"add_bos_token": True, "bos_token": "<s>"}), ("<s>", True)),
    "an object": (dict(config={"add_bos_token": True, "bos_token": AS_OBJECT}), ("<s>", True)),
    "stated not": (dict(config={"add_bos_token": False, "bos_token": "<s>"}), ("<s>", False)),
    "named alone": (dict(config={"bos_token": "<s>"}), ("<s>", False)),
    # Qwen: its config.json has a bos_token_id that no text begins with.
    "none": (
        dict(
            config={"add_bos_token": False, "bos_token": None},
            processor=BYTE_LEVEL,
            model={"bos_token_id": 0},
        ),
        (None, False),
    ),
    "no files": (dict(model={"bos_token_id": 0}), (None, False)),
    "GPT-NeoX, SmolLM2": (
        dict(
            config={"bos_token": "</s>", "eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"},
            processor=BYTE_LEVEL,
        ),
        ("</s>", False),
    ),
    "a template": (
        dict(
            processor=template("<s>"),
            config={"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"},
        ),
        ("<s>", True),
    ),
    "Llama 3": (dict(processor=LLAMA_3, config={"bos_token": "<s>"}), ("<s>", True)),
    "a template alone": (dict(processor=template("<s>", last=("</s>",))), ("<s>", True)),
    "a template without": (
        dict(
            processor=template(last=("</s>",)),
            config={"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"},
        ),
        ("<s>", False),
    ),
    "RoBERTa's": (
        dict(processor={"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}),
        ("<s>", True),
    ),
    "null leaves it to the template": (
        dict(config={"add_bos_token": None, "bos_token": "<s>"}, processor=template("<s>")),
        ("<s>", True),
    ),
    "null is no default": (
        dict(
            config={"add_bos_token": None, "bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"}
        ),
        ("<s>", False),
    ),
    "LlamaTokenizer adds by default": (
        dict(config={"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"}),
        ("<s>", True),
    ),
    "and has a default token": (dict(config={"tokenizer_class": "LlamaTokenizer"}), ("<s>", True)),
    "unless it is not there": (
        dict(config={"tokenizer_class": "LlamaTokenizer"}, tokens=("</s>",)),
        (None, False),
    ),
    "the class in config.json": (dict(model={"tokenizer_class": "LlamaTokenizer"}), ("<s>", True)),
    "special_tokens_map.json": (
        dict(config={"add_bos_token": True}, names={"bos_token": AS_OBJECT}),
        ("<s>", True),
    ),
    "it counts before": (
        dict(config={"add_bos_token": True, "bos_token": "</s>"}, names={"bos_token": "<s>"}),
        ("<s>", True),
    ),
    "but not with a decoder": (
        dict(
            config={"add_bos_token": True, "bos_token": "</s>"} | DECODER,
            names={"bos_token": "<s>"},
        ),
        ("</s>", True),
    ),
    "named by its id": (
        dict(config={"add_bos_token": True}, model={"bos_token_id": 1}),
        ("</s>", True),
    ),
    "named nowhere": (dict(config={"add_bos_token": True}), (None, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_checkpoint_says_is_read(tmp_path, name):
    files, expected = CASES[name]
    assert read_bos(write(tmp_path, **files))[:2] == expected


def test_a_byte_order_mark_before_a_file_is_none_of_it(tmp_path, caplog):
    path = write(tmp_path, config={"add_bos_token": True, "bos_token": "<s>"})
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_bos(path)[:2] == ("<s>", True) and not caplog.text


def test_what_contradicts_itself_is_logged(tmp_path, caplog):
    stated = {"bos_token": "<s>"}
    path = write(tmp_path / "a", template("<s>"), stated | {"add_bos_token": False})
    assert read_bos(path)[:2] == ("<s>", False)
    assert "add_bos_token = False in tokenizer_config.json, but" in caplog.text
    assert "puts <s> before a text" in caplog.text
    path = write(tmp_path / "b", template(), stated | {"add_bos_token": True})
    assert read_bos(path)[:2] == ("<s>", True)
    assert "puts nothing before a text" in caplog.text
    path = write(tmp_path / "c", template("<s>", "</s>"))
    assert read_bos(path)[:2] == ("<s>", True)
    assert "puts 2 tokens before a text (<s>, </s>)" in caplog.text
    read_bos(write(tmp_path / "d", None, {"add_bos_token": True}))
    assert "no file names a bos_token; none is added" in caplog.text


def test_what_cannot_be_read_is_named(tmp_path, caplog):
    with pytest.raises(TokenizerError, match="its bos_token '<bos>' is not in tokenizer.json"):
        read_bos(write(tmp_path, config={"add_bos_token": True, "bos_token": "<bos>"}))
    with pytest.raises(TokenizerError, match="is no tokenizer.json"):
        read_bos(write(tmp_path, {"type": "TemplateProcessing", "single": [{"SpecialToken": 3}]}))
    (tmp_path / "tokenizer.json").write_text("no JSON")
    read_bos(tmp_path / "tokenizer.json")
    assert "what it says of a BOS token is not known" in caplog.text


def test_a_tokenizer_that_is_no_file_has_none(tmp_path, monkeypatch):
    write(tmp_path, config={"add_bos_token": True, "bos_token": "<s>"})
    monkeypatch.chdir(tmp_path)
    assert read_bos(tmp_path / "bytes")[:2] == (None, False)


def test_the_token_is_found_by_its_name(tmp_path):
    tokenizer = JsonTokenizer.load(write(tmp_path))
    assert find_bos(tokenizer, "<s>") == Bos("<s>", 0)
    assert find_bos(tokenizer, None) is None
    own = train_sentencepiece(["one two three four 0123456789"], vocab_size=290)
    assert find_bos(own, "</s>") == Bos("</s>", own.eos_id)
    for other in (own, BytesTokenizer(), tokenizer):
        with pytest.raises(ValueError, match=r"evaluate.bos_token = '<bos>' is no token of the"):
            find_bos(other, "<bos>")
