"""Every tokenizer gives back the text it got, and counts its bytes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.data import tokenizers as tk
from fope_jax.data.tokenizers import BytesTokenizer, JsonTokenizer, TokenizerError
from fope_jax.data.tokenizers.sentencepiece import split_after_newlines

TRAINING = [
    "It was 1816.  The whale, the sea; Emma said: \u201cno\u201d.\n\n  Indented\tline 2047\n" * 40,
    "Caf\xe9 na\xefve\r\n" * 30,
]
HARD = [
    "",
    " ",
    "  a  b ",
    "\n",
    "\n\n\n\n\n",
    "\r\n\r\n",
    "a\u2581b \u2581 \u2581\u2581",
    "\0\t\x1a",
    "</s><pad><unk><0x41>\u2047",
    "12 3456 007",
    "\u65e5\u672c \U0001f600 e\u0301 \xe9 \ufeff",
    "x" * 5000,
]


def byte_level_json(tmp_path, eos="<|endoftext|>", decoder="ByteLevel", **config):
    """A byte-level BPE such as GPT-NeoX's, trained on a few lines."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = getattr(decoders, decoder)()
    tokenizer.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[eos, "<|padding|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def sentencepiece():
    return tk.train_sentencepiece(TRAINING, vocab_size=360)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return JsonTokenizer.load(byte_level_json(tmp_path_factory.mktemp("json")))


@pytest.fixture(params=["sentencepiece", "bytes", "byte_level"])
def tokenizer(request):
    if request.param == "bytes":
        return BytesTokenizer()
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", HARD + TRAINING)
def test_lossless_and_bytes_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eos_id not in ids and tokenizer.pad_id not in ids


@settings(max_examples=150, deadline=None)
@given(
    st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]), st.sampled_from("\n \t\u2581<>/s019\r\0ab")
        ),
        max_size=60,
    )
)
def test_sentencepiece_is_lossless_on_any_text(text):
    tokenizer = _trained()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def _trained(cache=[]):  # noqa: B006 - one model for all the examples of hypothesis
    if not cache:
        cache.append(tk.train_sentencepiece(TRAINING, vocab_size=360))
    return cache[0]


def test_special_tokens_have_no_bytes(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[[tokenizer.eos_id, tokenizer.pad_id]].tolist() == [0, 0]
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("a b"), tokenizer.pad_id]) == "a b"


def test_batches_are_the_texts_one_by_one(tokenizer):
    texts = HARD + TRAINING
    together = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in together] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in together)


def test_saved_in_a_cache_and_loaded_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    description = json.loads(json.dumps(tk.describe_tokenizer(tokenizer)))
    loaded = tk.load_tokenizer(tmp_path, description)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TRAINING[0]) == tokenizer.encode(TRAINING[0])
    assert (loaded.vocab_size, loaded.eos_id, loaded.pad_id) == (
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )


def test_a_changed_tokenizer_file_is_named(sentencepiece, tmp_path):
    sentencepiece.save(tmp_path)
    tk.train_sentencepiece(TRAINING, vocab_size=340).save(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is damaged"):
        tk.load_tokenizer(tmp_path, tk.describe_tokenizer(sentencepiece))


# ---------------------------------------------------------------------------- SentencePiece


def test_training_twice_gives_the_same_model(sentencepiece):
    again = tk.train_sentencepiece(iter(TRAINING), vocab_size=360)
    assert again.fingerprint == sentencepiece.fingerprint
    assert sentencepiece.vocab_size == 360
    assert (sentencepiece.pad_id, sentencepiece.eos_id) == (0, 1)


def test_cutting_a_document_changes_no_token(sentencepiece):
    """The tokens of the pieces are those of one call on the whole document."""
    text = "\n".join(TRAINING) * 20 + "\n\n\nend"
    whole = sentencepiece.processor.encode(text)
    pieces = list(split_after_newlines(text, 64))
    assert len(pieces) > 100 and "".join(pieces) == text
    assert sum((sentencepiece.processor.encode(p) for p in pieces), []) == whole
    assert sentencepiece.encode(text) == whole


def test_digits_stand_alone_and_newlines_too(sentencepiece):
    pieces = [sentencepiece.decode([i]) for i in range(sentencepiece.vocab_size)]
    assert not [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)]
    assert sorted(p for p in pieces if "\n" in p) == ["\n", "\n", "\n\n"]  # one is the byte 0x0A
    assert len(sentencepiece.encode("20479")) == 5


def test_lines_with_tabs_and_long_lines_are_trained_on():
    texts = ["zebra zebra\tzebra " * 2000]  # one line of 36,000 characters with tabs
    tokenizer = tk.train_sentencepiece(texts, vocab_size=285)
    assert "zebra" in {tokenizer.decode([i]).strip() for i in range(285)}


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_vocabulary_that_does_not_fit_the_text(size):
    with pytest.raises(TokenizerError, match=f"vocab_size = {size} does not fit") as caught:
        tk.train_sentencepiece(["a few words only"], vocab_size=size)
    assert "--character_coverage" not in str(caught.value)  # no option of ours


def test_no_training_text():
    with pytest.raises(TokenizerError, match="no characters"):
        tk.train_sentencepiece(["", "\n\n"], vocab_size=400)


# ---------------------------------------------------------------------------- tokenizer.json


def test_a_special_token_written_in_a_text_is_text(byte_level):
    text = "one<|endoftext|>two"
    ids = byte_level.encode(text)
    assert byte_level.eos_id not in ids and byte_level.decode(ids) == text


def test_eos_comes_from_the_config_beside_it(tmp_path):
    eos = {"content": "<stop>"}
    tokenizer = JsonTokenizer.load(byte_level_json(tmp_path, eos="<stop>", eos_token=eos))
    assert tokenizer.eos == "<stop>" and tokenizer.eos_id == 0 and tokenizer.pad_id == 1


def test_a_byte_order_mark_before_a_tokenizer_file_is_none_of_it(tmp_path):
    path = byte_level_json(tmp_path)
    plain = JsonTokenizer.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert JsonTokenizer.load(path).fingerprint == plain.fingerprint


def test_byte_fallback_pieces_count_as_one_byte(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "\u2581": 4, "a": 5, "\u2581a": 6}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": [
            {
                "id": i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, name in enumerate(["<unk>", "</s>"])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [["\u2581", "a"]],
        },
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = JsonTokenizer.load(path)
    ids = tokenizer.encode(" a\xe9a")
    assert ids == [6, 2, 3, 5] and tokenizer.decode(ids) == " a\xe9a"
    assert tokenizer.token_bytes.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert tokenizer.pad_id == tokenizer.eos_id == 1  # no pad token of its own


def test_wrong_tokenizer_files(tmp_path):
    with pytest.raises(TokenizerError, match=r"none\.json'.*no such file"):
        JsonTokenizer.load(tmp_path / "none.json")
    for content in ("[]", '{"a": 1}', '{"added_tokens": null}', '{"added_tokens": [{"id": 1}]}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(TokenizerError, match="is no tokenizer.json: it has no list 'added_tok"):
            JsonTokenizer.load(tmp_path / "other.json")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / "pointer.json").write_bytes(pointer)
    with pytest.raises(
        TokenizerError, match=r"pointer\.json.*: it is a Git LFS pointer, .*lfs pull"
    ):
        JsonTokenizer.load(tmp_path / "pointer.json")
    path = byte_level_json(tmp_path)
    path.with_name("tokenizer_config.json").write_bytes(pointer)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json .* Git LFS pointer, .*lfs pull"):
        JsonTokenizer.load(path)
    path.with_name("tokenizer_config.json").unlink()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(TokenizerError, match=r"folder\.json': it is a directory"):
        JsonTokenizer.load(tmp_path / "folder.json")
    with pytest.raises(TokenizerError, match="has no end-of-document token"):
        JsonTokenizer.load(byte_level_json(tmp_path, eos="<stop>"))
    with pytest.raises(TokenizerError, match="'<other>' is not in"):
        JsonTokenizer.load(byte_level_json(tmp_path, eos_token="<other>"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"decoder \['WordPiece'\]"):
        JsonTokenizer.load(byte_level_json(tmp_path, decoder="WordPiece"))
