"""Joined documents: chunks as in the paper's code, and resets equal to documents alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.evaluate.packed import packed_positions, score_chunks, score_resets
from fope_jax.evaluate.perplexity import token_sums
from fope_jax.evaluate.scoring import model_scorer
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer
from fope_jax.position import ALiBi, FoPE
from tests.evaluate.text_cache import TOKEN_BYTES, Reader, TextCache, sums_of

LENGTHS = (70, 5, 1, 90, 31, 140)
CONTEXTS = (8, 32)


def chunks(scorer, cache, **changes):
    settings = dict(contexts=CONTEXTS, num_blocks=99, batch_tokens=100) | changes
    return score_chunks(scorer, cache, **settings)


def resets(scorer, cache, reset, **changes):
    settings = dict(contexts=CONTEXTS, num_blocks=99, batch_tokens=100) | changes
    return score_resets(scorer, cache, reset=reset, **settings)


# ---------------------------------------------------------------------------- chunks


def test_chunks_are_those_of_the_paper_s_code():
    """Read T tokens, score the T - 1 that follow one of them, whatever the documents."""
    cache = TextCache(LENGTHS)
    rows, blocks = chunks(Reader(), cache)
    assert blocks.stop.tolist() == list(range(32, 337, 32))  # 337 tokens: the last 17 are left
    for context in CONTEXTS:
        expected = np.zeros(4)
        for start in range(0, 320, context):
            chunk = cache.stream[start : start + context]
            nats, hits = Reader()(chunk[None, :-1], chunk[None, 1:])
            expected += list(token_sums(nats, hits, chunk[None, 1:], TOKEN_BYTES).values())
        np.testing.assert_allclose(sums_of(rows, context=context), expected, rtol=1e-12)
        assert expected[1] == 320 // context * (context - 1)
    assert {(row["context"], row["scored_per_window"]) for row in rows} == {(8, 7), (32, 31)}


def test_a_token_is_counted_for_its_own_document():
    rows, _ = chunks(Reader(), TextCache(LENGTHS))
    # Of 70 tokens the first of each chunk of 8 (9 of them) is not scored.
    assert sums_of(rows, context=8, document="document 0")[1] == 70 - 9
    # The chunks begin at 72; this one token stands at 75.
    assert sums_of(rows, context=8, document="document 2")[1] == 1
    assert next(row for row in rows if row["document"] == "document 0")["windows"] == 9


def test_a_prefix_before_documents_is_none_of_their_bytes():
    """Its token is read and scored like any other; the space in it is no text."""
    cache = TextCache(LENGTHS)
    plain, _ = chunks(Reader(), cache)
    cache.tokenizer.prefix = " "
    rows, _ = chunks(Reader(), cache)
    starts = np.cumsum(LENGTHS) - LENGTHS
    for row, before in zip(rows, plain, strict=True):
        begin = int(starts[int(row["document"].split()[1])])
        scored = begin % row["context"] > 0  # the first token of a chunk is not
        assert row["bytes"] == before["bytes"] - scored
        assert row["nats"] == before["nats"] and row["tokens"] == before["tokens"]
    for reset in (True, False):  # here no first token of a document is scored
        with_prefix, _ = resets(Reader(), cache, reset)
        cache.tokenizer.prefix = ""
        without, _ = resets(Reader(), cache, reset)
        cache.tokenizer.prefix = " "
        assert with_prefix == without


def test_a_stride_of_the_context_gives_the_same_nats_as_chunks():
    from fope_jax.evaluate.sliding import slide

    cache = TextCache((337,))
    rows, _ = chunks(Reader(), cache, num_blocks=10)
    for context in CONTEXTS:
        nats, _, _ = slide(Reader(), cache, np.array([0]), 320, context, context, batch_tokens=300)
        inside = np.arange(1, 321) % context > 0  # all but the first token of the next chunk
        expected = nats[0][inside].sum(dtype=np.float64)
        assert sums_of(rows, context=context)[0] == pytest.approx(expected, rel=1e-12)


def test_a_block_holds_whole_chunks_of_every_length():
    rows, blocks = chunks(Reader(), TextCache(LENGTHS), contexts=(8, 12), num_blocks=3)
    assert blocks.stop.tolist() == [72, 192, 288]
    assert sums_of(rows, context=8)[1] == 3 * 24 // 8 * 7
    assert sums_of(rows, context=12)[1] == 3 * 24 // 12 * 11


@pytest.mark.parametrize(
    ("contexts", "told"),
    [
        ((1, 8), "a chunk of 1 token has none to score"),
        ((8, 1024), "6 documents joined have 337 tokens, and a block of 1024 takes 1025"),
    ],
)
def test_what_cannot_be_cut_is_named(contexts, told):
    with pytest.raises(ValueError, match=told):
        chunks(Reader(), TextCache(LENGTHS), contexts=contexts)


# ---------------------------------------------------------------------------- resets


def test_resets_are_the_documents_alone():
    cache = TextCache(LENGTHS)
    rows, _ = resets(Reader(), cache, True, contexts=(160,))
    for index in range(3):  # what lies wholly in the first block of 160 tokens
        start, size = cache.documents["start"][index], LENGTHS[index]
        text = cache.stream[None, start : start + size]
        found = sums_of(rows, document=f"document {index}")
        if size == 1:
            assert found == [0, 0, 0, 0]  # nothing of its own before it
            continue
        nats, hits = Reader()(text[:, :-1], text[:, 1:])
        alone = token_sums(nats, hits, text[:, 1:], TOKEN_BYTES)
        np.testing.assert_allclose(found, list(alone.values()), rtol=1e-6)


@pytest.mark.fast("rotation")
@pytest.mark.parametrize("position", [ALiBi(), FoPE(training_length=16)], ids=lambda p: p.kind)
def test_resets_of_a_model_are_the_documents_alone(position):
    cache = TextCache((30, 30, 68), vocab=23)
    config = TransformerConfig(
        vocab_size=23,
        d_model=16,
        num_layers=2,
        num_heads=2,
        mlp_dim=24,
        attention_block=16,
        init_std=0.5,
    )
    model = Transformer(config, position, rngs=nnx.Rngs(3))
    rows, _ = resets(model_scorer(model), cache, True, contexts=(64,), num_blocks=1)

    @jax.jit
    def nats_alone(text):
        at = jnp.arange(29)[None]
        log_p = jax.nn.log_softmax(model(text[:, :-1], at, jnp.ones_like(at)))
        return -jnp.take_along_axis(log_p, text[:, 1:, None], -1).sum()

    for index, start in enumerate((0, 30)):
        nats = float(nats_alone(cache.stream[None, start : start + 30]))
        found = sums_of(rows, document=f"document {index}")
        assert found[:2] == [pytest.approx(nats, rel=1e-5), 29]


def test_both_arms_score_the_same_tokens_at_every_context_and_differ_where_documents_meet():
    cache = TextCache(LENGTHS)
    (with_resets, blocks), (without, same) = (resets(Reader(), cache, r) for r in (True, False))
    np.testing.assert_array_equal(blocks.stop, same.stop)
    assert blocks.stop.tolist() == [96, 192, 224]  # documents begin at 70, 75, 76, 166 and 197
    for context in CONTEXTS:
        one, other = sums_of(with_resets, context=context), sums_of(without, context=context)
        assert one[1:3] == other[1:3]
        assert one[1] == 3 * 32 - 5  # all but the first of each document
        assert one[0] != other[0]
    first = [sums_of(rows, context=8, document="document 0") for rows in (with_resets, without)]
    assert first[0] == first[1]  # nothing stands before it


def test_places_are_those_of_training():
    from fope_jax.data.loader import Loader

    cache = TextCache(LENGTHS)
    cache.num_tokens, cache.tokenizer.pad_id = sum(LENGTHS), 0
    loader = Loader(cache, length=32, batch_size=2, seed=0, packing="documents")
    batch = loader.windows(np.array([2, 6]))
    for row, begin in enumerate((64, 192)):
        positions, segments = packed_positions(cache.documents["start"], begin, 32)
        np.testing.assert_array_equal(positions, batch.positions[row])
        np.testing.assert_array_equal(segments, batch.segments[row])


def test_documents_that_never_meet_have_nothing_to_reset():
    with pytest.raises(ValueError, match="no two documents meet inside a block of 32 tokens"):
        resets(Reader(), TextCache((64, 64, 40)), True)


def test_sums_do_not_depend_on_the_batches():
    cache = TextCache(LENGTHS)
    for score in (chunks, lambda s, c, **k: resets(s, c, True, **k)):
        first, _ = score(Reader(), cache)
        for batch_tokens in (1, 64, 10**6):
            assert score(Reader(), cache, batch_tokens=batch_tokens)[0] == first
