"""The numbers of a run for an experiment tracker: one hook, without a dependency.

``train.tracker = "module:function"`` names what makes a tracker, a function or a class that takes
the run's directory and its configuration:

    import wandb

    class WeightsAndBiases:
        def __init__(self, workdir, config):
            name = workdir.replace("/", "-")
            self.run = wandb.init(project="fope", id=name, resume="allow", config=config)

        def __call__(self, step, numbers):  # such as {"train/loss": 3.2, "train/grad_norm": 0.4}
            self.run.log(numbers, step=step)

        def close(self):
            self.run.finish()

With this in ``tracking.py``:

    PYTHONPATH=. fope train ... --config.train.tracker=tracking:WeightsAndBiases

A tracker that fails ends no run: a warning says so once, and metrics.jsonl has every number.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from fope_jax.config import ConfigError

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the numbers of a step by the names of their curves; some may be NaN.

    It may also have ``close()``, which is called at the end. It is used in the main process alone.
    """

    def __call__(self, step: int, numbers: Mapping[str, float]) -> Any: ...


MakeTracker = Callable[[str, dict[str, Any]], Tracker]  # (workdir, configuration)


def find_tracker(name: str) -> MakeTracker:
    """What ``train.tracker`` names; its module has been imported with the configuration.

    Raises:
      ConfigError: the module was not imported, as it is not of the user's own configuration file
        but of a config.json; or has no such callable.
    """
    module, _, path = name.partition(":")
    if module not in sys.modules:
        raise ConfigError(
            f"config.train.tracker = {name!r} is in the Python module {module!r}, whose code would "
            f"run when it is imported; allow it with --allow-module {module} if you trust it, or "
            "turn it off with --config.train.tracker=none"
        )
    make = getattr(sys.modules[module], path, None)
    if not callable(make):
        raise ConfigError(
            f"config.train.tracker = {name!r}: the module {module!r} has no callable {path!r}"
        )
    return cast(MakeTracker, make)


class SafeTracker:
    """A tracker that warns when it fails, once, and then gets no more numbers."""

    def __init__(self, make: Callable[[], Tracker]):
        self._tracker: Tracker | None = None
        self._tracker = self._attempt(lambda: _check_callable(make()))

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._attempt(lambda: tracker(step, dict(numbers)))

    def close(self) -> None:
        close = getattr(self._tracker, "close", None)
        if close is not None:
            self._attempt(close)
        self._tracker = None

    def _attempt(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("the tracker gets no more numbers (%s); metrics.jsonl goes on", reason)
            return None


def _check_callable(tracker: Any) -> Tracker:
    if not callable(tracker):
        raise TypeError(f"it is {tracker!r:.60}, which cannot be called")
    return tracker
