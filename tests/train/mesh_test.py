"""The training step on simulated devices gives the numbers of one device, for every method.

A step on a mesh compiles for ten seconds: the fast tests have the mesh with every kind of axis.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fope_jax.gallery.examples import examples
from fope_jax.position.layer_patterns import LAYER_PATTERNS
from tests.train.mesh_runs import PATTERNS

ROOT = Path(__file__).parents[2]
ONE = {"devices": 1, "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}}
MESHES = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "context": {"fsdp": 1, "context": 8},
    "tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    "four slices": {"fsdp": 2, "dcn_data": 2, "dcn_fsdp": 2},
}
# A method with all hooks: far versions, running sums; and all that a layer can have beside it.
EVERYTHING = {
    "method": "everything",
    "steps": 20,
    "model": {"windows": (6, None), "attention_sinks": True, "tie_embeddings": True},
}


def results(cases: list[dict]) -> list[dict]:
    command = [sys.executable, "-m", "tests.train.mesh_runs", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def fast() -> list[dict]:
    """On one device, and on the mesh with all axes."""
    return results([EVERYTHING | ONE, EVERYTHING | {"mesh": MESHES["all"]}])


@functools.cache
def slow() -> dict[str, dict]:
    names = [name for name in MESHES if name != "all"]
    cases = [EVERYTHING | {"mesh": MESHES[name]} for name in names]
    return dict(zip(names, results(cases), strict=True))


def on_mesh(mesh: str) -> dict:
    return fast()[1] if mesh == "all" else slow()[mesh]


every_mesh = pytest.mark.parametrize("mesh", MESHES)


@pytest.mark.fast("all")
@every_mesh
def test_losses_over_20_steps_are_those_of_one_device(mesh):
    one = fast()[0]
    assert_alike(on_mesh(mesh), one)
    assert one["losses"][-1] < one["losses"][0] - 0.1


@pytest.mark.fast("all")
@every_mesh
def test_no_large_array_is_kept_whole_on_every_device(mesh):
    # The mesh of data alone keeps copies of the model on purpose; the check must see them.
    assert bool(on_mesh(mesh)["whole"]) == (mesh == "data")


@pytest.mark.fast("all")
@every_mesh
def test_a_device_of_eight_needs_far_less_memory_for_the_step(mesh):
    share = on_mesh(mesh)["temporary_bytes"] / fast()[0]["temporary_bytes"]
    assert share < 0.5, share


def pair(method: str, meshes: tuple[str, ...] = ("all",), **changes) -> None:
    """One device against meshes, at first the one with every kind of axis."""
    case = {"method": method} | changes
    cases = [case | {"mesh": MESHES[name]} for name in meshes]
    one, *others = results([case | ONE, *cases])
    for ours in others:
        assert_alike(ours, one)


def assert_alike(ours: dict, one: dict) -> None:
    np.testing.assert_allclose(ours["losses"], one["losses"], rtol=1e-5, atol=0)
    np.testing.assert_allclose(ours["norms"], one["norms"], rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in examples(64, 16) if "+" not in name])
def test_every_method_on_packed_rows(method):
    if method == "dape":  # its network reads all heads of a layer
        with pytest.raises(AssertionError, match="all heads of a layer, .* mesh.tensor = 1"):
            pair(method)
        pair(method, ("data", "fsdp", "context"))
    else:
        pair(method, ("all", "context", "tensor"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYER_PATTERNS)
def test_every_pattern_of_layers_on_packed_rows(name):
    layers = len(PATTERNS[name].methods)
    model = {"num_layers": layers, "attention_sinks": name == "gpt_oss"}
    pair(name, ("all", "context", "tensor"), model=model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"packed": False},
        {"accumulate": 2},
        {"model": {"remat": "full"}},
        {"model": {"remat": "dots"}},
        {"model": {"scan_layers": False}},
        {"model": {"attention": "reference"}},
        {"model": {"qk_norm": "head"}},
        {"model": {"tie_embeddings": True}},
        {"model": {"norm": "post"}},
        {"model": {"derivatives": "all"}},
        {"method": "one-bias"},
        {"method": "rope", "model": {"norm": "post", "qk_norm": "width", "tie_embeddings": True}},
        {"model": {"qk_norm": "width", "num_kv_heads": 4}},
    ],
    ids=str,
)
def test_every_way_to_compute_the_step(changes):
    pair(**{"method": "fope"} | changes)
