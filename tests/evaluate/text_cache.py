"""A token cache in memory, and models whose nats are known, for the tests of protocols."""

from types import SimpleNamespace

import numpy as np

from tests.data.streams import TableOfDocuments

VOCAB = 50
TOKEN_BYTES = np.random.default_rng(1).integers(0, 9, VOCAB).astype(np.int32)


class TextCache(TableOfDocuments):
    """Documents of the given lengths, one after the other."""

    def __init__(self, lengths, vocab=VOCAB, seed=0):
        random = np.random.default_rng(seed)
        self.stream = random.integers(0, vocab, sum(lengths)).astype(np.int32)
        kinds = [("name", "U20"), ("start", "i8"), ("length", "i8"), ("bytes", "i8")]
        self.documents = np.zeros(len(lengths), kinds)
        self.documents["name"] = [f"document {i}" for i in range(len(lengths))]
        self.documents["start"] = np.cumsum(lengths) - lengths
        self.documents["length"] = lengths
        self.tokenizer = SimpleNamespace(token_bytes=TOKEN_BYTES[:vocab])

    def tokens(self, start, stop):
        assert 0 <= start < stop <= len(self.stream)
        return self.stream[start:stop]


class Reader:
    """Nats from all that a token sees: no two tokens or contexts have the same.

    The nats of a target depend on every visible token before it, on the distance to it and on the
    target, so a sum is right only where each target was scored once, with the context it should
    have. Segments and positions are obeyed as a model obeys them.
    """

    def __init__(self, vocab=VOCAB):
        random = np.random.default_rng(3)
        self.value, self.of_target = random.random(vocab), random.random(vocab)

    def __call__(self, tokens, targets, index=None):
        batch, length = tokens.shape
        positions = np.broadcast_to(np.arange(length), (batch, length))
        segments = np.ones((batch, length), int)
        if index is not None:
            positions, segments = index
        distance = positions[:, :, None] - positions[:, None, :]
        seen = (distance >= 0) & (segments[:, :, None] == segments[:, None, :])
        weight = np.where(seen, 1 / (1.0 + np.maximum(distance, 0)), 0)
        sums = (weight * self.value[tokens][:, None, :]).sum(-1) + 0.01 * positions
        sums = sums[:, -targets.shape[1] :]
        nats = sums * self.of_target[targets]
        return nats.astype(np.float32), sums > 1.5


def sums_of(rows, **fields):
    """Nats, tokens, bytes and hits of the rows that have these fields."""
    rows = [row for row in rows if row.items() >= fields.items()]
    return [sum(row[name] for row in rows) for name in ("nats", "tokens", "bytes", "correct")]
