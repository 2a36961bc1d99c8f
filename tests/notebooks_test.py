"""The notebooks run from the first cell to the last, as scripts and as notebooks."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.py"))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Runs of few steps, more than those of the warmup, in a directory of the test."""
    for name, value in {"MPLBACKEND": "agg", "RUNS": str(tmp_path), "STEPS": "120"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.slow
def test_the_functions_run_in_a_model_that_is_not_ours(settings):
    source = (ROOT / "docs/notebooks/your_own_flax_model.py").read_text()
    for whole, part in {"32, 150": "32, 3", "(rope, fope, alibi)": "(fope,)"}.items():
        assert whole in source
        source = source.replace(whole, part)
    names = {"__name__": "notebook"}
    exec(compile(source, "your_own_flax_model.py", "exec"), names)
    assert len(names["losses"]["fope"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_jupyter(path, settings):
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    notebook = jupytext.read(path)
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.resources = {"metadata": {"path": str(ROOT)}}
    client.execute()
    errors = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stderr"
    ]
    assert errors == []
