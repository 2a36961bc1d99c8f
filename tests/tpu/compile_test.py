"""The TPU compiler itself, on the paper's sizes: `make plan-test`."""

import importlib.util

import pytest

from fope_jax.config import build_experiment, load_config
from fope_jax.tpu.plan import make_cases, plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install 'fope-jax[tpu-compiler]'",
    ),
]


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
@pytest.mark.parametrize("size", ["60m", "180m", "1200m"])
def test_the_papers_sizes_compile(size, topology):
    experiment = build_experiment(load_config("configs/paper/c4_books.py", []))
    cases = make_cases(experiment, topologies=[topology], sizes=[size], methods=["fope"])
    (row,) = plan(cases, cache=None, jobs=1, advise=False)
    assert row["devices"] == 16
    if not row["fits"]:
        assert row["needed_bytes"] > row["limit_bytes"] > 10e9
        return
    assert row["attention"] == "splash"
    # A kernel's blocks on the diagonal are whole, and those above it are counted too.
    assert 1 < row["flops"] / row["model_flops"] < 1.2
    # Every parameter is gathered at least once, and its gradient is summed: bfloat16 and float32.
    assert sum(row["collective_bytes"].values()) > 0
    assert row["hbm_bytes"] > row["memory"]["arguments"]
    assert 0 < row["mfu_bound"] <= 1
