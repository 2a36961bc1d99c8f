"""Optional dependencies: one clear error in place of a ModuleNotFoundError."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType


def install_command(extra: str) -> str:
    """The pip line of an extra. No index has fope_jax: it is installed from the repository.

    >>> install_command("train")
    "pip install '.[train]'"
    """
    return f"pip install '.[{extra}]'"


def require(module: str, extra: str) -> ModuleType:
    """Imports ``module``, or says which extra of fope-jax brings it.

    Args:
      module: dotted name of a third-party module, such as ``"flax"``.
      extra: the extra that installs it: ``train``, ``data``, ``parquet``, ``tpu``, ``buckets``,
        ``gguf``, ``parity``, ``harness``, ``downstream``, ``docs`` or ``dev``.

    Raises:
      ImportError: the module is not installed; the message holds the pip line.

    >>> require("json", "train").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the module is there; something it needs is broken
        raise ImportError(
            f"{top} is not installed; it comes with the [{extra}] extra. In the repository of "
            f"fope_jax: {install_command(extra)}"
        ) from error


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, without importing it; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
