"""`fope --version`: what is installed, without importing it."""

from __future__ import annotations

import platform

import fope_jax
from fope_jax.extras import installed_version

PACKAGES = ("jax", "flax", "orbax-checkpoint")


def version_text(with_devices: bool = False) -> str:
    """One line of versions; ``with_devices`` adds one of jax's devices, which starts jax."""
    packages = {"python": platform.python_version()}
    packages |= {name: installed_version(name) or "not installed" for name in PACKAGES}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    line = f"fope-jax {fope_jax.__version__} ({versions})"
    return f"{line}\n{_devices()}" if with_devices else line


def _devices() -> str:
    import jax

    device = jax.devices()[0]
    return f"devices: {jax.device_count()} x {device.device_kind} ({device.platform})"
