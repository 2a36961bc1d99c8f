"""The experiment of a child: what follows, what is stated, what is refused."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fope_jax.config import ConfigError, build_experiment, experiment_to_dict, load_config
from fope_jax.config import experiment as experiment_module
from fope_jax.extend import run as extend_module
from fope_jax.extend.child import OPTIMIZERS, child_experiment
from fope_jax.extend.initial_loss import WARN_ABOVE
from fope_jax.extend.lineage import data_changes, describe_parent, has_same_data
from fope_jax.extend.parent import Parent, open_parent
from fope_jax.interop.run_import import import_run
from fope_jax.position import ALiBi, FoPE, Learned, NoPE, RoPE, YaRN


def parent_of(runs, method="rope", **changes):
    settings = {"steps": 100, "batch_size": 8, "length": 16, "warmup_steps": 30} | changes
    values = runs.values(method=method, **settings)
    return build_experiment(values | {"evaluate": {"lengths": (1, 2, 4), "passkey_lengths": (1,)}})


def test_what_follows_from_the_parent_and_the_length(runs):
    parent = parent_of(runs, accumulate=4)
    child = child_experiment(parent, 80, "yarn", 32)
    assert child.name == "fope+yarn-32" and child.seed == parent.seed
    assert child.position == RoPE(scaling=(YaRN(2.0, 16),))
    assert child.model == parent.model and child.data == parent.data
    assert (child.train.length, child.train.batch_size, child.train.accumulate) == (32, 4, 4)
    assert (child.train.steps, child.train.warmup_steps) == (10, 1)
    assert (child.train.schedule_start, child.train.data_start) == (0, 80)
    assert child.train.learning_rate == parent.train.learning_rate
    # The same tokens at the same contexts, where they are multiples of the new length.
    assert child.evaluate.lengths == (1, 2) and child.evaluate.passkey_lengths == (1,)
    assert child.evaluate.scored_tokens == parent.evaluate.scored_tokens == 8
    assert build_experiment(json.loads(json.dumps(experiment_to_dict(child)))) == child
    again = child_experiment(child, 10, "yarn", 64, "keep", ["train.steps=3"])
    assert again.position == RoPE(scaling=(YaRN(4.0, 16),))
    assert (again.train.schedule_start, again.train.data_start) == (10, 90)
    assert (again.train.batch_size, again.train.warmup_steps) == (2, 1)
    third = child_experiment(again, 3, "yarn", 128, "keep")
    assert (third.train.schedule_start, third.train.data_start) == (13, 93)
    thirds = child_experiment(parent_of(runs, batch_size=12, accumulate=4), 1, "pi", 64)
    assert (thirds.train.batch_size, thirds.train.accumulate) == (3, 1)


def test_the_tokens_that_a_parent_has_seen_are_those_of_the_whole_chain(runs):
    """80 updates of before its own 10, of 8 x 16 tokens each."""
    experiment = parent_of(runs, data_start=80)
    parent = Parent("runs/a", experiment, 10, is_imported=False, kept={}, load=None)
    described = describe_parent(parent, {"position": "1234"})
    assert described["tokens_seen"] == (80 + 10) * 8 * 16
    assert (described["step"], described["length"]) == (10, 16)


def test_overrides_go_where_they_belong(runs):
    child = child_experiment(
        parent_of(runs, "fope"),
        100,
        "yarn",
        32,
        overrides=[
            "--config.train.steps=50",
            "--config.train.learning_rate=1e-4",
            "--config.name=mine",
            "--config.position.factor=16",
            "--config.position.scaling_order=after_clip",
            "--config.position.attention_factor=2",
            "--config.train.first_lengths=16=10",
            "--config.model.remat=full",
            "--config.train.warmup_steps=7",
        ],
    )
    yarn = YaRN(16.0, 16, attention_factor=2.0)
    assert child.position == FoPE(32, scaling=(yarn,), scaling_order="after_clip")
    assert (child.name, child.train.steps, child.train.warmup_steps) == ("mine", 50, 7)
    assert child.train.stages == ((0, 10, 16, 8), (10, 50, 32, 4))
    assert child.model.remat == "full"
    literal = child_experiment(
        parent_of(runs),
        100,
        "rope",
        32,
        overrides=['position.scaling=[{"scaling": "clip_floor", "training_length": 20}]'],
    )
    assert literal.position.scaling[0].training_length == 20


def test_a_stretch_by_1_is_warned_of(runs, caplog):
    experiment_module._warn_once.cache_clear()
    child_experiment(parent_of(runs), 100, "yarn", 16)
    (record,) = caplog.records
    assert record.message == "WARNING: config.position: yarn with factor=1 changes nothing"


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("alibi", "alibi", ALiBi()),
        ("rope", "nope", NoPE()),
        ({"method": "learned", "table_length": 16}, "learned", Learned(32)),
        ("fope", "same", FoPE(16)),
    ],
)
def test_a_child_of_each_kind(runs, method, target, expected):
    child = child_experiment(parent_of(runs, method), 5, target, 32)
    assert child.position == expected
    assert child.evaluate.lengths == ((1,) if expected.limits.max_length else (1, 2))


OWN = """
import dataclasses
from typing import ClassVar

from fope_jax.position import PositionEmbedding


@dataclasses.dataclass(frozen=True)
class Own(PositionEmbedding):
    kind: ClassVar[str] = "rotation"
    training_length: int
    num_layers: int | None = None
    scale: float = dataclasses.field(default=0.1, metadata={"config": "model.init_std"})
    theta: float = 10_000.0
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user, importable and not imported."""
    (tmp_path / "own_of_child_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_of_child_test"
    sys.modules.pop("own_of_child_test", None)


@pytest.mark.parametrize("knobs", [{}, {"scale": 3.0, "training_length": 8}])
def test_a_class_of_the_users_own_has_the_knobs_that_training_gives_it(runs, own_module, knobs):
    parent = parent_of(runs, {"method": "rope", "theta": 5e5})
    overrides = [f"--config.position.{knob}={value}" for knob, value in knobs.items()]
    child = child_experiment(parent, 5, f"{own_module}:Own", 32, overrides=overrides)
    filled = {"training_length": 32, "num_layers": 1, "scale": parent.model.init_std, "theta": 5e5}
    assert dataclasses.asdict(child.position) == filled | knobs
    assert child.name == f"fope+{own_module}:Own-32"
    spec = experiment_to_dict(child)["position"]
    assert spec == {"method": f"{own_module}:Own"} | filled | knobs


@pytest.mark.parametrize(
    ("method", "length", "changes", "message"),
    [
        ("no_module:Own", 32, {}, "method 'no_module:Own': .* 'no_module' cannot be .*PYTHONPATH"),
        ("yarm", 32, {}, "unknown method 'yarm'; did you mean 'yarn'"),
        ("alibi", 32, {}, "rope to alibi: attention was trained with rotation"),
        ("yarn", 48, {}, "length 48: an update of the parent has 8 x 16 = 128 tokens, which are"),
        ("yarn", 0, {}, "length 0; accepted: 1 token or more"),
        ("same", -4, {}, "length -4; accepted: 1 token or more"),
        ("yarn", 8, {}, "length=8: shorter than the 16 tokens the parent was trained on"),
        ("fope", 16, {}, "length=16: not longer than the 16 tokens .* and fope would change its"),
        ("yarn", 32, {"optimizer": "forget"}, "optimizer 'forget'; accepted: keep, reset-moments"),
        ("yarn", 32, {"train.length": 64}, "config.train.length = 64: an extension takes it from"),
        ("yarn", 32, {"position.method": "fope"}, "position.method = fope: .* it from --method"),
        ("yarn", 32, {"position.factor": "x"}, "config.position.factor = 'x' is str; accepted: fl"),
        ("yarn", 32, {"position.beta": 1}, "unknown knob 'beta' of yarn"),
        ("yarn", 32, {"model.d_model": 32}, "config.model.d_model: 16, now 32; an extension keeps"),
        ("yarn", 32, {"train.batch_size": 8}, "would have 256 tokens, the parent's has 128; 4 row"),
        ("yarn", 32, {"train.stpes": 8}, "config.train.stpes is unknown"),
    ],
)
def test_mistakes_are_found_before_any_work(runs, method, length, changes, message):
    optimizer = changes.pop("optimizer", "reset")
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    with pytest.raises(ValueError, match=message):
        child_experiment(parent_of(runs), 5, method, length, optimizer, overrides)


def test_a_parent_that_is_still_at_a_shorter_length_is_refused(runs):
    parent = parent_of(runs, first_lengths=("8=40",))
    with pytest.raises(ConfigError, match="step 40 .* at 8 tokens; .* on its 16, from step 41 on"):
        child_experiment(parent, 40, "yarn", 32)
    child = child_experiment(parent, 41, "yarn", 32)
    assert child.train.stages == ((0, 10, 32, 4),)


GOLDENS = Path(__file__).parents[1] / "goldens" / "weights"


def test_imported_weights_go_on_from_the_length_that_they_were_trained_on(tmp_path):
    """The run counts in windows of 8 tokens; the checkpoint says what training was."""
    override = ["data.tokenizer=sentencepiece", "data.vocab_size=40", "train.length=8"]
    import_run(GOLDENS / "smollm", tmp_path / "smollm", override)
    stated = json.loads((GOLDENS / "smollm/config.json").read_text())["max_position_embeddings"]
    parent = open_parent(tmp_path / "smollm")
    assert (parent.is_imported, parent.step, parent.experiment.train.length) == (True, 0, stated)

    def go_on(*overrides, optimizer="reset"):
        return child_experiment(
            parent.experiment, 0, "yarn", 2 * stated, optimizer, overrides, is_imported=True
        )

    child = go_on("train.batch_size=3", "train.steps=50")
    assert child.position.scaling == (YaRN(2.0, stated),)
    assert (child.train.batch_size, child.train.warmup_steps, child.train.data_start) == (3, 5, 0)
    with pytest.raises(ConfigError, match="imported weights have no train.batch_size; give --conf"):
        go_on("train.steps=50")
    both = "no train.batch_size and train.steps; give --config.train.batch_size and --config.train."
    with pytest.raises(ConfigError, match=both):
        go_on()
    with pytest.raises(ConfigError, match="have no optimizer to keep; take reset"):
        go_on("train.batch_size=3", "train.steps=50", optimizer="keep")
    other = go_on("train.batch_size=3", "train.steps=50", "data.tokenizer=bytes")
    with pytest.raises(ConfigError, match="data.tokenizer = 'bytes': the parent's is 'sentencep"):
        extend_module._check_data(parent, None, other, None)
    assert extend_module._check_data(parent, None, child, None) is None


def test_every_choice_of_the_command_line_is_one_of_ours():
    from fope_jax.command_line.parser import build_parser

    verbs = build_parser()._subparsers._group_actions[0].choices
    options = {action.dest: action for action in verbs["extend"]._actions}
    assert tuple(options["optimizer"].choices) == OPTIMIZERS
    assert options["warn_above"].default == WARN_ABOVE
    with pytest.raises(ConfigError, match="accepted: keep, reset-moments, reset"):
        child_experiment(None, 0, "yarn", 1, "none")


def test_a_run_without_text_speaks_of_no_windows():
    parent = build_experiment(load_config("configs/recall.py:position=rope"))
    child = child_experiment(parent, parent.train.steps, "same", 128)
    text = data_changes(parent, child, SimpleNamespace(num_tokens=0), is_imported=False)["text"]
    assert text == (
        "no text, tasks alone; 16 rows an update in place of 32, 2048 tokens as before; begins at "
        "batch 1500"
    )


def test_the_same_text_may_be_packed_in_another_way():
    def built(*overrides):
        return build_experiment(load_config("configs/quickstart.py:position=rope", overrides))

    parent = built()
    assert has_same_data(parent, built("data.packing=windows", "data.cache_dir=elsewhere"))
    assert not has_same_data(parent, built("data.vocab_size=4096"))
