"""Tokenizers of every kind: a text comes back and its bytes add up, or it is said to change."""

import functools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.data import build
from fope_jax.data import tokenizers as tk
from fope_jax.data.manifest import add_digest, read_manifest
from fope_jax.data.retrieval import TASKS
from fope_jax.data.retrieval.passkey import TEMPLATES, Passkey
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.retrieval.text_task import NoiseHaystack
from fope_jax.data.tokenizers import JsonTokenizer, encode_documents, sentencepiece, tokenizer_json
from tests.data.tokenizers.examples import (
    BOS,
    EOS,
    LOSSLESS,
    LOSSY,
    MARK,
    MARKED,
    PAD,
    PREPEND,
    TOKENIZERS,
    UNK,
    bpe,
    llama_decoder,
    metaspace,
    spaces,
)

CONTROL = [EOS, PAD, BOS, UNK, "<|im_start|>", "<|u|>", "<|endoftext|>"]
STRANGE = [
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\r",
    "\r\n",
    "\0",
    MARK,
    "\u2047",
    "\ufeff",
    "\u200d",
    "\u0301",
    "e\u0301",
    "\xe9",
    "\ufb01",
    "\u0120",
    "\u010a",
    "\U0001f600",
    "\U0001f468\u200d",
    "\u732b",
    "a",
    "b",
    "ab",
    "xx",
    "<c>",
    "7",
    "the",
    " the",
    "The key",
    "<0x41>",
    "<0xE2>",
    "<",
    "s>",
    "ffff",
    "<<s>s>",
    *CONTROL,
]
TEXTS = st.lists(
    st.sampled_from(STRANGE) | st.characters(exclude_categories=["Cs"]), max_size=12
).map("".join)


@functools.cache
def tokenizer(kind):
    return TOKENIZERS[kind]()


def control_ids(made):
    if not isinstance(made, JsonTokenizer):
        return {made.pad_id, made.eos_id}
    vocab = json.loads(made._content)["model"]["vocab"]
    names = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]
    return {i for i, name in enumerate(names) if name in (EOS, PAD, BOS)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_a_text_comes_back_and_its_bytes_add_up_or_it_is_said_to_change(kind, text):
    made = tokenizer(kind)
    ids = made.encode(text)
    assert not control_ids(made) & set(ids)
    assert all(0 <= i < made.vocab_size for i in ids)
    (own,), (changed,) = encode_documents(made, [text])
    assert not control_ids(made) & set(own.tolist())
    prefix = made.prefix if text else ""
    assert changed == (made.decode(own) != prefix + text)
    if kind in LOSSLESS or kind in MARKED:
        assert made.decode(ids) == text and not changed
    if made.decode(ids) == text:
        assert made.token_bytes[ids].sum() == len(text.encode())
    if not changed:
        assert made.token_bytes[own].sum() == len(text.encode()) + len(prefix)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens_stand_for_no_text(kind):
    made = tokenizer(kind)
    assert made.token_bytes[sorted(control_ids(made))].tolist() == [0] * len(control_ids(made))
    ids = made.encode(" the key")
    assert made.decode([made.eos_id, *ids, made.pad_id, made.vocab_size + 5]) == " the key"


def test_every_kind_is_tried_on_what_it_changes():
    """The property above would hold of tokenizers that change nothing."""
    text = "THE KEY  caf\xe9 e\u0301 \ufb01 \u732b <c> ab"
    for kind in LOSSY:
        assert encode_documents(tokenizer(kind), [text])[1] == [True], kind
    for kind in MARKED:
        assert encode_documents(tokenizer(kind), [text, MARK])[1] == [False, False], kind


@pytest.mark.parametrize("kind", ["bpe, Prepend", "bpe, Metaspace always", "byte-level, prefix"])
def test_a_document_begins_as_the_library_begins_a_text(kind):
    """And a piece of a text does not."""
    made = tokenizer(kind)
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(made._content)
    for text in ("the key", "is", "caf\xe9 is"):
        ((ids,), _) = encode_documents(made, [text])
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert made.encode(" the") + made.encode(" key") == made.encode(" the key")
        assert made.decode(ids) == " " + text
    assert made.prefix == " " and tokenizer("bpe, Replace").prefix == ""


@pytest.mark.parametrize(
    "beside",
    [
        {"bos_token": None, "additional_special_tokens": None, "added_tokens_decoder": None},
        {"bos_token": [BOS], "additional_special_tokens": "<c>", "added_tokens_decoder": [1]},
        {"extra_special_tokens": {"image_token": "<c>"}, "added_tokens_decoder": {"7": "x"}},
        {"extra_special_tokens": ["<c>"], "model_max_length": 1e30},
    ],
)
def test_what_a_configuration_may_say_of_its_tokens(beside):
    made = bpe(**PREPEND, more=[("<c>", {})], beside=beside | {"eos_token": {"content": EOS}})
    named = "extra_special_tokens" in beside
    assert made.control == (("<c>",) if named else ())
    ids = made.encode("a<c>b")
    assert len(ids) == (5 if named else 3) and made.decode(ids) == "a<c>b"


# ---------------------------------------------------------------------------- retrieval


UNREADABLE = ("byte-level, lower case", "byte-level, tokens that take spaces")
READABLE = [kind for kind in TOKENIZERS if kind not in UNREADABLE]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
@pytest.mark.parametrize("kind", READABLE)
def test_windows_of_passkeys_read_as_the_template_says(kind, template):
    made = tokenizer(kind)
    task = Passkey.from_tokenizer(made, template)
    shortest = task.min_length(np.random.default_rng(0), "test")
    for more in range(150, 160):  # filler is cut at every kind of place
        trial = task.draw_trial(np.random.default_rng(0), shortest + more, 0.5, "test")
        text, (key,) = made.decode(trial.tokens), trial.answer_texts
        assert len(trial.tokens) == shortest + more
        assert text.lstrip().startswith(template.intro)
        assert text.count(template.needle.format(key=key)) == 1
        assert text.endswith(f"{template.question} {key}")
        assert "  " not in text
        before, _, after = text.partition(template.needle.format(key=key))
        assert before.endswith(template.filler[-20:]) and after.startswith(template.filler[:20])


@pytest.mark.parametrize("kind", ["bpe, Prepend", "unigram, words", "sentencepiece, no spaces"])
def test_windows_of_every_task_read_as_one_text(kind):
    made = tokenizer(kind)
    for name in TASKS:
        if name not in ("recall", "recall_64_keys", "copy"):  # of token ids
            task = make_task(name, made)
            size = task.min_length(np.random.default_rng(0), "test") + 200
            text = made.decode(task.draw_trial(np.random.default_rng(0), size, 0.5, "test").tokens)
            assert "  " not in text and not re.search(r"\.[A-Z]", text), name


def test_windows_that_are_made_otherwise_than_before_say_so():
    for name in ("passkey", "multi_key"):
        assert "prefix" not in make_task(name, tokenizer("byte-level")).describe()
        assert make_task(name, tokenizer("bpe, Prepend")).describe()["prefix"] == "none"
        assert make_task(name, tokenizer("bytes")).describe()["ends"] == "no space"
    whole_words = NoiseHaystack("a b", (1, 2))
    assert whole_words.describe() == {"haystack": "noise", "filler": "a b"}


# ---------------------------------------------------------------------------- builds


@pytest.fixture
def built(text_config, tmp_path):
    """Builds a cache of texts with a tokenizer."""

    def make(made, texts):
        made.save(tmp_path)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "many.jsonl").write_text(lines)
        config = text_config(
            tokenizer=str(tmp_path / made.filename), train_files=(f"{tmp_path}/many.jsonl",)
        )
        return build.build(config)["train"]

    return make


def test_a_prefix_is_no_change_and_none_of_a_document_s_bytes(built):
    found = built(bpe(**PREPEND), ["the key", "", " is blue"])
    assert found.documents["bytes"].tolist() == [7, 8]
    assert found.summary["changed_documents"] == 0 and found.summary["bytes"] == 15
    decoded = [
        found.tokenizer.decode(found.tokens(d["start"], d["start"] + d["length"]))
        for d in found.documents
    ]
    assert decoded == [" the key", "  is blue"]


def test_changes_that_keep_the_number_of_bytes_are_counted_and_named(built, capsys):
    found = built(tokenizer("byte-level, lower case"), ["the Key", "all right", "\xc9", "THE"])
    assert found.documents["bytes"].tolist() == [7, 9, 2, 3]
    assert found.summary["changed_documents"] == 3
    names = [name.rpartition("/")[2] for name in found.summary["first_changed"]]
    assert names == ["many.jsonl:1", "many.jsonl:3", "many.jsonl:4"]
    said = capsys.readouterr().err
    assert "train: the tokenizer changes 3 documents" in said and "many.jsonl:3" in said


def test_a_manifest_from_before_changed_documents_were_named_is_read(built):
    found = built(tokenizer("bpe, Replace"), ["a"])
    path = found.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for split in manifest["splits"].values():
        del split["first_changed"]
    path.write_text(json.dumps(add_digest(manifest)))
    assert read_manifest(found.directory)["splits"]["train"]["changed_documents"] == 0


# ---------------------------------------------------------------------------- saved


@pytest.mark.parametrize("kind", [*MARKED, *LOSSY])
def test_saved_in_a_cache_and_loaded_the_same(kind, tmp_path):
    made = tokenizer(kind)
    made.save(tmp_path)
    loaded = tk.load_tokenizer(tmp_path, json.loads(json.dumps(tk.describe_tokenizer(made))))
    text = f"the key {BOS}{EOS}  caf\xe9 <|im_start|>"
    assert loaded.encode(text) == made.encode(text)
    assert (loaded.fingerprint, loaded.prefix) == (made.fingerprint, made.prefix)


def test_a_file_with_the_line_ends_of_windows_is_loaded_the_same(tmp_path):
    made = bpe(normalizer=spaces(), decoder=llama_decoder())
    content = json.dumps(json.loads(made._content), indent=1).replace("\n", "\r\n")
    (tmp_path / "own.json").write_bytes(content.encode())
    made = JsonTokenizer.load(tmp_path / "own.json")
    (tmp_path / "cache").mkdir()
    made.save(tmp_path / "cache")
    loaded = tk.load_tokenizer(tmp_path / "cache", tk.describe_tokenizer(made))
    assert loaded.fingerprint == made.fingerprint


def test_only_rules_that_are_left_out_change_a_fingerprint(tmp_path):
    plain, prepended = bpe(normalizer=spaces(), decoder=llama_decoder()), bpe(**PREPEND)
    assert plain.fingerprint == JsonTokenizer.fingerprint_of(plain._content, EOS)
    earlier = JsonTokenizer.fingerprint_of(prepended._content, EOS)
    assert prepended.fingerprint != earlier
    # A cache of before says the earlier one, and is read all the same.
    prepended.save(tmp_path)
    description = tk.describe_tokenizer(prepended) | {"fingerprint": earlier}
    assert tk.load_tokenizer(tmp_path, description).fingerprint == earlier


def test_models_trained_without_a_space_keep_their_ids_and_are_found_out():
    model = sentencepiece._train(
        list(sentencepiece._training_lines(["\u543e\u8f29\u306f\n" * 200])), 276, "0123456789"
    )
    earlier = tk.SentencePieceTokenizer(model)
    assert not earlier.writes_spaces
    (ids,), (changed,) = encode_documents(earlier, ["\u543e \u8f29"])
    assert changed and earlier.decode(ids) == "\u543e\u2581\u8f29"


def test_text_with_spaces_trains_the_model_that_it_always_did():
    lines = list(sentencepiece._training_lines(["The key is blue. The sky.\n" * 40]))
    assert tokenizer("sentencepiece").model == sentencepiece._train(lines, 300, "0123456789")


def test_old_forms_of_metaspace_are_understood():
    rules = {"pre_tokenizer": {"type": "Metaspace", "replacement": MARK, "add_prefix_space": True}}
    assert tokenizer_json._remove_edge_rules(rules) == " "
    assert rules["pre_tokenizer"] == {
        "type": "Metaspace",
        "replacement": MARK,
        "prepend_scheme": "never",
    }
    rules["pre_tokenizer"]["add_prefix_space"] = False
    del rules["pre_tokenizer"]["prepend_scheme"]
    assert tokenizer_json._remove_edge_rules(rules) == ""
    assert metaspace("never")["pre_tokenizer"].prepend_scheme == "never"
