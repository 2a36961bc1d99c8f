"""A few preemptions of the soak test; `python -m tests.faults.soak` has as many as you wait for."""

import pytest

from tests.faults import soak


@pytest.mark.slow
def test_a_training_survives_some_preemptions(tmp_path):
    """Each kind once, and one again; then to its end. In two sittings, as after a stop."""
    said = []
    for preemptions in (2, 5):
        test = soak.Soak(tmp_path / "soak", seed=1)
        with test.running():
            test.go_on(preemptions, minutes=20, say=said.append, to_the_end=preemptions == 5)
    kept = soak.Soak(tmp_path / "soak", seed=1)
    assert len(kept.preempted()) == 5 and kept.lives[-1].kind == soak.ENDED
    assert {life.kind for life in kept.preempted()} == set(soak.PREEMPTIONS)
    assert sum(life.refusals for life in kept.lives) > 0


def test_the_table_counts_what_is_trained_again():
    asked, killed = soak.ASKED, "SIGKILL to all at once"
    lives = [
        soak.Life(0, asked, first=1, last=27, end_seconds=2.0),
        soak.Life(0, killed, end_seconds=0.5),
        soak.Life(0, killed, first=28, last=59, end_seconds=0.1, requests=40, refusals=1),
        soak.Life(0, soak.ENDED, first=41, last=soak.STEPS),
        soak.Life(1, killed, first=1, last=19, end_seconds=0.3),
    ]
    text = soak.table(lives)
    assert f"| {asked} | 1 | 0 | 0.0 | 0 | 2.0 | 2.0 |" in text
    assert f"| {killed} | 3 | 1 | 19.0 | 19 | 0.3 | 0.5 |" in text
    assert "4 preemptions of 4 processes; 1 trainings" in text and "19 of them again" in text


@pytest.mark.parametrize(
    ("kind", "steps", "loss", "codes", "said"),
    [
        ("SIGKILL to all at once", range(13, 20), 9.0, [-9] * 4, "step 13: .*9.0"),
        ("SIGKILL to all at once", (13, 15), 2.0, [-9] * 4, r"\[13, 15\]"),
        ("SIGKILL to all at once", range(1, 9), 2.0, [-9] * 4, "29 steps are lost"),
        ("SIGKILL to all at once", range(31, 40), 2.0, [-9] * 4, "-1 steps are lost"),
        (soak.ASKED, range(25, 30), 2.0, [143, 143, 134, 143], "134"),
        (soak.ENDED, range(25, 97), 2.0, [0, 0, 1, 0], "1"),
    ],
)
def test_a_broken_promise_is_found(kind, steps, loss, codes, said, tmp_path):
    test = soak.Soak(tmp_path, seed=0)
    test.reference = {"rows": {step: {"train/loss": 2.0} for step in range(1, soak.STEPS + 1)}}
    test.lives = [soak.Life(0, "SIGKILL to all at once", first=1, last=29)]
    rows = [[step, {"train/loss": loss}, 0.0] for step in steps]
    with pytest.raises(AssertionError, match=said):
        test._check(soak.Life(0, kind, codes=codes), rows, 0.0)


def test_a_step_lost_after_a_stop_with_time_is_found(tmp_path):
    test = soak.Soak(tmp_path, seed=0)
    test.reference = {"rows": {step: {} for step in range(1, soak.STEPS + 1)}}
    test.lives = [soak.Life(0, soak.ASKED, first=1, last=29), soak.Life(0, soak.ASKED)]
    test._check(soak.Life(0, soak.ENDED, codes=[0] * 4), [[30, {}, 0.0]], 0.0)
    with pytest.raises(AssertionError, match="1 steps are lost"):
        test._check(soak.Life(0, soak.ENDED, codes=[0] * 4), [[29, {}, 0.0]], 0.0)


def test_a_soak_whose_trainings_give_up_ends(tmp_path, monkeypatch):
    test = soak.Soak(tmp_path, seed=0)
    said = []

    def live(kind):
        test.lives.append(soak.Life(0, soak.GAVE_UP, codes=[2] * 4, said=[["no bucket"]]))
        return test.lives[-1]

    monkeypatch.setattr(test, "live", live)
    with pytest.raises(AssertionError, match="5 lives in a row gave up: .*no bucket"):
        test.go_on(1, minutes=1, say=said.append)
    assert len(said) == len(soak.Soak(tmp_path, seed=0).lives) == 5
