"""Where the numbers of README.md come from; `python -m experiments.check books_to_web`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import (
    BySeed,
    ends,
    exp,
    loss,
    mean,
    minus,
    plus_minus,
    select,
    spread_of,
)
from experiments.extrapolation import claims as extrapolation

ROWS = "books_to_web/results/*.jsonl"
LENGTH, LONGEST = 128, 2048
SPLITS = {"books": "validation", "web pages": "web", "news": "news"}
METHODS = ("rope", "fope", "alibi", "nope")


def at(method: str, context: int, text: str = "books") -> BySeed:
    return loss(ROWS, method, context, SPLITS[text])


def behind(one: str, other: str, context: int, text: str = "books") -> BySeed:
    """How many nats a token ``one`` loses more than ``other``."""
    return minus(at(one, context, text), at(other, context, text))


def growth(method: str, text: str) -> float:
    """Perplexity at 16L over that at L, the mean over seeds."""
    return mean(exp(minus(at(method, LONGEST, text), at(method, LENGTH, text))))


def percent_lost(method: str) -> list[float]:
    return [100 * (growth(method, text) - 1) for text in SPLITS]


def web_over_books(method: str, context: int) -> float:
    """The paper's ratio of perplexities, the mean over seeds."""
    return mean(exp(minus(at(method, context, "web pages"), at(method, context))))


def cells(header: list[str], row: list[str]) -> list:
    text, method = header[0], row[0].lower()
    digits = 1 if text == "books" else 0
    contexts = [int(name.replace(",", "")) for name in header[1:-1]]
    spreads = [spread_of(exp(at(method, context, text))) for context in contexts]
    ratio = f"{growth(method, text):.2f}"
    return [None, *(plus_minus(each, digits) for each in spreads), ratio]


def scored(text: str) -> list[float]:
    """Tokens at a context, and documents."""
    rows = select(
        ROWS,
        "perplexity",
        variant="rope",
        seed=0,
        split=SPLITS[text],
        context=LONGEST,
        protocol="same-tokens",
    )
    return [sum(row["tokens"] for row in rows), sum(row.get("documents", 1) for row in rows)]


CLAIMS = (
    Claim(
        "web over books is {} for RoPE, {} for FoPE, {} for ALiBi and {} for NoPE",
        lambda: [web_over_books(method, LENGTH) for method in METHODS],
    ),
    Claim(
        "the ratio falls for RoPE and FoPE ({} and {} at 2,048)",
        lambda: [web_over_books(method, LONGEST) for method in ("rope", "fope")],
    ),
    Claim(
        "then FoPE ({} ± {} nats a token behind), then RoPE ({} ± {} behind FoPE)",
        lambda: [*ends(behind("fope", "alibi", LONGEST)), *ends(behind("rope", "fope", LONGEST))],
    ),
    Claim(
        "differ significantly from FoPE at 16L ({} ± {} below it)",
        lambda: ends(behind("fope", "nope", LONGEST)),
    ),
    Claim(
        "FoPE starts better than RoPE** ({} ± {} at L), and the difference at 16L is "
        "not significant ({} ± {}). ALiBi is better than RoPE there ({} ± {})",
        lambda: [
            *ends(behind("rope", "fope", LENGTH, "web pages")),
            *ends(behind("rope", "fope", LONGEST, "web pages")),
            *ends(behind("rope", "alibi", LONGEST, "web pages")),
        ],
    ),
    Claim(
        "FoPE ends above YaRN with factor 16 by {} ± {} at 16L",
        lambda: ends(extrapolation.fope_on_news(LONGEST)),
    ),
    Claim(
        "the perplexity of RoPE rises by {}% on books, {}% on web pages and {}% on news; that of "
        "FoPE by {}%, {}% and {}%",
        lambda: [*percent_lost("rope"), *percent_lost("fope")],
    ),
    Claim(
        "The same {} tokens of each text are scored at every length", lambda: [scored("books")[0]]
    ),
)

PAGE = Page(
    path="experiments/books_to_web/README.md",
    claims=CLAIMS,
    tables=(Table(r"\| (books|web pages|news) \| 128", by_row(cells)),),
    exempt={"settings": ["At 128 tokens of context"]},
    exempt_sections={"": "settings and times", "What this cannot show": "settings"},
)
