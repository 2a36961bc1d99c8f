"""Training at random positions, on real files: its rows, a resume, an evaluation at such ones."""

import numpy as np
import pytest

from fope_jax.config import ConfigError, build_experiment
from fope_jax.data.random_positions import PositionDraw, RandomPositions
from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.run import evaluate
from fope_jax.evaluate.scoring import at_random_positions
from fope_jax.model.masks import TokenIndex
from fope_jax.report.page import write_report
from fope_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("compile_once")
RANDOM = {"position_range": 64, "save_every": 4}
EVALUATION = {
    "lengths": (1, 4),
    "num_windows": 4,
    "position_windows": 0,
    "passkey_trials": 0,
    "protocols": ("same-tokens",),
}


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "random"
    values = runs.values(**RANDOM) | {"evaluate": EVALUATION}
    train(build_experiment(values), workdir)
    return workdir


@pytest.mark.slow  # trains three times
def test_a_resumed_run_draws_what_the_unbroken_one_drew(runs, finished, tmp_path, monkeypatch):
    experiment = build_experiment(runs.values(**RANDOM) | {"evaluate": EVALUATION})
    with monkeypatch.context() as patch:

        def stop_at_10(loader, start, count):
            yield from map(loader.batch, range(start, 10))
            raise runs.Interrupted

        patch.setattr(RandomPositions, "iterate", stop_at_10)
        with pytest.raises(runs.Interrupted):
            train(experiment, tmp_path)
    train(experiment, tmp_path)
    assert runs.losses(tmp_path) == runs.losses(finished)
    assert runs.arrays(tmp_path, 12) == runs.arrays(finished, 12)
    changed = build_experiment(runs.values(position_range=65, save_every=4))
    with pytest.raises(ConfigError, match="train.position_range: 64, now 65"):
        train(changed, tmp_path)


@pytest.mark.slow  # trains and evaluates by the command
def test_rows_and_reports_say_how_a_run_was_trained_and_scored(finished, tmp_path):
    evaluate(finished, say=len)
    plain = [row for row in read_rows(finished / "metrics.jsonl") if row["kind"] == "perplexity"]
    assert {row["position_range"] for row in plain} == {64}
    assert not any("positions" in row for row in plain)
    text = write_report([finished], tmp_path / "plain.html").read_text()
    assert "fope was trained at random positions: for each document in order, from 64" in text
    assert "it is evaluated at positions 0, 1, 2, .." in text

    evaluate(finished, overrides=["--config.evaluate.random_positions=True"], say=len)
    drawn = [row for row in read_rows(finished / "metrics.jsonl") if row["kind"] == "perplexity"]
    assert len(drawn) == len(plain) and all(row["positions"] == "random" for row in drawn)
    for a, b in zip(plain, drawn, strict=True):
        assert a["tokens"] == b["tokens"]
        # A context of all 64 positions leaves nothing to draw.
        assert (a["nats"] == b["nats"]) == (a["context"] == 64)
    text = write_report([finished], tmp_path / "drawn.html").read_text()
    assert "it is evaluated at positions drawn in the same way" in text


def test_passkeys_are_asked_at_drawn_positions_too(finished, tmp_path):
    asked = ["protocols=passkey", "passkey_trials=2", "passkey_templates=compact"]
    asked += ["passkey_depths=0.5", "passkey_lengths=3,4", "random_positions=True"]
    overrides = [f"--config.evaluate.{setting}" for setting in asked]
    evaluate(finished, overrides=overrides, say=len)
    rows = [row for row in read_rows(finished / "metrics.jsonl") if row["kind"] == "passkey"]
    assert [row["context"] for row in rows] == [48, 64]
    assert all(row["positions"] == "random" for row in rows)
    overrides += ["--config.evaluate.passkey_lengths=1,8"]
    with pytest.raises(ValueError, match="a context of 128 tokens has not so many different .* 4$"):
        evaluate(finished, overrides=overrides, say=len)


def test_a_context_longer_than_the_range_cannot_be_drawn(finished):
    overrides = ["--config.evaluate.random_positions=True", "--config.evaluate.lengths=1,8"]
    with pytest.raises(ValueError, match="a context of 128 tokens has not so many different .* 4$"):
        evaluate(finished, overrides=overrides, say=len)


def test_a_row_is_scored_at_its_positions_whatever_batch_it_is_in():
    """And documents of a row at draws of their own."""
    seen = []
    scorer = at_random_positions(
        lambda tokens, targets, index: seen.append(index), PositionDraw(64, "subset", seed=1)
    )
    tokens = np.arange(36).reshape(3, 12)
    scorer(tokens, tokens[:, -3:])
    scorer(tokens[::-1], tokens[::-1, -3:])
    np.testing.assert_array_equal(seen[0].positions, seen[1].positions[::-1])
    assert (np.diff(seen[0].positions) > 0).all() and len(np.unique(seen[0].positions, axis=0)) == 3
    segments = np.repeat([[1, 2]], 6, axis=1).repeat(3, 0)
    scorer(tokens, tokens[:, -3:], TokenIndex(np.zeros((3, 12), np.int32), segments))
    assert (
        seen[2].segments is segments and (seen[2].positions[:, 6] < seen[0].positions[:, 6]).any()
    )


METHODS = {
    "learned": (
        {"method": "learned", "table_length": 32},
        "Learned is defined for positions below",
    ),
    "xpos": ({"method": "xpos", "scale_base": 1.0}, "XPos is defined for positions below 51; draw"),
    "dynamic": (
        {
            "method": "rope",
            "scaling": [{"scaling": "dynamic_ntk", "factor": 4.0, "original_length": 16}],
        },
        "RoPE does not go with random positions: its frequencies follow the length of a row",
    ),
    "window": (
        {"method": "sliding_window", "window": 8, "inner": {"method": "rope"}},
        "SlidingWindow does not go with random positions: a layer's window of 8 counts tokens",
    ),
    "log_n": (
        {"method": "logit_scaling", "inner": {"method": "rope"}},
        "takes a query's position for the number of its keys",
    ),
    "nope": ({"method": "nope"}, "NoPE reads no positions, so that drawing them changes nothing"),
    "cope": ({"method": "cope"}, "CoPE reads no positions"),
    "fox": ({"method": "fox"}, "FoX reads no positions"),
    "shares": (
        {
            "method": "by_share",
            "methods": [{"method": "nope"}, {"method": "nope"}],
            "shares": [0.5, 0.5],
        },
        "ByShare reads no positions",
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_cannot_be_trained_so_is_refused(runs, name):
    method, message = METHODS[name]
    with pytest.raises(ConfigError, match=f"config.train.position_range = 64: .*{message}"):
        runs.experiment(method=method, **RANDOM)


@pytest.mark.parametrize("method", ["t5", {"method": "learned", "table_length": 64}])
def test_fractions_are_refused_where_positions_are_an_index(runs, method):
    runs.experiment(method=method, position_range=64)
    with pytest.raises(ConfigError, match="position_draw = 'float': .* takes whole positions only"):
        runs.experiment(method=method, position_range=64, position_draw="float")


@pytest.mark.parametrize(
    "method",
    [
        *("sinusoidal", "rope", "fope", "alibi", "kerple", "fire", "xpos"),
        {"method": "learned", "table_length": 64},
        {"method": "logit_scaling", "form": "yarn", "factor": 4.0, "inner": {"method": "rope"}},
        {"method": "by_layer", "methods": [{"method": "rope"}]},
        {"method": "fox", "rotation": {"method": "rope"}},
        {"method": "fope", "learnable": True},
    ],
)
def test_methods_that_go_with_it(runs, method):
    draw = "subset" if isinstance(method, dict) else "float"
    experiment = runs.experiment(method=method, position_range=64, position_draw=draw)
    assert experiment.train.position_draw == draw


def test_windows_of_the_model_are_refused_too(runs):
    values = runs.values(**RANDOM)
    values["model"]["windows"] = [8]
    with pytest.raises(ConfigError, match="a layer's window of 8 counts tokens"):
        build_experiment(values)


def test_scoring_at_random_positions_needs_a_range(runs):
    values = runs.values() | {"evaluate": {"random_positions": True}}
    with pytest.raises(ConfigError, match="evaluate.random_positions = True, train.position_range"):
        build_experiment(values)
