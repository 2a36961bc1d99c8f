"""Every task: exact lengths, one seed one item, and no item of training in a test."""

import numpy as np
import pytest

from fope_jax.data.retrieval import TASKS, registry
from fope_jax.data.retrieval.base import NUM_DISTRACTORS, split_of
from fope_jax.data.retrieval.needles import KEYS, NEEDLES, WORDS, CommonWords, EveryKey
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.retrieval.text_task import FILLER, CorpusHaystack, NoiseHaystack
from fope_jax.data.retrieval.token_tasks import Copy, Recall
from fope_jax.data.tokenizers import BytesTokenizer

BYTES = BytesTokenizer()
DEPTHS = (0.0, 0.4, 1.0)
NEEDLE_TASKS = ("multi_key", "multi_value", "multi_query", "every_key", "variable_tracking")


class Corpus:
    split, fingerprint, num_tokens = "validation", "f", 20_000

    def tokens(self, start, stop):
        assert 0 <= start <= stop <= self.num_tokens
        return np.arange(start, stop, dtype=np.int32) % 91 + 130  # no byte of the needles


def rng(*seed):
    return np.random.default_rng(seed)


@pytest.fixture(params=TASKS)
def task(request):
    return make_task(request.param, BYTES, CorpusHaystack(Corpus()))


def test_a_window_has_exactly_the_tokens_asked_for(task):
    shortest = task.min_length(rng(7), "test")
    for context in (shortest, shortest + 1, 2 * shortest + 5, 1500):
        for depth in DEPTHS:
            trial = task.draw_trial(rng(7), context, depth, "test")
            assert trial.tokens.shape == (context,)
            assert trial.tokens.dtype == np.int32
            assert 1 <= trial.answer_length < context
            answer = trial.tokens[-trial.answer_length :].tolist()
            assert len(trial.distractors) == NUM_DISTRACTORS
            assert answer not in [distractor.tolist() for distractor in trial.distractors]
    with pytest.raises(ValueError, match=rf"of {shortest - 1} tokens; .* has {shortest}$"):
        task.draw_trial(rng(7), shortest - 1, 0.5, "test")


def test_the_same_is_asked_at_every_length_and_depth(task):
    trials = [
        task.draw_trial(rng(5), context, depth, "test")
        for context in (600, 900)
        for depth in DEPTHS
    ]
    asked = {tuple(trial.tokens[-trial.answer_length :]) for trial in trials}
    # What is asked of a copy is another part of the source, of every key another one.
    if not isinstance(task, (Copy, EveryKey)):
        assert len(asked) == 1
    again = [task.draw_trial(rng(5), 600, 0.3, "test").tokens for _ in range(2)]
    np.testing.assert_array_equal(*again)
    other = task.draw_trial(rng(6), 600, 0.3, "test").tokens
    assert (again[0] != other).any()


@pytest.mark.parametrize("length", [400, 401])
def test_lessons_are_windows_with_answers(task, length):
    tokens, answers = task.draw_training_window(rng(1), length)
    assert tokens.shape == answers.shape == (length,)
    assert answers.dtype == bool
    assert 0 < answers.sum() < length
    assert answers[-1] or isinstance(task, Recall)


# ---------------------------------------------------------------------------- recall and copying


def dictionary(tokens, task):
    """key -> value of the pairs of a window, keys found by being keys."""
    at = np.flatnonzero(np.isin(tokens[:-1], task.keys))
    return dict(zip(tokens[at].tolist(), tokens[at + 1].tolist(), strict=True))


@pytest.mark.parametrize("context", [64, 65])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_key_asked_for_stands_once_before_at_its_depth(context, depth):
    task = Recall.from_tokenizer(BYTES)
    for seed in range(20):
        trial = task.draw_trial(rng(seed), context, depth, "test")
        key, value = trial.tokens[-2:]
        (place,) = np.flatnonzero(trial.tokens[:-2] == key)
        assert trial.tokens[place + 1] == value
        assert (place - context % 2) // 2 == round(depth * ((context - 2) // 2 - 1))
        shown = dictionary(trial.tokens, task)
        assert {int(v[0]) for v in trial.distractors} & {shown[key]} == set()


def test_64_keys_repeat_at_four_times_a_length_as_16_do_at_it():
    def repeats(name, context):
        """How often each other key of a window stands there, the mean over 20 windows."""
        task, counts = make_task(name, BYTES), []
        for seed in range(20):
            tokens = task.draw_trial(rng(seed), context, 0.5, "test").tokens[:-2]
            assert len(dictionary(tokens, task)) <= task.entries
            counts.append((np.isin(tokens, task.keys).sum() - 1) / (task.entries - 1))
        return np.mean(counts)

    for context in (66, 130, 514):
        few, many = repeats("recall", context), repeats("recall_64_keys", 4 * context)
        np.testing.assert_allclose(few, many, rtol=0.06)
        assert repeats("recall_64_keys", context) < few / 3.9


@pytest.mark.parametrize("context", [9, 32, 65])
def test_distractors_of_recall_stand_in_the_window_as_far_as_it_has_others(context):
    task = Recall.from_tokenizer(BYTES)
    for seed in range(20):
        tokens, _, distractors, *_ = task.draw_trial(rng(seed), context, 0.4, "test")
        wrong = {int(value) for (value,) in distractors}
        others = set(tokens[np.isin(tokens, task.values)].tolist()) - {int(tokens[-1])}
        assert len(wrong) == NUM_DISTRACTORS and int(tokens[-1]) not in wrong
        assert len(wrong & others) == min(NUM_DISTRACTORS, len(others))


def test_the_window_of_recall_is_that_of_a_seed_whatever_the_distractors():
    """Trials of evaluations before distractors were of the window have the same tokens."""
    trial = Recall.from_tokenizer(BYTES).draw_trial(rng(3), 13, 0.5, "test")
    assert trial.tokens.tolist() == [29, 119, 17, 239, 29, 199, 241, 43, 209, 35, 249, 199, 241]


def test_a_training_window_asks_for_every_value_whose_key_was_there():
    task = Recall.from_tokenizer(BYTES)
    tokens, answers = task.draw_training_window(rng(2), 129)
    pairs = dictionary(tokens, task)
    seen = set()
    for place in range(0, 128, 2):
        key = int(tokens[place])
        assert not answers[place]
        assert answers[place + 1] == (key in seen)
        assert tokens[place + 1] == pairs[key]
        seen.add(key)
    assert len(seen) == task.entries


@pytest.mark.parametrize("context", [64, 65, 333])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_answer_of_a_copy_follows_what_was_copied(context, depth):
    task = Copy.from_tokenizer(BYTES)
    tokens = task.draw_trial(rng(3), context, depth, "test").tokens
    (mark,) = np.flatnonzero(tokens == task.mark)
    source, copy = tokens[:mark], tokens[mark + 1 :]
    np.testing.assert_array_equal(copy, source[: len(copy)])
    share = (len(copy) - task.span) / max(1, mark - task.span)
    assert share == pytest.approx(depth, abs=2 / (mark - task.span))


def test_a_training_window_of_copying_repeats_its_source_at_random_distances():
    task, distances = Copy.from_tokenizer(BYTES), set()
    for seed in range(30):
        tokens, answers = task.draw_training_window(rng(seed), 65)
        first = int(np.flatnonzero(tokens == task.mark)[0])
        np.testing.assert_array_equal(answers, np.arange(65) > first)
        np.testing.assert_array_equal(tokens[first + 1 :], tokens[: 65 - first - 1])
        distances.add(first + 1)
    assert len(distances) > 12
    assert min(distances) > task.span
    longest = task.draw_trial(rng(0), 64, 0.0, "test").tokens
    assert max(distances) <= int(np.flatnonzero(longest == task.mark)[0]) + 1 < max(distances) + 5


def test_too_few_tokens_for_symbols_are_named(pieces):
    few = pieces(r".")
    few.token_bytes = np.ones(100, np.int32)
    with pytest.raises(ValueError, match="take 128 tokens that stand for text; .* has 100"):
        Recall.from_tokenizer(few)


# ---------------------------------------------------------------------------- halves


def items(task, window):
    """What makes the items of a window, as the halves are told apart."""
    if isinstance(task, Recall):
        pairs = sorted(dictionary(window, task).items())
        return {tuple(pairs)} if len(pairs) == task.entries else set()
    if isinstance(task, Copy):
        return {window[: task.span].tobytes()}
    text = BYTES.decode(window)
    if isinstance(task, CommonWords):
        return {text.rpartition(" are ")[2]}
    return {word.strip(".,") for word in text.split() if word.strip(".,").isdecimal()}


@pytest.mark.fast("recall", "passkey", "multi_query", "common_words")
def test_train_and_test_items_never_overlap(task):
    """Drawn from equal seeds, as the worst case is."""
    length = 1600 if task.name == "recall_64_keys" else 400  # long enough for all of its keys
    windows = [task.draw_training_window(rng(seed), length)[0] for seed in range(150)]
    trials = [task.draw_trial(rng(seed), length, 0.5, "test").tokens for seed in range(150)]
    trained = set().union(*(items(task, window) for window in windows))
    tested = set().union(*(items(task, window) for window in trials))
    assert len(trained) > 100 and len(tested) > 100
    assert not trained & tested


def test_halves_are_of_one_size():
    share = np.mean([split_of(str(n).encode()) == "test" for n in range(10_000, 100_000)])
    assert share == pytest.approx(0.5, abs=0.01)


# ---------------------------------------------------------------------------- needles


def test_no_distractor_of_common_words_is_ranked_twice():
    task = make_task("common_words", BYTES)
    for seed in range(60):
        distractors = task.draw_trial(rng(seed), 400, 0.5, "test").distractors
        assert len({wrong.tobytes() for wrong in distractors}) == NUM_DISTRACTORS


def text_of(name, context=1200, haystack=None, seed=4, depth=0.5, tokenizer=BYTES):
    task = make_task(name, tokenizer, haystack)
    trial = task.draw_trial(rng(seed), context, depth, "test")
    return tokenizer.decode(trial.tokens), trial


def test_needles_are_whole_in_any_tokens_and_any_haystack(tokenizer):
    for haystack in (None, NoiseHaystack.from_tokenizer(tokenizer, " ...")):
        for name in NEEDLE_TASKS:
            text, trial = text_of(name, 700, haystack, tokenizer=tokenizer)
            question, _, answer = text.rpartition(" is " if name.endswith("_key") else " are ")
            found = [text.index(f" {part}") for part in trial.answer_texts]
            assert all(place < len(question) - 40 for place in found)
            assert [part for part in trial.answer_texts if part not in answer] == []


def test_the_needle_asked_for_stands_at_the_depth():
    for depth in DEPTHS:
        text, trial = text_of("multi_key", 3000, CorpusHaystack(Corpus()), depth=depth)
        sentence = text.rpartition(" The number of the ")[2]
        (place,) = [i for i in range(len(text)) if text.startswith(sentence + ".", i)]
        assert text.count(" The number of the ") == NEEDLES + 1
        assert place / 2900 == pytest.approx(depth, abs=0.07)
        others = [BYTES.decode(distractor) for distractor in trial.distractors]
        assert all(f" is{other}." in text for other in others[: NEEDLES - 1])
        assert not any(other in text for other in others[NEEDLES - 1 :])


@pytest.mark.parametrize("haystack", [None, CorpusHaystack(Corpus())], ids=["noise", "corpus"])
def test_every_key_is_asked_for_after_the_same_window(haystack, tokenizer):
    tokenizer = tokenizer if haystack is None else BYTES
    task = make_task("every_key", tokenizer, haystack)
    for context in (800, 1601):
        trials = [task.draw_trial(rng(3), context, depth, "test") for depth in task.depths]
        ends = {(trial.question_length, trial.answer_length) for trial in trials}
        ((asked, answer),) = ends  # one shape for all
        windows = {trial.tokens[: context - asked - answer].tobytes() for trial in trials}
        assert len(windows) == 1
        text = tokenizer.decode(trials[0].tokens[: context - asked - answer])
        places = []
        for trial in trials:
            sentence = tokenizer.decode(trial.tokens[-asked - answer :])
            assert text.count(f"{sentence}.") == 1
            places.append(text.index(sentence))
            # The candidates are the ten numbers of the window.
            numbers = [tokenizer.decode(wrong) for wrong in trial.distractors]
            assert all(f"{number}." in text for number in numbers)
            assert len({*numbers, *trial.answer_texts}) == KEYS
        assert places == sorted(places)
        free = len(text) - KEYS * len(sentence)
        before = [place - i * len(sentence) for i, place in enumerate(places)]
        np.testing.assert_allclose(np.array(before) / free, task.depths, atol=0.06)


def test_every_key_needs_words_of_one_length(pieces):
    odd = pieces(r".")
    odd.encode = lambda text: list(range(WORDS.index(text.split()[4]) + 3))
    with pytest.raises(ValueError, match=r"takes 10 words .* this tokenizer 1 of 44 have; leave"):
        make_task("every_key", odd, NoiseHaystack(" .", (0,))).draw_pieces(rng(0), "test")


def test_several_answers_are_in_the_order_of_their_needles():
    for name in ("multi_value", "multi_query", "variable_tracking"):
        text, trial = text_of(name, seed=9)
        assert len(trial.answer_texts) == NEEDLES
        assert text.endswith(f" {', '.join(trial.answer_texts[:-1])} and {trial.answer_texts[-1]}")
        if name == "multi_value":
            places = [text.index(part) for part in trial.answer_texts]
            assert places == sorted(places)


def test_variables_lead_back_to_their_value():
    text, trial = text_of("variable_tracking", seed=9)
    value = text.rpartition(" value ")[2].split()[0]
    chain = trial.answer_texts
    for earlier, later in zip(chain, chain[1:], strict=False):
        assert f" VAR {later} = VAR {earlier}." in text
    assert f" VAR {chain[0]} = {value}." in text
    assert text.index(f" VAR {chain[0]} =") < text.index(f" VAR {chain[1]} =")


@pytest.mark.parametrize("context", [None, 777, 2000])
def test_common_words_are_the_most_common(context):
    task = make_task("common_words", BYTES)
    shortest = task.min_length(rng(4), "test")
    text, trial = text_of("common_words", context or shortest)
    words_text = text.rpartition(" The most common")[0]
    counts = {word: words_text.count(f" {word},") for word in WORDS}
    top = sorted(counts, key=counts.get, reverse=True)
    assert set(top[:3]) == set(trial.answer_texts)
    assert counts[top[2]] > counts[top[3]]
    assert list(trial.answer_texts) == sorted(trial.answer_texts)


def test_a_haystack_of_the_corpus_is_one_stretch_of_it():
    haystack = CorpusHaystack(Corpus())
    gaps = haystack.gaps(rng(1), [5, 0, 7])
    assert [len(gap) for gap in gaps] == [5, 0, 7]
    joined = np.concatenate(gaps)
    assert set(np.diff(joined).tolist()) <= {1, -90}
    with pytest.raises(ValueError, match="of 20001 tokens: the validation split has 20000"):
        haystack.gaps(rng(1), [20_001])


def test_noise_is_whole_sentences_around_a_needle():
    first, second = NoiseHaystack.from_tokenizer(BYTES).gaps(rng(0), [200, 150])
    assert BYTES.decode(first).endswith(FILLER)
    assert BYTES.decode(second).startswith(FILLER)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="task 'poem'; accepted: recall, recall_64_keys, copy, "):
        make_task("poem", BYTES)


def test_every_name_has_its_task():
    assert sorted(TASKS) == sorted([*registry.WITH_HAYSTACK, *registry.WITHOUT_HAYSTACK])
