"""Tokenizers that cut text in awkward ways."""

import re

import pytest


class Pieces:
    """A tokenizer that cuts text by a pattern and numbers the pieces as they come."""

    fingerprint = "pieces"

    def __init__(self, pattern):
        self.pattern, self.ids, self.pieces = re.compile(pattern, re.DOTALL), {}, []

    def encode(self, text):
        found = self.pattern.findall(text)
        assert "".join(found) == text
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in found]

    def decode(self, ids):
        return "".join(self.pieces[int(i)] for i in ids)


TOKENIZERS = {
    "characters": r".",
    "words": r" ?[^ ]+",
    "digits apart": r" ?[a-zA-Z]+| |\d|[^a-zA-Z\d ]",
    "odd digit groups": r" ?[1-4]{1,3}| ?[5-9]{1,2}| ?[a-zA-Z]+|.",
    "straddling": r"is \d|are \d|.",
}


@pytest.fixture(params=TOKENIZERS, ids=lambda name: name.replace(" ", "-"))
def tokenizer(request):
    return Pieces(TOKENIZERS[request.param])


@pytest.fixture
def pieces():
    """Makes a tokenizer of a pattern."""
    return Pieces
