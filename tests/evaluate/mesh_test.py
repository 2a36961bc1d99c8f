import json
import subprocess
import sys
from pathlib import Path


def test_windows_score_the_same_on_every_mesh():
    """Rows and tokens that no axis divides, for a rotation, a bias and a contextual method."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.evaluate.mesh_scores"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    found, answers = printed["windows"], printed["answers"]
    assert len(found) == 3
    for case in found:
        assert case["shape"] in ([3, 5], [3, 41]), case
        assert case["spread"] > 0.5, case
        assert case["difference"] < 2e-5 and case["hits_differ"] == 0, case
    assert answers["shape"] == [3, 4]
    assert answers["differ"] == 0 and answers["difference"] < 2e-5, answers
    assert answers["texts"] == [[3, 4], 0]
    broken = printed["broken"]
    assert broken["gradient"] < 1e-5
    assert (broken["finite"], broken["hits"], broken["written"]) == (0, 0, [-1])
    assert broken["message"].startswith("here: weights that are not finite: unembedding (1 value)")
