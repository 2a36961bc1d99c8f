"""Compiled programs are kept on this machine, so that the next process need not compile them.

It is JAX's own cache. JAX_COMPILATION_CACHE_DIR says where it is, JAX_COMPILATION_CACHE_MAX_SIZE
how many bytes it may take (what was used longest ago goes first), and
JAX_ENABLE_COMPILATION_CACHE=false turns it off.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

from fope_jax.storage.paths import user_cache_dir

_DEFAULTS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 2**30),
    # A command compiles many programs that take less than JAX's second.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def keep_programs() -> None:
    """Sets what JAX reads when it is imported; no effect after that, or where a directory is set.

    The directory is ``$FOPE_CACHE/programs/MACHINE``. Programs for a CPU use its instructions, so
    machines that share a home directory have one each.
    """
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = user_cache_dir() / "programs" / _machine()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # nothing can be kept: a home directory that is read-only, or none
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def _machine() -> str:
    """Names the kind of CPU: all that Linux knows of its instructions, else the platform's name."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    of_cpu = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    described = "\n".join(sorted(set(of_cpu))) or f"{sys.platform} {platform.processor()}"
    return f"{platform.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
