"""Reads documents without TensorFlow, for tests of what a build makes of them.

The seqio tasks, which a build reads through, have tests of their own in seqio_tasks_test.py.
"""

import itertools
import sys
import types

from fope_jax.data.corpora import read_corpus
from fope_jax.data.documents import TokenizedDocument, encode_group

NAME = "fope_jax.data.seqio_tasks"


def read_documents(config, tokenizer, split, *, skip=None, taken=None, left_out=()):
    """As ``seqio_tasks.read_documents`` does for a corpus of files."""
    (corpus,) = [name for name, _ in config.components]
    documents = read_corpus(config, corpus, split, left_out)
    for one in itertools.islice(documents, (skip or {}).get(corpus, 0), None):
        tokens, _, (size,), (changed,) = encode_group(tokenizer, [one.text])
        yield TokenizedDocument(corpus, one.name, tokens, int(size), one.bad, bool(changed))


MODULE = types.SimpleNamespace(read_documents=read_documents)


def install():
    """Puts the reader in the place of the module, in a process of its own."""
    sys.modules[NAME] = MODULE
