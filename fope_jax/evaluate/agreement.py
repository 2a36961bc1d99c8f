"""Checks that the processes of a run were started alike.

Processes that differ would train on rows of different batches, or wait forever in a collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from fope_jax.config import Experiment, flat_values
from fope_jax.evaluate.run_data import RunData
from fope_jax.processes.agreement import check_equal_across_processes, software_versions


def check_processes_agree(
    experiment: Experiment,
    request: Mapping[str, Any],
    splits: Iterable[str] = ("train",),
    data: RunData | None = None,
) -> None:
    """Compares what all processes must share; does nothing in a single process.

    ``request`` holds the values of the command line that are not in ``experiment``; ``data`` is the
    token cache of a run that exists.

    Raises:
      DistributedError: in every process; lists what differs and which process has which value.
    """
    if jax.process_count() == 1:  # hashing the source would only slow the start
        return
    first = jax.local_devices()[0]
    values: dict[str, Any] = software_versions() | dict(request)
    values["devices"] = (
        f"{jax.local_device_count()} of {jax.device_count()}, {first.device_kind} "
        f"({first.platform}), in {jax.process_count()} processes"
    )
    values |= flat_values(experiment)
    values.pop("data.cache_dir")  # the path may differ between hosts; the content may not
    data = data or RunData(experiment.data)
    for split in splits:
        try:
            values[f"token cache, {split}"] = data.open(split).fingerprint
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            values[f"token cache, {split}"] = str(error)
    check_equal_across_processes(values)
