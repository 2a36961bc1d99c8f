"""A token cache in a bucket, read in every way; what came out as JSON.

A program by itself, because gcsfs reads the address of the service when it is loaded:

    python -m tests.data.bucket_shards_run SCRATCH
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.cloud_storage import Object, Storage, serving

WORDS = ["the", "whale", "sea", "said", "not", "12", "of", "a", "good,", "little"]


def read_all(cache: Any) -> np.ndarray:
    return cache.tokens(0, cache.num_tokens)


def message(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class Story:
    """A cache of 8 shards in a bucket, and the same on disk."""

    def __init__(self, storage: Storage, scratch: Path):
        from fope_jax.data import DataConfig, build, cache

        cache.BLOCK_TOKENS, cache.SHARD_TOKENS = 64, 1024
        for split, sizes in (("train", (700, 800, 600)), ("held", (100,))):
            for number, size in enumerate(sizes):
                words = random.Random(f"{split}{number}").choices(WORDS, k=size)
                (scratch / f"{split}{number}.txt").write_text(" ".join(words))
        files = {"train_files": f"{scratch}/train*.txt", "validation_files": f"{scratch}/held*.txt"}
        config = DataConfig(
            corpus="text",
            tokenizer="bytes",
            cache_dir=str(scratch / "disk"),
            **{name: (pattern,) for name, pattern in files.items()},
        )
        self.storage, self.scratch = storage, scratch
        self.config = dataclasses.replace(config, cache_dir="gs://bucket/caches")
        self.local = build.build(config)["train"]
        self.again = itertools.count()
        os.environ["FOPE_CACHE"] = str(scratch / "builder")
        self.built = build.build(self.config)["train"]
        os.environ["FOPE_CACHE"] = str(scratch / "second")
        storage.reads.clear()
        build.build(self.config)  # verifies what is there
        self.verified_without_copies = not list((scratch / "second").rglob("*.tokens"))

    def open(self, copy_shards: bool, machine: str = "") -> Any:
        """The training split on another machine, or on one that is there."""
        from fope_jax.data.cache import open_cache

        os.environ["FOPE_CACHE"] = str(self.scratch / (machine or f"machine{next(self.again)}"))
        self.storage.reads.clear()
        return open_cache(dataclasses.replace(self.config, copy_shards=copy_shards), "train")

    def read_tokens(self) -> list[tuple[str, str]]:
        """The objects of tokens that were read, with their ranges."""
        return [read for read in self.storage.reads if read[0].endswith(".tokens")]

    def object(self, cache: Any, file: str, content: bytes | None) -> bytes:
        """Replaces an object, or deletes it; returns what it was."""
        name = f"{cache.location}/{file}".removeprefix("gs://bucket/")
        objects = self.storage.buckets["bucket"]
        before = objects.pop(name)
        if content is not None:
            objects[name] = Object(content, next(self.storage.numbers))
        return before.content


def files(cache: Any) -> list[str]:
    return sorted(path.name for path in cache.directory.iterdir())


def wait_for_copies(cache: Any) -> None:
    for _ in range(400):
        if len(list(cache.directory.glob("*.tokens"))) == cache.num_shards:
            return
        time.sleep(0.02)
    raise AssertionError(files(cache))


def by_range(story: Story) -> dict[str, Any]:
    from fope_jax.data.loader import Loader

    cache = story.open(copy_shards=False)
    found: dict[str, Any] = {"opened": story.read_tokens(), "location": str(cache.location)}
    found["manifest_reads"] = sum(n.endswith("manifest.json") for n, _ in story.storage.reads)
    found["one"] = cache.tokens(1000, 1100).tolist() == story.local.tokens(1000, 1100).tolist()
    found["ranges"] = story.read_tokens()
    fields = {"length": 48, "batch_size": 16, "seed": 3}
    whole = Loader(story.local, **fields).batch(2)
    story.storage.reads.clear()
    same = []
    for rows in np.split(np.arange(16), 4):
        own = Loader(cache, **fields, rows=rows).batch(2)
        same += [np.array_equal(a[rows], b[rows]) for a, b in zip(own, whole, strict=True)]
    found["rows"] = all(same)
    found["bytes"] = sum(
        1 + int(last) - int(first)
        for first, last in (r.removeprefix("bytes=").split("-") for _, r in story.read_tokens())
    )
    found["documents"] = cache.documents.tolist() == story.local.documents.tolist()
    found["files"] = files(cache)
    return found


def with_copies(story: Story) -> dict[str, Any]:
    cache = story.open(copy_shards=True, machine="copies")
    found: dict[str, Any] = {"all": np.array_equal(read_all(cache), read_all(story.local))}
    wait_for_copies(cache)
    found["copies"] = len(story.read_tokens())
    again = story.open(copy_shards=True, machine="copies")  # as after a restart
    found["all_again"] = np.array_equal(read_all(again), read_all(story.local))
    found["read_again"] = story.read_tokens()
    found["files"] = files(again)
    copy = again.directory / "train-00001.tokens"
    whole = copy.read_bytes()
    copy.write_bytes(whole[:70] + b"?" + whole[71:])
    found["damaged_copy"] = message(again.tokens, 1024, 1200)
    copy.unlink()
    third = story.open(copy_shards=True, machine="copies")
    found["copied_again"] = np.array_equal(read_all(third), read_all(story.local))
    return found


def under_faults(story: Story) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cache = story.open(copy_shards=False)
    numbers = itertools.count()
    story.storage.fails = lambda: next(numbers) % 4 == 0 and next(numbers) < 20
    found["refused_sometimes"] = np.array_equal(read_all(cache), read_all(story.local))
    story.storage.fails = lambda: False

    flipped = bytearray(story.object(cache, "train-00002.tokens", b""))
    flipped[-1] ^= 1
    story.object(cache, "train-00002.tokens", bytes(flipped))
    found["changed"] = message(read_all, cache)
    found["sound_part"] = (
        cache.tokens(2048, 2100).tolist() == story.local.tokens(2048, 2100).tolist()
    )
    copying = story.open(copy_shards=True)
    copying.tokens(2048, 2100)
    for _ in range(400):
        found["changed_copy"] = message(copying.tokens, 2048, 2100)
        if found["changed_copy"] != "nothing was raised":
            break
        time.sleep(0.02)
    found["no_copy"] = not list(copying.directory.glob("train-00002.tokens*"))
    story.object(cache, "train-00002.tokens", bytes(flipped[:-9]))
    found["cut"] = message(read_all, cache)
    story.object(cache, "train-00002.tokens", None)
    found["gone"] = message(read_all, cache)
    found["gone_at_opening"] = message(story.open, False)
    flipped[-1] ^= 1
    name = f"{cache.location}/train-00002.tokens".removeprefix("gs://bucket/")
    story.storage.buckets["bucket"][name] = Object(bytes(flipped), next(story.storage.numbers))
    story.object(cache, "train-00003.index", b"x" * 800)
    found["changed_index"] = message(read_all, story.open(copy_shards=False))
    return found


def main(scratch: Path) -> None:
    storage = Storage("bucket")
    with serving(storage) as environment:
        os.environ |= environment
        story = Story(storage, scratch)
        found = {"shards": story.local.num_shards, "verified": story.verified_without_copies}
        found["built"] = np.array_equal(read_all(story.built), read_all(story.local))
        found |= {part.__name__: part(story) for part in (by_range, with_copies, under_faults)}
    (scratch / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
