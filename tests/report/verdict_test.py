"""The verdict says what rows show, by its table of rules, and nothing where they show nothing."""

import math
from pathlib import Path

import pytest

from fope_jax.report.rows import Run
from fope_jax.report.verdict import verdict

L = 64
TRIALS = 200


def run_of(name, seed=0, *, recall=None, copy=None, perplexity=None, length=L, split="validation"):
    """A run with percents right and perplexities by multiple of its training length."""
    ids = {"variant": name, "seed": seed, "step": 9, "training_length": length}
    rows = []
    for task, percents in {"recall": recall or {}, "copy": copy or {}}.items():
        for multiple, percent in percents.items():
            rows.append(
                {
                    "kind": "retrieval",
                    "task": task,
                    **ids,
                    "context": round(multiple * length),
                    "depth": 0.5,
                    "correct": round(percent * TRIALS / 100),
                    "total": TRIALS,
                    "nats": 1.0,
                    "tokens": TRIALS,
                }
            )
    for multiple, value in (perplexity or {}).items():
        rows.append(
            {
                "kind": "perplexity",
                "protocol": "same-tokens",
                "split": split,
                **ids,
                "context": round(multiple * length),
                "scored_per_window": 32,
                "windows": 10,
                "nats": 320 * math.log(value),
                "tokens": 320,
                "bytes": 960,
                "correct": 3,
                "document": None,
            }
        )
    config = {"name": name, "seed": seed, "train": {"length": length}}
    return Run(Path(f"{name}_{seed}_{length}"), config, {}, tuple(rows), 9)


def sentences(*runs):
    return verdict(runs).sentences


def rows(*runs):
    return dict(verdict(runs).table.rows)


ROPE = {1: 99, 2: 8, 4: 2}
FOPE = {1: 99, 2: 85, 4: 47}


# ---------------------------------------------------------------------------- right


def test_lengths_between_the_whole_multiples_are_said():
    runs = [
        run_of("rope", recall={0.5: 99, 1: 99, 1.5: 60, 2: 8}, perplexity={1: 20, 1.5: 34.6}),
        run_of("yarn", perplexity={0.25: 25, 1: 20, 1.3: 20, 1.5: 20.2}),
    ]
    assert sentences(*runs)[:2] == [
        "RoPE still answers 60% of recall at 1.5 times its training length, then 8% at twice; its "
        "perplexity, 20.00 at its training length, is 73% higher at 1.5 times that.",
        "yarn's perplexity, 20.00 at its training length, stays within 5% to 1.5 times that.",
    ]
    assert verdict(runs).table.columns == ["L", "1.5 L", "2 L"]


def test_one_seed_of_two_methods_and_two_questions():
    found = verdict(
        [
            run_of("rope", recall=ROPE),
            run_of("fope", recall=FOPE),
            run_of("nope", recall={1: 8, 2: 2, 4: 1}),
            run_of("rope", perplexity={1: 95, 2: 101, 4: 133}, length=128),
            run_of("fope", perplexity={1: 95, 2: 96, 4: 126}, length=128),
            run_of("nope", perplexity={1: 112, 2: 112, 4: 113}, length=128),
        ]
    )
    assert found.sentences == [
        "FoPE still answers 85% of recall at twice its training length (RoPE 8%), then 47% at 4 "
        "times; its perplexity, 95.00 at its training length, is 33% higher at 4 times that.",
        "RoPE answers 99% of recall at its training length and 8% at twice that; its perplexity, "
        "95.00 at its training length, is 40% higher at 4 times that.",
        "NoPE has not learned recall (8% right at its training length); its perplexity, 112.00 at "
        "its training length, stays within 5% to 4 times that.",
        "Recall at twice the training length (one seed, 200 trials): FoPE answers more than RoPE; "
        "the trials alone do not explain it, another seed may differ.",
        "Perplexity is of one seed: which differences hold is not known.",
    ]
    assert found.table.columns == ["L", "2 L", "4 L"]
    assert found.table.rows == [
        ("recall: FoPE", ["99%\n[96, 100]", "85% *\n[79, 89]", "47% *\n[40, 54]"]),
        ("recall: RoPE", ["99%\n[96, 100]", "8%\n[5, 13]", "2%\n[1, 5]"]),
        ("recall: NoPE", ["8%\n[5, 13]", "2%\n[1, 5]", "1%\n[0, 4]"]),
        ("perplexity: NoPE", ["112.00", "×1.00", "×1.01"]),
        ("perplexity: FoPE", ["95.00", "×1.01", "×1.33"]),
        ("perplexity: RoPE", ["95.00", "×1.06", "×1.40"]),
    ]
    assert found.table.note == (
        "trained on L tokens: 64 (recall), 128 (perplexity); tasks: right answers [95% of the "
        "trials]; perplexity: at L, then its ratio to that; seeds: 1; * in recall, against RoPE: "
        "the 95% intervals of the trials do not overlap (one seed: another may differ)"
    )
    assert found.text().startswith("- FoPE still answers 85%")
    assert "\n\nAt multiples of the training length L\n" in found.text()


def test_a_method_that_holds_to_the_end():
    (sentence,) = sentences(run_of("alibi", recall={1: 98, 2: 97, 4: 60}))
    assert sentence == (
        "ALiBi still answers 97% of recall at twice its training length, 60% at 4 times."
    )


@pytest.mark.parametrize(
    ("perplexity", "ending"),
    [
        ({1: 100, 2: 110, 4: 350}, "is 3.5 times as high at 4 times that"),
        ({1: 100, 2: 120, 4: 104}, "is 20% higher at twice that"),
        ({1: 100, 2: 104, 4: 96}, "stays within 5% to 4 times that"),
        ({1: 100, 2: 97, 4: 90}, "is 10% lower at 4 times that"),
    ],
)
def test_growth_of_perplexity(perplexity, ending):
    start = "RoPE's perplexity, 100.00 at its training length, "
    assert sentences(run_of("rope", perplexity=perplexity)) == [f"{start}{ending}."]


def test_texts_have_rows_of_their_own():
    runs = [run_of("rope", split=s, perplexity={1: 9, 2: 27}) for s in ("validation", "news")]
    found = verdict(runs)
    assert [header for header, _ in found.table.rows] == [
        "perplexity: RoPE",
        "perplexity (news): RoPE",
    ]
    assert found.sentences[0].count("3.0 times as high at twice that") == 2


def test_training_lengths_of_one_method_are_told_apart():
    runs = [run_of("rope", length=n, perplexity={1: 10, 2: 12}) for n in (64, 128)]
    assert {header for header, _ in verdict(runs).table.rows} == {
        "perplexity: RoPE (trained on 64)",
        "perplexity: RoPE (trained on 128)",
    }


# ---------------------------------------------------------------------------- which differ


def seeds_of(name, numbers, key="recall"):
    return [run_of(name, seed, **{key: values}) for seed, values in enumerate(numbers)]


def test_five_seeds_may_be_significant():
    shift = (0, 1, 2, 1, 0)
    runs = seeds_of("rope", [{1: 99, 2: 8 + d} for d in shift])
    runs += seeds_of("fope", [{1: 99, 2: 80 + 2 * d} for d in shift])
    runs += seeds_of("kerple", [{1: 99, 2: 8 + d} for d in reversed((2, 0, 1, 0, 1))])
    assert sentences(*runs)[-1] == (
        "Recall at twice the training length (5 seeds, paired): FoPE answers more than RoPE; "
        "between KERPLE and RoPE no difference holds; significant at 95% with all taken together."
    )
    found = verdict(runs)
    assert [cells[1] for _, cells in found.table.rows] == ["82% ± 2 *", "9% ± 1", "9% ± 1"]
    assert found.table.note.endswith(
        "significant at 95%, paired over seeds (t-test, Holm over the methods)"
    )


def test_a_method_with_fewer_seeds_changes_nothing_for_the_others():
    """Each is judged by the seeds that it has."""
    shift = (0, 1, 2, 1, 0)
    runs = seeds_of("rope", [{1: 99, 2: 8 + d} for d in shift])
    runs += seeds_of("fope", [{1: 99, 2: 80 + 2 * d} for d in shift])
    before = sentences(*runs)[-1]
    assert "5 seeds, paired): FoPE answers more than RoPE; significant" in before
    runs += seeds_of("alibi", [{1: 99, 2: 40}]) + seeds_of("kerple", [{1: 99, 2: 8}])
    with_others, of_one = sentences(*runs)[-2:]
    assert with_others == before
    assert of_one == (
        "Recall at twice the training length (one seed, 200 trials): ALiBi answers more than RoPE; "
        "between KERPLE and RoPE no difference holds; the trials alone do not explain it, another "
        "seed may differ."
    )
    marks = {name: cells[1] for name, cells in verdict(runs).table.rows}
    assert marks["recall: ALiBi"].startswith("40% *") and marks["recall: FoPE"] == "82% ± 2 *"
    assert "*" not in marks["recall: KERPLE"] + marks["recall: RoPE"]


def test_perplexity_of_one_seed_is_said_of_the_methods_that_have_one():
    runs = seeds_of("rope", [{1: 10, 4: 13}, {1: 11, 4: 15}], "perplexity")
    runs += seeds_of("alibi", [{1: 10, 4: 10}, {1: 11, 4: 11}], "perplexity")
    runs += seeds_of("fope", [{1: 10, 4: 12}], "perplexity")
    paired, alone = sentences(*runs)[-2:]
    assert "(2 seeds, paired): ALiBi loses less than RoPE" in paired and "FoPE" not in paired
    assert alone == "Perplexity of FoPE is of one seed: which differences hold is not known."


def test_of_runs_on_other_tokens_those_are_kept_that_can_be_compared():
    """And what is left out is named."""
    runs = [run_of("rope", 0, perplexity={1: 10, 2: 12}), run_of("fope", perplexity={1: 9, 2: 9})]
    other = run_of("rope", 1, perplexity={1: 20, 2: 22})
    for row in other.rows:
        row["tokens"], row["nats"] = 2 * row["tokens"], 2 * row["nats"]
    for order in ([other, *runs], [*runs, other]):
        found = verdict(order)
        assert "FoPE is of one seed" in found.sentences[-1] or "Perplexity is of" in str(found)
        assert dict(found.table.rows)["perplexity: RoPE"][0] == "10.00"
        assert "perplexity: RoPE also on other tokens or trials, which is left" in found.table.note


def test_three_seeds_are_never_called_significant():
    runs = seeds_of("rope", [{1: 10, 4: 13}, {1: 11, 4: 15}, {1: 10, 4: 14}], "perplexity")
    runs += seeds_of("alibi", [{1: 10, 4: 10}, {1: 11, 4: 11}, {1: 10, 4: 10}], "perplexity")
    runs += seeds_of("fope", [{1: 10, 4: 12}, {1: 11, 4: 16}, {1: 10, 4: 13}], "perplexity")
    assert sentences(*runs)[-1] == (
        "Perplexity at 4 times the training length (3 seeds, paired): ALiBi loses less than RoPE; "
        "between FoPE and RoPE no difference holds; in every seed, but they are too few to call "
        "it significant."
    )


@pytest.mark.parametrize("seeds", [3, 5])
def test_perplexity_is_compared_by_its_growth_not_its_size(seeds):
    """FoPE is lower everywhere and grows more; ALiBi is lower still and grows as RoPE does."""
    rope = [{1: 100 + d, 4: 110 + d} for d in (0, 3, 1, 4, 2)]
    fope = [{1: 80 + d, 4: 100 + 2 * d} for d in (0, 3, 1, 4, 2)]
    alibi = [{1: 50 + d, 4: 1.1 * (50 + d) + shift} for d, shift in enumerate((1, -1, 1, -1, 0))]
    runs = []
    for name, numbers in {"rope": rope, "fope": fope, "alibi": alibi}.items():
        runs += seeds_of(name, numbers[:seeds], "perplexity")
    said = sentences(*runs)[-1]
    assert f"({seeds} seeds, paired): FoPE loses more than RoPE; between ALiBi and RoPE no" in said
    marks = {name: ["*" in cell for cell in cells] for name, cells in rows(*runs).items()}
    assert marks["perplexity: FoPE"] == [True, True]  # at L the perplexities themselves differ
    assert marks["perplexity: ALiBi"] == [True, False]


def test_answers_are_compared_at_the_first_length_beyond_and_perplexity_at_the_longest():
    """Each is equal at the other length."""
    runs = []
    for seed in range(2):
        text = {1: 10 + seed, 2: 11 + seed}
        runs += [
            run_of("rope", seed, recall={1: 99, 2: 20, 4: 5}, perplexity=text | {4: 20 + seed}),
            run_of("fope", seed, recall={1: 99, 2: 60, 4: 5}, perplexity=text | {4: 14 + seed}),
        ]
    answers, growth = sentences(*runs)[-2:]
    assert "Recall at twice the training length (2 seeds, paired): FoPE answers more" in answers
    assert "Perplexity at 4 times the training length (2 seeds, paired): FoPE loses less" in growth


def test_trials_that_overlap_hold_no_difference():
    found = verdict([run_of("rope", recall={1: 99, 2: 50}), run_of("fope", recall={1: 99, 2: 55})])
    assert found.sentences[-1] == (
        "Recall at twice the training length (one seed, 200 trials): between FoPE and RoPE no "
        "difference holds."
    )
    assert "*" not in str(found.table)


def test_answers_after_one_window_count_as_one_trial():
    def star(windows):
        runs = [run_of("rope", recall={1: 99, 2: 40}), run_of("fope", recall={1: 99, 2: 70})]
        for row in (row for run in runs for row in run.rows if windows):
            row["windows"] = windows
        return "*" in str(verdict(runs).table)

    assert star(windows=None)
    assert star(windows=100)
    assert not star(windows=20)


def test_a_method_that_has_not_learned_is_compared_with_none():
    runs = [run_of("rope", recall={1: 30, 2: 3}), run_of("fope", recall=FOPE)]
    found = verdict(runs)
    assert found.sentences == [
        "FoPE still answers 85% of recall at twice its training length, then 47% at 4 times.",
        "RoPE has not learned recall (30% right at its training length).",
    ]
    assert "*" not in str(found.table)


def test_without_rope_the_best_that_has_learned_is_the_baseline():
    runs = [
        run_of("nope", recall={1: 60, 2: 55}),
        run_of("fire", recall={1: 99, 2: 20}),
        run_of("kerple", recall={1: 99, 2: 40}),
    ]
    assert list(rows(*runs)) == ["recall: KERPLE", "recall: FIRE", "recall: NoPE"]
    assert sentences(*runs)[-1].startswith(
        "Recall at twice the training length (one seed, 200 trials): FIRE answers less than KERPLE;"
    )


def test_a_method_that_one_seed_has_learned_is_no_baseline():
    alibi = [run_of("alibi", seed, recall={1: at, 2: 90}) for seed, at in enumerate((99, 60))]
    others = [
        run_of(name, seed, recall={1: 99, 2: right})
        for name, right in (("kerple", 50), ("fire", 10))
        for seed in range(2)
    ]
    assert list(rows(*alibi, *others))[0] == "recall: ALiBi"
    assert "FIRE answers less than KERPLE" in sentences(*alibi, *others)[-1]


def test_rope_at_two_training_lengths_is_the_baseline_still():
    runs = [
        run_of(name, recall={1: 99, 2: right}, length=length)
        for name, right in (("rope", 10), ("fope", 60))
        for length in (64, 128)
    ]
    said = [sentence for sentence in sentences(*runs) if "answers more" in sentence]
    assert len(said) == 1 and said[0].count("answers more than RoPE (trained on") == 1


def test_rope_at_the_length_at_which_it_has_learned_is_the_baseline():
    runs = [
        run_of("rope", recall={1: 50, 2: 45}, length=64),
        run_of("rope", recall={1: 99, 2: 10}, length=128),
        run_of("fope", recall={1: 99, 2: 60}, length=128),
    ]
    assert any("FoPE answers more than RoPE (trained on 128)" in said for said in sentences(*runs))


def test_other_trials_are_not_compared():
    """A run of another training length answered other questions."""
    runs = [run_of("rope", recall=ROPE), run_of("fope", recall=FOPE, length=128)]
    assert not any("more than" in sentence or "(RoPE" in sentence for sentence in sentences(*runs))


# ---------------------------------------------------------------------------- silent


def test_nothing_of_a_task_that_none_has_learned():
    runs = [
        run_of("rope", recall=ROPE, copy={1: 0, 2: 0}),
        run_of("fope", recall=FOPE, copy={1: 79, 2: 79}),
    ]
    found = verdict(runs)
    assert found.sentences[-1] == (
        "No method has learned copy at its training length; of what lies beyond it nothing is said."
    )
    assert not any("copy" in sentence for sentence in found.sentences[:-1])
    assert not any("copy" in header for header, _ in found.table.rows)


def test_nothing_without_rows():
    assert verdict([run_of("rope")]) == ([], None)
    assert verdict([run_of("rope")]).text() == ""


@pytest.mark.parametrize("multiples", [(1,), (2, 4), (3,)])
def test_nothing_is_extrapolated_from_missing_lengths(multiples):
    numbers = dict.fromkeys(multiples, 99)
    assert sentences(run_of("rope", recall=numbers, perplexity=numbers)) == []


def test_a_length_that_one_seed_lacks_is_only_in_the_table():
    runs = seeds_of("fope", [{1: 99, 2: 90, 4: 80}, {1: 97, 2: 92}])
    assert sentences(*runs) == ["FoPE still answers 91% of recall at twice its training length."]
    assert rows(*runs)["recall: FoPE"] == ["98% ± 1", "91% ± 1", "80%"]


def test_lengths_that_one_method_lacks():
    runs = [run_of("rope", recall=ROPE), run_of("learned", recall={1: 99})]
    assert rows(*runs)["recall: learned"] == ["99%\n[96, 100]", "-", "-"]
    assert not any("learned" in sentence for sentence in sentences(*runs))


# ---------------------------------------------------------------------------- contradictory


def test_seeds_that_disagree_beyond_the_training_length():
    (sentence,) = sentences(*seeds_of("fope", [{1: 99, 2: 95}, {1: 99, 2: 20}]))
    assert sentence == (
        "FoPE answers 99% of recall at its training length and 20% to 95% (its seeds disagree) at "
        "twice that."
    )
    (sentence,) = sentences(*seeds_of("fope", [{1: 10, 2: 13}, {1: 10, 2: 9}], "perplexity"))
    assert sentence == (
        "FoPE's perplexity, 10.00 at its training length, is ×0.90 to ×1.30 at twice that (its "
        "seeds disagree)."
    )


def test_seeds_that_disagree_on_whether_the_task_was_learned():
    runs = seeds_of("rope", [{1: 99, 2: 8}, {1: 9, 2: 2}, {1: 9, 2: 1}])
    assert sentences(*runs) == ["RoPE has learned recall in 1 of 3 seeds only."]


def test_seeds_of_both_signs_hold_no_difference():
    runs = seeds_of("rope", [{1: 99, 2: 40}, {1: 99, 2: 60}])
    runs += seeds_of("fope", [{1: 99, 2: 60}, {1: 99, 2: 40}])
    assert sentences(*runs)[-1] == (
        "Recall at twice the training length (2 seeds, paired): between FoPE and RoPE no "
        "difference holds."
    )


# ---------------------------------------------------------------------------- NaN


def test_a_number_that_is_not_finite():
    broken = run_of("rope", perplexity={1: 100, 2: 101, 4: math.nan, 8: 100})
    assert sentences(broken) == [
        "RoPE's perplexity, 100.00 at its training length, stays within 5% to twice that and is "
        "not finite at 4 times that."
    ]
    assert rows(broken)["perplexity: RoPE"] == ["100.00", "×1.01", "×nan", "×1.00"]
    nothing = run_of("rope", perplexity={1: math.nan, 2: 101})
    assert sentences(nothing) == []
    infinite = run_of("rope", perplexity={1: 100, 2: math.inf})
    assert sentences(infinite) == [
        "RoPE's perplexity, 100.00 at its training length, is not finite at twice that."
    ]
    # Beside a sound method nothing is compared with it.
    runs = [broken, run_of("fope", perplexity={1: 100, 2: 100, 4: 100, 8: 100})]
    assert sentences(*runs)[-1] == "Perplexity is of one seed: which differences hold is not known."
