"""Processes fail together and check that they were started alike."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fope_jax.processes.collectives import DistributedError, gather_texts

# Longer than any host needs to copy its token cache from a bucket.
AGREE_SECONDS = 3600
_SHOWN = 12  # differences named in a message
_NAMED = 3  # processes named for one value
# These decide the compiled program, which must be the same in all processes.
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
# Where a user sets options of the compiler.
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Dump directories may differ; device counts are compared separately.
_FLAGS_THAT_MAY_DIFFER = ("--xla_dump_", "--xla_force_host_platform_device_count")


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Fails in all processes if the block fails in one; else the others would wait for it.

    The block must not wait for other processes.

    Raises:
      DistributedError: in processes that succeeded; names those that failed and their messages.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    message = (str(error) or type(error).__name__) if error else ""
    texts = gather_texts(json.dumps([socket.gethostname(), message]), AGREE_SECONDS)
    if failures := describe_failures(texts):
        raise _mark_as_common(error or DistributedError(failures))


def _mark_as_common(error: Exception) -> Exception:
    """Marks an error that all processes raise, so that each can exit normally."""
    error.is_in_all_processes = True  # type: ignore[attr-defined]
    return error


def describe_failures(texts: Sequence[str]) -> str:
    """Which processes failed, with their messages; "" if none did.

    >>> describe_failures(['["a", ""]', '["b", "no such file"]'])
    'process 1 (host b): no such file'
    """
    failures = [
        f"process {process} (host {host}): {message}"
        for process, (host, message) in enumerate(map(json.loads, texts))
        if message
    ]
    more = [f"and {len(failures) - _NAMED} more processes"] if len(failures) > _NAMED else []
    return "\n".join(failures[:_NAMED] + more)


def check_equal_across_processes(values: Mapping[str, Any]) -> None:
    """Raises DistributedError in every process unless all have equal JSON ``values``, by name."""
    text = json.dumps([socket.gethostname(), values], default=str)
    if differences := describe_differences(gather_texts(text, AGREE_SECONDS)):
        raise _mark_as_common(DistributedError(differences))


def describe_differences(texts: Sequence[str]) -> str:
    """Which values differ between processes, and who has which; "" if none do.

    >>> describe_differences(['["a", {"seed": 0}]', '["b", {"seed": 1}]']).split("; ")[1]
    'different: seed = 0 in process 0 (host a), 1 in process 1 (host b)'
    """
    processes = [json.loads(text) for text in texts]
    differences = []
    for name in dict.fromkeys(name for _, values in processes for name in values):
        holders: dict[str, list[str]] = {}
        for process, (host, values) in enumerate(processes):
            value = json.dumps(values[name]) if name in values else "nothing"
            holders.setdefault(value, []).append(f"process {process} (host {host})")
        if len(holders) > 1:
            sides = [f"{value} in {_first_names(names)}" for value, names in holders.items()]
            differences.append(f"{name} = {', '.join(sides)}")
    if not differences:
        return ""
    more = [f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
    return "the processes of one run must be started alike; different: " + "; ".join(
        differences[:_SHOWN] + more
    )


def _first_names(processes: Sequence[str]) -> str:
    more = f" and {len(processes) - _NAMED} more" if len(processes) > _NAMED else ""
    return ", ".join(processes[:_NAMED]) + more


def software_versions() -> dict[str, Any]:
    """Hash of our source, package versions, and the settings that change JAX's programs."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    found: dict[str, Any] = {"source of fope_jax, sha256": digest.hexdigest()[:16]}
    found["python"] = platform.python_version()
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found |= {name: getattr(jax.config, name, None) for name in _JAX_SETTINGS}
    for name in FLAG_VARIABLES:
        flags = os.environ.get(name, "").split()
        found[name] = " ".join(f for f in flags if not f.startswith(_FLAGS_THAT_MAY_DIFFER))
    return found
