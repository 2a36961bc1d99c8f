"""The verdict: what runs say about length, in a sentence a method and one table.

Numbers are means over seeds, at multiples m of each model's own training length L: 1, and what is
measured beyond it, in quarters (1.5, 2, 16).

| what the rows show | what is said |
|---|---|
| no method answers ``SOLVED`` of a task at L | one sentence for all methods; not in the table |
| a method answers less than ``SOLVED`` at L | it has not learned the task; nothing beyond L |
| it does so in some of its seeds only | in how many; nothing beyond L |
| up to some m every seed keeps ``KEPT`` of what it answers at L | still answers, at that m |
| no seed does at the next m | what it answers there |
| some seeds do and others do not | that the seeds disagree, with the least and the most |
| perplexity above ``LOSES`` times that at L in every seed | how much higher, where it is highest |
| within ``GAINS`` and ``LOSES`` at every m in every seed | that it stays, and to which m |
| below ``GAINS`` at the longest m in every seed | how much lower, there |
| some seeds are above ``LOSES`` and others are not | that the seeds disagree, with the range |
| a number is not finite beyond L | that it is not, and where; earlier m as above |
| nothing is measured at L or beyond L, or not finite at L | nothing |

Which differences to the baseline (RoPE, else the best that has learned the task) hold, each by the
seeds that it has:

| seeds shared | a difference holds |
|---|---|
| 5 or more | if a paired t-test is significant at 95%, all methods together (Holm) |
| 2 to 4 | if all seeds have its sign; said to be too few for significance |
| 1, answers | if the 95% intervals of the trials (Wilson) do not overlap; said to be one seed |
| 1, perplexity | never: another seed may differ by any amount |

Answers are compared between methods that have learned the task, at the first m beyond L; the growth
of perplexity at the longest m of the baseline, between methods that have a number there.
"""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fope_jax.report.multiples import (
    PERPLEXITY,
    SOLVED,
    Curve,
    Held,
    Topic,
    are_comparable,
    best_beyond,
    held_differences,
    is_solved,
    read_topics,
    wilson,
)
from fope_jax.report.rows import Run
from fope_jax.report.sums import spread
from fope_jax.report.tables import EMPTY, Table, as_text, format_number

WIDTH = 100  # of a line in the terminal
KEPT = 0.5  # share of that which a method that still answers keeps
GAINS, LOSES = 0.95, 1.05  # perplexity over that at the training length
BASES = {  # what a mark in the table rests on
    "trials": "the 95% intervals of the trials do not overlap (one seed: another may differ)",
    "signs": "all seeds agree (fewer than 5: not called significant)",
    "test": "significant at 95%, paired over seeds (t-test, Holm over the methods)",
}


class Verdict(NamedTuple):
    """Sentences, one a method first; and one table, None where no run was evaluated."""

    sentences: list[str]
    table: Table | None

    def text(self) -> str:
        """For the terminal; empty where nothing can be said."""
        wrap = functools.partial(textwrap.fill, initial_indent="- ", subsequent_indent="  ")
        parts = ["\n".join(wrap(sentence, WIDTH) for sentence in self.sentences)]
        parts += [as_text(self.table)] if self.table else []
        return "\n\n".join(part for part in parts if part)


def verdict(runs: Sequence[Run]) -> Verdict:
    """What the runs say, by the rules at the head of this module.

    Of text the protocol "same-tokens" alone is taken. Runs of one name are seeds of a method; a
    model trained on a task and one trained on text may share a name, and then a sentence.
    """
    tasks = [*read_topics(runs, "retrieval"), *read_topics(runs, "passkey")]
    topics = [*sorted(tasks, key=best_beyond, reverse=True), *read_topics(runs, PERPLEXITY)]
    unlearned = [t for t in topics if t.is_task and not any(is_solved(c) for c in t.curves)]
    shown = [topic for topic in topics if topic not in unlearned]
    names = dict.fromkeys(curve.name for topic in shown for curve in topic.curves)
    sentences = [_method_sentence(name, shown) for name in names]
    sentences += [sentence for topic in shown for sentence in _difference_sentences(topic)]
    asked = [topic for topic in unlearned if any(curve.at(1) for curve in topic.curves)]
    if asked:
        sentences.append(
            f"No method has learned {_listed(topic.name for topic in asked)} at its training "
            "length; of what lies beyond it nothing is said."
        )
    return Verdict([sentence for sentence in sentences if sentence], _table(shown))


# ---------------------------------------------------------------------------- a method


def _method_sentence(name: str, topics: Sequence[Topic]) -> str:
    clauses = []
    for topic in topics:
        for curve in topic.curves:
            if curve.name == name:
                clause = _answers(topic, curve) if topic.is_task else _growth(topic, curve)
                clauses += [clause] if clause else []
    if not clauses:
        return ""
    first, *others = clauses
    owner = "'s " if first.startswith(PERPLEXITY) else " "
    later = [f"its {c}" if c.startswith(PERPLEXITY) else f"it {c}" for c in others]
    return f"{name}{owner}{'; '.join([first, *later])}."


def _answers(topic: Topic, curve: Curve) -> str:
    """What the method answers at its training length and beyond; empty where nothing can be said.

    Whether it keeps answering is decided in each seed by itself, so that a mean hides no failure.
    """
    at_length, beyond = curve.at(1), curve.beyond()
    if not at_length:
        return ""
    solved = [value for value in at_length if value >= SOLVED]
    if not solved:
        return f"has not learned {topic.name} ({curve.mean(1):.0f}% right at its training length)"
    if len(solved) < len(at_length):
        return f"has learned {topic.name} in {len(solved)} of {len(at_length)} seeds only"
    return _answers_beyond(topic, curve, beyond) if beyond else ""


def _answers_beyond(topic: Topic, curve: Curve, beyond: Sequence[float]) -> str:
    keeps = {m: [ratio >= KEPT for ratio in curve.ratios(m)] for m in beyond}
    kept = list(itertools.takewhile(lambda m: all(keeps[m]), beyond))
    after = beyond[len(kept)] if len(kept) < len(beyond) else None
    end = "" if after is None else _range(curve, after, is_mixed=any(keeps[after]))
    if not kept:
        start = f"answers {curve.mean(1):.0f}% of {topic.name} at its training length"
        return f"{start} and {end} at {_times(beyond[0])} that"
    first, *more = kept
    text = f"still answers {curve.mean(first):.0f}% of {topic.name} at {_times(first)} its "
    text += f"training length{_beside(topic, curve, first)}"
    text += "".join(f", {curve.mean(m):.0f}% at {_times(m)}" for m in more)
    return text if after is None else f"{text}, then {end} at {_times(after)}"


def _range(curve: Curve, multiple: float, is_mixed: bool) -> str:
    """The mean, or least and most where some seeds keep answering and others do not."""
    values = curve.at(multiple)
    if is_mixed:
        return f"{min(values):.0f}% to {max(values):.0f}% (its seeds disagree)"
    return f"{curve.mean(multiple):.0f}%"


def _beside(topic: Topic, curve: Curve, multiple: float) -> str:
    """The baseline's answers at the same multiple, in brackets."""
    other = topic.baseline
    if other is None or other is curve or not are_comparable(other, curve):
        return ""
    value = other.mean(multiple)
    return f" ({other.name} {value:.0f}%)" if math.isfinite(value) else ""


def _growth(topic: Topic, curve: Curve) -> str:
    """How perplexity goes beyond the training length; empty where nothing can be said."""
    finite = curve.beyond()
    broken = [m for m in curve.measured if m > max([1, *finite])]
    parts = [_growth_where_finite(curve, finite)] if finite else []
    if broken and all(map(math.isfinite, curve.at(1))):
        parts.append(f"is not finite at {_times(broken[0])} that")
    if not parts:
        return ""
    start = f"{topic.name}, {format_number(curve.mean(1))} at its training length,"
    return f"{start} {' and '.join(parts)}"


def _growth_where_finite(curve: Curve, multiples: Sequence[float]) -> str:
    means = {m: spread(curve.ratios(m)).mean for m in multiples}
    worst, longest = max(multiples, key=lambda m: means[m]), multiples[-1]
    highest = [max(seed) for seed in zip(*(curve.ratios(m) for m in multiples), strict=False)]
    is_lost = [ratio > LOSES for ratio in highest]
    if any(is_lost) and not all(is_lost):
        low, high = min(curve.ratios(worst)), max(curve.ratios(worst))
        return f"is ×{low:.2f} to ×{high:.2f} at {_times(worst)} that (its seeds disagree)"
    if all(is_lost):
        return f"is {_higher(means[worst])} at {_times(worst)} that"
    if all(ratio < GAINS for ratio in curve.ratios(longest)):
        return f"is {100 * (1 - means[longest]):.0f}% lower at {_times(longest)} that"
    return f"stays within 5% to {_times(longest)} that"


def _higher(ratio: float) -> str:
    """A ratio above 1 in words.

    >>> _higher(1.334), _higher(3.21)
    ('33% higher', '3.2 times as high')
    """
    return f"{100 * (ratio - 1):.0f}% higher" if ratio < 2 else f"{ratio:.1f} times as high"


def _times(multiple: float) -> str:
    """A multiple in words.

    >>> _times(2), _times(1.5)
    ('twice', '1.5 times')
    """
    return "twice" if multiple == 2 else f"{multiple} times"


# ---------------------------------------------------------------------------- differences


def _difference_sentences(topic: Topic) -> list[str]:
    """One for the methods whose differences rest on the same."""
    base = topic.baseline
    multiples = base.beyond() if base else []
    if base is None or not multiples:
        return []
    multiple = multiples[0] if topic.is_task else multiples[-1]
    held = held_differences(topic, multiple)
    return [_difference_sentence(topic, base, multiple, each, len(held) == 1) for each in held]


def _difference_sentence(
    topic: Topic, base: Curve, multiple: float, held: Held, is_all: bool
) -> str:
    if not held.basis:
        of = "" if is_all else f" of {_listed(held.compared)}"
        return (
            f"{_upper_first(topic.name)}{of} is of one seed: which differences hold is not known."
        )
    kinds = ("answer more", "answer less") if topic.is_task else ("lose more", "lose less")
    parts = []
    for sign, words in zip((1, -1), kinds, strict=True):
        names = [name for name in held.compared if held.signs.get(name) == sign]
        parts += [f"{_listed(names)} {_agree(words, names)} than {base.name}"] if names else []
    open_ = [name for name in held.compared if name not in held.signs]
    if open_:
        parts.append(f"between {_listed(open_)} and {base.name} no difference holds")
    counted = f"one seed, {held.trials} trials" if held.basis == "trials" else ""
    counted = counted or f"{held.seeds} seeds, paired"
    doubt = {
        "trials": "; the trials alone do not explain it, another seed may differ",
        "signs": "; in every seed, but they are too few to call it significant",
        "test": "; significant at 95% with all taken together",
    }[held.basis]
    where = f"{_upper_first(topic.name)} at {_times(multiple)} the training length ({counted})"
    return f"{where}: {'; '.join(parts)}{doubt if held.signs else ''}."


def _agree(words: str, names: Sequence[str]) -> str:
    verb, _, rest = words.partition(" ")
    return words if len(names) > 1 else f"{verb}s {rest}"


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(names: Iterable[str]) -> str:
    """Names in a sentence.

    >>> _listed(["a", "b", "c"]), _listed(["a"])
    ('a, b and c', 'a')
    """
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


# ---------------------------------------------------------------------------- the table


def _table(topics: Sequence[Topic]) -> Table | None:
    if not topics:
        return None
    multiples = sorted({m for topic in topics for c in topic.curves for m in c.multiples})
    rows, bases = [], {}
    for topic in topics:
        held = {multiple: held_differences(topic, multiple) for multiple in multiples}
        for curve in topic.curves:
            cells = [
                _cell(topic, curve, m, any(curve.name in each.signs for each in held[m]))
                for m in multiples
            ]
            rows.append((f"{topic.name}: {curve.name}", cells))
        marked = dict.fromkeys(each.basis for at in held.values() for each in at if each.signs)
        if base := topic.baseline:
            for basis in marked:
                bases.setdefault((basis, base.name), []).append(topic.name)
    notes = [_what_is_shown(topics), *_notes_of_marks(bases)]
    columns = ["L" if multiple == 1 else f"{multiple} L" for multiple in multiples]
    heading = "At multiples of the training length L"
    return Table(heading, "context", columns, rows, "; ".join(notes))


def _cell(topic: Topic, curve: Curve, multiple: float, is_held: bool) -> str:
    is_ratio = not topic.is_task and multiple > 1
    values = curve.ratios(multiple) if is_ratio else curve.at(multiple)
    if not values:
        return EMPTY
    mean, deviation, count = spread(values)
    if topic.is_task:
        text, error = f"{mean:.0f}%", f"{deviation:.0f}"
    elif is_ratio:
        text, error = f"×{mean:.2f}", f"{deviation:.2f}"
    else:
        text, error = format_number(mean), format_number(deviation)
    text += f" ± {error}" if count > 1 else ""
    text += " *" if is_held else ""
    asked = [trials[multiple] for trials in curve.trials.values() if multiple in trials]
    if len(curve.seeds) == 1 and asked:
        low, high = wilson(*asked[0])
        text += f"\n[{low:.0f}, {high:.0f}]"
    return text


def _what_is_shown(topics: Sequence[Topic]) -> str:
    lengths: dict[str, list[str]] = {}
    for topic in topics:
        found = _listed(f"{length:,}" for length in sorted({c.length for c in topic.curves}))
        lengths.setdefault(found, []).append(topic.name)
    seeds = sorted({len(curve.seeds) for topic in topics for curve in topic.curves})
    of_length = ", ".join(f"{found} ({_listed(names)})" for found, names in lengths.items())
    parts = [f"trained on L tokens: {of_length}"]
    if any(topic.is_task for topic in topics):
        parts.append("tasks: right answers" + (" [95% of the trials]" if seeds[0] == 1 else ""))
    if not all(topic.is_task for topic in topics):
        parts.append("perplexity: at L, then its ratio to that")
    if apart := [topic.name for topic in topics if _has_other_tokens(topic)]:
        parts.append(f"{_listed(apart)}: not all on the same tokens, only the ratios compare")
    for topic in topics:
        if topic.left_out:
            names = _listed(topic.left_out)
            parts.append(f"{topic.name}: {names} also on other tokens or trials, which is left out")
    deviation = ", mean ± deviation" if seeds[-1] > 1 else ""
    return "; ".join([*parts, f"seeds: {_listed(map(str, seeds))}{deviation}"])


def _has_other_tokens(topic: Topic) -> bool:
    """Whether perplexities of one training length were scored on different tokens."""
    scored = {(curve.length, curve.scored) for curve in topic.curves}
    return not topic.is_task and len({length for length, _ in scored}) < len(scored)


def _notes_of_marks(bases: Mapping[tuple[str, str], Sequence[str]]) -> list[str]:
    return [
        f"* in {_listed(names)}, against {baseline}: {BASES[basis]}"
        for (basis, baseline), names in bases.items()
    ]
