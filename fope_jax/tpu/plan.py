"""The cases of `fope plan`, combinations of size, method, length and slice, and their rows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.config import Experiment, TrainConfig, experiment_to_dict
from fope_jax.gallery.examples import choose, examples
from fope_jax.model.config import REMAT, TransformerConfig
from fope_jax.model.presets import PRESETS
from fope_jax.model.sharding import MeshConfig
from fope_jax.processes.agreement import FLAG_VARIABLES
from fope_jax.processes.cores import available_cores
from fope_jax.storage.files import read_json, write_json
from fope_jax.tpu.topology import COMPILER_ENVIRONMENT, Topology, libtpu_version, parse_topology

GB_PER_COMPILATION = 6  # host memory; the largest compilation measured took 4
Row = dict[str, Any]


class PlanError(RuntimeError):
    """A compilation that failed without an answer; the message ends with its last lines."""


class Case(NamedTuple):
    """One program: its experiment and its labels in the table."""

    size: str
    method: str
    topology: str
    experiment: Experiment


def make_cases(
    experiment: Experiment,
    *,
    topologies: Sequence[str],
    methods: Sequence[str] = (),
    lengths: Sequence[int] = (),
    sizes: Sequence[str] = (),
    mesh: MeshConfig | None = None,
    compare_options: bool = False,
) -> list[Case]:
    """All combinations, checked as far as possible without the compiler.

    A longer length takes fewer rows, so that a step keeps the tokens of the config. Methods are
    made for their training length. If the rows no longer divide the devices and no mesh is given,
    several devices share the tokens of a row. ValueError for an unknown name, with those accepted.

    Args:
      experiment: of the config, whose values replace empty ``methods``, ``lengths`` and ``sizes``.
      topologies: such as "v5e:4x4".
      methods: labels of ``gallery.examples``.
      lengths: tokens of a row.
      sizes: names of ``PRESETS``.
      mesh: replaces the config's.
      compare_options: follows each case by one without ``train.compiler_options``.
    """
    if unknown := [size for size in sizes if size not in PRESETS]:
        raise ValueError(f"size {unknown[0]!r}; accepted: {', '.join(PRESETS)}")
    models = {size: dataclasses.replace(experiment.model, **PRESETS[size]) for size in sizes}
    models = models or {_size_of(experiment.model): experiment.model}
    lengths = lengths or (experiment.train.length,)
    cases = []
    for topology, (size, model), length in itertools.product(topologies, models.items(), lengths):
        train = _with_length(experiment.train, length)
        chosen = choose(methods, examples(length, model.shape.head_dim)) if methods else None
        for method, position in (chosen or {experiment.name: experiment.position}).items():
            changed = dataclasses.replace(
                experiment,
                model=model,
                train=train,
                position=position,
                mesh=mesh or _fitting_mesh(experiment, train.batch_size, parse_topology(topology)),
            )
            cases.append(Case(size, method, topology, changed))
            if compare_options and train.compiler_options != ():
                plain = dataclasses.replace(train, compiler_options=())
                changed = dataclasses.replace(changed, train=plain)
                cases.append(Case(size, method, topology, changed))
    return cases


def _size_of(model: TransformerConfig) -> str:
    """The name of the preset with the sizes of ``model``, or its layers and width."""
    for name, sizes in PRESETS.items():
        if all(getattr(model, key) == value for key, value in sizes.items()):
            return name
    return f"{model.num_layers} x {model.d_model}"


def _with_length(train: TrainConfig, length: int) -> TrainConfig:
    tokens = train.batch_size * train.length
    if length < 1 or tokens % length:
        raise ValueError(
            f"length {length}: a step of the config has {train.batch_size} x {train.length} = "
            f"{tokens} tokens, which are no whole rows of it"
        )
    rows = tokens // length
    accumulate = math.gcd(train.accumulate, rows)
    return dataclasses.replace(
        train, length=length, batch_size=rows, first_lengths=(), accumulate=accumulate
    )


def _fitting_mesh(experiment: Experiment, rows: int, topology: Topology) -> MeshConfig:
    """The config's mesh; if rows are too few, ``context`` devices share a row."""
    sizes = experiment.mesh.axis_sizes(topology.num_devices, topology.num_slices)
    copies = sizes["data"] * sizes["fsdp"]
    if experiment.train.accumulate > 1 or copies <= rows:
        return experiment.mesh
    context = copies * sizes["context"] // rows
    return dataclasses.replace(experiment.mesh, data=1, fsdp=-1, context=context)


def plan(
    cases: Sequence[Case],
    *,
    cache: Path | None,
    jobs: int | None = None,
    advise: bool = True,
    done: Callable[[Case, Row], None] = lambda *_: None,
) -> list[Row]:
    """Compiles every case that is not in the cache, several at once; one row for each, in order.

    Args:
      cases: from ``make_cases``.
      cache: directory with one JSON file per program; None keeps none.
      jobs: compilations at once; None takes what cores and memory allow.
      advise: compiles changes of a case that does not fit and reports the first that does.
      done: called with each case and its row when it is ready.

    Raises TopologyError if the TPU compiler is not installed, PlanError if a compilation fails for
    another reason than memory.
    """
    versions = {"libtpu": libtpu_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}

    def plan_case(case: Case) -> Row:
        answer = compile_cached(case.experiment, case.topology, versions, cache)
        if advise and answer.get("fits") is False:
            answer["advice"] = _advice(case, versions, cache)
        train, model = case.experiment.train, case.experiment.model
        row = {
            "topology": case.topology,
            "size": case.size,
            "method": case.method,
            "length": train.length,
            "batch": train.batch_size,
            "accumulate": train.accumulate,
            "remat": model.remat,
            "scan_layers": model.scan_layers,
            "dtype": model.dtype,
            "versions": versions,
            **answer,
        }
        done(case, row)
        return row

    with ThreadPoolExecutor(jobs or _default_jobs()) as pool:
        return list(pool.map(plan_case, cases))


def _default_jobs() -> int:
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(available_cores()), int(memory // GB_PER_COMPILATION)))


def compile_cached(
    experiment: Experiment, topology: str, versions: dict[str, str], cache: Path | None
) -> Row:
    """The row from ``tpu.compile`` for one program, or from the cache."""
    # The package's code is part of the key: a change of it changes the program.
    sources = hashlib.sha256()
    package = Path(__file__).parents[1]
    for room in ("model", "position", "train", "tpu"):
        for path in sorted((package / room).rglob("*.py")):
            sources.update(path.read_bytes())
    parts = (experiment.model, experiment.position, experiment.train, experiment.mesh)
    flags = [os.environ.get(name, "") for name in FLAG_VARIABLES]
    program = (experiment.data.packing, *map(repr, parts))
    identity = [topology, versions, sources.hexdigest(), flags, *program]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    path = cache / f"{key}.json" if cache else None
    if path and path.is_file():
        with contextlib.suppress(OSError, ValueError):  # one that cannot be read is made again
            return read_json(path) | {"cached": True}
    run = subprocess.run(
        [sys.executable, "-m", "fope_jax.tpu.compile"],
        input=json.dumps([experiment_to_dict(experiment), topology]).encode(),
        capture_output=True,
        check=False,
        env=os.environ | COMPILER_ENVIRONMENT,
    )
    if run.returncode:
        tail = run.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise PlanError(f"{topology}: the compilation failed:\n" + "\n".join(tail))
    answer = json.loads(run.stdout)
    if path and "error" not in answer:
        with contextlib.suppress(OSError):  # the answer is worth more than its copy
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, answer)
    return answer | {"cached": False}


def _advice(case: Case, versions: dict[str, str], cache: Path | None) -> str:
    """The first change that fits, by compiling; changes that cost least time come first."""
    for text, changed in _changes(case.experiment):
        if compile_cached(changed, case.topology, versions, cache).get("fits"):
            return f"{text} fits"
    return "no remat or accumulation fits: take a larger slice, or fewer rows a step"


def _changes(experiment: Experiment) -> Iterable[tuple[str, Experiment]]:
    """Changes that may make a step fit, with their descriptions."""
    model, train, mesh = experiment.model, experiment.train, experiment.mesh
    if mesh.data != 1:  # copies of the model, which devices could share
        spread = dataclasses.replace(mesh, data=1, fsdp=-1)
        yield "mesh.data=1 with mesh.fsdp=-1", dataclasses.replace(experiment, mesh=spread)
    if model.scan_layers:  # a scan holds what layers keep for the backward pass twice
        in_a_row = dataclasses.replace(model, scan_layers=False)
        yield "model.scan_layers=False", dataclasses.replace(experiment, model=in_a_row)
    for remat in REMAT[REMAT.index(model.remat) + 1 :]:
        model = dataclasses.replace(model, remat=remat)
        yield f"model.remat={remat}", dataclasses.replace(experiment, model=model)
    for times in (4, 16):
        pieces = train.accumulate * times
        if train.batch_size % pieces == 0:
            smaller = dataclasses.replace(train, accumulate=pieces)
            text = f"model.remat={model.remat} with train.accumulate={pieces}"
            yield text, dataclasses.replace(experiment, model=model, train=smaller)
