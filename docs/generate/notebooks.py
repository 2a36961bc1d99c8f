"""Notebooks in jupytext's percent format, as pages."""

from __future__ import annotations

import re
from pathlib import Path


def pages(folder: Path) -> dict[str, str]:
    return {
        f"notebooks/{path.stem}.md": as_markdown(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.py"))
    }


def as_markdown(text: str) -> str:
    """
    >>> print(as_markdown("# %% [markdown]\\n# # Title\\n#\\n# words\\n\\n# %%\\nx = 1\\n"))
    # Title
    <BLANKLINE>
    words
    <BLANKLINE>
    ```python
    x = 1
    ```
    <BLANKLINE>
    """
    cells = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)[1:]
    parts = []
    for kind, cell in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", cell, flags=re.MULTILINE).strip())
        elif cell.strip():
            parts.append(f"```python\n{cell.strip()}\n```")
    return "\n\n".join(parts) + "\n"
