"""The training step on simulated devices gives the numbers of one device, for every method."""

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
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
MESHES = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "context": {"fsdp": 1, "context": 8},
    "tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}
FAST_MESHES = ("data", "context", "all")
# A rotation by head, a bias by head with an MLP, and whole rows of scores.
QUICK = ("fope", "fire", "cope")
QUICK_PAIRS = {f"packed {method}": {"method": method} for method in QUICK[1:]} | {
    "norms": {
        "method": "rope",
        "model": {"norm": "post", "qk_norm": "width", "tie_embeddings": True},
    },
    "everything": {
        "method": "everything",
        "model": {"windows": (6, None), "attention_sinks": True},
    },
}

LONG = {"method": "fope", "steps": 20}


def results(cases: list[dict]) -> list[dict]:
    command = [sys.executable, "-m", "tests.train.mesh_runs", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def fast() -> dict[str, dict]:
    """In one process: FoPE for 20 steps on one device and on meshes, and the quick pairs."""
    cases = {"one": LONG | {"devices": 1, "mesh": ONE}}
    cases |= {name: LONG | {"mesh": MESHES[name]} for name in FAST_MESHES}
    for name, case in QUICK_PAIRS.items():
        cases |= {name: case | {"mesh": MESHES["all"]}}
        cases |= {f"{name} on one": case | {"devices": 1, "mesh": ONE}}
    return dict(zip(cases, results(list(cases.values())), strict=True))


@pytest.fixture(scope="module")
def slow() -> dict[str, dict]:
    """FoPE for 20 steps on the other meshes."""
    names = [name for name in MESHES if name not in FAST_MESHES]
    return dict(zip(names, results([LONG | {"mesh": MESHES[name]} for name in names]), strict=True))


@pytest.fixture(
    params=[n if n in FAST_MESHES else pytest.param(n, marks=pytest.mark.slow) for n in MESHES]
)
def on_mesh(request) -> tuple[str, dict]:
    name = request.param
    return name, request.getfixturevalue("fast" if name in FAST_MESHES else "slow")[name]


def test_losses_over_20_steps_are_those_of_one_device(fast, on_mesh):
    assert_alike(on_mesh[1], fast["one"])
    assert fast["one"]["losses"][-1] < fast["one"]["losses"][0] - 0.1


def test_no_large_array_is_kept_whole_on_every_device(on_mesh):
    # The mesh of data alone keeps copies of the model on purpose; the check must see them.
    name, result = on_mesh
    assert bool(result["whole"]) == (name == "data")


def test_a_device_of_eight_needs_far_less_memory_for_the_step(fast, on_mesh):
    share = on_mesh[1]["temporary_bytes"] / fast["one"]["temporary_bytes"]
    assert share < 0.5, share


def pair(method: str, meshes: tuple[str, ...] = ("all",), **changes) -> None:
    """One device against meshes, at first the one with every kind of axis."""
    case = {"method": method} | changes
    cases = [case | {"mesh": MESHES[name]} for name in meshes]
    one, *others = results([case | {"devices": 1, "mesh": ONE}, *cases])
    for ours in others:
        assert_alike(ours, one)


def assert_alike(ours: dict, one: dict) -> None:
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
def test_every_method_on_packed_rows(method, request):
    if method in QUICK:
        fast = request.getfixturevalue("fast")
        ours, one = f"packed {method}", f"packed {method} on one"
        assert_alike(*((fast["all"], fast["one"]) if method == "fope" else (fast[ours], fast[one])))
    elif method == "dape":  # its network reads all heads of a layer
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
        {"model": {"qk_norm": "width", "num_kv_heads": 4}},
    ],
    ids=str,
)
def test_every_way_to_compute_the_step(changes):
    pair(**{"method": "fope"} | changes)


def test_windows_sinks_far_versions_and_running_sums(fast):
    assert_alike(fast["everything"], fast["everything on one"])


def test_norms_over_all_heads_and_tied_embeddings(fast):
    """A mean over heads of several devices, and one array for the tokens and for the logits."""
    assert_alike(fast["norms"], fast["norms on one"])
