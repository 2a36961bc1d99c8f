"""docs/first_day.md: every command runs in its order and prints what the page says."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/first_day.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)
INSTALLATION = ("git clone", "make", "source")  # minutes, once on each machine


BAR = re.compile(r"^.*\d%\|[^\]]*\]", flags=re.MULTILINE)


def steps():
    """(command, what it prints) of each block; a command's other lines begin with "> "."""
    for block in BLOCKS:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            first, *rest = part.splitlines(keepends=True)
            size = next((i for i, line in enumerate(rest) if not line.startswith("> ")), len(rest))
            command = first + "".join(line[2:] for line in rest[:size])
            if not command.startswith(INSTALLATION):
                yield command, "".join(rest[size:])


def test_the_page_covers_a_day():
    commands = " ".join(command for command, _ in steps())
    verbs = {"data build", "train", "generate", "evaluate", "extend", "export", "import", "sweep"}
    verbs |= {"report", "plan", "methods", "gallery", "spectrum", "doctor", "config"}
    assert {verb for verb in verbs if f"fope {verb}" not in commands} == set()
    assert len(list(steps())) >= 26 + 10


@pytest.mark.slow
def test_every_command_prints_what_the_page_says(tmp_path):
    """In a fresh clone, one command after the other."""
    clone = tmp_path / "fope_jax"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone),
        "COLUMNS": "100",
    }
    checker, different = doctest.OutputChecker(), []
    for command, expected in steps():
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=clone,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        printed = BAR.sub("", done.stdout.decode().replace("\r", "\n"))
        printed = re.sub(r"\n+", "\n", printed).lstrip("\n")
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not checker.check_output(expected, printed, flags):
            different.append(f"$ {command}{printed}\n--- the page has\n{expected}")
    assert not different, "\n\n".join(different)
