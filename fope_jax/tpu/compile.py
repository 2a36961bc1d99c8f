"""Compiles one training step for one slice and measures the compiled program.

This is a program that `fope plan` starts once per compilation: the TPU compiler reads its
environment before jax starts, and a compilation can end its process.

    python -m fope_jax.tpu.compile < request.json > row.json
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import jax

from fope_jax.config import Experiment, build_experiment
from fope_jax.model.attention import default_block
from fope_jax.position.registry import import_modules
from fope_jax.tpu.flops import model_flops, program_flops, visits_of_queries
from fope_jax.tpu.hlo import measure_traffic
from fope_jax.tpu.topology import parse_topology, topology_devices
from fope_jax.train.compiler_options import compile_step
from fope_jax.train.state import plan_state, trace_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
# The compiler's two messages; the second if the temporaries alone are too large.
_OUT_OF_MEMORY = (
    re.compile(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm"),
    re.compile(r"temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM \(([\d.]+)([KMG]?)\)"),
)


def measure_step(experiment: Experiment, topology: str) -> dict[str, Any]:
    """Compiles one training step and returns what it needs and what bounds it, as JSON values.

    The values are per device and step. All rows have ``flops``, ``fits`` and ``needed_bytes``. Rows
    that do not fit have ``limit_bytes``. Rows that fit have the ``compiler_options`` that were
    used, ``memory`` by class, ``hbm_bytes``,
    ``collective_bytes``, ``seconds`` at the chip's peak, the largest as ``bound``, and
    ``mfu_bound``. Rows of several slices that fit have ``dcn_bytes``, sent to other slices; their
    seconds are missing where the chip's share of that network is not published.
    """
    devices = topology_devices(topology)
    chip, _, num_slices = parse_topology(topology)
    train = experiment.train
    began = time.perf_counter()
    plan = plan_state(experiment, devices)
    traced = trace_step(plan)
    trips = visits_of_queries(train.length, experiment.model.attention_block or default_block())
    flops = program_flops(traced.jaxpr, trips) / len(devices)
    useful = model_flops(
        experiment.model, experiment.position, train.batch_size, train.length
    ) / len(devices)
    row: dict[str, Any] = {
        "devices": len(devices),
        "attention": plan.attention.name,
        "attention_reason": plan.attention.reason,
        "device_kind": devices[0].device_kind,
        "mesh": experiment.mesh.axis_sizes(len(devices), num_slices),
        "flops": flops,
        "model_flops": useful,
    }
    try:
        compiled, options = compile_step(plan, traced)
    except jax.errors.JaxRuntimeError as error:
        if (sizes := parse_out_of_memory(str(error))) is None:
            raise
        row |= {"fits": False, "needed_bytes": sizes[0], "limit_bytes": sizes[1]}
        return row | {"compile_seconds": time.perf_counter() - began}
    row["compile_seconds"] = time.perf_counter() - began
    classes = memory_by_class(compiled)
    moved = measure_traffic(compiled.as_text(), trips)
    seconds = {
        "compute": flops / (chip.flops / chip.cores),
        "hbm": moved.hbm / (chip.hbm_bandwidth / chip.cores),
        "ici": sum(moved.collectives.values()) / (chip.ici_bandwidth / chip.cores),
    }
    dcn = {"dcn_bytes": moved.between_slices} if num_slices > 1 else {}
    if dcn and chip.dcn_bandwidth is not None:
        seconds["dcn"] = moved.between_slices / (chip.dcn_bandwidth / chip.cores)
    bound = max(seconds, key=lambda name: seconds[name])
    return row | {
        "fits": True,
        "compiler_options": options,
        "needed_bytes": sum(classes.values()),
        "memory": classes,
        "hbm_bytes": moved.hbm,
        "collective_bytes": moved.collectives,
        **dcn,
        "seconds": seconds,
        "bound": bound,
        "mfu_bound": useful / (chip.flops / chip.cores) / seconds[bound],
    }


def memory_by_class(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled program needs of a device; their sum is all that it needs."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def parse_out_of_memory(message: str) -> tuple[int, int] | None:
    """Bytes needed and available, from the compiler's message; None for any other message.

    >>> parse_out_of_memory("Ran out of memory in memory space hbm. Used 58.4G of 15.7G hbm.")
    (62706522522, 16857746637)
    """
    for pattern in _OUT_OF_MEMORY:
        if match := pattern.search(message):
            needed, unit, limit, limit_unit = match.groups()
            needed_bytes = round(float(needed) * _UNITS[unit])
            return needed_bytes, round(float(limit) * _UNITS[limit_unit])
    return None


if __name__ == "__main__":
    # Output of jax or the compiler would mix with the JSON.
    answer, sys.stdout = sys.stdout, sys.stderr
    try:
        values, topology = json.load(sys.stdin)
        import_modules(values["position"])  # the parent process has imported them too
        result = measure_step(build_experiment(values), topology)
    except ValueError as error:
        result = {"error": str(error)}
    json.dump(result, answer)
