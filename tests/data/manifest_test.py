"""A manifest is believed only as far as it has been checked."""

import copy
import json

import pytest

from fope_jax.data.manifest import CacheError, add_digest, file_hashes, read_manifest
from tests.fuzz.readers_test import MANIFEST


def written(directory, manifest):
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_a_sealed_manifest_comes_back_and_names_its_files(tmp_path):
    manifest = read_manifest(written(tmp_path, add_digest(MANIFEST)))
    assert manifest == add_digest(MANIFEST)
    assert sorted(file_hashes(manifest)) == [
        "train-00000.documents.npz",
        "train-00000.index",
        "train-00000.tokens",
        "validation-00000.documents.npz",
        "validation-00000.index",
        "validation-00000.tokens",
    ]
    assert read_manifest(tmp_path / "elsewhere") is None


def test_every_changed_character_of_a_sealed_manifest_is_found(tmp_path):
    """Valid JSON of the right form too: another digit in a count or a name."""
    text = json.dumps(add_digest(MANIFEST))
    changed = 0
    for at in range(0, len(text), 7):
        other = text[:at] + ("7" if text[at] != "7" else "8") + text[at + 1 :]
        (tmp_path / "manifest.json").write_text(other)
        with pytest.raises(CacheError, match=r"manifest\.json is damaged: .*fope data build"):
            read_manifest(tmp_path)
        changed += 1
    assert changed > 150


def test_a_manifest_from_before_there_was_a_seal_is_read(tmp_path):
    old = copy.deepcopy(MANIFEST)
    for split in old["splits"].values():
        del split["bad_documents"], split["first_bad"]
        for shard in split["shards"]:
            del shard["index"]
    assert read_manifest(written(tmp_path, old)) == old


def changed(path, value):
    manifest = copy.deepcopy(MANIFEST)
    *parents, last = path
    place = manifest
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return manifest


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("dtype",), ..., "dtype is missing"),
        (("dtype",), "|O", r"dtype = '\|O'; accepted: '<u2' or '<i4'"),
        (("block_tokens",), 0, "block_tokens = 0; accepted: 1 or more"),
        (("shard_tokens",), 40, "shard_tokens = 40; accepted: a multiple of block_tokens = 16"),
        (("splits",), {}, r"splits.train is missing"),
        (("splits", "train"), [], "splits.train is no JSON object"),
        ((*SHARD, "tokens"), 65, r"shards\[0\].tokens = 65; accepted: 64, or fewer in the last"),
        ((*SHARD, "tokens"), True, r"shards\[0\].tokens = True; accepted: int"),
        ((*SHARD, "sha256"), "a" * 63, r"sha256 = 'a+'; accepted: 64 hex digits"),
        ((*SHARD, "file"), "../x", r"file = '\.\./x'; accepted: a name in this directory"),
        ((*SHARD, "file"), "train-00000.documents.npz", "file = 'train-.*' is named twice"),
        (("tokenizer", "fingerprint"), 7, "tokenizer.fingerprint = 7; accepted: str"),
        (("sources", 0, "sha256"), ..., r"sources\[0\].sha256 is missing"),
        (("splits", "train", "bad_documents"), -1, "bad_documents = -1; accepted: 0 or more"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, path, value, message):
    with pytest.raises(CacheError, match=rf"manifest\.json is damaged: .*{message}"):
        read_manifest(written(tmp_path, changed(path, value)))
