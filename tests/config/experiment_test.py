"""What is accepted becomes objects and back; what is not says why, before any work."""

import functools
import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    EvaluateConfig,
    TrainConfig,
    build_experiment,
    check_vocabulary,
    experiment_to_dict,
    incompatible_changes,
    load_config,
    parse_arg,
)
from fope_jax.config import experiment as experiment_module
from fope_jax.config.fields import field_types
from fope_jax.model.config import TransformerConfig
from fope_jax.position import (
    ALiBi,
    ByLayer,
    ClipFloor,
    FoPE,
    Learned,
    LogitScaling,
    NoPE,
    NTKAware,
    RoPE,
    YaRN,
)
from fope_jax.storage.changeable_keys import CHANGEABLE_KEYS

FILE = """
from ml_collections import ConfigDict
from fope_jax.position.base import has_hook

def get_config(arg=""):
    config = ConfigDict({
        "name": arg or "fope",
        "seed": 3,
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64},
        "position": {"method": arg or "fope"},
        "data": {"corpus": "gutenberg", "vocab_size": 300, "excluded_books": ["bible-kjv"]},
        "train": {"steps": 10, "batch_size": 4, "length": 128},
    })
    config.model.vocab_size = config.data.get_ref("vocab_size")
    return config
"""


@pytest.fixture
def spec(tmp_path) -> str:
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return str(path)


def build(spec, *overrides):
    return build_experiment(load_config(spec, overrides))


def test_a_file_becomes_an_experiment_with_defaults_filled_in(spec):
    experiment = build(spec)
    assert (experiment.name, experiment.seed) == ("fope", 3)
    assert experiment.model.shape.head_dim == 8
    assert experiment.data.excluded_books == ("bible-kjv",)
    assert experiment.train.learning_rate == 6e-4
    assert experiment.evaluate == EvaluateConfig(scored_tokens=64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ab]*.txt", ("[ab]*.txt",)),
        ("(draft) a.txt,b/[1].txt", ("(draft) a.txt", "b/[1].txt")),
        ("2024,none", ("2024", "none")),
        ("('a', \"b\",)", ("a", "b")),
        ("[a, b]", ("a", "b")),
        ("", ()),
    ],
)
def test_texts_of_a_list_stay_as_they_are(spec, text, expected):
    assert build(spec, f"data.excluded_books={text}").data.excluded_books == expected


def test_a_directory_may_have_colons_in_its_name(spec, tmp_path):
    directory = tmp_path / "2026-01-01T10:00:00"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(experiment_to_dict(build(spec))))
    assert build(f"{directory}/config.json").name == "fope"


def test_the_argument_goes_to_the_file(spec):
    assert build(f"{spec}:rope").position == RoPE()


def test_overrides_are_parsed_by_the_type_of_their_field(spec):
    experiment = build(
        spec,
        "--config.train.steps=200",
        "train.learning_rate=1",
        "train.gradient_clip=none",
        "train.schedule=constant",
        "train.evaluate_every=7",
        "seed=7",
        "name=3",
        "model.qk_norm=true",
        "model.num_kv_heads=2",
        "evaluate.lengths=1,2",
        "evaluate.passkey_lengths=(4,)",
        "evaluate.passkey_templates=compact",
        "position.sigma=0",
        "position.method=fope",
        "position.preset=equations",
    )
    train = experiment.train
    assert (train.steps, train.learning_rate, train.gradient_clip) == (200, 1.0, None)
    assert type(train.learning_rate) is float and train.evaluate_every == 7
    assert build(spec, "train.evaluate_every=auto").train.evaluate_every == "auto"
    assert build(spec, "train.evaluate_every=none").train.evaluate_every is None
    assert (experiment.seed, experiment.name, train.schedule) == (7, "3", "constant")
    assert (experiment.model.qk_norm, experiment.model.num_kv_heads) == ("head", 2)
    assert experiment.evaluate.lengths == (1, 2)
    assert experiment.evaluate.passkey_lengths == (4,)
    assert experiment.evaluate.passkey_templates == ("compact",)
    assert experiment.position == FoPE.equations(training_length=128, sigma=0.0)


def test_a_field_reference_follows_an_override(spec):
    assert build(spec, "data.vocab_size=500").model.vocab_size == 500


def test_the_training_length_is_stated_once(spec):
    assert build(spec).position.training_length == 128
    assert build(spec, "train.length=64").position.training_length == 64
    placeholder = load_config(spec)
    placeholder.position.training_length = None
    assert build_experiment(placeholder).position.training_length == 128
    continued = build(spec, "train.length=256", "position.training_length=128")
    assert continued.position.training_length == 128


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=5", r"config.train.stps is unknown \(nearest: train.steps\)"),
        ("steps=5", r"config.steps is unknown \(nearest: train.steps\)"),
        ("trian.length=5", r"config.trian.length is unknown \(nearest: train.length\)"),
        ("model.steps=5", r"config.model.steps is unknown \(nearest: train.steps\)"),
        ("sede=5", r"config.sede is unknown \(nearest: seed\)"),
        ("train=5", r"config.train is a section; .* as --config.train.steps=VALUE"),
        ("position=rope", r"config.position is a section; .* as --config.position.method=VALUE"),
        (
            "position.scaling=ntk",
            r"'ntk' is str; accepted: list of Scaling, as \[\{'scaling': 'ntk'",
        ),
        ("seed=-1", r"config.seed = -1; accepted: 0 to 4294967295"),
        (f"seed={2**32}", r"config.seed = 4294967296; accepted: 0 to 4294967295"),
        (f"seed={2**64}", r"config.seed = 18446744073709551616; accepted: 0 to 4294967295"),
        ("position.sigmaa=0.1", r"unknown knob 'sigmaa' of fope; did you mean 'sigma'"),
        ("position.method=ropee", r"config.position: unknown position embedding 'ropee'.*'rope'"),
        ("train.steps=many", r"config.train.steps = 'many' is str; accepted: int"),
        ("train.steps=1.5", r"config.train.steps = 1.5 is float; accepted: int"),
        (f"train.learning_rate=1{'0' * 400}", r"learning_rate = 10+ is int; accepted: float"),
        ("train.steps=true", r"config.train.steps = True is bool; accepted: int"),
        ("train.steps", r"'train.steps' has no value \(form: --config.train.steps=100\)"),
        ("train.gradient_clip=a", r"gradient_clip = 'a' is str; accepted: float or none"),
        ("train.schedule=cosin", r"= 'cosin' \(nearest: cosine\); accepted: cosine or constant"),
        ("evaluate.lengths=1,x", r"\(1, 'x'\): 'x' is str; accepted: list of int or float"),
        ("evaluate.length=1", r"config.evaluate.length is unknown \(nearest: evaluate.lengths\)"),
        ("evaluate.random_positions=yes", r"= 'yes' is str; accepted: True or False"),
        ("name=", r"config.name = ''; accepted: a name that is not empty"),
        ("position.sigma=big", r"config.position.sigma = 'big' is str; accepted: float"),
        ("train.steps=0", r"config.train: steps = 0; accepted: an integer of 1 or more"),
        ("train.accumulate=3", r"accumulate = 3; accepted: a divisor of batch_size = 4"),
        ("train.learning_rate=-1", r"learning_rate = -1.0; accepted: a positive number"),
        ("train.b2=1", r"b2 = 1.0; accepted: 0 <= value < 1"),
        ("evaluate.lengths=0", r"config.evaluate: lengths = \(0,\); accepted: multiples"),
        ("evaluate.lengths=1,-0.5", r"lengths = \(1, -0.5\); accepted: multiples above 0"),
        ("evaluate.passkey_depths=0.5,0.1,0.5", r"passkey_depths = .*; accepted: each once"),
        ("evaluate.passkey_depths=0,0.0", r"passkey_depths = .*; accepted: each once"),
        ("evaluate.passkey_templates=compact,compact", r"passkey_templates = .*: each once"),
        ("evaluate.retrieval_tasks=recall,copy,recall", r"retrieval_tasks = .*: each once"),
        ("evaluate.protocols=chunk", r"protocols = \('chunk',\); accepted: some of same-tokens,"),
        ("evaluate.passkey_templates=poem", r"= \('poem',\); accepted: some of compact, standard"),
        ("evaluate.splits=valid", r"splits = \('valid',\); accepted: some of train, validation"),
        ("model.d_model=30", r"config.model: d_model=30: expected a multiple of num_heads=4"),
        ("model.head_dim=7", r"config.position: .*7.*even"),
        ("model.windows=8,none,none,none,none", r"with windows of 5 after 5: num_layers="),
        ("model.windows=8,0", r"windows\[1\]=0: .*\(None for all\) must be 1 or more"),
        ("data.packing=none", r"config.data.packing = 'none'; accepted: documents or windows"),
    ],
)
def test_a_wrong_override_says_what_is_accepted(spec, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(spec, [override])


@pytest.mark.parametrize("overrides", ["train.steps=3", {"train.steps": 3}])
def test_overrides_are_a_list(spec, overrides):
    with pytest.raises(ConfigError, match=r"overrides = .*; accepted: a list such as \['train.st"):
        load_config(spec, overrides)


def test_a_file_name_is_no_configuration():
    with pytest.raises(
        ConfigError, match="config = 'quickstart'; accepted: .*; load_config reads a"
    ):
        build_experiment("quickstart")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.stpes", r"config.train.stpes is unknown \(nearest: train.steps\)"),
        ("evalute", r"config.evalute is unknown"),
        ("train.steps", r"config.train.steps = '5' is str; accepted: int"),
        ("data.excluded_books", r"excluded_books = '5' is str; accepted: list of str"),
    ],
)
def test_a_wrong_key_or_type_in_the_file_fails(tmp_path, change, message):
    section, _, field = change.rpartition(".")
    path = tmp_path / "wrong.py"
    target = f"config.{section}" if section else "config"
    line = f"    with config.ignore_type():\n        {target}[{field!r}] = '5'\n    return config"
    path.write_text(FILE.replace("    return config", line))
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


@pytest.mark.parametrize("missing", ["train", "train.length", "name", "position.method"])
def test_a_missing_value_is_named(spec, missing):
    config = load_config(spec)
    section, _, field = missing.partition(".")
    del (config[section] if field else config)[field or section]
    with pytest.raises(ConfigError, match=f"config.{missing} is missing"):
        build_experiment(config)


def test_a_window_longer_than_the_table_fails(spec):
    table = ["position.method=learned", "position.table_length=128"]
    assert isinstance(build(spec, *table).position, Learned)
    with pytest.raises(ConfigError, match=r"length = 256 is beyond .* 'learned', 128"):
        build(spec, *table, "train.length=256")


def test_a_file_that_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="'nowhere.py' does not exist"):
        load_config("nowhere.py:arg")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"defines no get_config\(arg\)"):
        load_config(str(tmp_path / "empty.py"))


@pytest.mark.parametrize("method", ["fope", "rope", "nope", "alibi", "sinusoidal"])
def test_config_json_builds_the_same_experiment(spec, method):
    experiment = build(f"{spec}:{method}", "model.num_kv_heads=2")
    stored = json.loads(json.dumps(experiment_to_dict(experiment)))
    assert build_experiment(stored) == experiment
    assert build_experiment(ConfigDict(stored)) == experiment


def test_config_json_is_a_configuration_file_too(spec, tmp_path):
    experiment = build(spec)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(experiment_to_dict(experiment)))
    assert build(str(path)) == experiment
    assert build(str(path), "train.steps=7", "model.norm=post") == replace(
        experiment,
        train=replace(experiment.train, steps=7),
        model=replace(experiment.model, norm="post"),
    )


def test_what_changes_the_numbers_is_told_with_both_values(spec):
    old = experiment_to_dict(build(spec))
    assert incompatible_changes(old, old) == []
    free = build(
        spec,
        "train.save_every=3",
        "train.keep=9",
        "evaluate.num_windows=1",
        "data.cache_dir=elsewhere",
        "name=other",
    )
    assert incompatible_changes(old, experiment_to_dict(free)) == []
    other = build(spec, "train.length=64", "position.method=rope", "seed=4")
    lines = incompatible_changes(old, experiment_to_dict(other))
    assert "train.length: 128, now 64" in lines
    assert "position.method: 'fope', now 'rope'" in lines
    assert "seed: 3, now 4" in lines


def test_more_steps_change_the_numbers_of_a_schedule_that_ends(spec):
    for schedule, expected in (("cosine", ["train.steps: 10, now 20"]), ("constant", [])):
        short, long = (
            experiment_to_dict(build(spec, f"train.schedule={schedule}", f"train.steps={steps}"))
            for steps in (10, 20)
        )
        assert incompatible_changes(short, long) == expected


def test_a_vocabulary_larger_than_the_embedding_is_refused(spec):
    model = build(spec).model
    check_vocabulary(300, model)
    with pytest.raises(ConfigError, match=r"has 301 tokens but config.model.vocab_size = 300"):
        check_vocabulary(301, model)


def test_nothing_touches_a_device(spec, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "devices", lambda *a: pytest.fail("a device was asked for"))
    build(spec)


def test_arguments_of_a_file():
    defaults = {"position": "fope", "seed": 0, "smoke": False, "rate": 1.0}
    assert parse_arg("", **defaults).to_dict() == defaults
    parsed = parse_arg("seed=4, smoke,rate=2", **defaults)
    assert (parsed.seed, parsed.smoke, parsed.rate) == (4, True, 2.0)
    with pytest.raises(ConfigError, match=r"'sede' is unknown \(nearest: seed\); accepted: posi"):
        parse_arg("sede=1", **defaults)
    with pytest.raises(ConfigError, match="seed = 'x' is str; accepted: int"):
        parse_arg("seed=x", **defaults)


def test_every_train_field_is_documented_and_checked_when_built_directly():
    for name in TrainConfig.__dataclass_fields__:
        assert name in TrainConfig.__doc__
    good = TrainConfig(steps=1, batch_size=2, length=3)
    for wrong in ({"schedule": "step"}, {"keep": 0}, {"eps": 0.0}, {"warmup_steps": -1}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{name} = {value!r}; accepted"):
            replace(good, **wrong)


def test_stages_follow_from_the_first_lengths(spec):
    config = build(spec, "train.first_lengths=32=4,64=3", "train.accumulate=2").train
    assert config.first_lengths == ("32=4", "64=3")
    assert config.stages == ((0, 4, 32, 16), (4, 7, 64, 8), (7, 10, 128, 4))
    assert build(spec).train.stages == ((0, 10, 128, 4),)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("32", r"first_lengths = '32'; accepted: 'length=updates', 1 update or more of seq"),
        ("32:4", r"first_lengths = '32:4'; accepted: 'length=updates', 1 update or more of seq"),
        ("32=0", r"first_lengths = '32=0'; accepted: 'length=updates', 1 update or more"),
        ("128=2", r"'128=2'; accepted: .* of sequences shorter than length = 128"),
        ("100=2", r"'100=2'; accepted: a length of which whole rows, .* the 4 \* 128 = 512 tokens"),
        ("32=4,64=6", r"accepted: fewer updates than steps = 10; these are 10"),
    ],
)
def test_wrong_first_lengths_say_what_is_accepted(spec, entries, message):
    with pytest.raises(ConfigError, match=message):
        build(spec, f"train.first_lengths={entries}")


def test_rows_of_a_shorter_length_are_a_multiple_of_the_pieces(spec):
    with pytest.raises(ConfigError, match="multiple of accumulate = 3 of them, make up the 6 "):
        build(spec, "train.batch_size=6", "train.accumulate=3", "train.first_lengths=96=2")


@pytest.mark.parametrize(
    ("scaling", "warned"),
    [
        ({"scaling": "yarn", "factor": 1.0, "original_length": 128}, ["yarn"]),
        ({"scaling": "ntk", "factor": 1.0}, ["ntk"]),
        ({"scaling": "llama3", "factor": 1, "original_length": 128}, ["llama3"]),
        ({"scaling": "yarn", "factor": 2.0, "original_length": 128}, []),
        ({"scaling": "yarn", "factor": 1.0, "original_length": 128, "attention_factor": 1.1}, []),
        ({"scaling": "dynamic_ntk", "factor": 1.0, "original_length": 64}, []),  # s(n) = n / L
    ],
)
@pytest.mark.parametrize("method", ["rope", "fope"])
def test_a_scaling_by_1_is_warned_of_once(spec, caplog, monkeypatch, method, scaling, warned):
    if (method, scaling["scaling"]) == ("fope", "dynamic_ntk"):
        scaling = scaling | {"length": 256}
    monkeypatch.setattr(
        experiment_module, "_warn_once", functools.cache(experiment_module._warn_once.__wrapped__)
    )
    plain = build(spec, f"position.method={method}")
    overrides = (f"position.method={method}", f"position.scaling=[{scaling}]")
    for _ in range(2):
        assert build(spec, *overrides).position != plain.position
    line = "WARNING: config.position: {} with factor=1 changes nothing"
    assert [record.message for record in caplog.records] == [line.format(name) for name in warned]


def test_the_paths_that_never_change_numbers_exist():
    for key in CHANGEABLE_KEYS:
        section, _, field = key.rpartition(".")
        cls = experiment_module.SECTIONS.get(section)
        assert field in (experiment_module.TOP_LEVEL if cls is None else field_types(cls))
    assert TransformerConfig in experiment_module.SECTIONS.values()


NESTED = {
    "scalings": (
        {"method": "rope", "scaling": [{"scaling": "clip_floor"}, {"scaling": "ntk", "factor": 4}]},
        RoPE(scaling=(ClipFloor(128), NTKAware(4.0))),
    ),
    "a pattern": (
        {"method": "by_layer", "methods": [{"method": "fope"}, {"method": "nope"}]},
        ByLayer((FoPE(128), NoPE())),
    ),
    "a pattern inside a scaling": (
        {
            "method": "logit_scaling",
            "inner": {"method": "by_layer", "methods": [{"method": "rope"}, {"method": "alibi"}]},
        },
        LogitScaling(ByLayer((RoPE(), ALiBi())), training_length=128),
    ),
    "a temperature": (
        {"method": "logit_scaling", "inner": {"method": "rope"}, "form": "yarn", "factor": 2},
        LogitScaling(RoPE(), form="yarn", factor=2.0),
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_methods_inside_methods(spec, name):
    """From a file, with the training length filled in, to plain values and back."""
    position, expected = NESTED[name]
    config = load_config(spec)
    config.position = ConfigDict(position)
    experiment = build_experiment(config)
    assert experiment.position == expected
    saved = json.loads(json.dumps(experiment_to_dict(experiment)))
    assert build_experiment(saved) == experiment


SINUSOIDAL = {"method": "sinusoidal"}
SCALED = {"method": "logit_scaling", "inner": SINUSOIDAL}


@pytest.mark.parametrize(
    ("position", "init_std", "amplitude"),
    [
        (SINUSOIDAL, 0.02, 0.02),
        (SINUSOIDAL, 0.06, 0.06),
        (SINUSOIDAL | {"amplitude": 1.0}, 0.06, 1.0),  # what configurations from before say
        (SCALED, 0.06, 0.06),
    ],
)
def test_sinusoids_are_as_large_as_the_embeddings(spec, position, init_std, amplitude):
    """One file states an amplitude and keeps it; one that states none takes model.init_std."""
    config = load_config(spec, [f"model.init_std={init_std}"])
    config.position = ConfigDict(position)
    experiment = build_experiment(config)
    method = getattr(experiment.position, "inner", experiment.position)
    assert method.amplitude == amplitude
    stored = json.loads(json.dumps(experiment_to_dict(experiment)))
    # Later changes of init_std change no model that has weights.
    stored["model"]["init_std"] = 0.5
    assert build_experiment(stored).position == experiment.position


@dataclass(frozen=True)
class Wave(NoPE):
    """Somebody's method with names that methods of this package have."""

    amplitude: float = 1.0
    training_length: int = 4096
    num_layers: int = 7


@dataclass(frozen=True)
class LengthBound(NoPE):
    num_layers: int
    training_length: int | None = None
    amplitude: float = field(default=1.0, metadata={"config": "model.init_std"})


def test_only_what_a_method_leaves_open_is_filled_in(spec):
    def position(cls):
        config = load_config(spec, ["model.init_std=0.06"])
        config.position = ConfigDict({"method": f"{__name__}:{cls.__name__}"})
        return build_experiment(config).position

    assert position(Wave) == Wave(1.0, 4096, 7)
    assert position(LengthBound) == LengthBound(2, 128, 0.06)


def test_numbers_of_numpy_are_numbers(spec):
    config = load_config(spec)
    config.position.training_length = np.int64(64)
    config.position.sigma = np.float32(0.25)
    position = build_experiment(config).position
    assert position == FoPE(64, sigma=0.25) and type(position.training_length) is int


def test_scalings_from_the_command_line(spec):
    text = '[{"scaling": "yarn", "factor": 4, "original_length": 128}]'
    experiment = build(spec, "position.method=rope", f"position.scaling={text}")
    assert experiment.position == RoPE(scaling=(YaRN(4.0, 128),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{'scaling': 'yarn'", r"config.position.scaling = .* is no Python literal"),
        ("[{'scaling': 'yarm'}]", r"unknown scaling 'yarm'; did you mean 'yarn'"),
        ("[{'factor': 4.0}]", r"config.position.scaling\[0\] = .*expected a 'method', or a"),
        (
            "[{'scaling': 'ntk', 'factor': 'four'}]",
            r"config.position.scaling\[0\].factor = 'four' is str; accepted: float",
        ),
        ("[{'scaling': 'ntk', 'factor': 0.5}]", r"config.position: factor=0.5.*1 or more"),
        ("[{'method': 'nope'}]", r"config.position.scaling = .*accepted: .*Scaling"),
    ],
)
def test_bad_scalings_say_where(spec, text, message):
    with pytest.raises(ConfigError, match=message):
        build(spec, "position.method=rope", f"position.scaling={text}")
