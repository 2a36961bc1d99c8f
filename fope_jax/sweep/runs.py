"""A sweep as data: its runs, their configurations and their parents.

A sweep file is Python with a function ``get_sweep(arg)`` that returns a list of ``Train`` and
``Extend``, parents first:

    from fope_jax.sweep import Train, product

    def get_sweep(arg=""):
        return [
            Train(f"{method}_{seed}", f"configs/quickstart.py:position={method},seed={seed}")
            for seed, method in product(seed=range(3), method=("rope", "fope"))
        ]
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from fope_jax.config import (
    Experiment,
    build_experiment,
    call_in_file,
    experiment_to_dict,
    incompatible_changes,
    load_config,
    split_spec,
)
from fope_jax.config.experiment import differing_values, flat_values
from fope_jax.config.fields import ConfigError, nearest
from fope_jax.extend.child import child_experiment
from fope_jax.train.options import (
    VerbParser,
    add_extend_options,
    add_processes,
    add_train_options,
    parse_arguments,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def product(**axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """All combinations of the values; the last axis varies fastest.

    >>> product(seed=(0, 1), method=("rope", "fope"))
    [(0, 'rope'), (0, 'fope'), (1, 'rope'), (1, 'fope')]
    """
    return list(itertools.product(*axes.values()))


def zipped(**axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Tuples of the first values, the second, ...; raises ValueError for different lengths.

    >>> zipped(length=(64, 128), batch_size=(32, 16))
    [(64, 32), (128, 16)]
    """
    sizes = {name: len(values) for name, values in axes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"axes of different lengths cannot be zipped: {sizes}")
    return list(zip(*axes.values(), strict=True))


@dataclass(frozen=True)
class Train:
    """A run of `fope train` in directory ``name``; overrides are such as ``"train.steps=100"``."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Extend:
    """A run of `fope extend` from run ``parent``; options are such as ``("--match", "index")``."""

    name: str
    parent: str
    method: str
    length: int
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


Run = Train | Extend


@dataclass(frozen=True)
class PlannedRun:
    """A checked run and its experiment."""

    run: Run
    experiment: Experiment

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def parent(self) -> str | None:
        """The run that must finish before this one."""
        return self.run.parent if isinstance(self.run, Extend) else None

    def command(self, workdir: Path) -> list[str]:
        """The arguments of ``fope`` for the run in ``workdir / name``."""
        return _command(self.run, workdir)

    def check_same(self, config: Mapping[str, Any], path: Path, advice: str) -> None:
        """Raises ConfigError if ``path`` holds a run of another ``config``, with ``advice``.

        Keys that may change when a run resumes tell no two runs apart.
        """
        there = as_stored(build_experiment(config))
        if changes := incompatible_changes(there, as_stored(self.experiment)):
            raise ConfigError(
                f"{path} holds another run than the sweep's; {advice}. Different:\n"
                + "\n".join(f"  {change}" for change in changes)
            )


def as_stored(experiment: Experiment) -> dict[str, Any]:
    """The values of an experiment as a JSON file has them: with lists in place of tuples."""
    return json.loads(json.dumps(experiment_to_dict(experiment)))


def _command(run: Run, workdir: Path) -> list[str]:
    directory = ["--workdir", str(workdir / run.name)]
    overrides = [f"--config.{override}" for override in run.overrides]
    if isinstance(run, Train):
        return ["train", "--config", run.config, *directory, *overrides]
    origin = ["extend", str(workdir / run.parent), "--method", run.method]
    return [*origin, "--length", str(run.length), *directory, *run.options, *overrides]


def load_sweep(spec: str) -> list[PlannedRun]:
    """Reads a sweep file ``"path.py:arg"`` and builds all its experiments before any runs.

    Raises:
      ConfigError: no such file or function, a duplicate name, two runs of one variant and seed, a
        parent that does not precede its child, or a run that cannot be built.
    """
    path, arg = split_spec(spec)
    runs = call_in_file("sweep", path, "get_sweep", arg)
    if not isinstance(runs, Iterable) or isinstance(runs, (str, bytes)):
        raise ConfigError(f"get_sweep of {path!r} returns {runs!r:.80}; accepted: a list of runs")
    try:
        return check_sweep(runs)
    except ConfigError as error:
        raise ConfigError(f"sweep file {path!r}: {error}") from error


def check_sweep(runs: Iterable[Run]) -> list[PlannedRun]:
    """The runs with their experiments; see `load_sweep`."""
    planned: dict[str, PlannedRun] = {}
    for run in runs:
        if not isinstance(run, Run):
            raise ConfigError(f"the sweep has {run!r:.80}; accepted: Train and Extend")
        for field in fields(run):
            value, accepted = getattr(run, field.name), "a text"
            # The length is checked by the parser of the verb.
            is_accepted = isinstance(value, str) or field.name == "length"
            if field.name in ("overrides", "options"):
                accepted, is_list = "a list of texts", isinstance(value, (list, tuple))
                is_accepted = is_list and all(isinstance(item, str) for item in value)
            if not is_accepted:
                name = f"run {run.name!r}: {field.name}"
                raise ConfigError(f"{name} = {value!r:.80}; accepted: {accepted}")
        if not _NAME.fullmatch(run.name):
            raise ConfigError(f"run name {run.name!r}; accepted: letters, digits and _ . + -")
        if run.name in planned:
            raise ConfigError(f"two runs are called {run.name!r}")
        try:
            planned[run.name] = PlannedRun(run, _build(run, planned))
        except ValueError as error:
            raise ConfigError(f"run {run.name!r}: {error}") from error
    if not planned:
        raise ConfigError("the sweep has no runs")
    _check_names(planned.values())
    return list(planned.values())


def choose(planned: Sequence[PlannedRun], patterns: Sequence[str]) -> list[PlannedRun]:
    """The runs whose names match one of the shell patterns, such as ``rope_*``, in their order.

    Raises:
      ConfigError: a pattern that no name matches.
    """
    names = [run.name for run in planned]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"no run of the sweep is called {pattern!r}; runs: {', '.join(names)}"
            )
    return [run for run in planned if any(fnmatch.fnmatchcase(run.name, p) for p in patterns)]


def with_parents(chosen: Sequence[PlannedRun], planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The chosen runs of a sweep and those that they extend, parents first."""
    needed = {run.name for run in chosen}
    for run in reversed(planned):
        if run.name in needed and run.parent is not None:
            needed.add(run.parent)
    return [run for run in planned if run.name in needed]


def _check_names(planned: Iterable[PlannedRun]) -> None:
    """Raises ConfigError for two runs that reports would take for one seed of one variant."""
    known: dict[tuple[str, int, int], PlannedRun] = {}
    for run in planned:
        key = run.experiment.name, run.experiment.seed, run.experiment.train.length
        if (other := known.setdefault(key, run)) is run:
            continue
        old, new = flat_values(other.experiment), flat_values(run.experiment)
        differing = [f"{key} ({one}, {two})" for key, one, two in differing_values(old, new)]
        raise ConfigError(
            f"runs {other.name!r} and {run.name!r} are both variant {key[0]!r} with seed {key[1]}, "
            f"but are not the same: {', '.join(differing) or 'their parents or options'}. Give one "
            'another variant: overrides=("name=NAME",)'
        )


class _Parser(VerbParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _build(run: Run, earlier: dict[str, PlannedRun]) -> Experiment:
    """The experiment of a run, with its options parsed as its verb parses them."""
    parser, workdir = _Parser(allow_abbrev=False, add_help=False), Path("sweep")
    (add_train_options if isinstance(run, Train) else add_extend_options)(parser)
    add_processes(parser)
    parser.add_argument("--traceback", action="store_true")
    options = parse_arguments(parser, _command(run, workdir)[1:])
    stated = {"workdir": workdir / run.name}
    if isinstance(run, Extend):
        stated["parent"] = workdir / run.parent
    for name, value in stated.items():
        if (given := getattr(options, name)) != value:
            raise ConfigError(f"its options give another {name}, {given}; that is the sweep's")
    if isinstance(run, Train):
        return build_experiment(load_config(options.config, options.overrides))
    if options.no_train:
        raise ConfigError(
            "its options have --no-train: a sweep trains its runs; `fope evaluate RUN --as METHOD` "
            "measures one under another position embedding"
        )
    if run.parent not in earlier:
        hint = nearest(run.parent, earlier)
        raise ConfigError(f"its parent {run.parent!r} is no run before it{hint}")
    parent = earlier[run.parent].experiment
    return child_experiment(
        parent,
        parent.train.steps,
        options.method,
        options.length,
        options.optimizer,
        options.overrides,
        config=load_config(options.config) if options.config else None,
        allow_shorter=options.allow_shorter,
    )
