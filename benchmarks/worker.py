"""A process of its own for one side of a comparison, so that no library waits in another's way."""

from __future__ import annotations

import json
import select
import subprocess
from typing import Any


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
