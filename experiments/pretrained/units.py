"""What is measured, as a list of units in the order of their worth; a unit that is done is kept.

A unit is one forward pass, one prefill with its questions, or one short training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

LENGTH = 8192  # tokens that the model was trained on
LONGEST = 4 * LENGTH
SCORED = 4096  # windows end at least this many tokens apart
PLACES = 6  # windows of a text that are chosen; how many are run is an argument

# A method as `fope evaluate --as` takes it. A scaling is made for twice the length up to there, and
# for four times beyond.
METHODS = {
    "rope": "same",
    "yarn": "yarn:factor={factor}",
    "fope": "fope",
    "clip": "clip",
    "ntk": "ntk:factor={factor}",
    "self_extend": "self_extend:window=1024,group={group}",
    "dynamic_ntk": "dynamic_ntk:factor={factor}",
    "pi": "pi:factor={factor}",
    "llama3": "llama3:factor={factor}",
    "rerope": "rerope:window=2048",
    "log_n": "logit_scaling",
}
# Before a second training that has shorter windows: the floor of those windows, or no rotation.
FLOORS = {
    "clip-2048": "clip:training_length=2048",
    "fope-2048": "fope:training_length=2048",
    "fope-official-2048": "fope:preset=official,training_length=2048",
    "drope": "drope",
    "clip-4096": "clip:training_length=4096",
    "fope-4096": "fope:training_length=4096",
}
# As tables and figures call them.
NAMES = {
    "RoPE": "rope",
    "YaRN": "yarn",
    "NTK": "ntk",
    "PI": "pi",
    "Llama 3": "llama3",
    "dynamic NTK": "dynamic_ntk",
    "Self-Extend": "self_extend",
    "ReRoPE": "rerope",
    "log-length scaling": "log_n",
    "DroPE": "drope",
    "FoPE, floor of 8,192": "fope",
    "floor of 8,192 alone": "clip",
    "FoPE, floor of 2,048": "fope-2048",
    "floor of 2,048 alone": "clip-2048",
    "FoPE, floor of 4,096": "fope-4096",
    "floor of 4,096 alone": "clip-4096",
    "FoPE as released, floor of 2,048": "fope-official-2048",
}
LABELS = {method: label for label, method in NAMES.items()}
MAIN = ("rope", "yarn", "clip", "fope")
WELL_KNOWN = (*MAIN, "ntk", "self_extend")
FAR_METHODS = ("yarn", "rope")
FLOORS_OF_WINDOWS = ("clip-2048", "fope-2048")  # of the short trainings' windows

TRAINED_AT = 2048
UPDATES = 32  # of one window each
TRAININGS = {  # name: method and knobs of `fope extend`
    "clip-2048": ("clip", ()),
    "rope": ("same", ()),
    "fope-2048": ("fope", ()),
    "yarn": ("yarn", ("position.factor=2",)),
    "fope-official-2048": ("fope", ("position.preset=official",)),
    "drope": ("drope", ()),
    "clip-4096": ("clip", ("position.training_length=4096",)),
    "clip": ("clip", (f"position.training_length={LENGTH}",)),
    "fope": ("fope", (f"position.training_length={LENGTH}",)),
}


class Unit(NamedTuple):
    """One measurement, or one training.

    Attributes:
      kind: "loss", "every_key", "heads" or "training".
      method: of ``METHODS``, ``FLOORS`` or ``TRAININGS``.
      text: what is read: "books" or "news"; of every_key the haystack, "noise" or "corpus".
      context: tokens of the window.
      window: its number; the same tokens, or questions, for all methods and contexts.
      updates: of the short training before it; 0 is the model as it was published.
      seed: of that training.
    """

    kind: str
    method: str
    text: str
    context: int
    window: int = 0
    updates: int = 0
    seed: int = 0

    @property
    def key(self) -> dict[str, Any]:
        """The fields that tell its row from all others."""
        return self._asdict()


def variant_text(method: str, context: int) -> str:
    """The variant of the checkpoint for a context, as `fope evaluate --as` takes it.

    >>> variant_text("yarn", 16384), variant_text("yarn", 32768), variant_text("rope", 8192)
    ('yarn:factor=2', 'yarn:factor=4', 'same')
    """
    is_far = context > 2 * LENGTH
    known = METHODS | FLOORS
    return known[method].format(factor=4 if is_far else 2, group=8 if is_far else 4)


def losses(contexts: Iterable[int], methods: Iterable[str], **fields: Any) -> Iterator[Unit]:
    """Losses on books; ``fields`` such as ``text="news"``."""
    fields = {"text": "books"} | fields
    for context, method in itertools.product(contexts, methods):
        yield Unit("loss", method, context=context, **fields)


def keys(
    contexts: Iterable[int], haystacks: Iterable[str], methods: Iterable[str], **fields: Any
) -> Iterator[Unit]:
    """Ten keys in each haystack."""
    for context, text, method in itertools.product(contexts, haystacks, methods):
        yield Unit("every_key", method, text, context, **fields)


def training(method: str, seed: int, updates: int = UPDATES) -> Iterator[Unit]:
    """A short training, and what the model has become."""
    after = {"updates": updates, "seed": seed}
    yield Unit("training", method, "books", TRAINED_AT, **after)
    yield from losses((2 * LENGTH, TRAINED_AT, LENGTH), [method], **after)
    yield from keys((TRAINED_AT,), ("noise", "corpus"), [method], **after)
    yield from keys((LENGTH,), ("noise",), [method], **after)


def before_training(method: str) -> Iterator[Unit]:
    """What a training starts from: the model as published, under the method."""
    yield from keys((TRAINED_AT,), ("noise", "corpus"), [method])
    yield from losses((2 * LENGTH,), [method])


def main_units() -> list[Unit]:
    """About five hours of two cores: every unit once, what says most first."""
    one, more, two = LENGTH, LENGTH * 3 // 2, 2 * LENGTH
    main, second, higher = list(TRAININGS)[:4], list(TRAININGS)[4:6], list(TRAININGS)[6:8]
    return _once(
        losses([two], MAIN),
        keys([one], ["noise"], ["rope"]),
        keys([two], ["noise"], ["rope", "yarn"]),
        losses([two], METHODS),
        *(training(method, 0) for method in main[:2]),
        [Unit("heads", "rope", "corpus", context) for context in (one, two)],
        *(training(method, 0) for method in main[2:]),
        *(before_training(method) for method in main),
        keys([one], ["noise"], MAIN),
        *(training(method, 0) for method in second),
        keys([two], ["noise"], WELL_KNOWN),
        losses([one, more], METHODS),
        *(before_training(method) for method in second),
        [Unit("heads", "yarn", "corpus", two)],
        losses([LONGEST], FAR_METHODS),
        losses([two], [*MAIN, "ntk"], text="news"),
        keys([two], ["corpus"], ["rope", "yarn"]),
        *(training(method, 0) for method in higher),
    )


def all_units(windows: int = 1, seeds: int = 1, updates: Iterable[int] = ()) -> list[Unit]:
    """``main_units``, then the rest of what can be asked, in more windows and with more seeds.

    ``updates`` are further budgets: each training is done anew with each of them.
    """
    one, more, two = LENGTH, LENGTH * 3 // 2, 2 * LENGTH
    rounds: list[Iterable[Unit]] = [
        main_units(),
        losses([two, one], METHODS, text="news"),
        keys([two, one], ["noise", "corpus"], METHODS),
        *(training(method, seed) for seed in range(seeds) for method in TRAININGS),
        *(before_training(method) for method in TRAININGS),
        keys([more], ["noise", "corpus"], METHODS),
        losses([LONGEST], METHODS),
        losses([LONGEST], FLOORS_OF_WINDOWS, updates=UPDATES),
    ]
    for count in updates:
        rounds.extend(training(m, seed, count) for seed in range(seeds) for m in TRAININGS)
    for window in range(1, windows):
        rounds.append(losses([two, one], METHODS, window=window))
        rounds.append(keys([two, one], ["noise", "corpus"], METHODS, window=window))
    return _once(*rounds)


def _once(*rounds: Iterable[Unit]) -> list[Unit]:
    return list(dict.fromkeys(itertools.chain.from_iterable(rounds)))


def core_seconds(unit: Unit) -> float:
    """A rough cost, fitted to the rows, which come from several CPUs."""
    tokens = unit.context
    forward = tokens * (0.006 + 0.6e-6 * tokens)
    if unit.kind == "training":
        return unit.updates * 3.5 * forward + 20 * forward
    return forward + (0.004 * tokens if unit.kind == "every_key" else 0.0)
