"""The benchmarks are no part of the package that is installed: found beside it, from the root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
