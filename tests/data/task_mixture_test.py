"""Batches with tasks: f(seed, step), all text kept, weights on answers."""

import dataclasses

import numpy as np
import pytest

from fope_jax.config import TrainConfig
from fope_jax.data.cache import open_cache
from fope_jax.data.config import DataConfig
from fope_jax.data.loader import Loader
from fope_jax.data.retrieval.base import TrialTooLong
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.task_mixture import MixtureLoader, make_stage_loaders, share_rows
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.typing import Batch
from tests.data.streams import TableOfDocuments

MIXED = DataConfig(tasks=("recall=0.25", "copy=0.25"))
ALONE = DataConfig(corpus="none", tokenizer="bytes", tasks=("recall=0.5", "passkey=0.5"))


class Stream(TableOfDocuments):
    tokenizer, num_tokens = BytesTokenizer(), 500
    documents = np.array([(0, 500)], [("start", np.int64), ("length", np.int64)])

    def tokens(self, start, stop):
        return np.arange(start, stop, dtype=np.int32) % 200 + 3


def loader(config=MIXED, seed=5, length=80, batch_size=8):
    cache = Stream() if config is MIXED else open_cache(config, "train")
    return make_stage_loaders(config, cache, [(0, 9, length, batch_size)], seed=seed)[0]


def equal(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("config", [MIXED, ALONE], ids=["mixed", "alone"])
def test_a_batch_is_a_function_of_seed_and_step(config):
    direct = [loader(config).batch(step) for step in range(9)]
    resumed = list(loader(config).iterate(4, 5))
    assert len(resumed) == 5
    assert all(map(equal, direct[4:], resumed))
    assert not equal(direct[1], direct[2])
    assert not equal(direct[1], loader(config, seed=6).batch(1))
    batch = direct[3]
    assert isinstance(batch, Batch)
    assert {leaf.shape for leaf in batch} == {(8, 80)}
    assert [leaf.dtype.name for leaf in batch] == ["int32"] * 4 + ["float32"]


def test_text_keeps_all_its_windows_beside_tasks():
    text = Loader(Stream(), length=80, batch_size=4, seed=5)
    for step in (0, 3):
        batch, alone = loader().batch(step), text.batch(step)
        assert equal([leaf[:4] for leaf in batch], alone)
        assert (batch.weights[4:].sum(axis=1) > 0).all()


def test_answers_have_weight_and_follow_their_prompt():
    batch = loader(ALONE).batch(2)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    for tokens, weights in zip(batch.targets[4:], batch.weights[4:], strict=True):
        text = BytesTokenizer().decode(tokens[weights == 1])
        assert text[1:].isdecimal() and len(text) == 6
    whole = DataConfig(**{**vars(ALONE), "task_targets": "all"})
    assert (loader(whole).batch(2).weights == 1).all()


def test_shares_become_whole_rows():
    assert share_rows([("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 3)], 16) == [5, 6, 5]
    with pytest.raises(ValueError, match="0.01 for 'copy' is no row of a batch of 16"):
        share_rows([("recall", 0.5), ("copy", 0.01)], 16)


class Counted(Stream):
    """A token says where it stands, so that a batch says what it has read."""

    def __init__(self, size):
        self.num_tokens = size
        starts = np.arange(0, size, 61)
        fields = [("name", "U8"), ("start", np.int64), ("length", np.int64)]
        self.documents = np.zeros(len(starts), fields)
        self.documents["start"] = starts
        self.documents["length"] = np.diff(np.append(starts, size))

    def tokens(self, start, stop):
        return np.arange(start, stop, dtype=np.int32) + 1000


def inputs(batch):
    """The tokens of text that a batch reads, and those whose targets it scores."""
    text = (batch.segments > 0) & (batch.tokens >= 1000)
    assert (
        batch.targets[text & (batch.weights > 0)] == batch.tokens[text & (batch.weights > 0)] + 1
    ).all()
    return batch.tokens[text].tolist()


CURRICULA = {
    "two": dict(length=64, batch_size=2, first_lengths=("16=3",)),
    "three": dict(length=64, batch_size=3, first_lengths=("8=2", "32=3")),
    "no divisor": dict(length=64, batch_size=3, first_lengths=("48=3", "24=1")),
    "longer first": dict(length=64, batch_size=2, first_lengths=("32=1", "16=2")),
    "from the middle": dict(length=64, batch_size=2, first_lengths=("16=3",), data_start=3),
    "begins in the second epoch": dict(
        length=64, batch_size=2, first_lengths=("16=12",), data_start=5
    ),
}


@pytest.mark.fast(
    "two-text-documents",
    "no divisor-tasks-documents",
    "longer first-text-windows",
    "from the middle-tasks-windows",
)
@pytest.mark.parametrize("packing", ["documents", "windows"])
@pytest.mark.parametrize("tasks", [(), ("recall=0.5",)], ids=["text", "tasks"])
@pytest.mark.parametrize("name", CURRICULA)
def test_stages_read_every_token_of_an_epoch_once(name, tasks, packing):
    train = TrainConfig(**{"steps": 40, "warmup_steps": 0} | CURRICULA[name])
    if tasks and (name == "three" or name == "no divisor"):
        train = dataclasses.replace(train, batch_size=6)
    text = 0.5 if tasks else 1
    epoch = 8  # updates
    size = int(epoch * train.batch_size * train.length * text) - 37  # the last window is not full
    config = DataConfig(packing=packing, tasks=tasks)
    stages = train.stages
    if tasks:  # tasks need room
        grow = 8
        stages = tuple(stage._replace(length=stage.length * grow) for stage in stages)
        size = (size + 37) * grow - 37
    loaders = make_stage_loaders(config, Counted(size), stages, seed=7, data_start=train.data_start)
    read = []
    for stage, loader in zip(stages, loaders, strict=True):
        for step in range(stage.start, stage.stop):
            read.append(inputs(loader.batch(step + train.data_start)))
        steps = range(stage.start + train.data_start, stage.stop + train.data_start)
        again = list(loader.iterate(steps[0] + 1, len(steps) - 1))  # resumed after one update
        assert [inputs(batch) for batch in again] == read[stage.start + 1 : stage.stop]
    before = train.data_start % epoch
    for first in range((epoch - before) % epoch, len(read) - epoch + 1, epoch):
        counts = np.bincount(sum(read[first : first + epoch], []), minlength=1000 + size)[1000:]
        assert (counts == 1).all(), (first, np.flatnonzero(counts != 1)[:5])


def test_no_tasks_is_the_loader_of_text():
    (plain,) = make_stage_loaders(DataConfig(), Stream(), [(0, 9, 16, 4)], seed=1, data_start=4)
    assert type(plain) is Loader
    text = Loader(Stream(), length=16, batch_size=4, seed=1)
    assert all(equal(plain.batch(step), text.batch(step)) for step in (0, 4, 11))
    assert isinstance(loader(), MixtureLoader)
    assert "4 of" not in plain.summary and "2 of recall, 2 of copy" in loader().summary


def test_a_task_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"a window of passkey \(compact\) takes \d+ .* gives 21"):
        loader(ALONE, length=20)


def test_trials_that_are_too_long_for_a_row_are_drawn_again():
    """Trials differ in length: the 16 that are looked at in the beginning are no bound."""
    config = DataConfig(corpus="none", tokenizer="bytes", tasks=("multi_query=1",))
    task = make_task("multi_query", BytesTokenizer())
    known = max(task.min_length(np.random.default_rng(i), "training") for i in range(16))
    batch, redrawn = loader(config, length=known - 1, batch_size=64).batch(3), 0
    for row in range(64):
        try:
            window, _ = task.draw_training_window(np.random.default_rng([5, 3, row]), known)
        except TrialTooLong:
            window, _ = task.draw_training_window(np.random.default_rng([5, 3, row, 1]), known)
            redrawn += 1
        np.testing.assert_array_equal(batch.targets[row], window[1:])
    assert redrawn
    tight = MixtureLoader(None, [(task, 2)], length=99, seed=0, answers_only=True)
    with pytest.raises(ValueError, match=r"none of 64 trials of multi_query fits into row 0 of st"):
        tight.batch(7)


def test_without_text_there_is_no_text_loader():
    with pytest.raises(ValueError, match="no text: corpus = 'none' trains on generated tasks"):
        Loader(open_cache(ALONE, "train"), length=8, batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=("poem=0.5",)), "tasks = .*poem.* accepted: entries 'task=share'"),
        (dict(tasks=("recall=0.5", "recall=0.2")), "each once"),
        (dict(tasks=("recall=x",)), "a positive share"),
        (dict(tasks=("recall=1",)), "shares that leave some for the text"),
        (dict(corpus="none", tokenizer="bytes", tasks=("recall=0.5",)), "shares that sum to 1"),
        (dict(corpus="none", tasks=("recall=1",)), "'bytes': there is no text"),
        (dict(task_targets="some"), "task_targets = 'some'"),
        (dict(corpus="mixture", mixture=("none=1",)), "mixture = .*none"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


@pytest.mark.parametrize("rows", [np.arange(3), np.array([2, 3, 6]), np.array([5, 7])])
@pytest.mark.parametrize("config", [MIXED, ALONE], ids=["mixed", "alone"])
def test_a_process_makes_its_own_rows_of_text_and_tasks(config, rows):
    cache = Stream() if config is MIXED else open_cache(config, "train")
    (own,) = make_stage_loaders(config, cache, [(0, 9, 80, 8)], seed=5, rows_of=lambda size: rows)
    expected, found = loader(config).batch(2), own.batch(2)
    for name, leaf, wanted in zip(Batch._fields, found, expected, strict=True):
        np.testing.assert_array_equal(leaf[rows], wanted[rows])
        if name != "positions":
            assert not np.delete(leaf, rows, axis=0).any()
    assert equal(own.batch(2, whole=True), expected)
