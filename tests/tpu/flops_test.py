import dataclasses

import jax
import pytest

from fope_jax.model.config import TransformerConfig
from fope_jax.model.presets import PRESETS
from fope_jax.tpu.flops import model_flops, program_flops, visits_of_queries
from fope_jax.train.state import plan_state, trace_step
from tests.train.mesh_runs import experiment


def of_step(changes, **train):
    case = {"method": "rope", "mesh": {"fsdp": 1}, "model": changes}
    setup = experiment(case)
    setup = dataclasses.replace(setup, train=dataclasses.replace(setup.train, **train))
    length = setup.train.length
    trips = visits_of_queries(length, setup.model.attention_block)
    found = program_flops(trace_step(plan_state(setup, jax.devices()[:1])).jaxpr, trips)
    return found, model_flops(setup.model, setup.position, setup.train.batch_size, length)


@pytest.mark.parametrize("size", ["60m", "180m", "1200m"])
def test_the_papers_sizes_agree_with_the_analytic_count(size):
    """Nothing is run: a traced step of the real model."""
    found, expected = of_step(dict(PRESETS[size]), batch_size=16, length=512)
    assert 1 < found / expected < 1.1


def test_scanned_and_unrolled_layers_count_alike():
    scanned, _ = of_step({"num_layers": 6})
    unrolled, _ = of_step({"num_layers": 6, "scan_layers": False})
    shallow, _ = of_step({"num_layers": 2})
    assert scanned == unrolled > 1.5 * shallow


def test_what_is_computed_again_counts_again():
    kept, model = of_step({})
    again, same = of_step({"remat": "full"})
    assert same == model
    assert 1.1 < again / kept < 1.4
    # With the products kept, attention alone is computed again.
    dots, _ = of_step({"remat": "dots"})
    assert 1 < dots / kept < 1 + (again / kept - 1) / 2


def test_pieces_of_a_batch_add_up():
    whole, _ = of_step({})
    pieces, _ = of_step({}, accumulate=4)
    assert pieces == whole


def test_model_flops_by_hand():
    config = TransformerConfig(
        vocab_size=7, d_model=4, num_layers=3, num_heads=2, num_kv_heads=1, mlp_dim=5
    )
    # Matrices of a layer: query and out 4 x 4, key and value 4 x 2, three of 4 x 5.
    matrices = 3 * (2 * 16 + 2 * 8 + 3 * 20) + 4 * 7
    assert model_flops(config, 2, 8) == 2 * 8 * (6 * matrices + 6 * 3 * 8 * 4)
