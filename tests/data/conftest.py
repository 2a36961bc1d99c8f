"""Small corpora on disk, in the forms that the readers take."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import random

import pytest

from fope_jax.data import DataConfig

WORDS = [
    "the",
    "whale",
    "sea",
    "Emma",
    "said",
    "not",
    "12",
    "345",
    "of",
    "a",
    "\tlittle\n\n",
    "good,",
]


@pytest.fixture
def story():
    """Text of ``n`` words, other for another seed, with digits, tabs and blank lines in it."""

    def make(n, seed=0):
        return " ".join(random.Random(seed).choices(WORDS, k=n))

    return make


@pytest.fixture
def text_config(tmp_path, story):
    """A text corpus of 4 training and 2 validation documents, read with the bytes tokenizer."""
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(4):
        (folder / f"train{i}.txt").write_text(story(300 + 100 * i, seed=i))
    for i in range(2):
        (folder / f"held{i}.txt").write_text(story(200, seed=10 + i))

    def make(**fields):
        return DataConfig(
            **{
                "corpus": "text",
                "train_files": (f"{folder}/train*.txt",),
                "validation_files": (f"{folder}/held*.txt",),
                "tokenizer": "bytes",
                "cache_dir": str(tmp_path / "cache"),
            }
            | fields
        )

    return make
