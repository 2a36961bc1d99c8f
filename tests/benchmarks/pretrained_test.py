"""A pretrained run beside transformers: rates, ratios within a round, and what differs."""

import json
import sys

import pytest

from benchmarks import pretrained
from fope_jax.train.loop import train


class FakeSide(pretrained.Side):
    """Answers like a process: ours takes half the seconds of theirs."""

    def __init__(self, name):
        self.name, self.stopped = name, False
        self.slowness = 1.0 if name == "fope_jax" else 2.0

    def ask(self, *request):
        task, tokens, *count = request
        if task == "hello":
            return {"versions": f"{self.name} 1.0", "peak": 2e9}
        if task == "score":
            return {"seconds": len(tokens) / 1e3 * self.slowness, "found": 3.25, "peak": 5e9}
        (count,) = count
        written = [[7] * count for _ in tokens]
        written[0][-1] = 7 if self.name == "fope_jax" else 8
        return {"seconds": (5 + count) * self.slowness, "found": written, "peak": 5e9}

    def stop(self):
        self.stopped = True


def draw(rows, length):
    return [list(range(length))] * rows


def test_rates_are_told_beside_transformers():
    result = pretrained.measure(FakeSide, draw, [999], (4, 16, 10), rounds=3)
    text = pretrained.render(json.loads(json.dumps(result)))
    assert "| score 999 | 999 | 500 | 2.00 | 2.00 to 2.00 |" in text
    # 10 tokens more of 4 rows take 10 s and 20 s: the prompt and the first token cancel.
    assert "| decode 4 x 10 after 16 | 4 | 2 | 2.00 | 2.00 to 2.00 |" in text
    assert "43 of 44 tokens equal" in text and "3.25000 and 3.25000 nats a token" in text


def test_nothing_is_decoded_for_no_tokens():
    result = pretrained.measure(FakeSide, draw, [99], (4, 16, 0), rounds=1)
    assert list(result["seconds"]) == ["score 99"]
    assert "decode" not in pretrained.render(result)


def test_memory_is_that_of_a_process_of_its_own():
    side = FakeSide("transformers")
    row = pretrained.peak_memory(side, list(range(2001)))
    text = pretrained.render_memory({"transformers": row})
    assert side.stopped and "| transformers | 2,000 | 4 | 2.00 | 5.00 | 3.25000 |" in text


@pytest.mark.slow
def test_a_side_that_does_not_start_says_what_to_install(tmp_path):
    side = pretrained.Side("fope_jax", sys.executable, str(tmp_path / "no run"))
    with pytest.raises(SystemExit, match="pip install torch"):
        side.ask("score", [1, 2, 3])
    side.stop()


@pytest.mark.slow
def test_our_side_scores_and_writes(runs, tmp_path):
    """The process of a run trained here: finite nats, tokens of the vocabulary."""
    run = tmp_path / "run"
    train(runs.experiment(method="rope", steps=4), run)
    side = pretrained.Side("fope_jax", sys.executable, str(run))
    try:
        scored = side.ask("score", list(range(33)))
        written = side.ask("write", [[1, 2, 3], [4, 5, 6]], 5)
    finally:
        side.stop()
    assert 0 < scored["found"] < 20 and scored["seconds"] > 0 and 5e7 < scored["peak"] < 1e11
    assert [len(row) for row in written["found"]] == [5, 5]
    assert all(0 <= token < 300 for row in written["found"] for token in row)
