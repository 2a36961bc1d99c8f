"""Fails where too few lines of the package ran in the tests: `python -m tests.coverage_gates FILE`.

SlipCover writes the file. Its cost is a twentieth of the tests' time where coverage.py costs half.
"""

import json
import sys

GATES = {"fope_jax/": 90.0, "fope_jax/position/": 100.0}  # least per cent of lines


def main(path: str) -> int:
    with open(path) as file:
        files = json.load(file)["files"]
    is_met = True
    for directory, least in GATES.items():
        inside = {name: lines for name, lines in files.items() if name.startswith(directory)}
        missing = {name: f["missing_lines"] for name, f in inside.items() if f["missing_lines"]}
        executed = sum(len(f["executed_lines"]) for f in inside.values())
        percent = 100 * executed / max(1, executed + sum(map(len, missing.values())))
        print(f"{directory}: {percent:.2f}% of {len(inside)} files' lines ran; at least {least:g}%")
        if not inside or percent < least:
            is_met = False
            for name, lines in missing.items():
                print(f"  {name}: {', '.join(map(str, lines))}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
