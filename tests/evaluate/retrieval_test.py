"""Retrieval scores: exactly those of models whose answers are known, and of real ones decoded."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from fope_jax.data.random_positions import PositionDraw
from fope_jax.data.retrieval.base import NUM_DISTRACTORS, Task, Trial, TrialLengths
from fope_jax.data.retrieval.passkey import COMPACT, STANDARD, Passkey
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.evaluate.generation import answer_room, model_answerer
from fope_jax.evaluate.retrieval import (
    ContextTooLongError,
    TrialGrid,
    answers_at_random_positions,
    check_trials,
    score_task,
)
from fope_jax.evaluate.scoring import positions_of_rows
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer
from fope_jax.position import FoPE, RoPE, SelfExtend

BYTES = BytesTokenizer()
SMALL = TransformerConfig(
    vocab_size=259,
    d_model=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=16,
    init_std=0.6,
    attention_block=32,
)
SERIES = TrialGrid(contexts=(200, 800), depths=(0.0, 0.5, 1.0), trials=6, seed=5)


def sees(window):
    """A model that copies what followed the question's last words, within ``window`` tokens."""

    def answerer(prompts, answers):
        written = np.full((len(prompts), answers.shape[2]), 7, np.int32)
        nats = np.full(answers.shape, 2.0, np.float32)
        for row, prompt in enumerate(prompts):
            context = BYTES.decode(prompt[-window:])
            start = context.find("key is ")
            if start >= 0:
                found = BYTES.encode(context[start + 6 :][: answers.shape[2]])
                written[row] = found
                nats[row, (answers[row] == found).all(axis=1)] = 0.25
        return written, nats

    return answerer


def score(answerer, task=None, series=SERIES, batch_tokens=4_000, **kwargs):
    task = task or Passkey.from_tokenizer(BYTES)
    return score_task(answerer, task, BYTES, series, batch_tokens=batch_tokens, **kwargs)


def test_a_model_with_a_known_window_gets_exactly_its_accuracy():
    """The needle begins `room * (1 - depth)` + question + needle before the answer."""
    fixed = Passkey.from_tokenizer(BYTES).pieces_for_key(12345, []).fixed
    for window in (20, 120, 250, 500, 10_000):
        rows = score(sees(window))
        for row in rows:
            room = row["context"] - fixed
            after = room - round(row["depth"] * room)
            right = len("key is 12345.") + after + len(COMPACT.question) <= window
            expected = 6 if right else 0
            assert (row["correct"], row["total"]) == (expected, 6)
            assert (row["found"], row["asked"]) == (expected, 6)
            assert row["tokens"] == 6 * len(" 12345")
            assert row["nats"] == row["tokens"] * (0.25 if right else 2.0)
            # Where all are equally likely, every tie counts against the answer.
            assert (row["first"], row["rank_sum"]) == (
                (6, 6) if right else (0, 6 * (1 + NUM_DISTRACTORS))
            )
            assert row["candidates"] == 1 + NUM_DISTRACTORS
        assert len(rows) == 2 * 3
    assert {row["correct"] for row in score(sees(250))} == {0, 6}


class Fixed(Task):
    """Answers of given lengths; the model below knows the first of each trial's number."""

    name, has_depth = "fixed", False

    def __init__(self, answers, distractors):
        self.answers, self.distractors = answers, distractors

    def lengths(self, rng, half):
        number = int(rng.integers(0, len(self.answers)))
        longest = max(self.answers[number], *self.distractors)
        return TrialLengths(5, self.answers[number], longest)

    def draw_trial(self, rng, context, depth, half):
        number = int(rng.integers(0, len(self.answers)))
        answer = np.full(self.answers[number], number)
        distractors = tuple(np.full(size, 99) for size in self.distractors)
        prompt = np.full(context - len(answer), 50)
        parts = (BYTES.decode(answer[:1]),)
        return Trial(
            np.concatenate([prompt, answer]).astype(np.int32), len(answer), distractors, parts
        )


def test_only_an_answers_own_tokens_count():
    """Filled up with copies, answers of 1, 2 and 3 tokens at 1 nat each, distractors at 1.5."""
    seen = []

    def answerer(prompts, answers):
        seen.append((prompts.shape, answers.shape))
        return answers[:, 0], np.where(answers == 99, 1.5, 1.0).astype(np.float32)

    series = TrialGrid(contexts=(20,), depths=(0.1, 0.9), trials=20, seed=1)
    (row,) = score(answerer, Fixed((1, 2, 3), (2,) * NUM_DISTRACTORS), series, batch_tokens=140)
    lengths = [series.draw(Fixed((1, 2, 3), (2,)), n, 20).answer_length for n in range(40)]
    assert row["depth"] is None
    assert row["correct"] == row["total"] == 40
    assert row["nats"] == row["tokens"] == sum(lengths)
    # 3 nats for two tokens of a distractor: better than none, as good as an answer of three.
    assert row["first"] == lengths.count(1) + lengths.count(2)
    assert row["rank_sum"] == row["first"] + lengths.count(3) * (1 + NUM_DISTRACTORS)
    assert {prompt[0] for prompt, _ in seen} == {7}  # one shape of batches for each answer length
    assert {(prompt[1], answer) for prompt, answer in seen} == {
        (20 - n, (7, 1 + NUM_DISTRACTORS, 3)) for n in (1, 2, 3)
    }


@pytest.mark.parametrize("what", ["all", "answer", "one distractor", "infinite", "written"])
def test_a_trial_that_is_not_finite_is_wrong_and_has_the_worst_rank(what):
    def answerer(prompts, answers):
        nats = np.where(np.arange(answers.shape[1])[:, None] == 0, 0.5, np.ones(answers.shape))
        nats[:, {"one distractor": 3, "answer": 0, "infinite": 0}.get(what, slice(None)), 1:2] *= (
            1.0 if what == "written" else np.inf if what == "infinite" else np.nan
        )
        written = answers[:, 0].copy()
        if what == "written":
            written[:, -1] = -1
        return written, nats

    rows = score(answerer, series=SERIES._replace(contexts=(200,)))
    for row in rows:
        assert (row["correct"], row["first"], row["rank_sum"]) == (0, 0, 6 * (1 + NUM_DISTRACTORS))
        assert np.isnan(row["nats"])
    (row,) = score(answerer, make_task("multi_value", BYTES), SERIES._replace(contexts=(600,)))
    assert (row["correct"], row["asked"]) == (0, 72)
    assert row["found"] == (0 if what == "written" else 72)


def test_parts_are_found_in_any_order():
    task = make_task("multi_value", BYTES)

    def answerer(prompts, answers):
        """Writes the second and first number of the answer, then other text."""
        written = [BYTES.decode(own[0]) for own in answers]
        numbers = [text.replace(" and", ",").strip().split(", ") for text in written]
        texts = [
            f" {b}, {a} x".ljust(len(t)) for (a, b, *_), t in zip(numbers, written, strict=True)
        ]
        return np.array([BYTES.encode(text) for text in texts]), np.ones(answers.shape)

    (row,) = score(answerer, task, SERIES._replace(contexts=(600,)))
    assert (row["correct"], row["total"], row["found"], row["asked"]) == (0, 18, 36, 72)


def test_a_context_shorter_than_the_template_names_the_minimum():
    task = Passkey.from_tokenizer(BYTES, STANDARD)
    minimum = len(STANDARD.intro + STANDARD.needle.format(key=12345) + STANDARD.question) + 6
    told = rf"passkey_lengths gives .* 200 tokens, too short for 'passkey \(standard\)'.* {minimum}"
    with pytest.raises(ValueError, match=told):
        score(sees(9), task)
    with pytest.raises(ValueError, match="passkey_trials is 0; accepted: 1"):
        check_trials(task, SERIES._replace(trials=0))
    with pytest.raises(ValueError, match="passkey_depths gives 0.5, 0.5; accepted: each once"):
        score(sees(9), series=SERIES._replace(depths=(0.5, 0.5)))
    with pytest.raises(ValueError, match="passkey_lengths gives 200, 200; accepted: each once"):
        score(sees(9), series=SERIES._replace(contexts=(200, 200)))


@pytest.mark.parametrize("name", ["common_words", "variable_tracking", "every_key", "recall"])
def test_contexts_end_where_the_longest_wrong_answer_does(name):
    """The longest context that is accepted is the longest whose cache is within the limit."""
    task, rooms = make_task(name, BYTES), []
    depths = task.depths or (0.5,)

    def answerer(prompts, answers, questions=None):
        asked = 0 if questions is None else questions.shape[2]
        rooms.append(prompts.shape[1] + asked + answer_room(answers.shape[-1]))
        shape = answers.shape[:1] if questions is None else answers.shape[:2]
        return np.zeros((*shape, answers.shape[-1]), np.int32), np.ones(answers.shape)

    grid = TrialGrid(contexts=(1300,), depths=depths, trials=4, seed=5)
    score(answerer, task, grid)
    check_trials(task, grid, limit=max(rooms))
    if max(rooms) > 1300:
        told = f"of 1300 tokens, .*'{name}' {max(rooms)} are read: .* at most 1300; .* up to"
        with pytest.raises(ContextTooLongError, match=f"{told} {2600 - max(rooms)} or"):
            check_trials(task, grid, limit=1300)
    else:
        check_trials(task, grid, limit=1300)
    assert (max(rooms) > 1300) == (name == "common_words")


def finds_keys(window, calls):
    """A model that knows the numbers within ``window`` tokens before the question."""

    def answerer(prompts, answers, questions):
        calls.append((prompts.shape, answers.shape, questions.shape))
        written = np.full((*questions.shape[:2], answers.shape[3]), 7, np.int32)
        nats = np.full(answers.shape, 2.0, np.float32)
        for row, asked in np.ndindex(questions.shape[:2]):
            context, question = BYTES.decode(prompts[row, -window:]), questions[row, asked]
            _, found, rest = context.partition(BYTES.decode(question))
            if found:
                written[row, asked] = BYTES.encode(rest[: answers.shape[3]])
                nats[row, asked, 0] = 0.25
        return written, nats

    return answerer


def test_every_key_is_read_once_and_asked_at_its_own_depths():
    task, calls = make_task("every_key", BYTES), []
    series = SERIES._replace(contexts=(900,), depths=task.depths, trials=5)
    rows = score(finds_keys(470, calls), task, series, batch_tokens=2_000)
    assert [row["depth"] for row in rows] == list(task.depths)
    # Five windows in rows of two; ten questions each; not fifty windows.
    assert [[shape[:2] for shape in call] for call in calls] == [
        [(2, 900 - len(" The number of the bridge is 12345")), (2, 10), (2, 10)]
    ] * 3
    assert [row["total"] for row in rows] == [5] * 10
    assert [row["correct"] for row in rows] == [0] * 5 + [5] * 5
    assert [row["first"] for row in rows] == [0] * 5 + [5] * 5
    assert [row["rank_sum"] for row in rows] == [50] * 5 + [5] * 5


def test_other_windows_have_other_keys():
    task = make_task("every_key", BYTES)
    series = SERIES._replace(contexts=(900,), depths=task.depths, trials=5)
    windows = series.windows(task)
    assert sorted(sum(windows, [])) == list(range(50))
    numbers = [[series.draw(task, n, 900).answer_texts[0] for n in each] for each in windows]
    assert len(set(sum(numbers, []))) == 50
    alone = series.windows(make_task("multi_key", BYTES))
    assert alone == [[number] for number in range(50)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "position",
    [SelfExtend(RoPE(), window=8, group=3), pytest.param(FoPE(24), marks=pytest.mark.slow)],
    ids=["self_extend", "fope"],
)
def test_questions_after_one_window_are_answered_as_after_their_own(position):
    model = Transformer(SMALL, position, rngs=nnx.Rngs(3))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 256, (2, 40), np.int32)
    questions = rng.integers(0, 256, (2, 3, 5), np.int32)
    answers = rng.integers(0, 256, (2, 3, 4, 6), np.int32)
    answerer = model_answerer(model)
    positions = PositionDraw(56, "subset", seed=1).positions(np.ones((2, 50), int), [0])
    written, nats = map(np.asarray, answerer(prompts, answers, questions, positions))
    assert written.shape == (2, 3, 6) and nats.shape == (2, 3, 4, 6)
    for number in range(3):
        whole = np.concatenate([prompts, questions[:, number]], axis=1)
        asked = answerer(whole, answers[:, number], None, positions)
        expected, losses = map(np.asarray, asked)
        np.testing.assert_array_equal(written[:, number], expected)
        np.testing.assert_allclose(nats[:, number], losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "subset", pytest.param("float", marks=pytest.mark.slow)])
def test_a_real_model_is_decoded_and_ranked_as_its_full_logits_say(kind):
    """At positions from 0, and at drawn ones, whatever is in the other rows of the batch."""
    config = dataclasses.replace(SMALL, tie_embeddings=True)
    model = Transformer(config, FoPE(16), rngs=nnx.Rngs(3))
    task = make_task("copy", BYTES)
    draw = [task.draw_trial(np.random.default_rng(i), 41, 0.5, "test") for i in range(2)]
    prompts = np.stack([trial.tokens[:-8] for trial in draw])
    answers = np.stack([[trial.tokens[-8:], *trial.distractors[:2]] for trial in draw])
    answerer, positions = model_answerer(model), np.arange(40)[None].repeat(2, 0)
    if kind is not None:
        drawn, plain = PositionDraw(100, kind, seed=1), answerer
        answerer = answers_at_random_positions(plain, drawn)
        positions = positions_of_rows(drawn, prompts, np.ones((2, 40), int))
        assert (positions[0] != positions[1]).any() and (np.diff(positions) > 0).all()
        assert (positions.dtype, (positions % 1).any()) == (
            (np.int32, False) if kind == "subset" else (np.float32, True)
        )
        alone = answerer(prompts[1:], answers[1:])
        np.testing.assert_array_equal(alone[0], answerer(prompts, answers)[0][1:])
        from_zero = np.asarray(plain(prompts, answers)[1])
        assert not np.allclose(answerer(prompts, answers)[1], from_zero, atol=1e-3)
    written, nats = map(np.asarray, answerer(prompts, answers))

    def logits(texts):
        # The last token is not read by the answerer, nor does any other token see it.
        at = np.concatenate([positions, positions[:, -1:] + 1], axis=1)
        return np.asarray(
            nnx.jit(lambda model, x: model(x, at, np.ones(at.shape, np.int32)))(model, texts)
        )

    greedy = logits(np.concatenate([prompts, written], axis=1))
    np.testing.assert_array_equal(greedy[:, -9:-1].argmax(axis=-1), written)
    for index in range(3):
        rows = logits(np.concatenate([prompts, answers[:, index]], axis=1))[:, -9:-1]
        log_p = rows - np.log(np.exp(rows - rows.max()).sum(-1, keepdims=True)) - rows.max()
        expected = -np.take_along_axis(log_p, answers[:, index][..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(nats[:, index], expected, rtol=1e-4, atol=1e-4)
