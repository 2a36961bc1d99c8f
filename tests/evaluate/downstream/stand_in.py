"""A small stand-in for LongBench's data sets, in their published form, with prompts of its own."""

import json

PROMPTS = {
    "gov_report": "Sum up this report:\n{context}\n\nSummary:",
    "multi_news": "Sum up this news:\n{context}\n\nSummary:",
    "trec": "Of which kind is the question?\n{context}\n{input}",
    "triviaqa": "Answer:\n{context}\n\n{input}",
    "samsum": "Sum up the dialogue:\n{context}\n\n{input}",
}
CLASSES = ["City", "Other city", "State", "Date"]


def row(name, number, words=None, **changes):
    """An item with a context of a few ``number`` words."""
    context = " ".join(f"w{i}" for i in range(3 + number))
    asked = "" if name in ("gov_report", "multi_news") else f"Question {number}?\nAnswer:"
    values = {
        "input": asked,
        "context": context,
        "answers": ["City"] if name == "trec" else ["cde", f"w1 w{number}"],
        "length": (1000, 4000, 7999, 8000)[number % 4] if words is None else words,
        "dataset": f"{name}_e",
        "language": "en",
        "all_classes": CLASSES if name == "trec" else None,
        "_id": f"{name}-{number}",
    }
    return values | changes


def write(directory, names=tuple(PROMPTS), count=4, end="_e", prompts=PROMPTS):
    """The data sets in ``directory/data`` and the prompts in ``directory/config``."""
    for folder in ("data", "config"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        lines = (json.dumps(row(name, number)) + "\n" for number in range(count))
        (directory / "data" / f"{name}{end}.jsonl").write_text("".join(lines))
    (directory / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    return directory
