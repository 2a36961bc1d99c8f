"""Compares every number of the experiments' pages with the committed rows.

    python -m experiments.check                 all pages
    python -m experiments.check pretrained      one experiment's page, or a page by its path

Numbers of tables and prose are computed anew from experiments/*/results and compared at the
precision they stand with. A number that no claim and no exemption covers is an error. What is not
compared is listed by name. Ends with status 1 where a number differs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from experiments.check.claims import Page
from experiments.check.compare import Result, check_page
from experiments.check.overview import PAGES

ROOT = Path(__file__).parents[2]
# Pages with results and without claims, and why.
NOT_COVERED = {
    "experiments/demo/README.md": "its rows are not committed; `make demo` prints them",
    "experiments/paper_scale/README.md": "it has no rows yet; its times are arithmetic",
    "docs/index.md": "shows what `make demo` prints",
    "docs/first_day.md": "shows what its commands print",
    "docs/howto/extend.md": "a run of SmolLM2 whose rows are not committed",
    "docs/howto/pretrained.md": "shows what `make pretrained-demo` prints",
    "benchmarks/README.md": "times of one machine; the benchmarks print them anew",
}


def all_pages() -> list[Page]:
    """The page of each experiment with a claims.py, and the pages that sum them up.

    Raises:
      ValueError: an experiment has neither a claims.py nor a reason in ``NOT_COVERED``.
    """
    pages = list(PAGES)
    for path in sorted(ROOT.glob("experiments/*/README.md")):
        name = path.relative_to(ROOT).as_posix()
        if (path.parent / "claims.py").is_file():
            pages.append(importlib.import_module(f"experiments.{path.parent.name}.claims").PAGE)
        elif name not in NOT_COVERED:
            raise ValueError(
                f"{name} has no claims.py beside it; write one, or give the reason why not in "
                "NOT_COVERED of experiments/check/__main__.py"
            )
    return pages


def check(page: Page) -> Result:
    """Compares one page as it is on disk."""
    return check_page(page, (ROOT / page.path).read_text(encoding="utf-8"))


def summary(page: Page, result: Result) -> str:
    """One line: what was compared, and what was exempt."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.exempt.most_common())
    exempt = f"; exempt: {reasons}" if reasons else ""
    return f"{page.path}: {result.compared} compared with rows{exempt}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments or paths (all)")
    names = parser.parse_args(arguments).names
    pages = {page.path: page for page in all_pages()}
    wanted = [name if name.endswith(".md") else f"experiments/{name}/README.md" for name in names]
    for name in wanted:
        if name not in pages:
            known = ", ".join(pages)
            parser.error(f"{name} has no claims; there are those of {known}")
    results = {name: check(pages[name]) for name in wanted or pages}
    for name, result in results.items():
        print(summary(pages[name], result))
    left_out = [] if names else [f"{page}: {reason}" for page, reason in NOT_COVERED.items()]
    left_out += [
        f"{name}, section {title!r}: {reason}"
        for name, result in results.items()
        for title, reason in result.unchecked.items()
    ]
    for line in left_out:
        print(f"not covered: {line}")
    problems = [problem for result in results.values() for problem in result.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
