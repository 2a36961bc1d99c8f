"""A trained model goes on: no-ops are exact, the rest is stated, refused or warned of."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fope_jax.checkpoint import CheckpointError
from fope_jax.config import ConfigError, build_experiment, experiment_to_dict
from fope_jax.data import lessons
from fope_jax.data.build import build
from fope_jax.data.cache import open_cache
from fope_jax.data.loader import Loader
from fope_jax.evaluate.perplexity import plain
from fope_jax.evaluate.run import evaluate
from fope_jax.main import main
from fope_jax.model.losses import LossSums
from fope_jax.model.transformer import merge, position_variables
from fope_jax.position import ALiBi, FoPE, Learned, NoPE, PositionInterpolation, RoPE, YaRN
from fope_jax.train import extend as extend_module
from fope_jax.train.exchange import import_run
from fope_jax.train.extend import (
    OPTIMIZERS,
    carry_state,
    child_experiment,
    extend,
    open_parent,
    read_lineage,
    stream_loss,
)
from fope_jax.train.loop import train
from fope_jax.train.state import plan_state


@pytest.fixture(scope="module")
def rope(runs, tmp_path_factory):
    """12 updates of RoPE at 16 tokens, the checkpoints of 8 and 12 kept."""
    workdir = tmp_path_factory.mktemp("runs") / "rope"
    train(runs.experiment(method="rope"), workdir)
    return workdir


@pytest.fixture(scope="module")
def fope(runs, tmp_path_factory):
    """One update of FoPE whose coefficients are trained."""
    workdir = tmp_path_factory.mktemp("runs") / "fope"
    method = {"method": "fope", "theta": 100.0, "learnable": True}
    train(runs.experiment(method=method, steps=1), workdir)
    return workdir


def rows(workdir):
    return (workdir / "metrics.jsonl").read_text()


# ---------------------------------------------------------------------------- what holds exactly


def test_going_on_unchanged_with_the_optimizer_is_the_parents_own_training(
    rope, runs, tmp_path, caplog
):
    """From update 8 of 12, same method, length and schedule: updates 9 to 12 to the bit."""
    with caplog.at_level(logging.INFO, logger="fope_jax"):
        extend(
            str(rope / "8"), "same", 16, tmp_path / "run", optimizer="keep", warn_above=0.9,
            overrides=["--config.train.steps=4"],
        )  # fmt: skip
    child, parent = runs.arrays(tmp_path / "run", 4), runs.arrays(rope, 12)
    schedule = [name for name in parent if child[name] != parent[name]]
    assert schedule == ["['optimizer'][3]['count']"], "counted anew; train.schedule_start goes on"
    assert sum(row[1] for row in runs.losses(tmp_path / "run")) == pytest.approx(
        sum(row[1] for row in runs.losses(rope) if row[0] > 8)
    )
    start = read_lineage(tmp_path / "run")["start"]
    assert start["parent"] == start["child"] == start["parent_at_new_length"], "to the bit"
    assert start["ratio"] == 1 and "1.00 times the parent's" in start["warning"]
    ours = [record for record in caplog.records if record.name.startswith("fope_jax")]
    warned = [record.message for record in ours if record.levelno == logging.WARNING]
    assert warned == [f"WARNING: {start['warning']}"]
    assert "more than 0.9 times" in start["warning"]


def carried(run, method, length, **arguments):
    """Experiments and models, float32, of a parent and of its child before any update."""
    parent = open_parent(str(run))
    child = child_experiment(parent.experiment, parent.step, method, length, **arguments)
    before, after = plan_state(parent.experiment), plan_state(child)
    arrays = parent.load(before, True).items
    trained = position_variables(arrays["params"], arrays["constants"])
    moved = extend_module._move(parent.experiment, trained, child, "frequency")
    optimizer = arguments.get("optimizer", "reset-moments")
    state, constants = carry_state(arrays, moved, after, optimizer)
    models = (
        merge(before.graphdef, arrays["params"], arrays["constants"]),
        merge(after.graphdef, state.params, constants),
    )
    return models, arrays["optimizer"], state.optimizer


@pytest.mark.parametrize(
    ("run", "method", "expected"),
    [
        ("rope", "pi", RoPE(scaling=(PositionInterpolation(1.0),))),
        ("rope", "same", RoPE()),
        ("fope", "fope", FoPE(16, theta=100.0, learnable=True)),
    ],
)
def test_the_first_forward_pass_of_a_change_that_is_none_has_the_same_bits(
    run, method, expected, request
):
    models, *_ = carried(request.getfixturevalue(run), method, 16)
    assert models[1].position == expected
    tokens = jnp.arange(48).reshape(2, 24) % 17
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
    before, after = (
        np.asarray(model(tokens, positions, jnp.ones_like(tokens))) for model in models
    )
    assert np.isfinite(before).all() and before.tobytes() == after.tobytes()


def test_moments_are_kept_for_what_is_carried_and_begin_anew_for_what_is_not(fope):
    """FoPE from 16 to 32 tokens: one frequency more, so its coefficients are other arrays."""
    _, old, kept = carried(fope, "fope", 32, optimizer="keep")
    _, _, reset = carried(fope, "fope", 32)
    adam, trained = kept[1], old[1]
    assert isinstance(adam, optax.ScaleByAdamState)
    assert (int(adam.count), int(kept[3].count)) == (1, 0)
    query = adam.mu["layers"]["query"]
    assert np.asarray(query).tobytes() == np.asarray(trained.mu["layers"]["query"]).tobytes()
    coefficients = adam.nu["position_layers"]["cos_coef"]
    assert coefficients.shape != trained.nu["position_layers"]["cos_coef"].shape
    assert not coefficients.any() and query.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(reset))
    _, _, same = carried(fope, "fope", 16, optimizer="keep")
    assert (
        same[1].nu["position_layers"]["cos_coef"] == trained.nu["position_layers"]["cos_coef"]
    ).all()


# ---------------------------------------------------------------------------- a whole extension


def arguments(parent, workdir, *overrides):
    return [
        "extend", "--from", str(parent), "--method", "yarn", "--length", "32", "--workdir",
        str(workdir), "--config.train.steps=5", "--config.train.save_every=2", *overrides,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def yarn(rope, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "yarn"
    assert main(arguments(rope, workdir)) == 0
    return workdir


def test_the_run_says_where_it_comes_from_and_what_was_changed(yarn, rope, runs):
    lineage = read_lineage(yarn)
    assert lineage["request"] == {
        "parent": str(rope.resolve()), "step": 12, "method": "yarn", "length": 32,
        "optimizer": "reset-moments", "match": "frequency",
    }  # fmt: skip
    parent, child = (json.loads((run / "run.json").read_text()) for run in (rope, yarn))
    assert lineage["parent"]["position"] == parent["position"]
    assert lineage["child"]["position"] == child["position"]
    assert child["position"]["hash"] != parent["position"]["hash"]
    # Head dimension 8: frequencies 1, 0.1, 0.01, 0.001; 16 / (2 pi) = 2.5 turns of the fastest.
    assert lineage["frequencies"]["text"] == (
        "of 4 frequencies 1 kept, 3 divided by 2, 0 zeroed, 0 new; cosine and sine times 1.069"
    )
    data, cache = lineage["data"], open_cache(runs.experiment().data, "train")
    assert data["windows"] == [-(-cache.num_tokens // 16), -(-cache.num_tokens // 32)]
    assert (data["rows"], data["tokens_an_update"], data["first_batch"]) == ([2, 1], 32, 12)
    assert lineage["parent"]["tokens_seen"] == 12 * 32
    start = lineage["start"]
    assert start["ratio"] == pytest.approx(start["child"] / start["parent"])
    assert start["parent"] != start["child"] != start["parent_at_new_length"]
    assert start["warning"] is None and start["warn_above"] == 1.2


def test_its_batches_go_on_where_the_parent_stopped(yarn, runs):
    cache = open_cache(runs.experiment().data, "train")
    loader = Loader(cache, length=32, batch_size=1, seed=1)
    expected = sum(loader.batch(step).weights.sum() for step in range(12, 17))
    assert sum(row[2] for row in runs.losses(yarn)) == expected


def test_the_same_command_goes_on_to_the_same_bits_without_the_parents_arrays(
    rope, yarn, runs, tmp_path, monkeypatch, caplog
):
    parent = Path(shutil.copytree(rope, tmp_path / "rope"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(lessons, patch, at=12 + 3)
        main(arguments(parent, tmp_path / "run"))
    shutil.rmtree(parent / "checkpoints")
    with caplog.at_level(logging.INFO, logger="fope_jax"):
        assert main(arguments(parent, tmp_path / "run")) == 0
    assert runs.losses(tmp_path / "run") == runs.losses(yarn)
    assert runs.arrays(tmp_path / "run", 5) == runs.arrays(yarn, 5)
    assert main(arguments(parent, tmp_path / "run")) == 0  # finished


def test_an_extended_run_is_evaluated_and_reported_beside_its_parent(yarn, rope, tmp_path, capsys):
    for run in (rope, yarn):
        copy = Path(shutil.copytree(run, tmp_path / run.name))
        config = json.loads((copy / "config.json").read_text())
        config["evaluate"] |= {
            "lengths": [2] if run is rope else [1], "num_windows": 4, "position_windows": 0,
            "passkey_trials": 0,
        }  # fmt: skip
        (copy / "config.json").write_text(json.dumps(config))
        assert evaluate(copy, progress=plain, say=lambda line: None)
    lineage = json.loads((tmp_path / "yarn/lineage.json").read_text())
    lineage["parent"]["run"] = str((tmp_path / "rope").resolve())
    (tmp_path / "yarn/lineage.json").write_text(json.dumps(lineage))
    assert (
        main(["report", str(tmp_path / "rope"), str(tmp_path / "yarn"), "-o", str(tmp_path)]) == 0
    )
    told = "fope+yarn-32 goes on from fope, step 12, at 32 tokens in place of 16: of 4 freq"
    assert told in capsys.readouterr().out and told in (tmp_path / "index.html").read_text()
    assert len(list(tmp_path.glob("perplexity-*.png"))) == 1, "one axis for both"


@pytest.mark.parametrize("tokens", [288, 3160])
@pytest.mark.parametrize("packing", ["documents", "windows"])
@pytest.mark.parametrize("length", [16, 32, 48])
def test_the_loss_before_the_start_scores_the_same_targets_at_every_length(
    runs, length, packing, tokens, monkeypatch
):
    """A model whose loss is its target sums the first targets of the split, whatever the windows.

    3,160 tokens are all that there are, no multiple of a window, and the last has no target.
    """

    def sums(graphdef, params, constants, batch):
        scored = jnp.sum(batch.weights)
        return LossSums(jnp.sum(batch.weights * batch.targets), scored, scored, scored)

    monkeypatch.setattr(extend_module, "batch_sums", sums)
    data = runs.data | {"packing": packing}
    experiment = runs.experiment(data, method="rope", length=length, batch_size=96 // length)
    cache = open_cache(experiment.data, "validation")
    loss = stream_loss(experiment, plan_state(experiment), {}, {}, cache, tokens)
    scored = cache.tokens(1, min(tokens + 1, cache.num_tokens))
    assert loss == pytest.approx(scored.mean(), rel=1e-6)


# ---------------------------------------------------------------------------- the experiment


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
    thirds = child_experiment(parent_of(runs, batch_size=12, accumulate=4), 1, "pi", 64)
    assert (thirds.train.batch_size, thirds.train.accumulate) == (3, 1)


def test_overrides_go_where_they_belong(runs):
    child = child_experiment(
        parent_of(runs, "fope"), 100, "yarn", 32,
        overrides=[
            "--config.train.steps=50", "--config.train.learning_rate=1e-4", "--config.name=mine",
            "--config.position.factor=16", "--config.position.scaling_order=after_clip",
            "--config.position.attention_factor=2", "--config.train.first_lengths=16=10",
            "--config.model.remat=full", "--config.train.warmup_steps=7",
        ],
    )  # fmt: skip
    yarn = YaRN(16.0, 16, attention_factor=2.0)
    assert child.position == FoPE(32, scaling=(yarn,), scaling_order="after_clip")
    assert (child.name, child.train.steps, child.train.warmup_steps) == ("mine", 50, 7)
    assert child.train.stages == ((0, 10, 16, 8), (10, 50, 32, 4))
    assert child.model.remat == "full"
    literal = child_experiment(
        parent_of(runs), 100, "rope", 32,
        overrides=['position.scaling=[{"scaling": "clip_floor", "training_length": 20}]'],
    )  # fmt: skip
    assert literal.position.scaling[0].training_length == 20


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
    assert child.evaluate.lengths == ((1,) if expected.max_length() else (1, 2))


@pytest.mark.parametrize(
    ("method", "length", "changes", "message"),
    [
        ("yarm", 32, {}, "unknown method 'yarm'; did you mean 'yarn'"),
        ("alibi", 32, {}, "rope to alibi: attention was trained with rotation"),
        (
            "yarn",
            48,
            {},
            "length 48: an update of the parent has 8 x 16 = 128 tokens, which are",
        ),
        ("yarn", 0, {}, "length 0: an update of the parent has"),
        ("yarn", 8, {}, "length=8: shorter than the 16 tokens the parent was trained on"),
        ("fope", 16, {}, "length=16: not longer than the 16 tokens .* and fope would change its"),
        ("yarn", 32, {"optimizer": "forget"}, "optimizer 'forget'; accepted: keep, reset-moments"),
        ("yarn", 32, {"train.length": 64}, "config.train.length = 64: an extension takes it from"),
        (
            "yarn",
            32,
            {"position.method": "fope"},
            "position.method = fope: .* it from --method",
        ),
        ("yarn", 32, {"position.factor": "x"}, "config.position.factor = 'x' is str; accepted: fl"),
        ("yarn", 32, {"position.beta": 1}, "unknown knob 'beta' of RoPE"),
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
    override = ["--config.data.tokenizer=bytes", "--config.train.length=8"]
    import_run(GOLDENS / "smollm", tmp_path / "smollm", override)
    stated = json.loads((GOLDENS / "smollm/config.json").read_text())["max_position_embeddings"]
    parent = open_parent(tmp_path / "smollm")
    assert (parent.imported, parent.step, parent.experiment.train.length) == (True, 0, stated)

    def go_on(*overrides, optimizer="reset"):
        return child_experiment(
            parent.experiment, 0, "yarn", 2 * stated, optimizer, overrides, imported=True
        )

    child = go_on("train.batch_size=3", "train.steps=50")
    assert child.position.scaling == (YaRN(2.0, stated),)
    assert (child.train.batch_size, child.train.warmup_steps, child.train.data_start) == (3, 5, 0)
    with pytest.raises(ConfigError, match="imported weights have no train.batch_size; give --conf"):
        go_on("train.steps=50")
    with pytest.raises(ConfigError, match="have no optimizer to keep; take reset"):
        go_on("train.batch_size=3", "train.steps=50", optimizer="keep")
    other = go_on("train.batch_size=3", "train.steps=50", "data.tokenizer=sentencepiece")
    with pytest.raises(ConfigError, match="data.tokenizer = 'sentencepiece': the parent's is 'byt"):
        extend_module._check_data(parent.experiment, None, other, None)
    assert extend_module._check_data(parent.experiment, None, child, None) is None


# ---------------------------------------------------------------------------- files


def test_parents_are_found_by_run_and_by_step(rope, tmp_path):
    assert open_parent(str(rope)).step == 12
    for source in (rope / "8", rope / "checkpoints" / "8"):
        assert (open_parent(str(source)).step, open_parent(str(source)).source) == (8, str(rope))
    with pytest.raises(FileNotFoundError, match="nowhere is no run: there is no config.json"):
        open_parent(str(tmp_path / "nowhere"))
    untrained = Path(shutil.copytree(rope, tmp_path / "untrained"))
    shutil.rmtree(untrained / "checkpoints")
    with pytest.raises(FileNotFoundError, match="untrained has no valid checkpoint; train it"):
        open_parent(str(untrained))
    with pytest.raises(CheckpointError, match="checkpoints/5 does not exist; there are: 8, 12"):
        extend(str(rope / "5"), "yarn", 32, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_run_is_left_alone(rope, yarn, fope, capsys):
    before = rows(fope), rows(yarn)
    for workdir, changes, message in (
        (rope, [], "is the parent itself; use another --workdir"),
        (fope, [], "holds a run that is no extension (it has no lineage.json)"),
        (yarn, ["--method", "ntk"], "holds an extension with method = yarn, now ntk"),
        (yarn, ["--optimizer", "keep"], "holds an extension with optimizer = reset-moments, now k"),
        (yarn, ["--from", str(rope / "8")], "holds an extension with step = 12, now 8"),
        (yarn, ["--config.train.steps=6"], "train.steps: 5, now 6"),
    ):
        assert main([*arguments(rope, workdir), *changes]) == 2
        assert message in capsys.readouterr().err
    assert (rows(fope), rows(yarn)) == before


def test_data_of_another_tokenizer_or_that_changed_is_refused(rope, runs, tmp_path, capsys):
    tokenizer = ["--config.data.tokenizer=sentencepiece", "--config.data.vocab_size=295"]
    build(runs.experiment(runs.data | {"tokenizer": "sentencepiece", "vocab_size": 295}).data)
    assert main([*arguments(rope, tmp_path / "a"), *tokenizer]) == 2
    assert "the parent's model reads tokens of its own tokenizer only" in capsys.readouterr().err
    changed = tmp_path / "text"
    changed.mkdir()
    (changed / "train_0.txt").write_text("other words " * 100)
    parent = Path(shutil.copytree(rope, tmp_path / "rope"))
    config = json.loads((parent / "config.json").read_text())
    config["data"]["train_files"] = [f"{changed}/train_*.txt"]
    (parent / "config.json").write_text(json.dumps(config))
    build(build_experiment(config).data)
    assert main(arguments(parent, tmp_path / "b")) == 2
    assert "corpus or tokenizer has changed" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_every_choice_of_the_command_line_is_one_of_ours():
    from fope_jax.main import build_parser

    verbs = build_parser()._subparsers._group_actions[0].choices
    options = {action.dest: action for action in verbs["extend"]._actions}
    assert tuple(options["optimizer"].choices) == OPTIMIZERS
    assert options["warn_above"].default == extend_module.WARN_ABOVE
    with pytest.raises(ConfigError, match="accepted: keep, reset-moments, reset"):
        child_experiment(None, 0, "yarn", 1, "none")
