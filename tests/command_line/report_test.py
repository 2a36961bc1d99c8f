"""Where `fope report` writes its page, and what it leaves out."""

from pathlib import Path

import pytest

from fope_jax.command_line.report import default_page, without_reports


def test_the_page_lies_in_the_run_or_beside_runs_of_one_directory():
    assert default_page([Path("runs/a")]) == Path("runs/a/report")
    assert default_page([Path("runs/a"), Path("runs/b")]) == Path("runs/report")
    assert default_page([Path(name) for name in ("a", "b")]) == Path("report")


def test_runs_of_several_directories_or_in_a_bucket_need_a_place():
    with pytest.raises(ValueError, match=r"several directories \(x, y\): give -o"):
        default_page([Path("x/a"), Path("y/b")])
    with pytest.raises(ValueError, match="runs in a bucket: give -o"):
        default_page(["gs://bucket/a"])


def test_a_report_among_the_runs_is_left_out(tmp_path, capsys):
    for name, file in {"run": "config.json", "report": "index.html", "other": "x"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    paths = sorted(tmp_path.iterdir())
    assert without_reports(paths) == [tmp_path / "other", tmp_path / "run"]
    assert capsys.readouterr().err == f"{tmp_path}/report is a report, left out\n"
    assert without_reports([tmp_path / "report"]) == [tmp_path / "report"]  # an error names it
