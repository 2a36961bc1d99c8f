"""Whether the processes of a run were started alike, asked before the first step of any of them.

Hosts that differ would train together all the same: each would feed its rows of another batch into
one program, or wait for ever in an operation that the others never come to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from fope_jax.config import Experiment, flat_values
from fope_jax.data.cache import open_cache
from fope_jax.processes.agreement import check_equal_across_processes, software_versions


def check_processes_agree(
    experiment: Experiment, request: Mapping[str, Any], splits: Iterable[str] = ("train",)
) -> None:
    """Compares what all processes must share; a single process has nothing to compare.

    Args:
      experiment: that this process would train or evaluate.
      request: what else the command line asks for.
      splits: of the token cache that are read.

    Raises:
      DistributedError: in every process, what differs and who has which value: a key of the
        experiment, the request, our source, a package, devices, or the content of the token cache,
        which also counts as different where one process has none.
    """
    if jax.process_count() == 1:  # it would read all of our source at each start for nothing
        return
    first = jax.local_devices()[0]
    values: dict[str, Any] = software_versions() | dict(request)
    values["devices"] = (
        f"{jax.local_device_count()} of {jax.device_count()}, {first.device_kind} "
        f"({first.platform}), in {jax.process_count()} processes"
    )
    values |= flat_values(experiment)
    values.pop("data.cache_dir")  # a host may keep the token cache elsewhere: content is compared
    for split in splits:
        try:
            values[f"token cache, {split}"] = open_cache(experiment.data, split).fingerprint
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            values[f"token cache, {split}"] = str(error)
    check_equal_across_processes(values)
