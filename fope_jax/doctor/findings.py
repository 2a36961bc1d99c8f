"""What a doctor says of a run: checks, what was found, and both in a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

_SHOWN = 5


class Finding(NamedTuple):
    """One thing that is not as it should be.

    Attributes:
      problem: what, with the file.
      advice: what to do, with the command.
      harmless: the next `fope train` or a reader copes with it by itself.
    """

    problem: str
    advice: str
    harmless: bool = False


class Check(NamedTuple):
    """One part of a run: what it is called, what was seen, and what is wrong with it."""

    name: str
    summary: str
    findings: tuple[Finding, ...] = ()


def exit_code(checks: Iterable[Check]) -> int:
    """0 where a run is sound, 1 where it is not; what is harmless does not count."""
    return int(any(not finding.harmless for check in checks for finding in check.findings))


def table(run: str | Path, checks: Iterable[Check]) -> str:
    """A table of the checks, and below it what was found with what to do."""
    checks = list(checks)
    lines = [str(run)]
    for check in checks:
        problems = [finding for finding in check.findings if not finding.harmless]
        state = "PROBLEM" if problems else ("note" if check.findings else "sound")
        lines.append(f"  {check.name:<12} {state:<8} {check.summary}")
    findings = [finding for check in checks for finding in check.findings]
    for finding in sorted(findings, key=lambda finding: finding.harmless):
        mark = "note" if finding.harmless else "PROBLEM"
        lines += [f"{mark}: {finding.problem}", f"  do: {finding.advice}"]
    # A name from a damaged file may hold what no terminal can show.
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def as_json(run: str | Path, checks: Iterable[Check]) -> dict[str, Any]:
    """The same for programs."""
    described = [
        {"name": c.name, "summary": c.summary, "findings": [f._asdict() for f in c.findings]}
        for c in checks
    ]
    return {"run": str(run), "exit_code": exit_code(checks), "checks": described}


def some(values: Iterable[Any]) -> str:
    """The first few of the values, and how many more there are.

    >>> some(range(7))
    '0, 1, 2, 3, 4 and 2 more'
    """
    values = list(values)
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more
