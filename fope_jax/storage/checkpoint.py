"""Verified checkpoints; Orbax writes the arrays.

    <directory>/<step>/<item>/        arrays as Orbax writes them ("params", "optimizer", ...)
    <directory>/<step>/metadata.json  the caller's metadata; path, dtype and shape of each array
    <directory>/<step>/manifest.json  sha256 and size of every file above; written last
    <directory>/quarantine/<step>     a damaged step that training moved aside

A step is valid only if its files match its manifest. Orbax alone silently casts a wrong dtype,
loads flipped bits and takes an empty directory for the newest step.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from fope_jax.processes.agreement import fail_together
from fope_jax.processes.collectives import (
    broadcast_from_process_0,
    is_main_process,
    wait_for_processes,
)
from fope_jax.storage.directories import (
    link_tree,
    list_file_sizes,
    move_tree,
    remove_tree,
    tree_sha256,
)
from fope_jax.storage.files import write_json
from fope_jax.storage.paths import absolute_path

log = logging.getLogger(__name__)

MANIFEST, METADATA, QUARANTINE = "manifest.json", "metadata.json", "quarantine"
_ATTEMPTS, _SECONDS_BETWEEN = 20, 0.1  # to remove the files of a failed save
_REASON = 400  # characters of a library's message; some have pages
_SHOWN = 3  # differing arrays named in an error


class CheckpointError(ValueError):
    """A checkpoint is damaged, belongs to another model, or cannot be written."""


class StoredItem(NamedTuple):
    """An item of a valid step: its directory, bytes and ``{name: "float32[8,64]"}``."""

    directory: Path
    size: int
    arrays: dict[str, str]


class CheckpointStore:
    """The checkpoints of one run, on disk or in a bucket; the newest ``keep`` are kept.

    All processes of one run write together into one shared directory; others may read meanwhile.
    Arrays can be restored onto other devices than they were saved from.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        self.directory = absolute_path(directory)
        self.keep = keep
        self._verified: set[int] = set()
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        metadata: Mapping[str, Any],
        shared: Mapping[str, StoredItem] = MappingProxyType({}),
    ) -> None:
        """Writes one step; returns when every file and the manifest are on disk.

        Args:
          step: optimizer updates done.
          items: name -> pytree of arrays; an empty tree is recorded without files.
          metadata: JSON values.
          shared: name -> item of another run, whose files get a second name here (hard links), so
            that neither run needs the other; copied where the disk has no links, and in buckets.

        Raises:
          CheckpointError: this step is not valid; earlier steps are untouched.
        """
        path, has_begun = self.directory / str(step), False
        try:
            if is_main_process():
                self._remove_unfinished()
                if path.is_dir() and any(path.iterdir()):
                    log.warning("%s was there before: moved to %s", path, self._quarantine(step))
            wait_for_processes(f"save {step}")
            has_begun = True
            args = {name: ocp.args.StandardSave(tree) for name, tree in _filled(items).items()}
            if args:
                # Without force Orbax refuses an existing empty directory.
                self._orbax.save(path, args=ocp.args.Composite(**args), force=True)
            if is_main_process():
                for name, item in shared.items():
                    link_tree(item.directory, path / name)
                shapes = {name: _describe(tree) for name, tree in items.items()}
                shapes |= {name: item.arrays for name, item in shared.items()}
                content = {"step": step, "metadata": dict(metadata), "items": shapes}
                write_json(path / METADATA, content)
                write_json(path / MANIFEST, {"files": tree_sha256(path, skip=MANIFEST)})
            wait_for_processes(f"saved {step}")
        except Exception as error:
            if is_main_process():
                self._remove_failed(path if has_begun else None)
            reason = " ".join(str(error).split())[:_REASON]
            raise CheckpointError(f"cannot save checkpoint {path}: {reason}") from error
        self._verified.add(step)
        if is_main_process():
            self._remove_older(step)

    def latest_valid_step(self, quarantine: bool = False) -> int | None:
        """The newest step whose files match its manifest; None if no save has finished.

        Process 0 checks for all; if it fails, all fail. Warns of newer damaged or unfinished steps.

        Args:
          quarantine: move those steps aside. Only for the writer: to readers a save in progress
            looks like one that was cut off.

        Raises:
          CheckpointError: all finished checkpoints are damaged; starting over would lose the run.
        """
        found = None
        with fail_together():
            if is_main_process():
                found = self._newest_valid_step(quarantine)
        step = broadcast_from_process_0(-1 if found is None else found)
        if step < 0:
            return None
        self._verified.add(step)
        return step

    def _newest_valid_step(self, quarantine: bool) -> int | None:
        damaged: dict[int, str] = {}
        for step in self._steps():
            damage = self._damage(step)
            if damage is None:
                break
            damaged[step] = damage
        else:
            step = None
            if any((self.directory / str(bad) / MANIFEST).exists() for bad in damaged):
                raise CheckpointError(
                    "no valid checkpoint is left; bring one back, or move the whole run away to "
                    "start over:\n"
                    + "\n".join(f"  {self.directory / str(b)}: {d}" for b, d in damaged.items())
                )
        for bad, damage in damaged.items():
            path = self.directory / str(bad)
            action = f"moved to {self._quarantine(bad)}" if quarantine else "skipped"
            warnings.warn(f"checkpoint {path} is damaged: {damage}; {action}", stacklevel=3)
        return step

    def _quarantine(self, step: int) -> Path:
        quarantine = self.directory / QUARANTINE
        names = (str(step) if n == 1 else f"{step}.{n}" for n in itertools.count(1))
        target = next(quarantine / name for name in names if not (quarantine / name).exists())
        move_tree(self.directory / str(step), target)
        self._verified.discard(step)
        return target

    def newest_step(self) -> int:
        """The newest step with a directory, valid or not; -1 without any."""
        return max(self._steps(), default=-1)

    def metadata(self, step: int) -> dict[str, Any]:
        return self._content(step)["metadata"]

    def item(self, step: int, name: str) -> StoredItem:
        """An item of ``step`` for another run to share; CheckpointError for a damaged step."""
        arrays, directory = self._content(step)["items"][name], self.directory / str(step) / name
        size = sum(list_file_sizes(directory).values()) if arrays else 0
        return StoredItem(directory, size, arrays)

    def restore(self, step: int, abstract_items: Mapping[str, Any]) -> dict[str, Any]:
        """Reads items of ``step`` bit for bit.

        ``abstract_items`` hold arrays or ShapeDtypeStructs; their shardings place the result.

        Raises:
          CheckpointError: damaged files, or other names, shapes or dtypes than asked for; checked
            before any array is read.
        """
        path = self.directory / str(step)
        stored = self._content(step)["items"]
        for name in abstract_items:
            if name not in stored:
                raise CheckpointError(
                    f"checkpoint {path} has no item {name!r}; it has {', '.join(stored)}"
                )
        _check_same_arrays(
            path, stored, {name: _describe(tree) for name, tree in abstract_items.items()}
        )
        args = {
            name: ocp.args.StandardRestore(jax.tree.map(_with_sharding, tree))
            for name, tree in _filled(abstract_items).items()
        }
        restored = self._orbax.restore(path, args=ocp.args.Composite(**args)) if args else {}
        return {
            name: restored[name] if name in args else tree for name, tree in abstract_items.items()
        }

    def with_stored_dtypes(self, step: int, item: str, abstract: Any) -> Any:
        """``abstract`` with the dtypes stored in ``item`` of ``step``, matched by name."""
        stored = self._content(step)["items"].get(item, {})

        def with_dtype(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            dtype = stored.get(_name(path), "").partition("[")[0] or leaf.dtype
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

        return jax.tree_util.tree_map_with_path(with_dtype, abstract)

    def close(self) -> None:
        self._orbax.close()

    def _steps(self) -> list[int]:
        """Steps with a directory, newest first."""
        if not self.directory.is_dir():
            return []
        found = [p for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir()]
        return sorted((int(p.name) for p in found), reverse=True)

    def _content(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step)
        if step not in self._steps():
            steps = ", ".join(map(str, sorted(self._steps()))) or "none"
            raise CheckpointError(f"checkpoint {path} does not exist; there are: {steps}")
        damage = self._damage(step)
        if damage is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: {damage}")
        return json.loads((path / METADATA).read_text())

    def _damage(self, step: int) -> str | None:
        """How the files of ``step`` differ from its manifest, or None."""
        path = self.directory / str(step)
        if step in self._verified:
            return None
        try:
            expected = json.loads((path / MANIFEST).read_text())["files"]
        except FileNotFoundError:
            if not any(path.iterdir()):
                return "it is empty"
            return "no manifest (the save was cut off, or is under way)"
        except (ValueError, KeyError, TypeError, RecursionError):
            expected = None
        if not isinstance(expected, dict):
            return f"{MANIFEST} cannot be read"
        found = tree_sha256(path, skip=MANIFEST)
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if expected.get(name) != found[name]:
                return f"{name} has changed (sha256)" if name in expected else f"{name} was added"
        self._verified.add(step)
        return None

    def _remove_older(self, step: int) -> None:
        """Keeps the newest ``keep`` steps up to this one; later steps belong to another run."""
        try:
            written = [known for known in self._steps() if known <= step]
            for old in written[self.keep :]:
                remove_tree(self.directory / str(old))
        except Exception as error:  # of any bucket library; the new step is already saved
            log.warning("older checkpoints in %s cannot be removed: %s", self.directory, error)

    def _remove_failed(self, path: Path | None) -> None:
        """Removes the files of a failed save; retries, as its threads may still be writing."""
        left: list[Path] = []
        for _ in range(_ATTEMPTS):
            self._remove_unfinished()
            with contextlib.suppress(OSError):
                remove_tree(path) if path else None
            time.sleep(_SECONDS_BETWEEN)
            with contextlib.suppress(OSError):
                left = [p for p in self.directory.glob("*") if _TEMPORARY in p.name or p == path]
            if not left:
                return
        log.warning("left by a save that failed, and in use: %s", ", ".join(map(str, left)))

    def _remove_unfinished(self) -> None:
        with contextlib.suppress(OSError):  # the save itself reports the error
            for path in self.directory.glob(f"*{_TEMPORARY}*"):
                remove_tree(path)


_TEMPORARY = ".orbax-checkpoint-tmp"


def _filled(items: Mapping[str, Any]) -> dict[str, Any]:
    """The items with arrays: Orbax refuses an empty tree."""
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(tree: Any) -> dict[str, str]:
    """``{"layers/query": "float32[8,64]"}`` for the arrays of a pytree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_same_arrays(path: Path, stored: dict, wanted: dict) -> None:
    pairs = {
        f"{item}/{name}": (stored[item].get(name, "nothing"), arrays.get(name, "nothing"))
        for item, arrays in wanted.items()
        for name in sorted(arrays.keys() | stored[item].keys())
    }
    differences = [
        f"  {name}: checkpoint {there}, this model {here}"
        for name, (there, here) in pairs.items()
        if there != here
    ]
    if differences:
        more = ["  ..."] if len(differences) > _SHOWN else []
        raise CheckpointError(
            f"{path} is a checkpoint of another model; {len(differences)} of {len(pairs)} arrays"
            " differ:\n" + "\n".join(differences[:_SHOWN] + more)
        )
