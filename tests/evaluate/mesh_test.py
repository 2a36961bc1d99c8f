import json
import subprocess
import sys
from pathlib import Path

import pytest


def scores(*arguments):
    """What mesh_scores prints, after a look at its windows."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.evaluate.mesh_scores", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    for case in printed["windows"]:
        assert case["shape"] in ([3, 5], [3, 41]), case
        assert case["spread"] > 0.5, case
        assert case["difference"] < 2e-5 and case["hits_differ"] == 0, case
    return printed


@pytest.mark.slow
def test_windows_score_the_same_on_a_mesh():
    """Rows and tokens that no axis divides."""
    assert len(scores("first")["windows"]) == 1


@pytest.mark.slow
def test_windows_and_answers_score_the_same_on_every_mesh():
    """For a rotation, a bias and a contextual method; what is not finite is found as well."""
    printed = scores()
    answers, broken = printed["answers"], printed["broken"]
    assert len(printed["windows"]) == 3
    assert answers["shape"] == [3, 4]
    assert answers["differ"] == 0 and answers["difference"] < 2e-5, answers
    assert answers["texts"] == [[3, 4], 0]
    assert broken["gradient"] < 1e-5
    assert (broken["finite"], broken["hits"], broken["written"]) == (0, 0, [-1])
    assert broken["message"].startswith("here: weights that are not finite: unembedding (1 value)")
