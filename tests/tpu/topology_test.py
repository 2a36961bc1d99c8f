"""Slices are described with the devices that their machines have."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from fope_jax.tpu import topology
from fope_jax.tpu.topology import (
    COMPILER_ENVIRONMENT,
    TopologyError,
    parse_topology,
    topology_devices,
)

# Chips, and devices of each on the machines of Google Cloud: jax.devices() of a v4-8, a v5p-8 and a
# v5litepod-4 lists 4, that of a tpu7x-8 (4 chips) lists 8. A v4 chip is one device of two cores.
SLICES = {
    "v4:2x2x1": 4,
    "v4:2x2x4": 16,
    "v5e:2x2": 4,
    "v5p:2x2x1": 4,
    "v6e:2x2": 4,
    "tpu7x:2x2x1": 8,
    "2xv4:2x2x1": 8,
    "3xv5e:4x4": 48,
    "2xtpu7x:2x2x1": 16,
}


@pytest.mark.parametrize("name", SLICES)
def test_devices_of_a_slice(name):
    assert parse_topology(name).num_devices == SLICES[name]


@pytest.mark.parametrize("name", SLICES)
def test_the_compiler_is_asked_for_the_devices_that_machines_have(name, monkeypatch):
    """As libtpu lists them: a v4 chip as two devices unless its cores are to be joined."""
    from jax.experimental import topologies

    def compiler(topology_name, platform, chip_config_name="default", num_slices=1):
        version, _, shape = topology_name.partition(":")
        chips = math.prod(map(int, shape.split("x")))
        apart = version == "tpu7x" or (version == "v4" and chip_config_name != "megacore")
        return type("Description", (), {"devices": [None] * (num_slices * chips * (1 + apart))})

    monkeypatch.setattr(topologies, "get_topology_desc", compiler)
    monkeypatch.setattr(topology, "libtpu_version", lambda: "0")
    for key, value in COMPILER_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    assert len(topology_devices(name)) == SLICES[name]
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: compiler("v4:1x1x1", ""))
    with pytest.raises(TopologyError, match=f"lists 2 devices, expected {SLICES[name]}"):
        topology_devices(name)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install '.[tpu-compiler]'",
)
def test_the_compilers_own_devices():
    code = (
        "import json, sys\n"
        "from fope_jax.tpu.topology import topology_devices\n"
        "found = {name: topology_devices(name) for name in json.load(sys.stdin)}\n"
        "kinds = {n: [len(d), d[0].device_kind, d[0].num_cores] for n, d in found.items()}\n"
        "print(json.dumps(kinds))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(list(SLICES)),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | COMPILER_ENVIRONMENT,
    )
    cores = {"v4": 2, "v5p": 2}
    for name, found in json.loads(run.stdout).items():
        chip = parse_topology(name).chip
        assert found == [SLICES[name], chip.kind, cores.get(chip.name, 1)], name
