"""A model or a batch that a mesh cannot be cut over is named before any device works."""

import dataclasses
import re

import pytest

from fope_jax.config import build_experiment, load_config
from fope_jax.model.sharding import MeshConfig
from fope_jax.train.state import check_mesh
from tests.train.mesh_runs import experiment


@pytest.mark.parametrize(
    ("mesh", "train", "devices", "message"),
    [
        ({"fsdp": 16}, {}, 16,
         "train.batch_size / train.accumulate = 8: expected a multiple of "
         "mesh.data * mesh.fsdp = 16"),
        ({"fsdp": 4}, {"accumulate": 4}, 4, "train.batch_size / train.accumulate = 2"),
        ({"fsdp": 1, "context": 3}, {}, 3, "train.length = 64: expected a multiple of mesh"),
        ({"fsdp": 1, "tensor": 8}, {}, 8,
         "model.num_heads = 4: expected a multiple of mesh.tensor = 8"),
        ({"fsdp": 1, "tensor": 4}, {}, 4, "model.num_kv_heads = 2: expected a multiple of"),
        ({"fsdp": 1, "context": 2}, {}, 1, "needs 2 devices, there are 1"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named(mesh, train, devices, message):
    setup = experiment({"method": "rope", "mesh": mesh})
    setup = dataclasses.replace(setup, train=dataclasses.replace(setup.train, **train))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_mesh(setup, devices)


@pytest.mark.parametrize("size", ["60m", "180m", "1200m"])
@pytest.mark.parametrize("devices", [1, 16, 256])
def test_the_papers_configs_fit_their_meshes(size, devices):
    setup = build_experiment(load_config(f"configs/paper/c4_books.py:size={size}", []))
    check_mesh(setup, devices)
    check_mesh(dataclasses.replace(setup, mesh=MeshConfig(tensor=4 if devices > 1 else 1)), devices)
