"""A model or a batch that a mesh cannot be cut over is named before any device works."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.config import build_experiment, load_config
from fope_jax.model.sharding import MeshConfig
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.train.checkpoints import restore_arrays
from fope_jax.train.state import check_mesh, init_train_state, plan_state
from tests.train.mesh_runs import experiment


@pytest.mark.parametrize(
    ("mesh", "train", "devices", "message"),
    [
        (
            {"fsdp": 16},
            {},
            16,
            "train.batch_size / train.accumulate = 8: expected a multiple of "
            "mesh.data * mesh.fsdp = 16",
        ),
        ({"fsdp": 4}, {"accumulate": 4}, 4, "train.batch_size / train.accumulate = 2"),
        ({"fsdp": 1, "context": 3}, {}, 3, "train.length = 64: expected a multiple of mesh"),
        (
            {"fsdp": 1, "tensor": 8},
            {},
            8,
            "model.num_heads = 4: expected a multiple of mesh.tensor = 8",
        ),
        ({"fsdp": 1, "tensor": 4}, {}, 4, "model.num_kv_heads = 2: expected a multiple of"),
        ({"fsdp": 1, "context": 2}, {}, 1, "needs 2 devices, there are 1"),
    ],
)
def test_what_does_not_divide_is_named(mesh, train, devices, message):
    setup = experiment({"method": "rope", "mesh": mesh})
    setup = dataclasses.replace(setup, train=dataclasses.replace(setup.train, **train))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_mesh(setup, devices)


def test_rows_are_divided_over_all_slices():
    setup = experiment({"method": "rope", "mesh": {"data": 8, "fsdp": 1}})
    check_mesh(setup, 8, num_slices=1)
    message = "8: expected a multiple of mesh.data * mesh.fsdp over 2 slices = 16"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_mesh(setup, 16, num_slices=2)


@pytest.mark.parametrize("size", ["60m", "180m", "1200m"])
@pytest.mark.parametrize("devices", [1, 16, 256])
def test_the_papers_configs_fit_their_meshes(size, devices):
    setup = build_experiment(load_config(f"configs/paper/c4_books.py:size={size}", []))
    check_mesh(setup, devices)
    check_mesh(dataclasses.replace(setup, mesh=MeshConfig(tensor=4 if devices > 1 else 1)), devices)


@pytest.mark.slow
def test_bfloat16_moments_of_earlier_versions_are_widened_and_other_dtypes_refused(tmp_path):
    setup = experiment({"method": "rope", "mesh": {}})
    wide = plan_state(setup)
    low = dataclasses.replace(setup.model, param_dtype="bfloat16", attention="reference")
    setup = dataclasses.replace(setup, model=low)
    plan = plan_state(setup)
    state = init_train_state(plan)
    assert {x.dtype.name for x in jax.tree.leaves(state.optimizer)} == {"float32", "int32"}
    rng = np.random.default_rng(0)

    def earlier(x, like):
        """As optax made it of the parameters."""
        return jnp.asarray(rng.normal(size=x.shape), like.dtype)

    adam = state.optimizer[1]
    moments = [jax.tree.map(earlier, tree, state.params) for tree in (adam.mu, adam.nu)]
    adam = adam._replace(mu=moments[0], nu=moments[1])
    optimizer = (state.optimizer[0], adam, *state.optimizer[2:])
    store = CheckpointStore(tmp_path)
    items = {"params": state.params, "constants": {}, "optimizer": optimizer}
    store.save(3, items, {})
    restored = restore_arrays(store, 3, plan)
    jax.tree.map(np.testing.assert_array_equal, restored["optimizer"], optimizer)
    jax.tree.map(np.testing.assert_array_equal, restored["params"], state.params)
    for x, leaf in zip(
        jax.tree.leaves(restored["optimizer"]), jax.tree.leaves(plan.state.optimizer), strict=True
    ):
        assert x.dtype == leaf.dtype and x.sharding == leaf.sharding
    with pytest.raises(CheckpointError, match=r"params/embedding: checkpoint bfloat16.*float32"):
        restore_arrays(store, 3, wide)
    store.close()
