"""Position embeddings and length generalization in JAX.

    import fope_jax as fj

    run = fj.train("configs/recall.py:position=fope", "runs/fope", train_steps=500)
    table = fj.evaluate(run, contexts=[1, 2, 4])

``fope_jax.position`` has the methods as functions, `fope_jax.testing` their properties as
assertions, `fope_jax.api` the functions used here.
Importing this package imports neither jax nor flax: the first use of a name does. ``train``,
``evaluate``, ``extend``, ``report`` and ``spectrum`` are folders of the package too, and can be
called: ``fope_jax.train(...)`` is `fope_jax.api.train`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect

    from fope_jax.api import Run, evaluate, evaluate_tasks, extend, load, report, spectrum, train

    __version__: str

__all__ = [
    "Run",
    "__version__",
    "evaluate",
    "evaluate_tasks",
    "extend",
    "load",
    "report",
    "spectrum",
    "train",
]

_CALLABLE_FOLDERS = {"evaluate", "extend", "report", "spectrum", "train"}


class _CallableModule(ModuleType):
    """A folder of the package that is also the function of `fope_jax.api` of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self)(*args, **kwargs)

    # What `help` and notebooks show.

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect

        return inspect.signature(_function(self))

    @property
    def __doc__(self) -> str:
        parts = [_function(self).__doc__, vars(self).get("__doc__")]
        return "\n\n".join(filter(None, parts))


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE_FOLDERS and type(value) is ModuleType:  # it has just been imported
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _CALLABLE_FOLDERS or name in ("position", "testing"):
        return importlib.import_module(f"fope_jax.{name}")
    if name in __all__:
        return getattr(_api(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    folders = {name for name, value in globals().items() if isinstance(value, ModuleType)}
    return sorted({*__all__, "position", "testing", *folders} - {"importlib", "sys"})


def _function(folder: ModuleType) -> Callable[..., Any]:
    return getattr(_api(), folder.__name__.rpartition(".")[2])


def _api() -> ModuleType:
    from fope_jax.extras import require

    for library in ("ml_collections", "flax"):  # else the error names no extra
        require(library, "train")
    return importlib.import_module("fope_jax.api")


def _version() -> str:
    """The version of this copy of the package, "0+unknown" where nothing states it.

    In a checkout it is that of pyproject.toml: installed metadata may be of another copy.
    """
    import tomllib
    from importlib import metadata
    from pathlib import Path

    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        stated = tomllib.loads(project.read_text()).get("project", {})
        if stated.get("name") == "fope-jax":
            return stated["version"]
    try:
        return metadata.version("fope-jax")
    except metadata.PackageNotFoundError:
        return "0+unknown"
