"""What `fope` says before a verb runs: help, versions, suggestions, and how values are given."""

import subprocess
import sys

import pytest

from fope_jax.command_line.parser import build_parser
from fope_jax.main import main
from fope_jax.train.options import parse_arguments


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_fope_alone_shows_the_verbs(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "usage: fope" in shown and "measure a trained run against context length" in shown


def test_versions_are_told_without_starting_jax():
    code = (
        "import sys\nfrom fope_jax.main import main\nassert main(['--version']) == 0\n"
        "assert not {'jax', 'flax', 'orbax', 'numpy'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("fope-jax 0.") and run.stdout.count("\n") == 1
    for name in ("python 3.", "jax 0.", "flax 0.", "orbax-checkpoint 0."):
        assert name in run.stdout


def test_devices_are_told_when_asked_for(capsys):
    assert main(["--version", "-v"]) == 0
    assert "devices: 1 x cpu (cpu)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "near"), [("trian", "train"), ("eval", "evaluate"), ("reprot", "report")]
)
def test_an_unknown_verb_gets_the_nearest(word, near, capsys):
    assert f"{word!r} is no verb; did you mean {near!r}?" in refusal([word, "x"], capsys)


@pytest.mark.parametrize("word", ["fly", "e", ""])
def test_a_verb_like_none_or_like_two_gets_no_suggestion(word, capsys):
    said = refusal([word], capsys)
    assert f"{word!r} is no verb (verbs: data, train, " in said


@pytest.mark.parametrize(
    ("arguments", "missing", "example"),
    [
        (["train"], "--config, --workdir", "fope train --config configs/quickstart.py --workdir"),
        (["evaluate"], "", "fope evaluate "),
        (
            ["plan"],
            "--config, --topology",
            "fope plan --config configs/paper/c4_books.py --topology",
        ),
        (["doctor"], "", "fope doctor runs/fope"),
        (["gallery"], "-o/--out", "fope gallery -o runs/gallery"),
        (["data"], "ACTION", "fope data build --config configs/quickstart.py"),
    ],
)
def test_what_is_missing_is_named_with_an_example(arguments, missing, example, capsys):
    said = refusal(arguments, capsys)
    assert missing in said and f"example: {example}" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runner-option", "region=x"], "--runner-option needs --runner NAME"),
        (["--runner-parts=gs://b/x", "--workers=2"], "--runner-parts needs --runner NAME"),
        (["--runner", "DirectRunner", "--workers=2"], "--workers is for this machine"),
    ],
)
def test_options_of_a_build_that_would_do_nothing_are_refused(options, message, capsys):
    assert message in refusal(["data", "build", "--config", "x.py", *options], capsys)


@pytest.mark.parametrize("form", [["=3"], ["", "3"]])
@pytest.mark.parametrize(
    "verb",
    [
        ["train", "--config", "x.py", "--workdir", "run"],
        ["extend", "--from", "a", "--method", "yarn", "--length", "8", "--workdir", "b"],
        ["evaluate", "--run", "run"],
        ["data", "build", "--config", "x.py"],
        ["plan", "--config", "x.py", "--topology", "v5e:2x2"],
        ["import", "--from", "hf", "--workdir", "run"],
    ],
    ids=lambda verb: verb[0],
)
def test_a_value_stands_after_an_equals_sign_or_a_space(verb, form):
    first, *after = form
    line = [*verb, f"--config.train.steps{first}", *after, "--config.seed", "-1"]
    arguments = parse_arguments(build_parser(), line)
    assert arguments.overrides == ["--config.train.steps=3", "--config.seed=-1"]
    assert vars(parse_arguments(build_parser(), verb)).keys() == vars(arguments).keys()


def test_a_value_with_a_space_is_no_positional_argument():
    line = ["report", "run", "-o", "out", "--config.evaluate.texts=my mails/*.txt"]
    with pytest.raises(SystemExit):  # report takes no values; as a run it would be looked for
        parse_arguments(build_parser(), line)
    line = ["evaluate", "--run", "run", "--config.evaluate.texts", "a=my mails/*.txt"]
    overrides = parse_arguments(build_parser(), line).overrides
    assert overrides == ["--config.evaluate.texts=a=my mails/*.txt"]


@pytest.mark.parametrize("rest", [[], ["--workdir", "run"], ["-o", "out"]])
def test_a_value_that_is_left_out_is_named(rest, capsys):
    said = refusal(["train", "--config", "x.py", "--config.train.steps", *rest], capsys)
    assert "--config.train.steps has no value; accepted: --config.train.steps=VALUE or" in said


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (
            ["train", "configs/a.py:smoke"],
            "a configuration is given as --config configs/a.py:smoke",
        ),
        (["config", "run/config.json"], "a configuration is given as --config run/config.json"),
        (
            ["evaluate", "a", "b"],
            "one more than the verb takes; several values of an option are joined by commas",
        ),
        (
            ["evaluate", "a", "--steps"],
            "a configuration value is given as --config.train.steps=100",
        ),
    ],
)
def test_a_configuration_without_its_option_is_shown_with_it(words, advice, capsys):
    assert f"unknown argument '{words[-1]}' ({advice})" in refusal(words, capsys)
