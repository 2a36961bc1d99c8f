"""The arithmetic of the harness adapter on a model whose probabilities are known."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from fope_jax.data.bos import Bos
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.evaluate import harness
from fope_jax.evaluate.harness import as_harness_model
from fope_jax.evaluate.text_model import TextModel, rolling_windows, row_programs
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.position import FoPE

BYTES = BytesTokenizer()


def successor(tokens, segments, targets):
    """p(next byte) = 1/2, else 1/4; a token that saw no context at all: 1/8."""
    nats = np.where(targets == tokens + 1, math.log(2), math.log(4))
    first = segments & (np.cumsum(segments, axis=1) == 1)
    eos = (tokens == BYTES.eos_id) & (first == 1)
    return np.where(eos, math.log(8), nats).astype(np.float32), targets == tokens + 1


def count_up(tokens, segments, count):
    return tokens[:, -1:] + 1 + np.arange(count)


def model(max_length=None, score=successor, **changes):
    return TextModel(score, count_up, BYTES, max_length=max_length, **changes)


def test_continuations_are_scored_after_their_contexts():
    found = model().loglikelihood([("ab", "cd"), ("ab", "ce"), ("ab", "x"), ("", "ab"), ("q", "r")])
    expected = [1 / 4, 1 / 8, 1 / 4, 1 / 16, 1 / 2]
    np.testing.assert_allclose([total for total, _ in found], np.log(expected), rtol=1e-6)
    assert [greedy for _, greedy in found] == [True, False, False, False, True]


def test_spaces_before_a_continuation_belong_to_it():
    seen = []

    def score(tokens, segments, targets):
        seen.append((segments.sum(), BYTES.decode(targets[0])))
        return successor(tokens, segments, targets)

    spaced, joined = model(score=score).loglikelihood([("a ", "b"), ("a", " b")])
    assert spaced == joined
    assert seen[0][1].endswith(" b")


class Pieces:
    """A tokenizer of whole pieces, longest match first from the left; EOS is 0, BOS 1."""

    eos_id = pad_id = 0

    def __init__(self, *pieces, prefix=""):
        self.prefix = prefix
        self.pieces = ["", "", *sorted(pieces, key=len, reverse=True)]

    def encode(self, text):
        ids = []
        while text:
            ids.append(next(i for i, p in enumerate(self.pieces) if p and text.startswith(p)))
            text = text.removeprefix(self.pieces[ids[-1]])
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def scored_by(tokenizer, pairs, **settings):
    """What is read before each pair's targets, and the targets, with a bar between tokens."""
    rows = {}

    def score(tokens, segments, targets):
        for row, own, aims in zip(tokens, segments, targets, strict=True):
            rows[tuple(row[own == 1]), tuple(aims[own == 1])] = None
        return np.zeros(tokens.shape), np.ones(tokens.shape, bool)

    found = []
    for pair in pairs:
        rows.clear()
        text = TextModel(score, None, tokenizer, max_length=None, **settings)
        context, target = text.encode_pair(*pair, "")
        text.loglikelihood([pair])
        ((read, aims),) = rows
        assert [*read, aims[-1]] == context + target
        named = [
            "|".join({0: "EOS", 1: "BOS"}.get(i, tokenizer.pieces[i]) for i in ids)
            for ids in (context, target)
        ]
        found.append(tuple(named))
    return found


def test_tokens_across_the_border_belong_to_the_continuation():
    ans = Pieces("Answer", "Ans", "A", "n", "s", "w", "e", "r", "x")
    pairs = [("Ans", "wer"), ("Ans", "x"), ("An", "swer"), ("xAn", "swerx"), ("", "Answer")]
    assert scored_by(ans, pairs) == [
        ("EOS", "Answer"),
        ("Ans", "x"),
        ("EOS", "Answer"),
        ("x", "Answer|x"),
        ("EOS", "Answer"),
    ]
    # What follows is cut otherwise from the second of four tokens of the context on.
    far = Pieces("a", "b", "c", "d", "e", "bcde", "bcd")
    assert scored_by(far, [("abc", "de"), ("abc", "dea"), ("abc", "ea")]) == [
        ("a", "bcde"),
        ("a", "bcde|a"),
        ("a|b|c", "e|a"),
    ]
    # As many tokens as the context alone, and as many as before: the harness would score "!" alone.
    world = Pieces("hello", " wor", " world", "ld", "!", " ")
    assert scored_by(world, [("hello wor", "ld!"), ("hello", " world!")]) == [
        ("hello", " world|!"),
        ("hello", " world|!"),
    ]


def test_white_space_of_any_kind_goes_to_the_continuation():
    lines = Pieces("Q", "A", "\n", "\n\n", "\t", " ", "\nA")
    pairs = [("Q\n", "A"), ("Q\t ", "A"), ("Q\n\n", "A"), (" \n", "A"), ("Q", " A")]
    assert scored_by(lines, pairs) == [
        ("Q", "\nA"),
        ("Q", "\t| |A"),
        ("Q", "\n\n|A"),
        ("EOS", " |\nA"),
        ("Q", " |A"),
    ]


def test_what_the_tokenizer_puts_before_a_text_stands_before_the_context_alone():
    """As Llama 2's space: once before the joint text, and not before the continuation."""
    spaced = Pieces(" a", "a", " b", "b", " ", "c", prefix=" ")
    assert scored_by(spaced, [("a", " b"), ("a", "b"), ("", "b"), ("ab", "c")]) == [
        (" a", " b"),
        (" a", "b"),
        ("EOS", " b"),
        (" a|b", "c"),
    ]
    bos = Bos("<s>", 1)
    assert scored_by(spaced, [("a", "b"), ("", "b")], bos=bos, add_bos=True) == [
        ("BOS| a", "b"),
        ("BOS", " b"),
    ]


def test_a_continuation_without_tokens_is_an_error_by_name():
    class Deaf(BytesTokenizer):
        def encode(self, text):
            return super().encode(text.rstrip("~"))

    told = r"request 1, context 'ab', continuation '': the continuation is empty"
    for pair in (("ab", ""), ("", "")):
        with pytest.raises(ValueError, match=told.replace("'ab'", repr(pair[0]))):
            model().loglikelihood([("a", "b"), pair])
    deaf = TextModel(successor, None, Deaf(), max_length=None)
    for pair in (("ab", "~"), ("", "~")):
        with pytest.raises(ValueError, match="request 0, .*continuation '~': .* no tokens of its"):
            deaf.loglikelihood([pair])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error_by_name(wrong):
    def score(tokens, segments, targets):
        nats, hits = successor(tokens, segments, targets)
        return np.where(targets == BYTES.encode("x")[0], wrong, nats), hits

    broken = model(score=score)
    assert broken.loglikelihood([("a", "b")])[0][1]
    with pytest.raises(ValueError, match="request 1, context 'ab', continuation 'xy': the log-lik"):
        broken.loglikelihood([("ab", "cd"), ("ab", "xy")])
    with pytest.raises(
        ValueError, match="request 1, text 'axb': the log-likelihood is -?(nan|inf)"
    ):
        broken.loglikelihood_rolling(["ab", "axb"])
    long = "y" * 100 + "x"
    with pytest.raises(ValueError, match=r"context 'y{30} \.\.\. y{30}', continuation 'yx'"):
        broken.loglikelihood([(long[:-2], "yx")])


# ---------------------------------------------------------------------------- BOS


def test_texts_begin_with_bos_where_it_is_added():
    pieces, bos = Pieces("a", "b", "ab", " ", "<s>"), Bos("<s>", 1)
    pairs = [("a", " b"), ("a", "b"), ("", "a"), (" ", "a"), ("<s>a", " b")]
    assert scored_by(pieces, pairs, bos=bos, add_bos=True) == [
        ("BOS|a", " |b"),
        ("BOS", "ab"),
        ("BOS", "a"),
        ("BOS", " |a"),
        ("BOS|a", " |b"),
    ]
    # A token that texts do not begin with still stands where there is no context.
    assert scored_by(pieces, pairs[:3], bos=bos) == [("a", " |b"), ("BOS", "ab"), ("BOS", "a")]
    assert scored_by(pieces, pairs[:3]) == [("a", " |b"), ("EOS", "ab"), ("EOS", "a")]


def test_documents_and_prompts_begin_with_bos():
    seen, prompts = [], []
    bos = 2  # a token of BytesTokenizer that stands for no byte

    def score(tokens, segments, targets):
        rows = [row[own == 1].tolist() for row, own in zip(tokens, segments, strict=True)]
        seen.extend(row for row in rows if row not in seen)
        return successor(tokens, segments, targets)

    def write(tokens, segments, count):
        prompts.append(tokens[segments == 1].tolist())
        return count_up(tokens, segments, count)

    own = TextModel(score, write, BYTES, max_length=4, bos=Bos("<s>", bos), add_bos=True)
    a, b, c, d, e = BYTES.encode("abcde")
    own.loglikelihood_rolling(["abcde", "<s>ab"])
    # BOS once, and only at the beginning of a document, which is scored from its first token on.
    assert seen == [[bos, a, b, c], [a, b, c, d], [bos, a]]
    own.generate("a", [], 2)
    own.generate("", [], 2)
    own.generate("abc", [], 2)
    assert prompts == [[bos, a], [bos], [b, c]]  # what is cut off is the beginning
    seen.clear()
    own.loglikelihood([("abcde", "a")])
    assert seen == [[b, c, d, e]]


def test_every_token_of_a_document_is_scored_once():
    text = "abcdefghijk"
    for length in (None, 1, 3, 4, 11, 50):
        windows = list(rolling_windows(BYTES.encode(text), BYTES.eos_id, length))
        scored = [token for _, target in windows for token in target]
        assert scored == BYTES.encode(text)
        stream = [BYTES.eos_id, *scored]
        for context, target in windows:
            joined = context + target
            assert joined == stream[stream.index(target[0]) - len(context) :][: len(joined)]
            assert length is None or len(joined) - 1 <= length
        if length and length < 11:
            assert len(sum(windows[-1], [])) - 1 == length
    (whole,) = model().loglikelihood_rolling([text])
    assert whole == pytest.approx(math.log(1 / 8) + 10 * math.log(1 / 2))
    assert model(4).loglikelihood_rolling([text, ""]) == pytest.approx([whole, 0.0])


def test_long_contexts_lose_their_beginning_and_it_is_told(caplog):
    seen = []

    def score(tokens, segments, targets):
        seen.extend(BYTES.decode(row[own == 1]) for row, own in zip(tokens, segments, strict=True))
        return successor(tokens, segments, targets)

    model(8, score).loglikelihood([("0123456789", "abc"), ("01", "a")])
    assert {"456789ab"[-8:], "01"} == set(seen)
    assert "1 of 2 contexts are longer than max_length = 8" in caplog.text
    with pytest.raises(ValueError, match=r"request 1, .*'xxxxxxxxx'.* 9 tokens is longer than max"):
        model(8).loglikelihood([("a", "x"), ("a", "x" * 9)])


def test_batches_hold_no_more_tokens_than_allowed():
    shapes = []

    def score(tokens, segments, targets):
        shapes.append(tokens.shape)
        return successor(tokens, segments, targets)

    pairs = [("a" * n, "bc") for n in (3, 40, 4, 5, 30, 6, 7)]
    found = model(score=score, batch_tokens=64).loglikelihood(pairs)
    assert found == model().loglikelihood(pairs)
    assert {length for _, length in shapes} == {16, 32, 64}
    assert all(rows * length <= 64 for rows, length in shapes)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_length": 0}, "max_length = 0; accepted: an integer of 1 or more, or None"),
        ({"max_length": -8}, "max_length = -8; accepted"),
        ({"max_length": True}, "max_length = True; accepted"),
        ({"batch_tokens": 0}, "batch_tokens = 0; accepted: an integer of 1 or more, or None"),
        ({"batch_tokens": 2.5}, "batch_tokens = 2.5; accepted"),
        ({"max_length": 65}, "max_length = 65: Learned is defined for at most 64"),
    ],
)
def test_settings_that_cannot_be_are_named_before_any_work(runs, monkeypatch, settings, told):
    monkeypatch.setattr(harness, "load_run_tokenizer", lambda *_: pytest.fail("read a tokenizer"))
    learned = runs.experiment(method={"method": "learned", "table_length": 64})
    with pytest.raises(ValueError, match=told):
        harness.plan_text_model("runs/none", learned, **settings)


def test_settings_have_the_runs_where_they_are_left_out(runs, monkeypatch):
    monkeypatch.setattr(harness, "load_run_tokenizer", lambda *_: BYTES)
    learned = runs.experiment(method={"method": "learned", "table_length": 64})
    plan = harness.plan_text_model("runs/none", learned)
    assert (plan.max_length, plan.batch_tokens) == (64, learned.evaluate.batch_tokens)
    plan = harness.plan_text_model("runs/none", learned, max_length=1, batch_tokens=1)
    assert (plan.max_length, plan.batch_tokens) == (1, 1)


def test_generation_ends_at_a_stop_or_the_end_of_a_document(caplog):
    assert model().generate("ab", ["f", "h", ""], 20) == "cde"
    assert model().generate("ab", [], 3) == "cde"
    # One stop after the other: what the first has cut off cannot hold the second.
    assert model().generate("ab", ["ef", "de"], 9) == "cd"
    prompts = []

    def write(tokens, segments, count):
        prompts.append(BYTES.decode(tokens[segments == 1]))
        return np.array([[*BYTES.encode("xy"), BYTES.eos_id, 100]])

    own = TextModel(successor, write, BYTES, max_length=6)
    assert own.generate("abcdef", [], 4) == "xy"
    assert prompts == ["ef"]
    assert "1 of 1 prompts, of up to 6 tokens, lose their beginning: with 4 to" in caplog.text
    with pytest.raises(ValueError, match="6 tokens to write leave no room"):
        own.generate("a", [], 6)


class Request:
    def __init__(self, *args):
        self.args = args


def test_the_harness_gets_its_methods():
    lm = as_harness_model(object, model())
    assert lm.loglikelihood([Request("ab", "cd")]) == model().loglikelihood([("ab", "cd")])
    assert lm.loglikelihood_rolling([Request("abc")]) == model().loglikelihood_rolling(["abc"])
    assert lm.generate_until(
        [Request("ab", {"until": "f"}), Request("a", {"max_gen_toks": 2})]
    ) == ["cde", "bc"]
    greedy = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "num_beams": 1}
    settings = [
        (greedy | {"max_new_tokens": 1}, "b"),
        ({"max_tokens": 2, "until": None}, "bc"),
        ({"max_completion_tokens": 3, "until": ["c", "b"]}, ""),
        ({"temperature": 0.0, "max_new_tokens": 5, "max_gen_toks": 1}, "b"),
    ]
    for asked, written in settings:
        assert lm.generate_until([Request("a", asked)]) == [written]


def test_requests_of_the_same_settings_are_one_batch_and_answers_keep_their_order():
    calls = []

    def write(tokens, segments, count):
        calls.append((len(tokens), count))
        return count_up(tokens, segments, count)

    def score(tokens, segments, targets):
        calls.append(len(tokens))
        return successor(tokens, segments, targets)

    lm = as_harness_model(object, TextModel(score, write, BYTES, max_length=None))
    two, three = {"max_gen_toks": 2}, {"max_gen_toks": 3, "until": "e"}
    asked = [("a", two), ("b", three), ("c", two), ("aa", two), ("c", three)]
    assert lm.generate_until([Request(*x) for x in asked]) == ["bc", "cd", "de", "bc", "d"]
    assert calls == [(4, 2), (2, 3)]  # three prompts, filled to a power of two, then two
    calls.clear()
    texts = ["abc", "xx", "abd"]
    alone = [model().loglikelihood_rolling([text])[0] for text in texts]
    assert lm.loglikelihood_rolling([Request(text) for text in texts]) == alone
    assert calls == [4]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"do_sample": True}, "asks for sampling .* only greedy decoding is done"),
        ({"temperature": 0.5}, "asks for sampling .* only greedy decoding is done"),
        ({"num_beams": 4}, "asks for num_beams = 4, which greedy decoding here does not know"),
        ({"repetition_penalty": 1.1}, "asks for repetition_penalty = 1.1"),
        ({"max_length": 99}, "asks for max_length = 99"),
        ({"max_gen_toks": 0}, "max_gen_toks = 0; accepted: an integer of 1 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1; accepted"),
        ({"until": 3}, "until = 3; accepted: a text or a list of texts"),
        ({"until": [3]}, r"until = \[3\]; accepted"),
    ],
)
def test_settings_that_would_change_what_is_written_are_refused(asked, told):
    lm = as_harness_model(object, model())
    with pytest.raises(ValueError, match=told):
        lm.generate_until([Request("a", asked)])


def test_without_the_harness_the_error_holds_the_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[harness\]'"):
        harness.harness_model("runs/none")


def test_rows_of_a_real_model_are_scored_as_if_alone():
    config = TransformerConfig(
        vocab_size=259, d_model=16, num_layers=1, num_heads=2, mlp_dim=16, init_std=0.6
    )
    network = Transformer(config, FoPE(16), rngs=nnx.Rngs(3))
    real = TextModel(*row_programs(network), BYTES, max_length=None)
    (total, _), _ = real.loglikelihood([("the sky", " is"), ("a", "bcdefghij")])
    tokens = np.asarray([BYTES.encode("the sky is")], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    whole = nnx.jit(lambda network, *x: network(*x))
    logits = np.asarray(whole(network, tokens, positions, np.ones_like(positions)))[0]
    log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True))
    expected = sum(log_p[i - 1, tokens[0, i]] for i in (7, 8, 9))
    assert total == pytest.approx(expected, rel=1e-4)
    assert len(real.generate("the sky", [], 5)) <= 5
    # With weights of NaN, which would write token 0 and nothing else.
    graphdef, params, constants = split(network)
    broken = merge(graphdef, jax.tree.map(lambda x: x * np.nan, params), constants)
    real = TextModel(*row_programs(broken), BYTES, max_length=None)
    with pytest.raises(ValueError, match="the logits after the prompt 'the sky' are not finite"):
        real.generate("the sky", [], 5)
