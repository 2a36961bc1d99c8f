"""Every fault of the table: the cheapest trials here, all of them in the slow suite."""

import pytest

from tests.faults import broken
from tests.faults.__main__ import faults
from tests.faults.broken import BREAKS, finds

FAULTS = faults()


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.short], ids=lambda fault: fault.name)
def test_a_fault_is_survived(fault, tmp_path):
    try_all(fault, tmp_path, range(fault.short))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_survived_in_all_trials(fault, tmp_path):
    try_all(fault, tmp_path, range(fault.short, fault.trials))


@pytest.mark.slow
@pytest.mark.parametrize("promise", BREAKS.values(), ids=lambda promise: promise.make.__name__)
def test_a_broken_promise_is_found(promise):
    assert finds(promise, FAULTS)


@pytest.mark.parametrize("promise", BREAKS.values(), ids=lambda promise: promise.make.__name__)
def test_what_breaks_a_promise_replaces_what_the_code_has(promise, monkeypatch):
    """``monkeypatch.setattr`` refuses a name that is gone, and puts the code back."""
    replaced = []

    def replace(owner, name, value):
        replaced.append(name)
        monkeypatch.setattr(owner, name, value)

    monkeypatch.setattr(broken, "replace", replace)
    promise.make()
    assert replaced


def try_all(fault, directory, seeds):
    for seed in seeds:
        fresh = directory / str(seed)
        fresh.mkdir()
        fault.trial(fresh, seed)


def test_every_fault_has_a_name_of_its_own_and_a_promise():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 10
    assert all(fault.promise and 0 <= fault.short <= fault.trials >= 1 for fault in FAULTS)
