"""Loss while a model is being trained: what was scored on the same tokens shares axes."""

import json

import pytest

from fope_jax.report import page
from fope_jax.report.comparison import run_labels
from fope_jax.report.page import write_report
from fope_jax.report.rows import read_runs
from fope_jax.report.styles import method_styles
from fope_jax.report.validation import (
    alt_text,
    validation_charts,
    validation_figure,
    validation_groups,
    validation_table,
)
from tests.report.lineage_test import lineage

pytestmark = pytest.mark.usefixtures("undrawn")

UPDATE = 4096


def validation(variant, length, losses, *, step=100, contexts=(128, 256), tokens=640):
    """Rows of every ``step`` updates from 0 on; ``losses[i][j]`` at step i and context j."""
    return [
        {
            "kind": "validation",
            "protocol": "same-tokens",
            "split": "validation",
            "variant": variant,
            "seed": 0,
            "step": i * step,
            "training_length": length,
            "tokens_seen": i * step * UPDATE,
            "context": context,
            "scored_per_window": 64,
            "windows": tokens // 64,
            "nats": loss * tokens,
            "tokens": tokens,
            "bytes": 3 * tokens,
            "correct": 9,
        }
        for i, own in enumerate(losses)
        for context, loss in zip(contexts, own, strict=True)
    ]


def add(run, rows):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def pair(make_run):
    """A parent of 1,000 updates measured every 250, and a child of 200 measured every 100."""
    parent, child = make_run("rope"), make_run("nope", length=256)
    losses = [(8.0, 8.0), (5.0, 6.0), (4.0, 5.5), (3.5, 5.2), (3.25, 5.0)]
    add(parent, validation("rope", 128, losses, step=250))
    add(child, validation("nope", 256, [(3.5,), (3.25,), (3.0,)], contexts=(256,)))
    (child / "lineage.json").write_text(json.dumps(lineage(parent)))
    return parent, child


def test_windows_with_a_bos_token_have_axes_of_their_own(pair, make_run, tmp_path):
    third = make_run("alibi")
    rows = validation("alibi", 128, [(8.0, 8.0), (3.0, 3.0)])
    add(third, [row | {"bos_token": "<s>"} for row in rows])
    found = validation_groups(read_runs([*pair, third]))
    shown = {scored.bos_token: [run.variant for run, _ in own] for scored, own in found.items()}
    assert shown == {"": ["rope", "nope"], "<s>": ["alibi"]}
    runs = read_runs([third])
    (topic,) = page._validation(runs, method_styles(run_labels(runs).values()))
    assert topic.figures.parts[0].endswith("Every window begins with <s>.")


def test_a_run_that_got_a_bos_token_on_the_way_is_in_both(make_run):
    run = make_run("alibi")
    rows = validation("alibi", 128, [(8.0, 8.0), (3.0, 3.0)])
    add(run, [*rows, *(row | {"bos_token": "<s>"} for row in rows)])
    assert [scored.bos_token for scored in validation_groups(read_runs([run]))] == ["", "<s>"]


def test_parent_and_child_are_on_one_axis_one_after_the_other(pair):
    runs = read_runs(pair)
    ((scored, shown),) = validation_groups(runs).items()
    assert (scored.tokens, scored.scored_per_window, scored.split) == (640, 64, "validation")
    figure = validation_figure(shown, method_styles(run_labels(runs).values()))
    short, long, *_ = figure.axes
    assert (short.get_title(), long.get_title()) == ("context 128", "context 256")
    before, after, line = long.lines
    assert list(line.get_xdata()) == [1000 * UPDATE] * 2 and len(short.lines) == 2
    # Before the child's 200 updates there are 400 of the parent: its last two measurements.
    assert list(before.get_xdata()) == [750 * UPDATE, 1000 * UPDATE]
    assert list(before.get_ydata()) == [5.2, 5.0]
    assert list(after.get_xdata()) == [1000 * UPDATE, 1100 * UPDATE, 1200 * UPDATE]
    assert list(after.get_ydata()) == [3.5, 3.25, 3.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["rope", "nope"]


def test_the_live_chart_has_the_losses_of_the_panels(pair):
    ((_, shown),) = validation_groups(read_runs(pair)).items()
    short, long = validation_charts(shown).values()
    assert list(short.curves) == list(long.curves) == ["rope", "nope"]
    assert short.curves["nope"].y == []  # not measured there
    assert long.curves["rope"] == ([750 * UPDATE, 1000 * UPDATE], [5.2, 5.0], None, None)
    assert long.curves["nope"].y == [3.5, 3.25, 3.0]


def test_every_loss_is_in_the_table_and_the_ends_in_words(pair):
    ((_, shown),) = validation_groups(read_runs(pair)).items()
    table = validation_table(shown)
    assert table.columns == ["updates", "tokens seen", "128", "256"]
    assert table.rows[1] == ("rope", ["250", "1,024,000", "5.000", "6.000"])
    assert table.rows[-1] == ("nope", ["200", "4,915,200", "-", "3.000"])
    assert alt_text(shown) == (
        "Loss during training. rope at 128 tokens: 8.000, then 3.250; rope at 256 tokens: 8.000, "
        "then 5.000; nope at 256 tokens: 3.500, then 3.000."
    )


def test_other_tokens_are_other_figures_and_no_rows_none(pair, make_run, tmp_path):
    add(pair[1], validation("nope", 256, [(3.5,)], contexts=(256,), tokens=1280))
    page = write_report(pair, tmp_path / "report").read_text()
    assert page.count("<h2>Loss during training (validation)</h2>") == 2
    assert page.index("<h2>Lineage</h2>") < page.index("<h2>Loss during")
    assert "640 tokens of the validation split" in page and "1,280 tokens of the" in page
    assert (tmp_path / "report/during-2.png").is_file()
    without = make_run("alibi")
    assert not validation_groups(read_runs([without]))
