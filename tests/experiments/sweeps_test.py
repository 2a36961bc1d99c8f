"""The committed rows of an experiment are of the runs that its sweep describes today."""

from pathlib import Path

import pytest

from fope_jax.sweep.kept_rows import kept_runs
from fope_jax.sweep.runs import load_sweep

ROOT = Path(__file__).parents[2]
SWEEPS = sorted(ROOT.glob("experiments/*/sweep.py"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_rows_are_of_the_runs_of_the_sweep(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    kept_runs(load_sweep(str(path)), path.parent / "results")
