"""The Python examples of the README and of docs/ run as they stand, those of a page in order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {
    path.relative_to(ROOT).as_posix(): examples
    for path in PAGES
    if (examples := re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL))
}


def test_there_are_examples():
    assert {"README.md", "docs/howto/your_model.md", "docs/howto/your_method.md"} <= set(EXAMPLES)


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for number, example in enumerate(EXAMPLES[page], start=1):
        exec(compile(example, f"{page}, example {number}", "exec"), names)
