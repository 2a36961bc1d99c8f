"""The Python examples of the README and of docs/ run as they stand, those of a page in order."""

import os
import re
import subprocess
import sys
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


@pytest.mark.slow
def test_the_page_of_your_text(tmp_path):
    """Its commands in order, then its own tokenizer in both of them."""
    for folder in ("configs", "docs", "experiments"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    page = (ROOT / "docs/howto/your_text.md").read_text()
    commands = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)[0]
    tokenizer = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)[0]
    own = commands.replace("vocab_size=1024", "tokenizer=tokenizer.json")
    own = own.replace("runs/notes", "runs/own").partition("fope data build")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for script in (commands, f"python - <<'END'\n{tokenizer}END\n" + "".join(own[1:])):
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            check=True,
        )
    for run in ("notes", "own"):
        rows = (tmp_path / "runs" / run / "metrics.jsonl").read_text()
        assert '"protocol": "same-tokens"' in rows
