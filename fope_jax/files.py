"""Files that a reader finds whole: the old one or the new one, whatever happens in between."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` under another name, flushes it to disk, then takes the name of ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of ``content`` as indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")
