"""Settings of several processes, and the rendezvous: who is missing is named, nothing hangs."""

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fope_jax.processes.agreement import (
    DistributedError,
    check_equal_across_processes,
    describe_differences,
    describe_failures,
    fail_together,
    software_versions,
)
from fope_jax.processes.start import Settings, find_settings, initialize, meet


@pytest.fixture
def coordinator():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


def outcomes(settings, timeout_seconds):
    """What `meet` did for each of the settings, called at the same time: "" or its error."""

    def one(own):
        try:
            meet(own, timeout_seconds)
        except DistributedError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(one, settings))


# ---------------------------------------------------------------------------- settings


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
    import jax

    for name in ("FOPE_COORDINATOR", "FOPE_NUM_PROCESSES", "FOPE_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    initialize()
    initialize("127.0.0.1:1", 1, 0)
    assert not jax.distributed.is_initialized()
    with pytest.raises(DistributedError, match=r"timeout_seconds = 0; accepted: above 0"):
        initialize(timeout_seconds=0)


# ---------------------------------------------------------------------------- rendezvous


def test_all_meet_and_the_port_is_free_again(coordinator):
    assert outcomes([Settings(coordinator, 4, i) for i in (3, 1, 0, 2)], 20) == [""] * 4
    # As JAX's coordinator does straight afterwards; and a second start on the same port.
    with socket.create_server(("", int(coordinator.split(":")[1]))):
        pass
    assert outcomes([Settings(coordinator, 2, i) for i in (0, 1)], 20) == [""] * 2


def test_every_process_that_came_learns_who_did_not(coordinator):
    began = time.monotonic()
    errors = outcomes([Settings(coordinator, 5, i) for i in (0, 3, 1)], 2)
    assert time.monotonic() - began < 12
    assert (
        errors
        == [f"3 of 5 processes arrived at {coordinator} within 2 s; missing process ids: 2, 4"] * 3
    )


def test_without_process_0(coordinator):
    began = time.monotonic()
    (error,) = outcomes([Settings(coordinator, 2, 1)], 1)
    assert time.monotonic() - began < 6
    assert "process 0 did not answer" in error and coordinator in error and "within 1 s" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([(3, 0), (3, 1), (3, 1)], "two processes were started with process_id = 1"),
        ([(2, 0), (3, 2)], "process 2 was started with num_processes = 3, process 0 with 2"),
    ],
)
def test_processes_that_contradict_each_other(coordinator, settings, message):
    errors = outcomes([Settings(coordinator, *own) for own in settings], 10)
    assert errors == [message] * len(settings)


def test_a_port_in_use_and_a_stranger(coordinator):
    port = int(coordinator.split(":")[1])
    with socket.create_server(("", port)):
        (error,) = outcomes([Settings(coordinator, 2, 0)], 1)
    assert "process 0 cannot listen at coordinator" in error and coordinator in error

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, Settings(coordinator, 2, 0), 20)
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            pool.submit(meet, Settings(coordinator, 2, 1), 20).result()
        assert first.result() is None


# ---------------------------------------------------------------------------- with jax

PROGRAM = """
import jax
from fope_jax.processes.start import initialize
initialize(timeout_seconds=60)
initialize(timeout_seconds=60)
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.array(jax.process_index() + 1)).sum()
print("SUM", int(total), jax.process_count(), jax.device_count())
"""


def test_two_processes_compute_together(coordinator):
    def start(process_id):
        environment = {
            "FOPE_COORDINATOR": coordinator,
            "FOPE_NUM_PROCESSES": "2",
            "FOPE_PROCESS_ID": str(process_id),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PATH": "/usr/bin:/bin",
        }
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    for process in [start(0), start(1)]:
        out, err = process.communicate(timeout=120)
        assert "SUM 3 2 4" in out, err


# ---------------------------------------------------------------------------- what all agree on


def said(host, values):
    return json.dumps([host, values])


def test_what_differs_is_named_with_both_values_and_who_has_them():
    same = {"train.length": 64, "devices": "4 of 8", "jax": "0.10.2"}
    assert describe_differences([said("a", same), said("b", same)]) == ""
    other = same | {"train.length": 128, "jax": None}
    assert describe_differences([said("a", same), said("b", other)]) == (
        "the processes of one run must be started alike; different: "
        "train.length = 64 in process 0 (host a), 128 in process 1 (host b); "
        'jax = "0.10.2" in process 0 (host a), null in process 1 (host b)'
    )


def test_processes_that_say_the_same_are_told_together_and_many_are_counted():
    texts = [said(f"h{i}", {"seed": int(i == 7)}) for i in range(64)]
    assert describe_differences(texts).endswith(
        "seed = 0 in process 0 (host h0), process 1 (host h1), process 2 (host h2) and 60 more, "
        "1 in process 7 (host h7)"
    )
    many = [said("a", {f"k{i:02}": 0 for i in range(20)}), said("b", {})]
    text = describe_differences(many)
    assert "k00 = 0 in process 0 (host a), nothing in process 1 (host b); " in text
    assert text.endswith("; and 8 more") and "\n" not in text
    failed = [said("a", "")] + [said("b", "no file")] * 5
    assert describe_failures(failed).splitlines() == [
        *(f"process {i} (host b): no file" for i in (1, 2, 3)),
        "and 2 more processes",
    ]


def test_alone_a_process_agrees_with_itself():
    check_equal_across_processes({"seed": 1})
    with pytest.raises(ZeroDivisionError), fail_together():
        _ = 1 / 0


def test_software_is_told_by_its_content(monkeypatch):
    found = software_versions()
    assert found == software_versions() and len(found["source of fope_jax, sha256"]) == 16
    assert found["numpy"] == np.__version__ and found["libtpu"] != "0"
    flags = "--xla_cpu_enable_fast_math=true"
    monkeypatch.setenv(
        "XLA_FLAGS", f"--xla_dump_to=/tmp/3 {flags} --xla_force_host_platform_device_count=3"
    )
    assert software_versions()["XLA_FLAGS"] == flags


AGREE = """
import jax
from fope_jax.processes import start
from fope_jax.processes.agreement import (
    DistributedError, agree, check_equal_across_processes, fail_together)
start.initialize(timeout_seconds=60)
me = jax.process_index()
for i in range(3):  # as often as a run saves
    assert agree(f"{me}{i}", " ".join) == f"0{i} 1{i}"
check_equal_across_processes({"seed": 0})
for block in ("one", "all"):
    try:
        with fail_together():
            if me == 1 or block == "all":
                raise OSError(f"no {block} here {me}")
    except (OSError, DistributedError) as error:
        print(type(error).__name__, error, sep=": ", end="; ", flush=True)
check_equal_across_processes({"seed": me})
"""


def test_where_one_fails_all_fail_and_where_one_differs_all_end(coordinator):
    environment = {
        "FOPE_COORDINATOR": coordinator,
        "FOPE_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE],
            env=environment | {"FOPE_PROCESS_ID": str(process)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in (0, 1)
    ]
    (first, err_0), (second, err_1) = (process.communicate(timeout=120) for process in both)
    host = socket.gethostname()
    assert first == (
        f"DistributedError: process 1 (host {host}): no one here 1; OSError: no all here 0; "
    ), err_0
    assert second == "OSError: no one here 1; OSError: no all here 1; ", err_1
    for process, text in zip(both, (err_0, err_1), strict=True):
        assert process.returncode == 1
        assert f"seed = 0 in process 0 (host {host}), 1 in process 1 (host {host})" in text
