"""What all processes agree on: they fail together, and must have been started alike.

They speak through the key-value store of JAX's coordinator, which needs no device.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as jax_distributed

# Longer than any host needs to copy its token cache out of a bucket.
AGREE_SECONDS = 3600
_SHOWN = 12  # differences that a message names; the count says how many there are
_NAMED = 3  # processes that a message names of those that say the same
_exchanges = itertools.count()  # a key of the store is written once
# What decides the program that is compiled, and so whether the processes' programs fit together.
PACKAGES = (
    "fope-jax",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "grain",
    "array-record",
    "numpy",
    "ml-dtypes",
)
_JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Where a process dumps its programs is its own affair; devices are compared when they are there.
_OWN_FLAGS = ("--xla_dump_", "--xla_force_host_platform_device_count")


class DistributedError(RuntimeError):
    """Processes that cannot start as one; the message names the setting or who is missing."""


def agree(
    text: str, judge: Callable[[Sequence[str]], str], timeout_seconds: float = AGREE_SECONDS
) -> str:
    """What process 0 makes of the texts of all processes, in every process.

    All call it the same number of times in the same order. A process on its own judges itself.

    Args:
      text: of this process.
      judge: the texts in the order of the process ids -> the answer; called in process 0.
      timeout_seconds: how long process 0 waits for the last text.

    Raises:
      DistributedError: a process did not come in time; every process that did raises it.
    """
    state = jax_distributed.global_state
    if state.client is None:
        return judge([text])
    number, late = next(_exchanges), ""
    key = f"fope/{number}"
    client, count = state.client, state.num_processes or 1
    client.key_value_set(f"{key}/{state.process_id}", text)
    if state.process_id == 0:
        deadline = time.monotonic() + timeout_seconds
        texts = [_stored(client, f"{key}/{process}", deadline) for process in range(count)]
        missing = [str(process) for process, own in enumerate(texts) if own is None]
        if missing:
            late = (
                f"waited {timeout_seconds:g} s for processes that have started but do not go on: "
                f"{', '.join(missing)}"
            )
        answer = "" if late else judge([own for own in texts if own is not None])
        if number and not late:  # all are here, so all have read the answer before this one
            client.key_value_delete(f"fope/{number - 1}")
        client.key_value_set(f"{key}/agree", json.dumps([late, answer]))
    else:
        # A little longer than process 0 waits, because it knows who is missing.
        found = _stored(client, f"{key}/agree", time.monotonic() + timeout_seconds + 10)
        late, answer = json.loads(found or '["process 0 does not answer", ""]')
    if late:
        raise DistributedError(late)
    return answer


def _stored(client: Any, key: str, deadline: float) -> str | None:
    """The text under a key; None where there is none by then. Ctrl-C gets through every second."""
    while True:
        left = deadline - time.monotonic()
        try:
            return client.blocking_key_value_get(key, int(1000 * min(1.0, max(0.001, left))))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise DistributedError(f"the coordinator cannot be reached: {error}") from error
            if left <= 0:
                return None


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Where the block fails in one process, it fails in all of them.

    Without it the others would wait for that one in the next collective operation. The block itself
    must wait for no other process.

    Raises:
      DistributedError: in the processes where the block was done: who failed, and its message.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    problem = (str(error) or type(error).__name__) if error else ""
    failed = agree(json.dumps([socket.gethostname(), problem]), describe_failures)
    if failed:
        raise _in_all(error or DistributedError(failed))


def _in_all(error: Exception) -> Exception:
    """Marks an error that every process raises, so that none needs to be told of it."""
    error.is_in_all_processes = True  # type: ignore[attr-defined]
    return error


def describe_failures(texts: Sequence[str]) -> str:
    """Which processes say that they have failed, and how; "" where none does.

    >>> describe_failures(['["a", ""]', '["b", "no such file"]'])
    'process 1 (host b): no such file'
    """
    told = [json.loads(text) for text in texts]
    failed = [
        f"process {process} (host {host}): {problem}"
        for process, (host, problem) in enumerate(told)
        if problem
    ]
    more = [f"and {len(failed) - _NAMED} more processes"] if len(failed) > _NAMED else []
    return "\n".join(failed[:_NAMED] + more)


def check_equal_across_processes(values: Mapping[str, Any]) -> None:
    """Raises DistributedError in every process where the processes' values are not the same.

    Args:
      values: JSON values by what they are called in the message.
    """
    text = json.dumps([socket.gethostname(), values], default=str)
    if differences := agree(text, describe_differences):
        raise _in_all(DistributedError(differences))


def describe_differences(texts: Sequence[str]) -> str:
    """Which values differ between processes, and who has which; "" where none does.

    >>> describe_differences(['["a", {"seed": 0}]', '["b", {"seed": 1}]']).split("; ")[1]
    'different: seed = 0 in process 0 (host a), 1 in process 1 (host b)'
    """
    told = [json.loads(text) for text in texts]
    names = list(dict.fromkeys(name for _, values in told for name in values))
    different = []
    for name in names:
        groups: dict[str, list[str]] = {}
        for process, (host, values) in enumerate(told):
            value = json.dumps(values[name]) if name in values else "nothing"
            groups.setdefault(value, []).append(f"process {process} (host {host})")
        if len(groups) > 1:
            parts = [f"{value} in {_some(processes)}" for value, processes in groups.items()]
            different.append(f"{name} = {', '.join(parts)}")
    if not different:
        return ""
    more = [f"and {len(different) - _SHOWN} more"] if len(different) > _SHOWN else []
    return "the processes of one run must be started alike; different: " + "; ".join(
        different[:_SHOWN] + more
    )


def _some(processes: Sequence[str]) -> str:
    more = f" and {len(processes) - _NAMED} more" if len(processes) > _NAMED else ""
    return ", ".join(processes[:_NAMED]) + more


def software_versions() -> dict[str, Any]:
    """What this process runs: our own source, packages, and what changes JAX's programs."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    found = {"source of fope_jax, sha256": digest.hexdigest()[:16]}
    found["python"] = platform.python_version()
    found |= {package: _version(package) for package in PACKAGES}
    found |= {name: getattr(jax.config, name, None) for name in _JAX_SETTINGS}
    for name in _FLAGS:
        flags = os.environ.get(name, "").split()
        found[name] = " ".join(flag for flag in flags if not flag.startswith(_OWN_FLAGS))
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
