"""DataConfig refuses what cannot be read, and says what it accepts."""

import subprocess
import sys

import pytest

from fope_jax.data import DataConfig

FILES = {"train_files": ("a.txt",), "validation_files": ("b.txt",)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": "books"}, r"corpus = 'books'.*gutenberg"),
        ({"packing": "both"}, r"packing = 'both'.*documents"),
        ({"tokenizer": "gpt2"}, r"tokenizer = 'gpt2'.*sentencepiece"),
        ({"vocab_size": 0}, r"vocab_size = 0.*1 or more"),
        ({"cache_dir": ""}, "cache_dir = ''"),
        ({"cache_dir": "s3://b/c"}, "cache_dir = 's3://b/c'.*or gs://BUCKET/PATH"),
        ({"corpus": "text", "train_files": ("s3://b/*.txt",)}, r"train_files = \('s3.*gs://BUCKET"),
        ({"train_files": ("a.txt",)}, r"train_files = .* corpus = 'gutenberg'.*corpus = 'text'"),
        ({"corpus": "text"}, r"train_files = \(\).*globs"),
        ({"corpus": "text", "train_files": ("a.txt",)}, r"validation_files = \(\)"),
        ({"corpus": "c4"}, r"train_files = \(\).*tfds_data_dir"),
        (
            {"corpus": "c4", "tfds_data_dir": "d", **FILES},
            "empty where c4 is read from train_files",
        ),
        ({"mixture": ("c4=1",)}, "nothing otherwise"),
        ({"corpus": "mixture"}, r"mixture = \(\)"),
        ({"corpus": "mixture", "mixture": ("gutenberg=0",)}, "a positive weight"),
        ({"corpus": "mixture", "mixture": ("gutenberg",)}, "a positive weight"),
        ({"corpus": "mixture", "mixture": ("mixture=1",)}, "a positive weight"),
        ({"corpus": "mixture", "mixture": ("gutenberg=1", "gutenberg=2")}, "each corpus once"),
        ({"corpus": "mixture", "mixture": ("gutenberg=1", "c4=1")}, "a TFDS data directory"),
        ({"validation_books": ()}, "at least one book"),
        ({"excluded_books": ("austen-persuasion",)}, "no validation book"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_lists_of_a_configuration_file_become_tuples():
    config = DataConfig(corpus="text", train_files=["a.txt"], validation_files=["b.txt"])
    assert config.train_files == ("a.txt",)
    assert hash(config) == hash(DataConfig(corpus="text", **FILES) and config)


def test_components_do_not_depend_on_the_order_of_the_entries():
    fields = {"corpus": "mixture", "tfds_data_dir": "d"}
    one = DataConfig(mixture=("gutenberg=1", "c4=3"), **fields)
    other = DataConfig(mixture=("c4=3", "gutenberg=1"), **fields)
    assert one.components == other.components == (("c4", 3.0), ("gutenberg", 1.0))
    assert DataConfig().components == (("gutenberg", 1.0),)


def test_importing_the_config_imports_nothing_heavy():
    code = (
        "import sys; from fope_jax.data import DataConfig; DataConfig();"
        "heavy = {'numpy', 'jax', 'grain', 'tensorflow', 'seqio', 'sentencepiece', 'tokenizers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
