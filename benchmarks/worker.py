"""A process of its own for one side of a comparison, so that no library waits in another's way."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from fope_jax.tpu.topology import COMPILER_ENVIRONMENT


class Worker:
    """A process that reads tasks from stdin, each a list in a line of JSON, and answers likewise.

    Args:
      name: of the side.
      command: that starts the process.
      advice: what to do where it stops.
    """

    def __init__(self, name: str, command: list[str], advice: str) -> None:
        self.name, self.advice = name, advice
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *task: Any, seconds: float | None = None) -> Any:
        """The answer to a task.

        Raises:
          SystemExit: the process has stopped; with the advice.
          TimeoutError: there is no answer after ``seconds`` (None waits for it).
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            # An answer is one line, so nothing of an earlier one waits in the buffer.
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                raise TimeoutError(f"{self.name}: no answer after {seconds:.0f} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.name} stopped; its message is above. {self.advice}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def needs_compiler_environment() -> bool:
    """Whether this process lacks what the TPU compiler reads, before jax starts."""
    return bool(COMPILER_ENVIRONMENT.keys() - os.environ.keys())


def run_for_compiler(module: str, arguments: Sequence[str] | None) -> int:
    """Runs a benchmark in a process that has it; ``arguments`` default to this process's."""
    given = sys.argv[1:] if arguments is None else arguments
    command = [sys.executable, "-m", module, *given]
    environment = os.environ | COMPILER_ENVIRONMENT
    return subprocess.run(command, env=environment, check=False).returncode
