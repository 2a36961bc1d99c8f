"""The page of a sweep is drawn where something has changed, and is kept otherwise."""

import json

import pytest

from fope_jax.command_line.train import _page_of_sweep
from fope_jax.report import page as pages


@pytest.fixture
def drawn(monkeypatch):
    """The names of the runs of each page that is drawn."""
    pages_drawn = []

    def write_report(runs, out):
        pages_drawn.append([run.name for run in runs])
        out.mkdir(exist_ok=True)
        (out / "index.html").touch()
        return out / "index.html"

    monkeypatch.setattr(pages, "write_report", write_report)
    return pages_drawn


def test_the_page_is_drawn_again_after_a_run_alone(tmp_path, drawn, capsys):
    def done(name, seconds):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "sweep.json").write_text(json.dumps({"seconds": seconds}))
        (tmp_path / name / "metrics.jsonl").write_text("{}\n")
        return tmp_path / name

    runs = [done("a", 1.5), done("b", 2.5)]
    assert _page_of_sweep(tmp_path, runs) == tmp_path / "report" / "index.html"
    assert capsys.readouterr().out == "the page is drawn in 0 s\n"
    _page_of_sweep(tmp_path, runs)
    assert drawn == [["a", "b"]]
    assert capsys.readouterr().out == ""
    done("b", 3.5)  # made again
    _page_of_sweep(tmp_path, runs)
    _page_of_sweep(tmp_path, runs[:1])  # the sweep has fewer runs now
    assert drawn[1:] == [["a", "b"], ["a"]]
    (tmp_path / "report" / "index.html").unlink()
    _page_of_sweep(tmp_path, runs[:1])
    assert len(drawn) == 4
    (tmp_path / "a" / "metrics.jsonl").write_text("{}\n{}\n")  # `fope evaluate --as`
    _page_of_sweep(tmp_path, runs[:1])
    _page_of_sweep(tmp_path, runs[:1])
    assert len(drawn) == 5
