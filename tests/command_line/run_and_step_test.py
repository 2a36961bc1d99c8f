"""RUN and RUN/STEP name a run and a checkpoint in every verb; former spellings mean the same."""

import argparse

import pytest

from fope_jax.command_line.common import run_and_step
from fope_jax.command_line.parser import build_parser
from fope_jax.storage.run_paths import split_step

EXTENSION = ["--method", "yarn", "--length", "32", "--workdir", "new"]


@pytest.mark.parametrize(
    ("former", "line"),
    [
        (["evaluate", "--run", "a", "--step", "5"], ["evaluate", "--step", "5", "a"]),
        (["evaluate", "--force", "--run=a"], ["evaluate", "a", "--force"]),
        (["export", "--run", "a/5", "-o", "out"], ["export", "a/5", "-o", "out"]),
        (["spectrum", "--run", "a", "-o", "out"], ["spectrum", "-o", "out", "a"]),
        (["extend", "--from", "a/5", *EXTENSION], ["extend", "a/5", *EXTENSION]),
        (["extend", "--from", "hf:a", *EXTENSION], ["extend", *EXTENSION, "hf:a"]),
        (["import", "--workdir", "w", "--from", "m"], ["import", "m", "--workdir", "w"]),
    ],
)
def test_former_options_are_the_positional_argument(former, line):
    parser = build_parser()
    assert parser.parse_args(former) == parser.parse_args(line)


@pytest.mark.parametrize("verb", ["evaluate", "export", "extend", "import"])
def test_a_verb_without_its_run_says_what_is_missing(verb, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([verb])
    assert "required: RUN[/STEP]" in capsys.readouterr().err or verb == "import"


@pytest.fixture
def run(tmp_path):
    """A directory that counts as a run, named by a number."""
    directory = tmp_path / "2026"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def test_the_step_is_in_the_name_or_given_beside_it(run, tmp_path):
    assert split_step(run) == (run, None)
    assert split_step(run, 500) == (run, 500)
    assert split_step(run / "500") == split_step(run / "checkpoints" / "500") == (run, 500)
    assert split_step(f"{run}/500", 500) == (run, 500)
    assert split_step(tmp_path / "none" / "500") == (tmp_path / "none" / "500", None)
    arguments = argparse.Namespace(run=run / "500", step=400)
    with pytest.raises(ValueError, match="2026/500 and --step 400: leave one out"):
        run_and_step(arguments)
