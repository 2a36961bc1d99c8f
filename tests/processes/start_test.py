"""Settings of several processes, and their start: nothing hangs, messages say what is known."""

import os
import socket
import subprocess
import sys
import time

import jax
import pytest

from fope_jax.processes.collectives import DistributedError
from fope_jax.processes.start import find_settings, initialize


def test_arguments_go_before_the_environment():
    environment = {"FOPE_COORDINATOR": "a:1", "FOPE_NUM_PROCESSES": "4", "FOPE_PROCESS_ID": "3"}
    assert find_settings(None, None, None, environment) == ("a:1", 4, 3)
    assert find_settings("b:2", 2, 0, environment) == ("b:2", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("a:1", 2, None), {}, "without --process-id or FOPE_PROCESS_ID;"),
        ((None, None, None), {"FOPE_NUM_PROCESSES": "2"}, "without --coordinator or FOPE_COORD"),
        ((None, 2, None), {"FOPE_PROCESS_ID": "one"}, "FOPE_PROCESS_ID = 'one'; accepted: an int"),
        (("a:1", 2, 2), {}, "process_id = 2 with num_processes = 2; accepted: 0 to 1"),
        (("a:1", 2, -1), {}, "process_id = -1"),
        (("a:1", 0, 0), {}, "num_processes = 0; accepted: 1 or more"),
        (("a", 2, 0), {}, "coordinator = 'a'; accepted: HOST:PORT"),
        (("a:99999", 2, 0), {}, "a port of 1 to 65535"),
    ],
)
def test_errors_name_the_setting(arguments, environment, message):
    with pytest.raises(DistributedError) as error:
        find_settings(*arguments, environment)
    assert message in str(error.value)


def test_a_single_process_starts_nothing(monkeypatch):
    for name in ("FOPE_COORDINATOR", "FOPE_NUM_PROCESSES", "FOPE_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    initialize("127.0.0.1:1", 1, 0)
    initialize(num_processes=1)
    monkeypatch.setattr(jax.distributed, "initialize", refuse_outside_of_clusters)
    initialize()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setattr(jax.distributed, "initialize", None)
    initialize()
    with pytest.raises(DistributedError, match=r"timeout_seconds = 0; accepted: above 0"):
        initialize(timeout_seconds=0)


def refuse_outside_of_clusters(*settings, **options):
    """As JAX does; it takes what it is given only before the first use of a device."""
    raise ValueError("coordinator_address should be defined.")


def start_alone(coordinator, process_id, seconds):
    code = (
        "from fope_jax.processes.start import initialize\n"
        f"initialize({coordinator!r}, 2, {process_id}, {seconds})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("process_id", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_does_not_come(process_id):
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    began = time.monotonic()
    run = start_alone(coordinator, process_id, 1)
    assert run.returncode == 2 and time.monotonic() - began < 20
    message = (
        f"within 1 s; this is process {process_id} of 2, coordinator {coordinator}; process 0 "
    )
    assert message + ("has come, another", "does not answer there")[process_id] in run.stderr


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            DistributedError, match=f"cannot listen at coordinator = '{coordinator}'"
        ):
            initialize(coordinator, 2, 0)


PROGRAM = """
import jax, sys
from fope_jax.processes import collectives
from fope_jax.processes.agreement import check_equal_across_processes, fail_together
from fope_jax.processes.start import initialize
initialize(timeout_seconds=60)
initialize(timeout_seconds=60)
me = jax.process_index()
said = [jax.process_count(), jax.device_count(), collectives.broadcast_from_process_0(me)]
for i in (1, 5000):
    assert collectives.gather_texts(f"{me}" * i, 60) == ["0" * i, "1" * i]
check_equal_across_processes({"seed": 0})
for block in ("one", "all"):
    try:
        with fail_together():
            if me == 1 or block == "all":
                raise OSError(f"no {block} here {me}")
    except (OSError, collectives.DistributedError) as error:
        said.append(f"{type(error).__name__}: {error}")
print("SAID", *said, file=sys.stderr)
try:
    check_equal_across_processes({"seed": me})
except collectives.DistributedError as error:
    print(error, file=sys.stderr)
if me == 0:
    collectives.gather_texts("", 1)
"""


@pytest.mark.slow  # tests/train/processes_test.py trains with two
def test_two_processes_are_one():
    """They share devices and values, fail together, and a process that stays away is named."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    environment = os.environ | {
        "FOPE_COORDINATOR": coordinator,
        "FOPE_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment | {"FOPE_PROCESS_ID": str(process)},
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for process in (0, 1)
    ]
    first, second = (process.communicate(timeout=120)[1] for process in both)
    host = socket.gethostname()
    told = f"SAID 2 4 0 DistributedError: process 1 (host {host}): no one here 1 "
    assert told + "OSError: no all here 0" in first
    assert "SAID 2 4 0 OSError: no one here 1 OSError: no all here 1" in second
    for text in (first, second):
        assert f"seed = 0 in process 0 (host {host}), 1 in process 1 (host {host})" in text
    assert "DistributedError: waited 1 s at most" in first and "timed out task names: 1 " in first
