"""The experiment on SmolLM2, with a model of one layer: units, rows, what they are compared to."""

import numpy as np
import pytest

from experiments.pretrained import __main__ as program
from experiments.pretrained import figures, heads, measure, tables, trainings, units
from experiments.pretrained.units import Unit, all_units
from fope_jax.evaluate.metrics import read_rows


def test_every_unit_is_listed_once_and_after_the_training_it_needs():
    listed = all_units(windows=3, seeds=2)
    assert len({tuple(unit.key.items()) for unit in listed}) == len(listed)
    for index, unit in enumerate(listed):
        if unit.updates and unit.kind != "training":
            trained = model_of(unit)
            assert any(u.kind == "training" and model_of(u) == trained for u in listed[:index])
    longer = [unit for unit in all_units(updates=(64,)) if unit not in all_units()]
    assert {unit.updates for unit in longer} == {64}
    assert {unit.method for unit in longer} == units.TRAININGS.keys()
    # What one window gives comes first, and stays what it is where more are asked for.
    first = [unit for unit in listed if unit.window == 0 and unit.seed == 0]
    assert first == all_units()
    main = units.main_units()
    assert listed[: len(main)] == main
    assert 4.5 < sum(map(units.core_seconds, main)) / 7200 < 5.0  # hours of two cores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--windows", "0"], "--windows: invalid choice: 0"),
        (["list", "--windows", "7"], "--windows: invalid choice: 7"),
        (["list", "--seeds", "2"], "give --all"),
        (["list", "--updates", "64"], "give --all"),
        (["list", "--all", "--updates", "0"], "--updates: '0': a training warms up for 4 updates"),
        (["run", "--run", "nowhere"], "--run nowhere is no run"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["experiments.pretrained", *arguments])
    with pytest.raises(SystemExit):
        program.main()
    assert message in capsys.readouterr().err


def model_of(unit):
    return unit.method, unit.updates, unit.seed


def test_a_stretch_is_made_for_the_length():
    assert units.variant_text("self_extend", 16384) == "self_extend:window=1024,group=4"
    assert units.variant_text("self_extend", 16385) == "self_extend:window=1024,group=8"
    assert units.variant_text("clip-2048", 32768) == "clip:training_length=2048"


@pytest.mark.slow  # six programs and a training
def test_a_tiny_model_runs_the_whole_course_and_goes_on_where_it_stopped(
    rope, tmp_path, monkeypatch
):
    from fope_jax.evaluate.perplexity import score_same_tokens
    from fope_jax.evaluate.restore import load_run
    from fope_jax.evaluate.run_data import find_run_data
    from fope_jax.evaluate.scoring import model_scorer
    from fope_jax.extend.variants import make_variants
    from fope_jax.spectrum.capture import observer

    for module, name, value in (
        *((measure, "LONGEST", 1600), (measure, "SCORED", 400), (measure, "BLOCK", 200)),
        *((trainings, "TRAINED_AT", 32), (trainings, "WARMUP", 1)),
    ):
        monkeypatch.setattr(module, name, value)
    texts = {units.variant_text(u.method, u.context) for u in all_units() if not u.updates}
    assert len(make_variants(rope, None, sorted(texts))) == len(texts) > 20
    course = [
        Unit("loss", "rope", "books", 800),
        Unit("loss", "rope", "books", 1600),
        Unit("loss", "yarn", "books", 1600),
        Unit("every_key", "rope", "noise", 600),
        Unit("every_key", "self_extend-8", "corpus", 600),
        Unit("heads", "rope", "corpus", 900),
        Unit("training", "clip-2048", "books", 32, updates=10),
        Unit("loss", "clip-2048", "books", 800, updates=10),
    ]
    monkeypatch.setitem(units.METHODS, "self_extend-8", "self_extend:window=8,group=4")
    run, results = tmp_path / "model", tmp_path / "results"
    run.symlink_to(rope)
    subject = program.Subject(run)
    program.run(course[:5], subject, results, "commit")
    kept = (results / "loss.jsonl").read_bytes()
    program.run(course, program.Subject(run), results, "another")

    rows = {(row["kind"], row["method"], row["context"]): row for row in read_all(results)}
    assert len(rows) == len(course)
    assert (results / "loss.jsonl").read_bytes().startswith(kept)
    monkeypatch.setattr(program.Subject, "measure", None)  # all is done
    program.run(course, program.Subject(run), results, "a third")

    # The last blocks hold the same tokens at every context, and are what `fope evaluate` scores.
    loaded = load_run(rope)
    cache = find_run_data(rope, loaded.experiment.data).open("validation")
    short, long = rows["loss", "rope", 800], rows["loss", "rope", 1600]
    assert short["bytes"] == long["bytes"][-4:]
    assert short["stop"] == long["stop"]
    expected, windows = score_same_tokens(
        model_scorer(loaded.model),
        cache,
        contexts=[800, 1600],
        scored=400,
        num_windows=measure.PLACES,
        batch_tokens=1600,
    )
    assert short["stop"] == windows.stop[0]
    assert rows["loss", "yarn", 1600]["nats"] != long["nats"]
    assert rows["loss", "yarn", 1600]["position"]["scaling"][0]["factor"] == 2

    # A window with questions is attended to as the spectra measure it.
    placed = heads.make_window(cache, 900, 0)
    capture = observer(loaded.model)(placed.tokens)
    measured = rows["heads", "rope", 900]
    for name in ("entropy", "distance"):
        of_queries = getattr(capture, name)[:, :, placed.reading].mean(axis=-1)
        np.testing.assert_allclose(measured[name], of_queries, rtol=2e-3)
    for answer, number in zip(placed.writing + 1, placed.numbers, strict=True):
        np.testing.assert_array_equal(placed.tokens[answer], placed.tokens[number])
    sizes = np.hypot(capture.q[..., :4], capture.q[..., 4:]).mean(axis=(1, 2))
    np.testing.assert_allclose(measured["q_size"], sizes, rtol=1e-3)

    trained = rows["training", "clip-2048", 32]
    assert [step for step, _ in trained["training_loss"]] == list(range(1, 11))
    assert [step for step, _ in trained["held_out_loss"]] == list(range(11))
    assert trained["position"]["scaling"][0]["training_length"] == 32
    assert rows["loss", "clip-2048", 800]["position"] == trained["position"]

    # The tables and figures of these rows.
    for module, name, value in (
        *((tables, "LENGTH", 800), (tables, "SAME", 400), (tables, "CONTEXTS", (600, 800, 1600))),
        *((figures, "LENGTH", 800), (figures, "STRETCH", 400), (figures, "UPDATES", 10)),
        (tables, "UPDATES", 10),
    ):
        monkeypatch.setattr(module, name, value)
    read = tables.Results(results)
    losses = tables.loss_table(read, "books").splitlines()
    assert losses[0] == "| method | 800 | 1,600 |"
    shown = [sum(short["nats"][-2:]) / 400, sum(long["nats"][-2:]) / 400]
    assert losses[2] == f"| rope | {shown[0]:.2f} | {shown[1]:.2f} |"
    assert all(f"## {part}" in tables.all_tables(read) for part in ("Keys found", "Heads"))
    # Of heads there is one context alone, and the control of the trainings is RoPE at twice it.
    read.rows += [row | {"context": 800} for row in read.of("heads")]
    written = figures.write_figures(read, tmp_path / "figures")
    assert {path.stem for path in written} == {"loss", "training", "updates", "sizes", "heads"}
    assert all(path.stat().st_size > 5_000 for path in written)


def test_the_figures_of_the_trainings_have_a_place_for_each():
    assert sorted(figures.TRAINED) == sorted(units.TRAININGS)
    assert figures.COMPARED.keys() < set(figures.TRAINED)


def test_the_interval_of_answers_that_share_windows_is_wider():
    apart = tables.found_interval([[1, 0] * 5] * 4)
    together = tables.found_interval([[1] * 10, [0] * 10] * 2)
    assert apart[0] < 50 < apart[1] and together[0] < 50 < together[1]
    assert apart == pytest.approx(tables.wilson(20, 40))
    assert together == pytest.approx(tables.wilson(2, 4))


def read_all(results):
    return [row for path in sorted(results.glob("*.jsonl")) for row in read_rows(path)]
