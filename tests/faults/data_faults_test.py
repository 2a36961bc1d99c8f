"""The promises about data, each tried a few times; all trials in the slow suite."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import pytest

from tests.faults.data_faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_few_trials(fault, tmp_path):
    for seed in range(fault.short):
        directory = tmp_path / str(seed)
        directory.mkdir()
        fault.trial(directory, seed)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_all_trials(fault, tmp_path):
    for seed in range(fault.trials):
        directory = tmp_path / str(seed)
        directory.mkdir()
        fault.trial(directory, seed)
