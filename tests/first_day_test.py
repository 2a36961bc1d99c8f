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
IN_THE_CLONE = ("$ git clone", "$ make")  # run by users and by `make`, not once more here


def steps():
    """(command, what it prints) of each block; a command may go over lines that end in a \\."""
    for block in BLOCKS:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines(keepends=True)
            size = next(i for i, line in enumerate(lines, start=1) if not line.endswith("\\\n"))
            command = "".join(lines[:size])
            if not any(f"$ {command}".startswith(made) for made in IN_THE_CLONE):
                yield command, "".join(lines[size:])


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
            text=True,
        )
        printed = re.sub(r"[^\n]*\r", "", done.stdout)  # progress bars
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not checker.check_output(expected, printed, flags):
            different.append(f"$ {command}{printed}\n--- the page has\n{expected}")
    assert not different, "\n\n".join(different)
