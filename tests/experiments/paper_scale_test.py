"""The experiment for one accelerator: what is run, on which data, how it is scored and shown."""

import numpy as np
import pytest

from experiments.paper_scale import __main__ as program
from experiments.paper_scale import data, figures, tables, training, units
from experiments.paper_scale.units import METHODS, PAPER, SMALL, TASKS, Unit, all_units
from fope_jax.data.retrieval.base import split_of
from fope_jax.report.results import write_results
from fope_jax.report.rows import Run


def experiment(method="rope", updates=5, seed=0, scale=SMALL):
    return units.unit_experiment(Unit(method, updates, seed), scale, "float32")


def test_the_methods_are_those_of_the_question_at_the_papers_head_dim():
    positions = {method: experiment(method, scale=PAPER).position for method in METHODS}
    frequencies = {method: positions[method].frequencies(64) for method in ("rope", "clip", "fope")}
    kept = {method: int((values > 0).sum()) for method, values in frequencies.items()}
    assert kept == {"rope": 32, "clip": 16, "fope": 16}
    shape = experiment(scale=PAPER).model.shape
    assert shape.head_dim == 64 and shape.num_heads == 4
    assert positions["fope-d-64"]._num_mixed(64) == 64


def test_runs_go_on_where_they_stopped_and_stop_in_time(tmp_path):
    listed, clock, ran = all_units(updates=9, seeds=2), [0.0], []
    assert [unit.seed for unit in listed] == [0] * 7 + [1] * 7

    def run(unit):
        clock[0] += 50 if unit.method == "rope" else 20
        ran.append(unit)
        program.result_file(unit, tmp_path).write_text("a row")

    left = program.run_all(listed, 2, tmp_path, run, lambda: clock[0])
    assert ran == listed[:3] and left == listed[3:]  # 90 s, and the next might take 50
    left = program.run_all(listed, 0.01, tmp_path, run, lambda: clock[0])
    assert ran == listed[:4] and left == listed[4:]  # the first is always begun
    assert program.run_all(listed, 60, tmp_path, run, lambda: clock[0]) == []
    assert ran == listed


def test_a_batch_is_a_function_of_seed_and_step_and_each_window_weighs_the_same():
    drawn = data.SeedData(experiment(updates=53), [], processes=0)
    batches = list(drawn.batches())
    assert len(batches) == 53
    alone, answers = data.draw_batches(experiment().data, 16, 256, 0, 51, 1)
    np.testing.assert_array_equal(batches[51].tokens, alone[0, :, :-1])
    np.testing.assert_array_equal(batches[51].targets, alone[0, :, 1:])
    np.testing.assert_array_equal(batches[51].weights > 0, answers[0])
    np.testing.assert_allclose(batches[51].weights.sum(axis=1), 1.0, rtol=1e-6)
    # 6 rows of copying, 4 of recall, 3 each of the two with an answer of six characters at the end
    counts = (batches[51].weights > 0).sum(axis=1)
    assert list(counts[10:]) == [6] * 6 and min(counts[:10]) > 20
    assert batches[51].weights[10:, -6:].all()


def test_trials_differ_by_seed_and_are_of_the_half_that_is_not_trained_on():
    first, other = (data.draw_trials(experiment().data, 300, (0.1, 0.9), 3, s) for s in (0, 1))
    assert first.tokens.shape == (4 * 2 * 3, 300)
    passkeys = first.task == list(TASKS).index("passkey")
    for windows in (first, other):
        for row in windows.tokens[passkeys]:
            assert split_of((row[-5:] - 3).astype(np.uint8).tobytes()) == "test"
    assert not (first.tokens[passkeys] == other.tokens[passkeys]).all(axis=1).any()
    assert list(first.answer[[0, 6, 12, 18]]) == [8, 1, 6, 6]


def test_a_trial_is_right_where_every_token_of_its_answer_is_and_no_other_counts():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 200, (5, 40)).astype(np.uint16)
    answer = np.array([3, 3, 1, 1, 3])
    windows = data.Windows(tokens, answer, np.zeros(5, int), np.zeros(5, int))
    believed = tokens.copy()
    believed[1, -3] = 0  # the first token of an answer
    believed[2, -2] = 0  # before an answer
    believed[3, -1] = 0

    def scorer(inputs, targets):
        """A model that expects ``believed``, and takes a nat for each position of a target."""
        numbers = [int(np.flatnonzero((tokens == row).all(axis=1))[0]) for row in inputs]
        count = targets.shape[1]
        expected = np.concatenate([believed[numbers], np.full((len(numbers), 1), -1)], axis=1)
        nats = np.broadcast_to(np.arange(40 + 1 - count, 41), targets.shape)
        return nats.astype(np.float32), targets == expected[:, -count:]

    right, nats = training.score_windows(scorer, windows, batch_tokens=80)
    assert list(right) == [True, False, True, False, True]
    assert list(nats) == [37 + 38 + 39, 37 + 38 + 39, 39, 39, 37 + 38 + 39]


def scored_run(method, seed, is_right, path):
    """A run with the rows of a model that answers as ``is_right(task, context)`` says."""
    found = experiment(method, seed=seed)
    drawn = data.SeedData(found, [], processes=0)

    def trials(context):
        windows = data.draw_trials(found.data, 256, (0.5,), 2, seed)
        drawn.context = context
        return windows

    drawn.trials = trials

    def scorer(inputs, targets):
        # answers tell the tasks apart: copying has its mark in the window, recall no letters
        windows = data.draw_trials(found.data, 256, (0.5,), 2, seed)
        numbers = [int(np.flatnonzero((windows.tokens == row).all(axis=1))[0]) for row in inputs]
        names = [list(TASKS)[windows.task[number]] for number in numbers]
        hits = np.array([is_right(name, drawn.context) for name in names])
        return np.ones(targets.shape, np.float32), np.broadcast_to(hits[:, None], targets.shape)

    rows = training.score(found, scorer, drawn, SMALL.contexts)
    config = training.experiment_to_dict(found)
    write_results(Run(path, config, {"seed": seed}, tuple(rows), 5), path)


def test_what_is_not_learned_at_the_training_length_is_not_shown_beyond(tmp_path):
    answers = {
        ("rope", 0): lambda task, context: context == 256,
        ("rope", 1): lambda task, context: True,
        ("fope", 0): lambda task, context: task == "copy",
        ("fope", 1): lambda task, context: True,
    }
    for (method, seed), is_right in answers.items():
        scored_run(method, seed, is_right, tmp_path / f"{method}_5_{seed}.jsonl")
    runs = tables.read_results(tmp_path)  # as `fope report` does
    text = tables.all_tables(runs)
    assert text.count("| rope | 5 | 2 | 100 (100 to 100) | 50 (0 to 100) |") == 4
    assert text.count("| fope | 5 | 2 | 100 (100 to 100) | 100 (100 to 100) |") == 1  # copying
    assert text.count("| fope | 5 | 2 | 50 (0 to 100) | not learned |") == 3
    with pytest.raises(ValueError, match="no rows in"):
        tables.read_results(tmp_path / "none")
    figure = figures.task_figure("recall", tables.task_curves(runs, "recall"))
    assert "not learned: fope" in figure.axes[0].get_title()


@pytest.mark.slow  # a minute of a core
def test_small_models_are_trained_scored_and_reported(tmp_path, monkeypatch, capsys):
    from fope_jax.command_line.report import runs_text
    from fope_jax.data.retrieval.registry import make_task
    from fope_jax.data.tokenizers import BytesTokenizer
    from fope_jax.evaluate.generation import model_answerer
    from fope_jax.evaluate.retrieval import TrialGrid, score_task
    from fope_jax.model.transformer import merge

    monkeypatch.setattr(units, "METHODS", {name: METHODS[name] for name in ("clip", "alibi")})
    arguments = ["--small", "--updates", "3", "--seeds", "1", "--minutes", "60"]
    arguments += ["--results", str(tmp_path / "results")]
    assert program.main(["run", *arguments, "--processes", "2"]) == 0
    assert program.main(["list", *arguments]) == 0
    assert program.main(["tables", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "done clip_3_0" in shown and "| alibi | 3 | 1 | 0 |" in shown
    runs = tables.read_results(tmp_path / "results")
    assert [row["step"] for row in runs[0].of("train")] == [3]
    assert "recall" in runs_text(runs) and runs[0].info["position"]["hash"]

    # The same numbers as `fope evaluate`, which decodes: of a model whose logits say something.
    found = experiment("clip")
    programs = training.make_programs(found)
    state, constants = training.init_state(found, programs.plan)
    drawn = data.SeedData(found, [256], processes=0)
    for batch in drawn.batches():
        state, _ = programs.step(state, constants, training.shard_batch(batch, programs.plan.mesh))
    rows = training.score(found, programs.make_scorer(state.params, constants), drawn, [256])
    answerer = model_answerer(merge(programs.plan.graphdef, state.params, constants))
    for name, row in zip(TASKS, rows, strict=False):
        task = make_task(name, BytesTokenizer())
        grid = TrialGrid([256], (0.5,), 2, found.seed)
        (expected,) = score_task(answerer, task, BytesTokenizer(), grid, batch_tokens=10_000)
        assert row["nats"] == pytest.approx(expected["nats"], rel=1e-4)
        assert all(row[key] == expected[key] for key in ("correct", "total", "tokens", "depth"))
