"""Joins the processes of a run through `jax.distributed`."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import jax

from fope_jax.processes.collectives import DistributedError

TIMEOUT_SECONDS = 300
TIMEOUT_LIMIT = 1e6  # JAX refuses a longer timeout
HEARTBEAT_SECONDS = 30  # JAX ends the others when one is silent for this long
# Flag and environment variable of each field of `Settings`.
SOURCES = {
    "coordinator": ("--coordinator", "FOPE_COORDINATOR"),
    "num_processes": ("--num-processes", "FOPE_NUM_PROCESSES"),
    "process_id": ("--process-id", "FOPE_PROCESS_ID"),
}
# JAX's errors without a cluster, and after a device was used (notebooks). In a cluster the second
# would start unconnected processes, which the lock of the run stops.
_ALONE = ("coordinator_address should be defined", "must be called before any JAX calls")
# With one task JAX would join nothing, but restrict the task to one of its GPUs.
_TASK_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


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
    """Joins the other processes of the run, before any device is used; a second call does nothing.

    Settings come from the arguments, then from FOPE_COORDINATOR, FOPE_NUM_PROCESSES and
    FOPE_PROCESS_ID, then from the cluster that `jax.distributed.initialize` detects (TPU slices,
    Slurm, Open MPI). Without these, or with num_processes = 1 alone, this is the only process.

    If another process does not come in time, this one prints what it knows and exits with code 2:
    JAX would abort it without naming anyone, so no exception is possible.

    Args:
      coordinator: "HOST:PORT" of process 0, the same in every process.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      timeout_seconds: wait for the last process; default FOPE_DISTRIBUTED_TIMEOUT, else 300.

    Raises:
      DistributedError: incomplete or invalid settings, a port in use, or unequal device counts.
    """
    if jax.distributed.is_initialized():
        return
    if timeout_seconds is None:
        text = os.environ.get("FOPE_DISTRIBUTED_TIMEOUT", "")
        timeout_seconds = _seconds("FOPE_DISTRIBUTED_TIMEOUT", text) if text else TIMEOUT_SECONDS
    if not 0 < timeout_seconds < TIMEOUT_LIMIT:  # False for NaN
        raise DistributedError(
            f"timeout_seconds = {timeout_seconds}; accepted: above 0, below {TIMEOUT_LIMIT:,.0f}"
        )
    settings = find_settings(coordinator, num_processes, process_id, os.environ)
    is_only_task = "1" in [os.environ.get(name) for name in _TASK_COUNTS]
    if settings.num_processes == 1 if settings else is_only_task:
        return
    if settings and settings.process_id == 0:
        try:  # JAX crashes if the port is in use
            socket.create_server(("", int(settings.coordinator.rpartition(":")[2]))).close()
        except OSError as error:
            raise DistributedError(
                f"process 0 cannot listen at coordinator = {settings.coordinator!r}: {error}"
            ) from error
    address, count, index = settings or (None, None, None)
    alarm = threading.Timer(timeout_seconds, _exit_too_late, (settings, timeout_seconds))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=round(timeout_seconds) + 10,  # after `alarm`
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if settings is None and any(reason in str(error) for reason in _ALONE):
            return
        raise DistributedError(f"cannot join the other processes: {error}") from error
    finally:
        alarm.cancel()
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:  # JAX's collectives need equal numbers
        different = ", ".join(f"{counts[process]} in process {process}" for process in counts)
        error = DistributedError(
            f"the processes of one run must be started alike; different: devices = {different}"
        )
        error.is_in_all_processes = True  # type: ignore[attr-defined]
        raise error


def _exit_too_late(settings: Settings | None, timeout_seconds: float) -> None:
    """Exits before JAX aborts the process, which waits in C++."""
    line = f"fope: not all processes of the run have come within {timeout_seconds:g} s"
    if settings is not None:
        coordinator, num_processes, process_id = settings
        line += f"; this is process {process_id} of {num_processes}, coordinator {coordinator}"
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            line += "; process 0 has come, another has not: see which one has no such line"
        except OSError as error:
            line += f"; process 0 does not answer there: {error.strerror or error}"
    print(line, file=sys.stderr, flush=True)
    os._exit(2)


def find_settings(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> Settings | None:
    """Settings from arguments, then environment; None if neither has any.

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
    if found == {"num_processes": 1}:
        return Settings("", 1, 0)
    missing = [" or ".join(SOURCES[name]) for name in SOURCES if name not in found]
    if missing:
        raise DistributedError(
            f"{', '.join(f'{k} = {v!r}' for k, v in found.items())} without {', '.join(missing)};"
            " several processes need all three, a single process none"
        )
    coordinator, num_processes, process_id = settings = Settings(**found)
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


def _seconds(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DistributedError(f"{name} = {text!r}; accepted: a number of seconds") from None


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DistributedError(f"{name} = {text!r}; accepted: an integer") from None
