"""Retrieval tasks in words: what is asked, how often, and in which text it is hidden."""

from __future__ import annotations

from collections.abc import Sequence

from fope_jax.report.comparison import TASK_FIELD, Comparison
from fope_jax.report.rows import Run

_RECALL = (
    "Pairs of a key and a value, all of one dictionary of {} keys; at the end one key is "
    "given that stands once before, and its value is asked for. All are token ids."
)
TASKS = {
    "recall": _RECALL.format(16),
    "recall_64_keys": _RECALL.format(64),
    "copy": "A text of random token ids is followed by its copy, which the model has to go on "
    "with for some tokens; the depth is the share of the text copied before.",
    "multi_key": "Several words have a number each, hidden in a haystack; one is asked for.",
    "multi_value": "One word has several numbers, hidden in a haystack; all are asked for.",
    "multi_query": "Several words have a number each, hidden in a haystack; all are asked for.",
    "every_key": "Ten words have a number each, evenly spaced in a haystack; after the window "
    "every one is asked for, each as if it were the only one. The ten answers of a window share "
    "its haystack, so intervals count a window as one trial.",
    "variable_tracking": "Two chains of assignments are hidden in a haystack; all variables of "
    "one value are asked for.",
    "common_words": "In a long list some words are more common than all others; they are asked "
    "for.",
}


def retrieval_paragraph(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The protocol, with the prompt's texts or the haystack where a run states them."""
    is_passkey, rows = comparison.kind == "passkey", comparison.first_rows
    passkey = "A random five-digit key is hidden in filler."
    task = passkey if is_passkey else TASKS.get(comparison.name, "")
    depths = {row["depth"] for row in rows}
    by_depth = "" if None in depths else f" and each of {len(depths)} depths"
    text = (
        f"{task} It is asked for at the end of the window: {rows[0]['total']:,} trials at each "
        f"length{by_depth}, the same at every length and for every variant. A trial is right when "
        "greedy decoding writes the whole answer. The window, answer included, has exactly the "
        "number of tokens shown."
    ).strip()
    field = TASK_FIELD[comparison.kind]
    protocol_rows = [row for run in runs for row in run.of("protocol")]
    for settings in (r["settings"] for r in protocol_rows if r.get(field) == comparison.name):
        texts, haystack = settings.get("texts"), settings.get("haystack")
        if is_passkey and texts:
            prompt = "".join(texts[k] for k in ("intro", "filler", "needle", "filler", "question"))
            return f"{text} The prompt: “{prompt}” (filler repeated)."
        if not is_passkey and haystack and comparison.name != "common_words":
            source = "repeated sentences" if haystack == "noise" else f"the {haystack} text"
            return f"{text} The haystack is {source}."
    return text
