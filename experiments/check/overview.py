"""Pages that sum up several experiments."""

from __future__ import annotations

from experiments.books_longer import claims as books_longer
from experiments.books_to_web import claims as books_to_web
from experiments.check.claims import Below, Claim, Page
from experiments.check.rows import ends, mean, minus
from experiments.extrapolation import claims as extrapolation
from experiments.fope_ablations import claims as ablations
from experiments.passkey import claims as passkey
from experiments.pretrained import claims as pretrained
from experiments.qk_norm import claims as norms
from experiments.recall_controls import claims as controls
from experiments.recall_longer import claims as longer
from experiments.recall_newer import claims as newer
from experiments.recall_repetition import claims as repetition
from experiments.short_tasks import claims as short_tasks
from experiments.spectra import claims as spectra
from experiments.tournament import claims as tournament

LENGTH, LONGEST = 128, 2048
SHORT = tournament.SHORT
THEN = ", then {} at 2L"


def recall(variant: str, *multiples: int) -> list[float]:
    """Percent right at multiples of L."""
    return [tournament.percent(variant, multiple * SHORT) for multiple in multiples]


def floor_costs() -> list[float]:
    return [pretrained.at("clip", 6, 8) - pretrained.at("rope", 6, 8)]


def keys(*cells: tuple[str, int]) -> list[float]:
    """Percent of passkeys found by a variant at a multiple of L."""
    return [mean(passkey.right(name, times * passkey.LENGTH)) for name, times in cells]


def recall_at(multiple: int, *names: str) -> list[float]:
    """Percent right in recall_newer."""
    return [mean(newer.right(name, multiple * newer.LENGTH)) for name in names]


YARN = "RoPE, read as YaRN 2"
OF_FLOOR = ("FoPE", "floor alone", "RoPE")
ON_FRONT = ("RoPE", "FoPE", "floor alone", "ALiBi")


def on_books(name: str, context: int, sign: int = 1) -> tuple[float, float]:
    """Nats a token above RoPE (``sign=-1``: below) in books_longer, with its interval."""
    return ends(books_longer.behind(name, "RoPE", context), sign)


FRONT = Page(
    path="README.md",
    claims=(
        Claim(
            "SWAN answers {}% at 16 times the training length, without its growing logits "
            "(RNoPE-SWA) {}%, where the floor alone has {}% and RoPE {}%",
            lambda: recall_at(16, "SWAN", "RNoPE-SWA", "floor alone", "RoPE"),
        ),
        Claim(
            "the window alone gains {} ± {} points over RoPE, the layer without positions alone "
            "{} ± {}, both {} ± {}",
            lambda: [
                x for name in (*newer.PARTS, "RNoPE-SWA") for x in ends(newer.apart(name, "RoPE"))
            ],
        ),
        Claim("FoX has {}% if its gates start open", lambda: recall_at(16, "FoX, gates open")),
        Claim(
            "FoPE answers {}% of recall at twice the training length, the floor alone {}%, the "
            "series alone {}%, RoPE {}%",
            lambda: controls.percents(128, "FoPE", "floor alone", "series on all pairs", "RoPE"),
        ),
        Claim(
            "Over all longer contexts FoPE is {} ± {} points ahead of the floor alone; where the "
            "sine of its unrotated pairs is 0, as in the floor alone, {} ± {} (five seeds); after "
            "four times the updates, each with a learning rate of its own, {} ± {}, where the "
            "floor alone is {} ± {} ahead of RoPE",
            lambda: [
                *ends(controls.apart("FoPE", "floor alone")),
                *ends(controls.apart("FoPE, phase 0", "floor alone")),
                *ends(longer.apart("FoPE", "floor alone")),
                *ends(longer.apart("floor alone", "RoPE")),
            ],
        ),
        Claim(
            "RoPE finds {}% at its training length and {}% at twice that, FoPE {} and {}%, its "
            "floor alone {} and {}%, ALiBi {} and {}%. Read as YaRN with factor 2, without "
            "training, the RoPE models find {}% there",
            lambda: keys(*((name, times) for name in ON_FRONT for times in (1, 2)), (YARN, 2)),
        ),
        Claim(
            "on books at 16 times the training length FoPE loses {} ± {} nats a token less than "
            "RoPE, and ALiBi {} ± {} less than FoPE. Of recall at 8 times the training length "
            "FoPE answers {} ± {} points more than ALiBi of what stands far back (depth 0.1), and "
            "{} ± {} points fewer of what stands near the question (0.9)",
            lambda: [
                *on_books("FoPE", LONGEST, -1),
                *ends(books_longer.behind("FoPE", "ALiBi", LONGEST)),
                *ends(tournament.apart_at_depth("FoPE", "ALiBi", 8 * SHORT, 0.1)),
                *ends(tournament.apart_at_depth("FoPE", "ALiBi", 8 * SHORT, 0.9), -1),
            ],
        ),
        Claim(
            "RoPE ends at {} nats a token, YaRN at {} without training, {} with it",
            lambda: [
                pretrained.at("rope", 14, 16),
                pretrained.at("yarn", 14, 16),
                pretrained.after_training("yarn", 14, 16),
            ],
        ),
        Claim(
            "FoPE after the same training at {}",
            lambda: [pretrained.after_training("fope-2048", 14, 16)],
        ),
    ),
    exempt_sections={"": "settings and times", "The functions": "settings", "License": "settings"},
    unchecked={"The answer": "the rows of the demo are not committed; `make demo` prints it"},
)

FINDINGS = Page(
    path="docs/findings/index.md",
    claims=(
        Claim(
            "at 16L FoPE is {} ± {} nats a token below RoPE, ALiBi {} ± {}; at L FoPE is "
            "{} ± {} above it, which is not resolved",
            lambda: [
                *on_books("FoPE", LONGEST, -1),
                *on_books("ALiBi", LONGEST, -1),
                *on_books("FoPE", LENGTH),
            ],
        ),
        Claim(
            "FoPE {} ± {} points, YaRN {} ± {}, both without training",
            lambda: [*short_tasks.of(short_tasks.FOPE), *short_tasks.of(short_tasks.YARN)],
        ),
        Claim(
            "SWAN {}% at 16L, without its growing logits (RNoPE-SWA) {}%; FoX {}% if its gates "
            "start open",
            lambda: recall_at(16, "SWAN", "RNoPE-SWA", "FoX, gates open"),
        ),
        Claim(
            "FoPE recalls {}% at 2L, RoPE {}%; KERPLE",
            lambda: [*recall("FoPE", 2), *recall("RoPE", 2)],
        ),
        Claim(
            "the floor: alone it recalls {}% at 2L, the series alone {}%, RoPE {}%",
            lambda: controls.percents(128, "floor alone", "series on all pairs", "RoPE"),
        ),
        Claim(
            "in part: the floor alone stays {} ± {} points ahead of RoPE beyond L; FoPE's lead "
            "over it is not resolved ({} ± {})",
            lambda: [
                *ends(longer.apart("floor alone", "RoPE")),
                *ends(longer.apart("FoPE", "floor alone")),
            ],
        ),
        Claim(
            "with RoPE {}% at 2L, with FoPE {}% there (its floor alone {}%) and {}% at 4L, with "
            "ALiBi {}% and {}%; RoPE read as YaRN with factor 2, without training, {}% at 2L",
            lambda: keys(
                ("RoPE", 2),
                ("FoPE", 2),
                ("floor alone", 2),
                ("FoPE", 4),
                ("ALiBi", 2),
                ("ALiBi", 4),
                (YARN, 2),
            ),
        ),
        Claim("the floor of 8,192 alone costs {} nats without training", floor_costs),
        Claim(
            "where keys stand as often at 4L as at L, FoPE, its floor alone and RoPE lose {}, {} "
            "and {} points; fewer repetitions at 4L give back at most {}",
            lambda: [
                *(-mean(repetition.of_length(name, 4)) for name in OF_FLOOR),
                max(mean(repetition.of_repetition(name, 4)) for name in OF_FLOOR),
            ],
        ),
    ),
    exempt={
        "settings": [
            "to 16 times the length",
            "8,192 tokens",
            "beyond 1.25 times its length",
            "the floor of 2,048 is ahead of RoPE beyond 12 k",
            "below 2 pi / L",
            "YaRN with factor 2 is ahead at 2L",
            "the paper's YaRN at 8L and 16L",
            "YaRN as the paper has it (factor 16)",
            "8 times what YaRN was made for",
            "at 20 tokens a parameter",
            "no difference that 1,000 questions can show",
        ],
        "of the demo, whose rows are not committed": ["FoPE recalls 81% at 2L, RoPE 8% |"],
    },
)

ITEMS = Page(
    path="experiments/README.md",
    claims=(
        Claim(
            "a model of 0.42 M, 4,200 updates and books of its own for each seed: by {} ± {} "
            "([books_longer]",
            lambda: on_books("FoPE", LONGEST, -1),
        ),
        Claim(
            "at 16L FoPE is {} ± {} nats a token below RoPE, an interval that holds the draw of "
            "the books; at L it is {} ± {} above",
            lambda: [*on_books("FoPE", LONGEST, -1), *on_books("FoPE", LENGTH)],
        ),
        Claim(
            "Without any training a change to FoPE answers {} ± {} points more, to YaRN {} ± {}",
            lambda: [*short_tasks.of(short_tasks.FOPE), *short_tasks.of(short_tasks.YARN)],
        ),
        Claim(
            "answer {} and {}% of recall at 16L, far more than FoPE or its floor",
            lambda: recall_at(16, "SWAN", "RNoPE-SWA"),
        ),
        Claim(
            "FoX has with gates that start open ({}% at 16L)",
            lambda: recall_at(16, "FoX, gates open"),
        ),
        Claim(
            "a steep fall holds: {}% at L and {}% at 2L in the tournament, where naming any value "
            "is right in 6%; a fall to nothing is not here: {}% and {}% in the controls, seeds "
            "from {} to {}% | three seeds of {} trials a length",
            lambda: [
                *recall("RoPE", 1, 2),
                *(controls.percents(context, "RoPE")[0] for context in (SHORT, 2 * SHORT)),
                *controls.extremes("RoPE", 2 * SHORT),
                tournament.trials() / 3,
            ],
        ),
        Claim(
            "a steep fall holds: {}% at L, {}% at 2L, none beyond; to nothing at 2L in four seeds "
            "(at most {}%), {}% in the fifth; of the four methods that learn them RoPE falls most "
            "| five seeds of {} keys a length",
            lambda: [
                *keys(("RoPE", 1), ("RoPE", 2)),
                *sorted(passkey.right("RoPE", passkey.TWICE).values())[-2:],
                passkey.trials(),
            ],
        ),
        Claim(
            "holds: {}, {}, {}, {} and {}% of passkeys at L to 16L; of recall {}, {}, {}, {} and "
            "{}% at L to 16L",
            lambda: [
                *keys(*(("ALiBi", times) for times in (1, 2, 4, 8, 16))),
                *recall("ALiBi", 1, 2, 4, 8, 16),
            ],
        ),
        Claim(
            "above RoPE's beyond L holds ({} ± {} points), above ALiBi's not here ({} ± {} "
            "below); stable not here: {}% at L, {}, {} and {}% at 2L, 4L and 8L | "
            "five seeds, at 2L from {} to {}%; over the floor alone {} ± {}; RoPE and FoPE "
            "find less than 95% at L in two of the seeds",
            lambda: [
                *ends(passkey.apart("FoPE", "RoPE")),
                *ends(passkey.apart("ALiBi", "FoPE")),
                *keys(("FoPE", 1), ("FoPE", 2), ("FoPE", 4), ("FoPE", 8)),
                *passkey.extremes("FoPE", passkey.TWICE),
                *ends(passkey.apart("FoPE", "floor alone")),
            ],
        ),
        Claim(
            "beyond L holds ({} ± {} points, tournament); stable not here: {}% at L, {}% at 2L, "
            "{}% at 16L",
            lambda: [*ends(tournament.apart("FoPE", "RoPE")), *recall("FoPE", 1, 2, 16)],
        ),
        Claim(
            "the floor without the series is {} ± {} points above RoPE, and FoPE {} ± {} above "
            "that (recall_controls, ten seeds); after four times the updates, each with a "
            "learning rate of its own, {} ± {} and {} ± {}",
            lambda: [
                *ends(controls.apart("floor alone", "RoPE")),
                *ends(controls.apart("FoPE", "floor alone")),
                *ends(longer.apart("floor alone", "RoPE")),
                *ends(longer.apart("FoPE", "floor alone")),
            ],
        ),
        Claim(
            "FoPE answers {}% at 4L, with 16 keys {}%: it is length that costs",
            lambda: [mean(repetition.right("FoPE", keys, 4)) for keys in ("64", "16")],
        ),
        Claim(
            "the floor alone answers {}% at 2L, the series alone on all pairs {}%, RoPE {}% |",
            lambda: controls.percents(128, "floor alone", "series on all pairs", "RoPE"),
        ),
        Claim(
            "holds: by {} ± {} nats a token at 16L | after 1,000 updates; after 500 not resolved "
            "({} ± {}, tournament)",
            lambda: [
                *ends(extrapolation.behind("RoPE", "FoPE", LONGEST)),
                *ends(tournament.behind("RoPE", "FoPE", LONGEST)),
            ],
        ),
        Claim(
            "above holds: by {} ± {} at 16L; slightly not here",
            lambda: ends(books_to_web.behind("fope", "alibi", LONGEST)),
        ),
        Claim(
            "Now {}% of recall is right at L, and perplexity grows by {}% to 16L",
            lambda: [
                tournament.percent("sinusoidal", tournament.SHORT),
                tournament.growth("sinusoidal"),
            ],
        ),
        Claim(
            "the hidden states hold no position (below {}% of their energy)",
            lambda: [Below(spectra.most_locked())],
        ),
        Claim(
            "spectra, {} runs of {} variants | 1.2 M, 128 | holds as a correlation: of their "
            "energy with the gap over all (r = {}, from {} to {}); among those that have "
            "any not resolved ({}, from {} to {}, {} variants, RoPE counted once) | the others "
            "have none by construction; the intervention, the floor alone, changes the gap by "
            "{} ± {}",
            lambda: [
                *spectra.undertrained_correlation(),
                *spectra.among_those_with_any("rope-log-n"),
                *ends(ablations.wider(ablations.FLOOR, "RoPE")),
            ],
        ),
        Claim(
            "not resolved against the paper's factor 16 on books ({} ± {} below it at 16L), on "
            "news not here ({} ± {} above it); against factor 2 holds at 16L (by {} ± {}, over "
            "RoPE that merely goes on by {} ± {}), at 2L the opposite ({} ± {})",
            lambda: [
                *ends(extended("RoPE", "YaRN 16", "FoPE", LONGEST)),
                *ends(extrapolation.fope_on_news(LONGEST)),
                *ends(extended("RoPE", "YaRN", "FoPE", LONGEST)),
                *ends(extended("RoPE", "RoPE", "FoPE", LONGEST)),
                *ends(extended("RoPE", "FoPE", "YaRN", 2 * LENGTH)),
            ],
        ),
        Claim(
            "in the paper's order (factor 16 after the clip) not resolved at 2L ({} ± {}), at 16L "
            "holds (by {} ± {}); scaled first by {} ± {} and {} ± {}; against factor 2 at 2L "
            "({} ± {}), at 16L the opposite ({} ± {})",
            lambda: [
                *ends(extended("FoPE", "YaRN 16 after the clip", "FoPE", 2 * LENGTH)),
                *ends(extended("FoPE", "YaRN 16 after the clip", "FoPE", LONGEST)),
                *ends(extended("FoPE", "YaRN 16", "FoPE", 2 * LENGTH)),
                *ends(extended("FoPE", "YaRN 16", "FoPE", LONGEST)),
                *ends(extended("FoPE", "YaRN", "FoPE", 2 * LENGTH)),
                *ends(extended("FoPE", "FoPE", "YaRN", LONGEST)),
            ],
        ),
        Claim(
            "at L holds ({} ± {} below RoPE), beyond L not resolved ({} ± {} at 16L)",
            lambda: [
                *ends(books_to_web.behind("rope", "fope", LENGTH, "web pages")),
                *ends(books_to_web.behind("rope", "fope", LONGEST, "web pages")),
            ],
        ),
        Claim(
            "over the floor alone ({} ± {}: {} ± {} at L, {} ± {} at 16L), which itself gives "
            "{} ± {}; in the released form not here: without the floor the gap is {} ± {} larger "
            "than without the series, which over the floor adds {} ± {}. "
            "The floor for the fit at L: not here ({} ± {} against RoPE)",
            lambda: [
                *ends(ablations.wider(*ablations.SERIES)),
                *ends(ablations.behind(*ablations.SERIES, LENGTH)),
                *ends(ablations.behind(*ablations.SERIES, LONGEST)),
                *ends(ablations.wider(*ablations.CLIP)),
                *ends(ablations.wider("without the floor", ablations.FLOOR)),
                *ends(ablations.wider("FoPE", ablations.FLOOR)),
                *ends(ablations.behind(*ablations.CLIP, LENGTH)),
            ],
        ),
        Claim(
            "with wide heads FoPE's gap minus RoPE's is {} ± {}",
            lambda: ends(ablations.wider("FoPE, head_dim 64", "RoPE, head_dim 64")),
        ),
        Claim(
            "at 16L holds against 0 and 0.1 (by {} ± {} and {} ± {}), not resolved against 0.5 "
            "({} ± {} above it); at L not here: worse than 0 and 0.1 by {} ± {} and {} ± {}. The "
            "gap of 0.5 is smaller, by {} ± {}",
            lambda: [
                *ends(ablations.behind(*ablations.SERIES, LONGEST), -1),
                *ends(ablations.behind("sigma 0.3", "sigma 0.1", LONGEST), -1),
                *ends(ablations.behind("sigma 0.3", "sigma 0.5", LONGEST)),
                *ends(ablations.behind(*ablations.SERIES, LENGTH)),
                *ends(ablations.behind("sigma 0.3", "sigma 0.1", LENGTH)),
                *ends(ablations.wider("sigma 0.3", "sigma 0.5")),
            ],
        ),
        Claim(
            "D = 128 minus D = 16 is {} ± {}; at 16L not resolved: {} ± {}",
            lambda: [
                *ends(ablations.behind("D = 128", "D = 16", LENGTH)),
                *ends(ablations.behind("D = 128", "D = 16", LONGEST)),
            ],
        ),
        Claim(
            "RoPE loses {} ± {} by it at L; of snapped frequencies not here: {} ± {} behind RoPE "
            "at twice L, where the paper has them ahead; NoPE ahead of RoPE at 16L holds: by "
            "{} ± {}",
            lambda: [
                *ends(norms.behind("RoPE, normed", "RoPE", norms.LENGTH)),
                *ends(norms.behind("whole cycles", "RoPE", norms.TWICE)),
                *ends(norms.behind("NoPE", "RoPE", norms.LONGEST), -1),
            ],
        ),
        Claim(
            "the pairs that turn less than once carry {}% of the product",
            lambda: [pretrained.slow_pairs()[2]],
        ),
        Claim(
            "not here up to 12 k ({} against {} nats at 8 to 10 k); beyond it holds ({} against {} "
            "at 14 to 16 k). YaRN has {} there without training and {} with the same, and the "
            "floor alone {}",
            lambda: [
                pretrained.after_training("fope-2048", 8, 10),
                pretrained.after_training("rope", 8, 10),
                pretrained.after_training("fope-2048", 14, 16),
                pretrained.after_training("rope", 14, 16),
                pretrained.at("yarn", 14, 16),
                pretrained.after_training("yarn", 14, 16),
                pretrained.after_training("clip-2048", 14, 16),
            ],
        ),
    ),
    exempt={
        "the paper's parts": [
            "Equations 7 and 8",
            "| Tables 4 to 6: downstream",
            "Tables 4 to 6 take models",
            "tasks of Tables 4 and 6",
        ],
        "settings": [
            "the 16 keys repeat",
            "With 64 keys",
            "as often as 16 at L",
            "| 0.1 M, 64 tokens |",
            "| 0.1 M, 64 |",
            "| 0.1 M, 128 bytes |",
            "| 0.1 M, 128 and 64 |",
            "| 1.2 M, 128 |",
            "| 1.2 M, 128, then 256 |",
            "60 M to 1.2 B",
            "| 135 M, 8,192 | holds",
            "| 135 M, 8,192 | not yet",
            "| 1,000 questions of at most 158 tokens",
            "pretrained, 66 k tokens at 2,048 | 135 M, 8,192 |",
            "YaRN with factor 2 is read at 8 times",
            "18 web pages, perplexities near 900",
            "sigma 0.3 is best",
            "the code's, with D = 32",
            "just leaves out 0",
            "it leaves out 0)",
            "Intervals are 95%",
            "the paper's factor 16**, no longer with factor 2 alone",
        ],
        "the paper's numbers": ["in the paper by 0.17"],
    },
)


def extended(base: str, one: str, other: str, context: int) -> dict[int, float]:
    """How many nats ``base`` extended by ``one`` loses more than extended by ``other``."""
    names = (base + THEN.format(one), base + THEN.format(other))
    return minus(*(extrapolation.at(name, context) for name in names))


PAGES: tuple[Page, ...] = (FRONT, FINDINGS, ITEMS)
