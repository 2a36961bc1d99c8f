"""Curves of a run: what TensorBoard and a tracker get, and trackers that fail."""

import logging
import sys
import types

import pytest

from fope_jax.config import ConfigError, apply_overrides, build_experiment, load_config
from fope_jax.evaluate.metrics import read_rows
from fope_jax.extras import require
from fope_jax.train.loop import train
from fope_jax.train.metrics import curve_points
from fope_jax.train.tracker import SafeTracker, find_tracker

pytestmark = pytest.mark.usefixtures("compile_once")


class Recorder:
    """A tracker that keeps what it gets."""

    def __init__(self, workdir="", config=None):
        self.workdir, self.config, self.got, self.is_closed = workdir, config, [], False

    def __call__(self, step, numbers):
        self.got.append((step, numbers))

    def close(self):
        self.is_closed = True


def experiment(runs, **changes):
    values = runs.values(method="nope", steps=4, log_every=2, **changes)
    values["evaluate"] = {"lengths": (1,), "training_windows": 2}
    return build_experiment(values)


@pytest.fixture
def module(monkeypatch):
    """A module of the user whose ``make`` records."""
    made = []
    found = types.ModuleType("their_tracker")
    found.make = lambda workdir, config: made.append(Recorder(workdir, config)) or made[-1]
    found.made, found.number = made, 3
    monkeypatch.setitem(sys.modules, "their_tracker", found)
    return found


def test_a_tracker_and_tensorboard_get_the_numbers_of_the_rows(runs, tmp_path, module, caplog):
    caplog.set_level(logging.INFO, "fope_jax")
    run = tmp_path / "run"
    train(experiment(runs, tracker="their_tracker:make", evaluate_every=2), run)
    (tracker,) = module.made
    assert (tracker.workdir, tracker.config["train"]["steps"]) == (str(run), 4)
    assert tracker.is_closed
    rows = read_rows(run / "metrics.jsonl")
    assert [step for step, _ in tracker.got] == [0, 2, 2, 4, 4]
    (first,) = [numbers for step, numbers in tracker.got if step == 0]
    assert first.keys() == {"validation/loss_16"}
    numbers = {key: value for step, got in tracker.got if step == 4 for key, value in got.items()}
    assert numbers == curve_points([row for row in rows if row["step"] == 4])
    assert {"train/loss", "train/learning_rate", "validation/loss_16"} <= numbers.keys()
    assert points_of(run / "tensorboard")["validation/loss_16"].keys() == {0, 2, 4}
    assert points_of(run / "tensorboard")["train/loss"] == pytest.approx(
        {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    )
    assert f"curves: tensorboard --logdir {run}/tensorboard" in caplog.text


def points_of(directory):
    """The scalars of event files: {tag: {step: value}}."""
    event_class = require("tensorboardX.proto.event_pb2", "train").Event
    points = {}
    for path in directory.iterdir():
        data = path.read_bytes()
        while data:  # records of TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = event_class.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                points.setdefault(value.tag, {})[event.step] = value.simple_value
            data = data[16 + size :]
    return points


class Broken(Recorder):
    """A tracker whose second call fails."""

    def __call__(self, step, numbers):
        super().__call__(step, numbers)
        if len(self.got) == 2:
            raise ConnectionError("no such\nhost")


@pytest.mark.slow
def test_a_tracker_that_fails_ends_no_run_and_is_warned_of_once(runs, tmp_path, caplog):
    tracker = Broken()
    train(runs.experiment(method="nope", steps=4, log_every=1), tmp_path / "run", tracker=tracker)
    assert [step for step, _ in tracker.got] == [1, 2] and not tracker.is_closed
    warnings = [r.message for r in caplog.records if "tracker" in r.message]
    assert warnings == [
        "the tracker gets no more numbers (ConnectionError: no such host); metrics.jsonl goes on"
    ]
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]


def fail():
    raise OSError("not logged in")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fail, "OSError: not logged in"),
        (lambda: None, "TypeError: it is None, which cannot be called"),
    ],
)
def test_a_tracker_that_cannot_start_is_warned_of(make, reason, caplog):
    tracker = SafeTracker(make)
    tracker(1, {"train/loss": 1.0})
    tracker.close()
    assert [r.message for r in caplog.records] == [
        f"the tracker gets no more numbers ({reason}); metrics.jsonl goes on"
    ]


def test_a_function_is_a_tracker_too_and_gets_a_copy():
    seen = []
    tracker = SafeTracker(lambda: lambda step, numbers: seen.append((step, numbers.pop("loss"))))
    numbers = {"loss": 2.0}
    tracker(1, numbers)
    tracker.close()
    tracker(2, numbers)
    assert seen == [(1, 2.0)] and numbers == {"loss": 2.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:make", "allow it with --allow-module nowhere.at_all if you trust it"),
        ("their_tracker:mkae", "the module 'their_tracker' has no callable 'mkae'"),
        ("their_tracker:number", "has no callable 'number'"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_before_training(module, name, message, runs, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(runs.experiment(tracker=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert find_tracker("their_tracker:make") is module.make


def test_its_module_is_imported_with_the_users_configuration_and_not_from_a_json(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_a_user.py").write_text("def make(workdir, config): pass\n")
    line = "--config.train.tracker=of_a_user:make"
    config = load_config("configs/quickstart.py")
    assert "of_a_user" not in sys.modules
    apply_overrides(config, [line])
    assert sys.modules.pop("of_a_user")
    (tmp_path / "config.json").write_text(config.to_json())
    load_config(str(tmp_path / "config.json"))
    assert "of_a_user" not in sys.modules
    with pytest.raises(ConfigError, match=r"config.train.tracker: the Python module 'nowhere' can"):
        load_config("configs/quickstart.py", ["train.tracker=nowhere:make"])
    for name in ("nowhere", "nowhere:", ":make"):
        with pytest.raises(ConfigError, match=r"tracker = .*; accepted: 'module:function', or"):
            load_config("configs/quickstart.py", [f"train.tracker={name}"])
