"""Tokenising through Apache Beam gives the cache of a build on one machine, to the last byte."""

import gzip
import importlib.util
import json

import pytest

from fope_jax.data import beam, build, cache, parts
from fope_jax.data.beam import Runner
from fope_jax.data.cache_directories import cache_directory
from fope_jax.data.corpora import CorpusError
from fope_jax.storage.paths import as_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("apache_beam") is None,
        reason="needs Apache Beam in an environment of its own: make beam-test",
    ),
]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 0)  # a part for each file
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(cache, "SHARD_TOKENS", 1024)


@pytest.fixture
def two_builds(text_config, tmp_path):
    """The files of a cache built without Beam and of one built with it."""

    def make(runner, **fields):
        built = []
        for name, own in (("one", None), ("many", runner)):
            config = text_config(cache_dir=str(tmp_path / name), **fields)
            build.build(config, own)
            directory = cache_directory(config)
            built.append({p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()})
            assert [p.name for p in directory.parent.iterdir() if p.is_dir()] == [directory.name]
        return built

    return make


@pytest.fixture
def json_tokenizer(tmp_path):
    """A tokenizer whose file has to travel to the workers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_bit_equal(two_builds):
    one, many = two_builds(Runner())
    assert one == many
    assert len([name for name in one if name.endswith(".tokens")]) > 3


def test_bit_equal_with_two_workers_and_a_tokenizer_of_ones_own(two_builds, json_tokenizer):
    options = ("direct_num_workers=2", "direct_running_mode=multi_threading")
    one, many = two_builds(Runner(options=options), tokenizer=json_tokenizer)
    assert one == many and "tokenizer.json" in one


def test_lines_empty_documents_and_gzip(two_builds, tmp_path, story):
    lines = [json.dumps({"text": t}) for t in (story(50), "", story(200), "caf\u00e9 \u2603")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with gzip.open(tmp_path / "b.json.gz", "wt") as stream:
        stream.write("\n".join(reversed(lines)) + "\n")
    (tmp_path / "c.txt").write_text("")
    train = tuple(f"{tmp_path}/{name}" for name in ("a.jsonl", "b.json.gz", "c.txt"))
    one, many = two_builds(Runner(), train_files=train)
    assert one == many


def test_finished_parts_are_kept_and_others_are_not_trusted(text_config, tmp_path, monkeypatch):
    runner = Runner(parts=str(tmp_path / "parts"))
    made = []

    def run(work, config, tokenizer, runner):
        for part, output in work:
            if not as_path(output + ".npz").exists():
                made.append(part.files)
                parts.save_part(config, lambda: tokenizer, part, output)

    monkeypatch.setattr(beam, "run", run)
    build.build(text_config(cache_dir=str(tmp_path / "one")), runner)
    assert len(made) == 6
    build.build(text_config(cache_dir=str(tmp_path / "two")), runner)
    assert len(made) == 6  # the same text, so nothing was left to do
    (tmp_path / "books" / "train0.txt").write_text("other words")
    changed = build.build(text_config(cache_dir=str(tmp_path / "three")), runner)["train"]
    assert len(made) == 12
    assert changed.documents["bytes"][0] == len("other words")


def test_text_that_cannot_be_read_fails_the_build(text_config, tmp_path):
    (tmp_path / "books" / "train1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(Exception, match=r"train1\.txt is not UTF-8: byte 0xe9 at offset 3"):
        build.build(text_config(), Runner())


def test_tfds_is_refused(text_config):
    config = text_config(
        corpus="c4", train_files=(), validation_files=(), tfds_data_dir="gs://b/tfds"
    )
    with pytest.raises(CorpusError, match="tfds_data_dir = 'gs://b/tfds' is not read through Beam"):
        build.build(config, Runner())
