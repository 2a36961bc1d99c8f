"""The training step on simulated devices gives the numbers of one device, for every method."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fope_jax.gallery.examples import examples

ROOT = Path(__file__).parents[2]
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
MESHES = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "context": {"fsdp": 1, "context": 8},
    "tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}
# A rotation by head, a bias by head with an MLP, and whole rows of scores.
QUICK = ("fope", "fire", "cope")


def results(cases: list[dict]) -> list[dict]:
    command = [sys.executable, "-m", "tests.train.mesh_runs", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_meshes() -> dict[str, dict]:
    """FoPE for 20 steps on one device and on every mesh."""
    base = {"method": "fope", "steps": 20}
    cases = {"one": base | {"devices": 1, "mesh": ONE}}
    cases |= {name: base | {"mesh": mesh} for name, mesh in MESHES.items()}
    return dict(zip(cases, results(list(cases.values())), strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_over_20_steps_are_those_of_one_device(on_meshes, mesh):
    np.testing.assert_allclose(
        on_meshes[mesh]["losses"], on_meshes["one"]["losses"], rtol=1e-5, atol=0
    )
    np.testing.assert_allclose(on_meshes[mesh]["norms"], on_meshes["one"]["norms"], rtol=2e-4)
    assert on_meshes["one"]["losses"][-1] < on_meshes["one"]["losses"][0] - 0.1


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "data"])
def test_no_large_array_is_kept_whole_on_every_device(on_meshes, mesh):
    # The mesh of data alone keeps copies of the model on purpose; the check must see them.
    assert on_meshes["data"]["whole"]
    assert on_meshes[mesh]["whole"] == []


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_of_eight_needs_far_less_memory_for_the_step(on_meshes, mesh):
    share = on_meshes[mesh]["temporary_bytes"] / on_meshes["one"]["temporary_bytes"]
    assert share < 0.5, share


def pair(method: str, **changes) -> None:
    """One device against every kind of axis at once."""
    case = {"method": method, "mesh": MESHES["all"]} | changes
    ours, one = results([case, case | {"devices": 1, "mesh": ONE}])
    np.testing.assert_allclose(ours["losses"], one["losses"], rtol=1e-5, atol=0)
    np.testing.assert_allclose(ours["norms"], one["norms"], rtol=2e-4)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method in QUICK else pytest.mark.slow)
        for method in examples(64, 16)
        if "+" not in method
    ],
)
def test_every_method_on_packed_rows(method):
    pair(method)


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
        {"model": {"qk_norm": "width", "num_kv_heads": 4}},
    ],
    ids=str,
)
def test_every_way_to_compute_the_step(changes):
    pair(**{"method": "fope"} | changes)


def test_norms_over_all_heads_and_tied_embeddings():
    """A mean over heads of several devices, and one array that meets the tokens and the logits."""
    pair("rope", model={"norm": "post", "qk_norm": "width", "tie_embeddings": True})
