"""The start of several processes as one: a rendezvous that cannot hang, and what all must share.

JAX's own client ends the process from C++ when a host does not arrive: no exception, no name. So
the processes meet on the coordinator's port first, in plain TCP. Each says who it is; process 0
answers when all have come, or tells everyone who is missing when the time is over. Then the port is
free again, and JAX takes it for its own coordinator.

After that they speak through the key-value store of JAX's coordinator, which needs no device:
where one cannot start, or was not started like the others, all of them say so and end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax._src import clusters

from fope_jax.processes.agreement import (
    DistributedError,
    check_equal_across_processes,
    software_versions,
)

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 300
TIMEOUT_LIMIT = 1e6  # beyond which sockets and JAX take no timeout
# Flag, and the environment variable that stands in for it, of each field of `Settings`.
SOURCES = {
    "coordinator": ("--coordinator", "FOPE_COORDINATOR"),
    "num_processes": ("--num-processes", "FOPE_NUM_PROCESSES"),
    "process_id": ("--process-id", "FOPE_PROCESS_ID"),
}
# JAX can also ask Kubernetes, through a package of its own that we do not need; a TPU slice there
# has what it takes in its environment.
_CLUSTERS = (
    clusters.OmpiCluster,
    clusters.SlurmCluster,
    clusters.GkeTpuCluster,
    clusters.GceTpuCluster,
)
_GO, _RETRY_SECONDS, _LINE_BYTES = "go", 0.2, 65536


class Settings(NamedTuple):
    """``coordinator`` is "HOST:PORT" of process 0; ``process_id`` is in [0, num_processes)."""

    coordinator: str
    num_processes: int
    process_id: int


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: float | None = None,
) -> None:
    """Joins this process with the others of the run, before any device is used.

    Settings come from the arguments, then from FOPE_COORDINATOR, FOPE_NUM_PROCESSES and
    FOPE_PROCESS_ID, then from the cluster (TPU slices, Slurm, Open MPI). A single process has
    nothing to join, and a second call does nothing.

    Args:
      coordinator: "HOST:PORT" of process 0, the same in every process.
      num_processes: how many there are.
      process_id: which one this is.
      timeout_seconds: how long to wait for the last process; without it what
        FOPE_DISTRIBUTED_TIMEOUT says, or 300.

    Raises:
      DistributedError: settings that are incomplete or out of range, a process that has not
        arrived in time, or one that runs other software. Every process that did arrive raises it.
    """
    if jax.distributed.is_initialized():
        return
    if timeout_seconds is None:
        text = os.environ.get("FOPE_DISTRIBUTED_TIMEOUT", "")
        timeout_seconds = _integer("FOPE_DISTRIBUTED_TIMEOUT", text) if text else TIMEOUT_SECONDS
    if not 0 < timeout_seconds < TIMEOUT_LIMIT:  # also where it is no number
        raise DistributedError(f"timeout_seconds = {timeout_seconds}; accepted: above 0")
    settings = find_settings(coordinator, num_processes, process_id, os.environ)
    settings = settings or _of_cluster(timeout_seconds)
    if settings is None or settings.num_processes == 1:
        return
    meet(settings, timeout_seconds)
    jax.distributed.initialize(*settings, initialization_timeout=max(1, round(timeout_seconds)))
    check_equal_across_processes(
        software_versions()
    )  # before the devices of different versions look for each other


def find_settings(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> Settings | None:
    """The settings that arguments and environment give together; None where neither gives any.

    >>> find_settings(None, None, 1, {"FOPE_COORDINATOR": "a:80", "FOPE_NUM_PROCESSES": "2"})
    Settings(coordinator='a:80', num_processes=2, process_id=1)
    >>> find_settings(None, None, None, {}) is None
    True

    Raises:
      DistributedError: some are missing, not numbers or out of range.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    found = {}
    for name, value in given.items():
        text = environment.get(SOURCES[name][1], "")
        if value is not None:
            found[name] = value
        elif text:
            found[name] = text if name == "coordinator" else _integer(SOURCES[name][1], text)
    if not found:
        return None
    missing = [" or ".join(SOURCES[name]) for name in SOURCES if name not in found]
    if missing:
        raise DistributedError(
            f"{', '.join(f'{k} = {v!r}' for k, v in found.items())} without {', '.join(missing)};"
            " several processes need all three, a single process none"
        )
    return _checked(Settings(**found))


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DistributedError(f"{name} = {text!r}; accepted: an integer") from None


def _checked(settings: Settings) -> Settings:
    coordinator, num_processes, process_id = settings
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise DistributedError(
            f"coordinator = {coordinator!r}; accepted: HOST:PORT, a port of 1 to 65535"
        )
    if num_processes < 1:
        raise DistributedError(f"num_processes = {num_processes}; accepted: 1 or more")
    if not 0 <= process_id < num_processes:
        raise DistributedError(
            f"process_id = {process_id} with num_processes = {num_processes};"
            f" accepted: 0 to {num_processes - 1}"
        )
    return settings


def _of_cluster(timeout_seconds: float) -> Settings | None:
    """What the cluster that runs this process says; None outside of one."""
    for cluster in _CLUSTERS:
        if cluster.is_env_present():
            num_processes = cluster.get_process_count()
            if num_processes == 1:
                return None
            address = cluster.get_coordinator_address(
                timeout_secs=round(timeout_seconds),
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
            return Settings(address, num_processes, cluster.get_process_id())
    return None


# ---------------------------------------------------------------------------- rendezvous


def meet(settings: Settings, timeout_seconds: float) -> None:
    """Returns in every process when all have called it.

    Raises:
      DistributedError: after ``timeout_seconds`` at most, in all that came: which process ids have
        not arrived, which came twice, or whose number of processes is another.
    """
    deadline = time.monotonic() + timeout_seconds
    log.info(
        "process %d of %d: waiting for the others at %s, %g s at most",
        settings.process_id,
        settings.num_processes,
        settings.coordinator,
        timeout_seconds,
    )
    if settings.process_id == 0:
        _receive(settings, deadline, timeout_seconds)
    else:
        _report(settings, deadline, timeout_seconds)


def _receive(settings: Settings, deadline: float, timeout_seconds: float) -> None:
    """Process 0's part: collects the others and gives all of them the same answer."""
    arrived: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as open_sockets:
        try:
            server = open_sockets.enter_context(_listen(int(settings.coordinator.split(":")[-1])))
        except OSError as error:
            raise DistributedError(
                f"process 0 cannot listen at coordinator = {settings.coordinator!r}: {error}"
            ) from error
        problem = ""
        while len(arrived) < settings.num_processes - 1 and not problem:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, settings.num_processes)) - arrived.keys())
                problem = (
                    f"{len(arrived) + 1} of {settings.num_processes} processes arrived at"
                    f" {settings.coordinator} within {timeout_seconds:g} s;"
                    f" missing process ids: {', '.join(map(str, missing))}"
                )
                break
            open_sockets.enter_context(peer)
            greeting = _read_line(peer, min(deadline, time.monotonic() + 5)).split()
            if len(greeting) != 3 or greeting[0] != "fope":
                continue  # a stranger, such as a port scan
            process, count = int(greeting[1]), int(greeting[2])
            if count != settings.num_processes:
                problem = (
                    f"process {process} was started with num_processes = {count},"
                    f" process 0 with {settings.num_processes}"
                )
            elif process in arrived or process == 0:
                problem = f"two processes were started with process_id = {process}"
            arrived[-1 - len(arrived) if problem else process] = peer
        for peer in arrived.values():
            with contextlib.suppress(OSError):
                peer.sendall(f"{problem or _GO}\n".encode())
        for peer in arrived.values():  # they hang up first, so that the port is free at once
            _read_line(peer, time.monotonic() + 5)
    if problem:
        raise DistributedError(problem)


def _report(settings: Settings, deadline: float, timeout_seconds: float) -> None:
    """The others' part: says who this is and waits for the answer."""
    host, _, port = settings.coordinator.rpartition(":")
    last = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as peer:
                peer.sendall(f"fope {settings.process_id} {settings.num_processes}\n".encode())
                # A little longer than process 0 waits, because it knows who is missing.
                answer = _read_line(peer, deadline + 10)
        except OSError as error:
            last = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
            continue
        if answer == _GO:
            return
        if answer:
            raise DistributedError(answer)
        last = "it hung up"
        time.sleep(_RETRY_SECONDS)
    raise DistributedError(
        f"process {settings.process_id}: process 0 did not answer at coordinator ="
        f" {settings.coordinator!r} within {timeout_seconds:g} s ({last})"
    )


def _listen(port: int) -> socket.socket:
    """A listener on every interface, as JAX's coordinator is."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    return socket.create_server(("", port), backlog=1024)


def _read_line(peer: socket.socket, deadline: float) -> str:
    """What ``peer`` sends up to the end of the line; "" where it hangs up or says nothing."""
    received = b""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        while b"\n" not in received and len(received) < _LINE_BYTES:
            peer.settimeout(max(0.001, deadline - time.monotonic()))
            part = peer.recv(1024)
            if not part:
                return ""
            received += part
        return received.decode().strip()
    return ""
