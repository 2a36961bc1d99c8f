"""The list of keys against the dataclasses, and against what a run may change when it resumes."""

import dataclasses

import pytest

from fope_jax.config import (
    ConfigError,
    build_experiment,
    experiment_to_dict,
    incompatible_changes,
    load_config,
)
from fope_jax.config.experiment import SECTIONS, TOP_LEVEL
from fope_jax.config.keys import (
    all_keys,
    class_keys,
    field_texts,
    find_keys,
    keys_markdown,
    keys_text,
)
from fope_jax.main import main
from fope_jax.model.sharding import MeshConfig
from fope_jax.position.registry import METHODS, SCALINGS


def test_every_field_of_every_section_method_and_scaling_has_its_line():
    for name, cls in {**SECTIONS, **METHODS, **SCALINGS}.items():
        keys = class_keys(name, cls)
        assert [key.name for key in keys] == [
            f"{name}.{field.name}" for field in dataclasses.fields(cls) if field.init
        ]
        assert all(len(key.meaning) > 5 for key in keys), name
    names = [key.name for key in all_keys()]
    assert len(names) == len(set(names)) and {*TOP_LEVEL, "position.method"} <= {*names}


def test_what_may_change_is_what_a_resumed_run_accepts():
    config = experiment_to_dict(build_experiment(load_config("configs/quickstart.py")))
    for key in (key for key in all_keys() if not key.name.startswith("position.")):
        section, _, field = key.name.rpartition(".")
        changed = config | ({section: config[section] | {field: "?"}} if section else {field: "?"})
        is_refused = bool(incompatible_changes(config, changed))
        assert is_refused == (key.on_resume != "yes"), key.name


def test_a_text_may_be_of_several_fields_and_lines_and_ends_with_its_section():
    class Documented:
        """A class.

        Attributes:
          a, b: of both,
            told in two lines: see ``x``.

          c: after a gap.

        Returns:
          d: nothing.
        """

    both = "of both, told in two lines: see `x`."
    assert field_texts(Documented) == {"a": both, "b": both, "c": "after a gap."}


def test_keys_by_section_key_and_method():
    assert {key.name.partition(".")[0] for key in find_keys("train")} == {"train"}
    (steps,) = find_keys("train.steps")
    assert (steps.default, steps.type) == (None, "int")
    defaults = {key.name: key.default for key in find_keys("position.fope")}
    assert defaults["position.training_length"] == "train.length"
    assert defaults["position.sigma"] == "0.3"
    assert {key.name for key in find_keys("position.yarn")} >= {"position.beta_fast"}
    with pytest.raises(ConfigError, match=r"'train.step' \(nearest: train.steps\)"):
        find_keys("train.step")
    with pytest.raises(ConfigError, match=r"'position.roap' \(nearest: position.rope\)"):
        find_keys("position.roap")


def test_one_line_of_many_keys_and_the_whole_text_of_one():
    many, one = keys_text(find_keys("train")), keys_text(find_keys("train.keep"))
    assert "train.keep = 2  (int, may change on resuming)\n    number of checkpoints" in many
    assert one.startswith("train.keep = 2  (int, may change on resuming)\n    number of")
    weights = keys_text(find_keys("model.param_dtype"))
    assert weights.count(".") > 3 and keys_text(find_keys("model")).endswith("    of the weights")
    table = keys_markdown(find_keys("mesh")).splitlines()
    assert len(table) == 2 + len(dataclasses.fields(MeshConfig))
    assert {line.count("|") for line in table} == {6}


def test_the_verb_prints_keys_and_configurations(capsys):
    assert main(["config", "--keys", "position.alibi"]) == 0
    assert capsys.readouterr().out.startswith("position.slopes = none  (list of float or none)")
    file = ["config", "--config", "configs/quickstart.py:position=rope,smoke"]
    assert main([*file, "--config.train.steps", "7"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {"train.steps = 7", 'position.method = "rope"', "train.keep = 2"} <= {*shown}


def test_what_is_printed_as_json_is_a_configuration(capsys, tmp_path):
    file = ["config", "--config", "configs/recall.py:position=fope"]
    assert main([*file, "--json"]) == 0
    (tmp_path / "config.json").write_text(capsys.readouterr().out)
    assert main(file) == 0
    shown = capsys.readouterr().out
    assert main(["config", "--config", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --config and --keys is required"),
        (["--keys", "--config", "x.py"], "--keys lists the keys of every configuration; leave --c"),
        (["--keys", "--config.train.steps=3"], "changes a value of --config FILE"),
    ],
)
def test_config_takes_a_file_or_asks_for_keys(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["config", *arguments])
    assert message in capsys.readouterr().err
