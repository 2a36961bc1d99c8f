"""What `benchmarks.tpu_step` has other frameworks compile is our model, batch and slice."""

import dataclasses

import jax
import pytest
from flax import nnx

from benchmarks.maxtext_step import settings
from benchmarks.tpu_step import PlainTransformer
from fope_jax.config import build_experiment, load_config
from fope_jax.train.state import plan_state


@pytest.fixture
def experiment():
    return build_experiment(load_config("configs/paper/c4_books.py:position=rope"))


@pytest.mark.parametrize(
    ("topology", "name", "rows"),
    [
        ("v5e:4x4", "v5e-16", 64),
        ("v5p:4x4x4", "v5p-128", 16),
        ("v6e:8x8", "v6e-64", 16),
        ("v4:2x2x2", "v4-16", 128),
    ],
)
def test_maxtext_gets_the_same_slice_and_rows(experiment, topology, name, rows):
    given = settings(experiment, topology)
    assert experiment.train.batch_size == 1024
    assert given["compile_topology"] == name and given["per_device_batch_size"] == rows


def test_the_plain_model_has_weights_of_our_sizes(experiment):
    model = dataclasses.replace(experiment.model, num_layers=2, vocab_size=256)
    small = dataclasses.replace(
        experiment, model=model, train=dataclasses.replace(experiment.train, batch_size=8)
    )
    plain = nnx.split(nnx.eval_shape(lambda: PlainTransformer(model, nnx.Rngs(0))))[1]
    ours = plan_state(small, jax.devices()).state.params
    assert sum(x.size for x in jax.tree.leaves(plain)) == sum(x.size for x in jax.tree.leaves(ours))
