"""The arithmetic of the harness adapter on a model whose probabilities are known."""

import math

import numpy as np
import pytest
from flax import nnx

from fope_jax.data.tokenizer import BytesTokenizer
from fope_jax.evaluate import harness
from fope_jax.evaluate.harness import TextModel, as_harness_model, rolling_windows, row_programs
from fope_jax.model.transformer import Transformer, TransformerConfig
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
    with pytest.raises(ValueError, match="continuation of 9 tokens is longer than max_length = 8"):
        model(8).loglikelihood([("a", "x" * 9)])


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


def test_generation_ends_at_a_stop_or_the_end_of_a_document(caplog):
    assert model().generate("ab", ["f", "h", ""], 20) == "cde"
    assert model().generate("ab", [], 3) == "cde"
    prompts = []

    def write(tokens, segments, count):
        prompts.append(BYTES.decode(tokens[segments == 1]))
        return np.array([[*BYTES.encode("xy"), BYTES.eos_id, 100]])

    own = TextModel(successor, write, BYTES, max_length=6)
    assert own.generate("abcdef", [], 4) == "xy"
    assert prompts == ["ef"]
    assert "a prompt of 6 tokens loses its beginning" in caplog.text
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
    ) == [
        "cde",
        "bc",
    ]
    with pytest.raises(ValueError, match="asks for sampling .* only greedy decoding is done"):
        lm.generate_until([Request("a", {"do_sample": True})])


def test_without_the_harness_the_error_holds_the_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'fope-jax\[harness\]'"):
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
    logits = np.asarray(network(tokens, positions, np.ones_like(positions)))[0]
    log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True))
    expected = sum(log_p[i - 1, tokens[0, i]] for i in (7, 8, 9))
    assert total == pytest.approx(expected, rel=1e-4)
    assert len(real.generate("the sky", [], 5)) <= 5
