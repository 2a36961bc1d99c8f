"""Every corpus through its seqio Task: no token lost, C4 in both of its forms, mixtures."""

import dataclasses
import doctest
import gzip
import json
import math
import re
import shutil
from typing import NamedTuple

import numpy as np
import pytest

from fope_jax.data import build, cache, corpora, documents, tokenized
from fope_jax.data.build_state import BuildState
from fope_jax.data.corpora import CorpusError
from fope_jax.data.documents import encode_group
from fope_jax.data.loader import Loader
from fope_jax.data.manifest import CacheError
from fope_jax.data.sources import list_sources
from fope_jax.data.tokenizers import BytesTokenizer

BYTES = BytesTokenizer()


@pytest.fixture(scope="module", autouse=True)
def tensorflow():
    """Imported for the tests alone: it takes ten seconds, in each worker that collects them."""
    global prepare_c4, seqio, seqio_tasks, tf, tfds, tfds_files
    from fope_jax.data import seqio_tasks, tfds_files
    from fope_jax.data.tf_libraries import seqio, tf, tfds
    from tests.faults.tfds_files import prepare_c4


def test_examples_of_the_docstrings():
    """They are not collected, for the same reason."""
    found = doctest.testmod(tfds_files)
    assert found.attempted and not found.failed


def pages(count, size, mark):
    return [f"{mark} page {i} " + "word \u00e9\n" * (size + i % 7) for i in range(count)]


@pytest.fixture(scope="module")
def prepared_c4(tmp_path_factory):
    splits = {"train": pages(40, 10, "train"), "validation": pages(6, 5, "held")}
    return prepare_c4(tmp_path_factory.mktemp("prepared"), splits, examples_per_file=15), splits


@pytest.fixture
def c4_dir(prepared_c4, tmp_path):
    """A copy of it, to be damaged."""
    directory, splits = prepared_c4
    return shutil.copytree(directory, tmp_path / "tfds"), splits


@pytest.fixture
def c4_config(text_config, c4_dir):
    """The configuration that reads `c4_dir`."""

    def make(**fields):
        directory, _ = c4_dir
        files = {"train_files": (), "validation_files": (), "tfds_data_dir": str(directory)}
        return text_config(corpus="c4", **(files | fields))

    return make


class One(NamedTuple):
    """A document of a stream of `TokenizedDocuments`."""

    corpus: str
    name: str
    tokens: np.ndarray
    bytes: int
    bad: str
    changed: bool


def read(config, split, workers=tokenized.InProcess, **state):
    """The documents that a build writes, one by one."""
    read_from = workers(config, BYTES)
    sources = [] if config.tfds_data_dir and config.corpus == "c4" else list_sources(config)
    found = []
    for group in tokenized.read_documents(config, split, read_from, sources, **state):
        tokens = np.split(group.tokens, np.cumsum(group.lengths)[:-1])
        columns = (group.names, tokens, group.bytes.tolist(), group.bad, group.changed.tolist())
        found += [One(group.corpus, *row) for row in zip(*columns, strict=True)]
    return found


def read_task(config, split):
    """The documents that the seqio Task or Mixture yields."""
    task = seqio_tasks.register_tasks(config, BYTES)
    if config.corpus == "mixture":
        features = {"num_epochs": 1, "passthrough_features": One._fields}
        dataset = task.get_dataset(None, split=split, shuffle=False, **features)
    else:
        dataset = task.get_dataset(None, split=split, shuffle=False, try_in_mem_cache=False)
    return [
        One(
            x["corpus"].decode(),
            x["name"].decode(),
            x["targets"],
            int(x["bytes"]),
            x["bad"].decode(),
            bool(x["changed"]),
        )
        for x in dataset.as_numpy_iterator()
    ]


def assert_same(documents, others):
    assert [(*d[:2], d.tokens.tolist(), *d[3:]) for d in documents] == [
        (*d[:2], d.tokens.tolist(), *d[3:]) for d in others
    ]


def check(documents, texts):
    """Each text came out whole, with its EOS and its size."""
    assert sorted(BYTES.decode(d.tokens[:-1]) for d in documents) == sorted(texts)
    for document in documents:
        assert document.tokens[-1] == BYTES.eos_id and document.tokens.dtype == np.int32
        assert len(document.tokens) == document.bytes + 1


# ---------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_every_token_of_every_document_from_text_to_batches(text_config, tokenizer):
    config = text_config(tokenizer=tokenizer, vocab_size=300)
    built = build.build(config)
    for split, found in built.items():
        texts = [d.text for d in corpora.read_corpus(config, "text", split)]
        stream = [i for text in texts for i in [*found.tokenizer.encode(text), 1]]
        np.testing.assert_array_equal(found.tokens(0, found.num_tokens), stream)
        assert [
            found.tokenizer.decode(found.tokens(d["start"], d["start"] + d["length"]))
            for d in found.documents
        ] == texts
        assert found.documents["bytes"].tolist() == [len(t.encode()) for t in texts]
        assert found.tokenizer.token_bytes[stream].sum() == found.summary["bytes"]
        assert found.summary["changed_documents"] == 0
        loader = Loader(found, length=64, batch_size=1, seed=0)
        batches = [loader.batch(step) for step in range(loader.windows_per_epoch)]
        inputs = np.concatenate([b.tokens[b.segments > 0] for b in batches])
        np.testing.assert_array_equal(np.sort(inputs), np.sort(stream))
    assert built["train"].fingerprint == built["validation"].fingerprint
    assert len(built["train"].fingerprint) == 64


def test_a_build_reads_the_documents_of_the_task(text_config, tmp_path):
    """Bad, empty and changed ones too, from the beginning and from where a build goes on."""
    (tmp_path / "more.jsonl").write_bytes(b'{"text": "caf\xc3\xa9"}\n\n\xff\n{"body": 1}\n' * 40)
    files = (f"{tmp_path}/books/train*.txt", f"{tmp_path}/more.jsonl")
    config = text_config(train_files=files, max_bad_documents=99)
    of_task = read_task(config, "train")
    assert len(of_task) > 150
    assert_same(read(config, "train"), of_task)
    assert_same(read(config, "train", skip={"text": 7}), of_task[7:])


# ---------------------------------------------------------------------------- corpora


@pytest.mark.fast("validation")
@pytest.mark.parametrize("split", ["train", "validation"])
def test_c4_as_tfds_prepares_it(c4_config, c4_dir, split):
    directory, texts = c4_dir
    config = c4_config()
    assert (directory / "c4" / "en" / "3.0.1" / "dataset_info.json").exists()
    documents = read(config, split)
    check(documents, texts[split])
    assert documents[0].name.startswith(f"https://{split}.example/")
    assert [d.name for d in read(config, split)] == [d.name for d in documents]
    rest = read(config, split, skip={"c4": 4})
    assert [d.name for d in rest] == [d.name for d in documents[4:]]
    assert_same(documents, read_task(config, split))
    found = [d.text for d in seqio_tasks.read_texts(config, "c4", split)]
    assert sorted(found) == sorted(texts[split])


def test_c4_as_public_json_gz_files(text_config, tmp_path):
    texts = {"train": pages(20, 3, "train"), "validation": pages(5, 2, "held")}
    for split, own in texts.items():
        for part in range(2):
            with gzip.open(tmp_path / f"c4-{split}.0000{part}-of-01024.json.gz", "wt") as stream:
                for text in own[part::2]:
                    stream.write(json.dumps({"text": text, "url": "u", "timestamp": "t"}) + "\n")
    config = text_config(
        corpus="c4",
        train_files=(f"{tmp_path}/c4-train.*.json.gz",),
        validation_files=(f"{tmp_path}/c4-validation.*.json.gz",),
    )
    for split in texts:
        check(read(config, split), texts[split])


def test_c4_that_is_not_there(c4_config, tmp_path):
    config = c4_config(tfds_data_dir="/nowhere/")
    message = r"tfds_data_dir = '/nowhere/' holds no prepared c4/en:3.0.1: /nowhere/c4/en/3.0.1/dat"
    with pytest.raises(CorpusError, match=message):
        read(config, "train")
    with pytest.raises(CorpusError, match=message):
        tfds_files.dataset_identity(config)


def test_c4_in_a_bucket_is_left_to_tfds(c4_config, monkeypatch):
    place = "gs://bucket/tensorflow_datasets"
    config = c4_config(tfds_data_dir=place, tfds_name="c4/en:1.0")
    asked = []
    monkeypatch.setattr(tf.io.gfile, "exists", lambda path: asked.append(path) or True)
    monkeypatch.setattr(seqio, "TfdsDataSource", lambda **named: named)
    source = seqio_tasks._source(config, "c4", [], ())
    assert source["tfds_data_dir"] == f"{place}/c4/en/1.0"
    assert asked == [f"{place}/c4/en/1.0/dataset_info.json"]


def test_c4_without_a_validation_split(c4_config, c4_dir):
    directory, _ = c4_dir
    file = directory / "c4" / "en" / "3.0.1" / "dataset_info.json"
    content = json.loads(file.read_text())
    content["splits"] = [s for s in content["splits"] if s["name"] != "validation"]
    file.write_text(json.dumps(content))
    config = c4_config()
    with pytest.raises(CorpusError, match=r"has no split \['validation'\]; it has \['train'\]"):
        tfds_files.dataset_identity(config)


def test_a_damaged_tfds_file_is_named(c4_config, c4_dir):
    directory, _ = c4_dir
    config = c4_config()
    before = tfds_files.dataset_identity(config)
    damaged = sorted(directory.rglob("c4-train.tfrecord*"))[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CorpusError, match=f"{damaged.name} is damaged"):
        read(config, "train")
    assert tfds_files.dataset_identity(config) == before


def damage(file, kind):
    """Cuts off the last record, or the end of it."""
    content = file.read_bytes()
    sizes = [len(r) + 16 for r in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()]
    file.write_bytes(content[: -sizes[-1]] if kind == "short" else content[:-9])
    return len(sizes)


@pytest.mark.fast("broken")
@pytest.mark.parametrize("kind", ["broken", "short"])
def test_a_damaged_tfds_file_is_left_out_within_a_budget(c4_config, c4_dir, kind, capsys):
    directory, texts = c4_dir
    strict = c4_config(tokenizer="bytes")
    lenient = dataclasses.replace(strict, max_damaged_files=1)
    file = sorted(directory.rglob("c4-train.tfrecord*"))[1]
    held = set(urls_of(strict, file))
    kept = [d.name for d in read(strict, "train") if d.name not in held]
    count = damage(file, kind)
    expected = f"{file} has {count - 1} records; dataset_info.json says {count}: fetch it again"
    if kind == "broken":
        expected = f"{file} is damaged: record {count - 1} of {count}, which begins at offset "
    (own,) = (f for f in tfds_files.list_files(strict, "train") if f.path == str(file))
    assert own == (1, str(file), count) and tfds_files.find_damage(own).startswith(expected)
    with pytest.raises(CorpusError, match=re.escape(expected)):
        build.build(strict)
    assert "tokenize" not in capsys.readouterr().err
    built = build.build(lenient)
    assert built["train"].documents["name"].tolist() == kept
    assert built["validation"].summary["documents"] == len(texts["validation"])
    assert f"train: damaged files, left out, 1: {expected}" in capsys.readouterr().err
    assert len(list(seqio_tasks.read_texts(lenient, "c4", "train", {str(file)}))) == 40 - count
    with pytest.raises(CacheError, match="lacks 1 train files that were damaged"):
        build.build(strict)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 9\n" % (b"0" * 64)


def test_pointers_in_place_of_tfds_files_are_named(c4_config, c4_dir):
    directory, _ = c4_dir
    config = c4_config(tokenizer="bytes")
    file = sorted(directory.rglob("c4-train.tfrecord*"))[0]
    file.write_bytes(POINTER)
    message = f"{file.name} is no TFRecord file: it is a Git LFS pointer, .*; fetch that with"
    with pytest.raises(CorpusError, match=message):
        build.build(config)
    (directory / "c4" / "en" / "3.0.1" / "dataset_info.json").write_bytes(POINTER)
    with pytest.raises(CorpusError, match=r"dataset_info\.json is a Git LFS pointer"):
        build.build(config)


def test_of_a_part_only_the_files_that_are_read_are_looked_through(
    c4_config, c4_dir, monkeypatch, tmp_path
):
    """A damaged file beyond its end is in nobody's way; one that is read is told."""
    directory, _ = c4_dir
    looked, whole = [], tfds_files.find_damage
    monkeypatch.setattr(
        tfds_files, "find_damage", lambda file: looked.append(file.path[-5:]) or whole(file)
    )
    monkeypatch.setattr(seqio_tasks, "DOCUMENTS_AT_ONCE", 4)
    monkeypatch.setattr(documents, "DOCUMENTS_AT_ONCE", 4)
    everything = read(c4_config(), "train")
    looked.clear()
    files = sorted(directory.rglob("c4-train.tfrecord*"))
    held = files[1].read_bytes()
    files[1].write_bytes(b"")  # it has no document, and is passed by

    def part(count, **fields):
        cache_dir = str(tmp_path / f"part{count}")
        return c4_config(tokenizer="bytes", max_documents=count, cache_dir=cache_dir, **fields)

    built = build.build(part(4))["train"]
    assert looked == ["00000", "00000"]  # of the held-out files, and of the others
    assert built.documents["name"].tolist() == [one.name for one in everything[:4]]
    with pytest.raises(CorpusError, match="00001 has 0 records; dataset_info.json says"):
        build.build(part(20))
    files[1].write_bytes(held)
    built = build.build(part(20))["train"]
    assert built.documents["name"].tolist() == [one.name for one in everything[:20]]
    looked.clear()
    whole_set = c4_config(tokenizer="bytes", cache_dir=str(tmp_path / "part20"))
    build.build(whole_set)
    assert {"00000", "00001", "00002"} <= {*looked}, "nothing is taken as sound that was not read"
    files[1].write_bytes(b"")
    with pytest.raises(CorpusError, match="damaged files of the train split: 2, more"):
        files[2].write_bytes(b"")
        build.build(part(5, max_damaged_files=1))


def test_a_mixture_that_ends_early_looks_through_all_its_files(text_config, c4_dir):
    directory, _ = c4_dir
    damage(sorted(directory.rglob("c4-train.tfrecord*"))[2], "short")
    config = text_config(
        corpus="mixture", mixture=("text=1", "c4=0.001"), tfds_data_dir=str(directory)
    )
    with pytest.raises(CorpusError, match="00002 has .* records; dataset_info.json says"):
        build.build(config)


def test_a_cache_survives_its_text(c4_config, c4_dir, capsys):
    directory, _ = c4_dir
    config = c4_config(max_damaged_files=3)
    before = build.build(config)["train"]
    file = sorted(directory.rglob("c4-train.tfrecord*"))[0]
    damage(file, "broken")
    after = build.build(config)["train"]  # damaged when the cache was complete
    assert after.fingerprint == before.fingerprint and after.summary == before.summary
    assert "left out" not in capsys.readouterr().err
    file.unlink()
    with pytest.raises(CorpusError, match=f"{file.name} cannot be read: .*No such file"):
        build.build(config)
    assert cache.open_cache(config, "train").fingerprint == before.fingerprint


@pytest.mark.slow
def test_a_tfds_file_that_is_fetched_again_is_not_gone_on_without(c4_config, c4_dir, monkeypatch):
    """Interrupted without a damaged file, a build does not go on with it, nor the other way."""
    directory, _ = c4_dir
    config = c4_config(tokenizer="bytes", max_damaged_files=1)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(cache, "SHARD_TOKENS", 1024)
    names = {}
    file = sorted(directory.rglob("c4-train.tfrecord*"))[0]
    content = {"whole": file.read_bytes()}
    damage(file, "short")
    content["short"] = file.read_bytes()
    for state, other in (("whole", "short"), ("short", "whole")):
        file.write_bytes(content[state])
        clean = dataclasses.replace(config, cache_dir=f"{config.cache_dir}-{state}")
        names[state] = build.build(clean)["train"].documents["name"].tolist()
        file.write_bytes(content[other])
        interrupted = dataclasses.replace(config, cache_dir=f"{config.cache_dir}-went-on-{state}")
        with monkeypatch.context() as patch:
            patch.setattr(BuildState, "save", _stop_after(BuildState.save, 3))
            with pytest.raises(KeyboardInterrupt):
                build.build(interrupted)
        file.write_bytes(content[state])
        built = build.build(interrupted)["train"]
        assert built.documents["name"].tolist() == names[state], state
        assert built.fingerprint == cache.open_cache(clean, "train").fingerprint
    assert len(names["whole"]) == 40 > len(names["short"])


def _stop_after(save, calls):
    left = [calls]

    def stopping(*arguments):
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return stopping


def test_tfds_files_are_looked_through_once(c4_config, c4_dir, monkeypatch):
    directory, _ = c4_dir
    config = c4_config()
    looked, whole = [], tfds_files.find_damage
    monkeypatch.setattr(
        tfds_files, "find_damage", lambda file: looked.append(file.path) or whole(file)
    )
    build.build(config)
    files = [str(file) for file in sorted(directory.rglob("c4-*.tfrecord*"))]
    assert sorted(looked) == files
    build.build(config)
    assert len(looked) == len(files)


def test_the_bar_of_a_tfds_build_moves_by_its_documents(c4_config, c4_dir):
    config = c4_config()
    listed, steps = list_sources(config), []
    size = sum(s["size"] for s in listed if s.get("split") == "train")
    workers = tokenized.InProcess(config, BYTES)
    options = {"skip": {"c4": 10}, "report": steps.append}
    documents = 0
    for group in tokenized.read_documents(config, "train", workers, listed, **options):
        assert sum(steps) == size * (10 + documents) // 40
        documents += len(group.lengths)
    assert sum(steps) == size and documents == 30
    assert build._count_workers(config, listed, 4) == 1


@pytest.mark.parametrize("file_format", ["tfrecord", "riegeli"])
def test_the_processes_for_tfds_come_from_its_documents(
    c4_config, c4_dir, monkeypatch, file_format
):
    """Whatever the format of its files."""
    directory, _ = c4_dir
    file = directory / "c4" / "en" / "3.0.1" / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fileFormat": file_format}))
    config = c4_config()
    monkeypatch.setattr(build, "TFDS_DOCUMENTS", 12)
    assert build._count_workers(config, list_sources(config), 99) == 3


def test_tfds_files_of_another_format_are_left_to_tfds(c4_config, c4_dir):
    directory, _ = c4_dir
    config = c4_config()
    assert len(tfds_files.list_files(config, "train")) == 3
    file = directory / "c4" / "en" / "3.0.1" / "dataset_info.json"
    content = json.loads(file.read_text()) | {"fileFormat": "riegeli"}
    file.write_text(json.dumps(content))
    assert tfds_files.list_files(config, "train") == []


def test_a_file_that_cannot_be_reached_is_not_damaged(c4_config, c4_dir, monkeypatch):
    directory, _ = c4_dir
    config = c4_config(max_damaged_files=3)

    def lost(path):
        raise tf.errors.UnavailableError(None, None, "no connection")

    monkeypatch.setattr(tf.io.gfile, "stat", lost)
    with pytest.raises(CorpusError, match="00000 cannot be read: no connection"):
        build.build(config)
    monkeypatch.undo()
    monkeypatch.setattr(tf.data, "TFRecordDataset", lost)
    with pytest.raises(CorpusError, match="00000 cannot be read: no connection"):
        build.build(config)


def test_a_tfds_split_of_which_nothing_is_left(c4_config, c4_dir):
    directory, _ = c4_dir
    config = c4_config(max_damaged_files=9)
    files = sorted(directory.rglob("c4-validation.tfrecord*"))
    for file in files:
        damage(file, "broken")
    message = rf"all {len(files)} files of split 'validation' are damaged: \S*{files[0].name}"
    with pytest.raises(CorpusError, match=message):
        build.build(config)


def urls_of(config, file):
    """The names of the documents of one TFDS file."""
    builder = tfds.builder_from_directory(tfds_files.dataset_directory(config))
    raw = tf.data.TFRecordDataset(str(file)).map(builder.info.features.deserialize_example)
    return [page["url"].decode() for page in raw.as_numpy_iterator()]


def test_a_users_own_files(text_config):
    config = text_config()
    texts = [d.text for d in corpora.read_corpus(config, "text", "train")]
    documents = read(config, "train")
    check(documents, texts)
    assert [BYTES.decode(d.tokens) for d in documents] == texts  # in the order of the files
    assert [d.text for d in seqio_tasks.read_texts(config, "text", "train")] == texts


def test_many_small_documents_and_empty_ones(text_config, tmp_path):
    texts = ["", *[f"line {i}" * (i % 5) for i in range(300)], ""]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = text_config(train_files=(f"{tmp_path}/many.jsonl",))
    documents = read(config, "train")
    assert [BYTES.decode(d.tokens) for d in documents] == texts
    assert [d.bytes for d in documents] == [len(t) for t in texts]
    task = seqio_tasks.register_tasks(config, BYTES)
    dataset = task.get_dataset({"targets": 100}, "train", shuffle=False)
    stream = np.concatenate([x["targets"] for x in dataset.as_numpy_iterator()])
    assert (stream == BYTES.eos_id).sum() == len([t for t in texts if t])  # none stands alone


def test_an_error_in_a_file_comes_out_as_it_was_raised(text_config, tmp_path):
    (tmp_path / "books" / "train2.txt").write_bytes(b"ab\xffcd")
    with pytest.raises(CorpusError, match=r"train2\.txt is not UTF-8: byte 0xff at offset 2"):
        read(text_config(), "train")
    with pytest.raises(CorpusError, match=r"train2\.txt is not UTF-8"):
        list(seqio_tasks.read_texts(text_config(), "text", "train"))


def test_text_of_a_dataset_that_is_not_utf8_names_the_document():
    page = {"corpus": "c", "name": "page 7", "text": b"a\xff", "bad": ""}
    dataset = tf.data.Dataset.from_tensors(page)
    failures = []
    with pytest.raises(tf.errors.OpError):
        list(seqio_tasks.tokenize(dataset, BYTES, failures))
    assert "'page 7' is not UTF-8: byte 0xff at offset 1" in str(failures[0])


def test_groups_of_documents_keep_their_order_and_their_errors():
    """What TensorFlow runs in threads of its own, run here."""
    documents = [corpora.Document(f"d{i}", "x" * (i % 3)) for i in range(150)]
    groups = list(seqio_tasks._as_examples(lambda: iter(documents), []))
    assert len(groups) > 1
    assert [n for g in groups for n in g["name"]] == [d.name for d in documents]
    assert [t for g in groups for t in g["text"]] == [d.text for d in documents]
    large = [corpora.Document("d", "x" * 3_000_000)] * 3
    assert [len(g["name"]) for g in seqio_tasks._as_examples(lambda: iter(large), [])] == [2, 1]

    def broken():
        yield documents[0]
        raise CorpusError("no more")

    failures = []
    with pytest.raises(CorpusError):
        list(seqio_tasks._as_examples(broken, failures))
    assert str(failures[0]) == "no more"


def test_encoding_a_group():
    tokens, lengths, sizes, changed = encode_group(BYTES, ["\u00e9", "", "x"])
    assert tokens.tolist() == [3 + 0xC3, 3 + 0xA9, 1, 1, 3 + ord("x"), 1]
    assert lengths.tolist() == [3, 1, 2] and sizes.tolist() == [2, 0, 1]
    assert changed.dtype == bool and not changed.any()


# ---------------------------------------------------------------------------- windows


def test_a_document_of_5000_words_keeps_every_token_at_length_512(text_config, tmp_path, story):
    (tmp_path / "long.txt").write_text(story(5000))
    config = text_config(train_files=(f"{tmp_path}/long.txt", f"{tmp_path}/books/train*.txt"))
    task = seqio_tasks.register_tasks(config, BYTES)
    assert isinstance(task, seqio.Task) and seqio.get_mixture_or_task("fope_text") is task
    dataset = task.get_dataset({"targets": 512}, split="train", shuffle=False)
    windows = [example["targets"] for example in dataset.as_numpy_iterator()]
    stream = np.concatenate([d.tokens for d in read(config, "train")])
    assert len(stream) > 5000 * 3
    np.testing.assert_array_equal(np.concatenate(windows), stream)
    assert len(windows) == math.ceil(len(stream) / 512)
    assert {len(w) for w in windows[:-1]} == {512} and len(windows[-1]) == len(stream) % 512


# ---------------------------------------------------------------------------- mixtures


@pytest.fixture
def mixture(text_config, c4_dir):
    directory, texts = c4_dir
    config = text_config(corpus="mixture", mixture=("c4=3", "text=1"), tfds_data_dir=str(directory))
    own = [d.text for d in corpora.read_corpus(config, "text", "train")]
    return config, texts, own


def test_a_mixture_follows_its_weights_in_tokens(mixture):
    config, texts, own = mixture
    documents = read(config, "train")
    assert isinstance(seqio_tasks.register_tasks(config, BYTES), seqio.Mixture)
    assert_same(documents, read_task(config, "train"))
    tokens = {c: sum(len(d.tokens) for d in documents if d.corpus == c) for c in ("c4", "text")}
    longest = max(len(d.tokens) for d in documents)
    assert abs(tokens["c4"] / 3 - tokens["text"]) <= longest
    # It ends because a corpus has ended, and keeps each corpus's order.
    given = {c: [d for d in documents if d.corpus == c] for c in tokens}
    assert len(given["c4"]) == len(texts["train"]) or len(given["text"]) == len(own)
    assert [BYTES.decode(d.tokens) for d in given["text"]] == own[: len(given["text"])]


def test_a_mixture_goes_on_where_it_was(mixture):
    config, _, _ = mixture
    documents = read(config, "train")
    for done in (1, 9):
        skip, taken = {}, {}
        for document in documents[:done]:
            skip[document.corpus] = skip.get(document.corpus, 0) + 1
            taken[document.corpus] = taken.get(document.corpus, 0) + len(document.tokens)
        rest = read(config, "train", skip=skip, taken=taken)
        assert [d.name for d in rest] == [d.name for d in documents[done:]]


def test_validation_of_a_mixture_is_every_held_out_document(mixture):
    config, texts, _ = mixture
    own = [d.text for d in corpora.read_corpus(config, "text", "validation")]
    check(read(config, "validation"), texts["validation"] + own)
