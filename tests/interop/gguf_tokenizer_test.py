"""The tokenizer in a GGUF file, rebuilt, cuts a text as the model's own does."""

import json

import pytest

gguf = pytest.importorskip("gguf", reason="pip install '.[gguf]'")

from tokenizers import Tokenizer  # noqa: E402

from fope_jax.data.bos import read_bos  # noqa: E402
from fope_jax.data.tokenizers import JsonTokenizer  # noqa: E402
from fope_jax.interop.gguf import open_gguf  # noqa: E402
from fope_jax.interop.gguf_tokenizer import tokenizer_rules, write_gguf_tokenizer  # noqa: E402
from tests.interop.tiny_gguf import metadata, random_tensors, vocabulary, write  # noqa: E402

EMBEDDING = {"token_embd.weight": random_tensors()["token_embd.weight"]}


def rebuilt(directory, **values):
    """The tokenizer that a file gives, and its directory."""
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    file = open_gguf(write(directory / "x.gguf", EMBEDDING, values=named))
    write_gguf_tokenizer(file, directory)
    return JsonTokenizer.load(directory / "tokenizer.json")


TEXT = "It's  1234 x\n\n 56  7e\u0301 o'CLOCK's"
# Written by hand from the rules of llama.cpp and the tokenizer.json files of the models.
PIECES = {
    "gpt-2": "It 's _ _1234 _x NN _56 _ _7 e \u0301 _o ' CLOCK 's",
    "olmo": "It 's _ _1234 _x NN _56 _ _7 \u00e9 _o ' CLOCK 's",
    "smollm": "It 's __ 1 2 3 4 _x NN_ 5 6 __ 7 e \u0301 _o ' CLOCK 's",
    "qwen2": "It 's _ _ 1 2 3 4 _x NN _ 5 6 _ _ 7 \u00e9 _o 'CLOCK 's",
    "llama-bpe": "It 's _ _ 123 4 _x NN _ 56 _ _ 7 e \u0301 _o 'CLOCK 's",
}


@pytest.mark.parametrize("pre", PIECES)
def test_each_rule_cuts_a_text_as_its_models_do(tmp_path, pre):
    rebuilt(tmp_path, pre=pre)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = library.normalizer.normalize_str(TEXT) if library.normalizer else TEXT
    pieces = library.pre_tokenizer.pre_tokenize_str(text)
    cut = [text[start:end] for _, (start, end) in pieces]
    assert cut == [piece.replace("_", " ").replace("N", "\n") for piece in PIECES[pre].split()]


def test_merges_are_applied_within_the_pieces(tmp_path):
    tokenizer = rebuilt(tmp_path)
    tokens = vocabulary()[0]
    assert [tokens[i] for i in tokenizer.encode("and the  12")] == ["and", "Ġthe", "ĠĠ", "1", "2"]
    gpt2 = rebuilt(tmp_path, pre="gpt-2").encode("the  12")
    assert [tokens[i] for i in gpt2] == ["th", "e", "Ġ", "Ġ", "12"]
    text = "any \x00\x07 bytes: \u00e9\U0001f600\u200b\r\n\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_whole_piece_that_is_a_token_ignores_the_merges_in_llama_bpe(tmp_path):
    tokens, types = vocabulary()
    values = {"tokens": [*tokens[:-1], "xyz"], "token_type": [*types[:-1], 1]}  # no merge makes it
    assert rebuilt(tmp_path, pre="llama-bpe", **values).encode("xyz") == [299]
    assert len(rebuilt(tmp_path, pre="qwen2", **values).encode("xyz")) == 3


def test_special_tokens_are_no_text_and_user_defined_ones_are(tmp_path):
    tokenizer, tokens = rebuilt(tmp_path), vocabulary()[0]
    think = tokens.index("<think>")
    assert tokenizer.encode("a<think>b")[1] == think and tokenizer.decode([think]) == "<think>"
    ids = tokenizer.encode("<|im_end|> the")
    assert 2 not in ids and tokenizer.decode(ids) == "<|im_end|> the"
    assert (tokenizer.eos, tokenizer.eos_id) == ("<|im_end|>", 2)
    assert tokenizer.vocab_size == think + 1  # the unused rows have no token
    assert tokenizer.token_id("[PAD299]") is None


@pytest.mark.parametrize(
    ("values", "token", "added"),
    [
        ({}, "<|im_start|>", False),
        ({"add_bos_token": True}, "<|im_start|>", True),
        ({"pre": "llama-bpe"}, "<|im_start|>", True),  # as llama.cpp where nothing is stated
        ({"pre": "llama-bpe", "add_bos_token": False}, "<|im_start|>", False),
        ({"bos_token_id": None}, None, False),
        ({"pre": "llama-bpe", "bos_token_id": None}, None, False),
    ],
)
def test_bos_is_what_the_file_says(tmp_path, values, token, added):
    rebuilt(tmp_path, **values)
    bos = read_bos(tmp_path / "tokenizer.json")
    assert (bos.token, bos.added) == (token, added)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (library.encode("a").tokens[0] == token) == added


def test_a_byte_without_a_token_is_left_out(tmp_path):
    tokens, types = vocabulary()
    types[tokens.index("Z")] = 5
    tokenizer = rebuilt(tmp_path, token_type=types)
    assert tokenizer.decode(tokenizer.encode("aZb")) == "ab"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model='llama': expected 'gpt2', byte-level BPE; give"),
        ({"model": None}, "tokenizer.ggml.model=None: expected 'gpt2'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken': expected one of 'gpt-2', 'olmo'"),
        ({"pre": None}, "tokenizer.ggml.pre=None: .*--config.data.tokenizer=PATH/tokenizer.json"),
        ({"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix=True: expected False"),
        ({"merges": None}, "tokenizer.ggml.merges is None: expected a list of str"),
        ({"merges": ["t h", "th"]}, r"tokenizer.ggml.merges\[1\] is 'th': expected two pieces"),
        ({"merges": ["t h", "th x"]}, "cannot be rebuilt: .*thx"),
        ({"token_type": [1] * 299}, "299 token types for 300 tokens"),
        ({"token_type": [6] * 300}, r"tokenizer.ggml.token_type holds \[6\]: expected 1 to 5"),
        ({"tokens": ["a"] * 300}, "tokenizer.ggml.tokens holds 'a' more than once"),
        ({"eos_token_id": 300}, "tokenizer.ggml.eos_token_id=300: there are 300 tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, "but there is no tokenizer.ggml.bos_tok"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(tmp_path, values, message):
    with pytest.raises(ValueError, match=f"(?s)x.gguf: .*{message}"):
        rebuilt(tmp_path, **values)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_rules_are_json(tmp_path):
    rules, config = tokenizer_rules(metadata())
    assert json.loads(json.dumps(rules)) == rules
    assert config["eos_token"] == "<|im_end|>" and "pad_token" not in config
