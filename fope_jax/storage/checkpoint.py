"""Verified checkpoints; Orbax writes the arrays.

    <directory>/<step>/<item>/        arrays as Orbax writes them ("params", "optimizer", ...)
    <directory>/<step>/metadata.json  the caller's metadata; path, dtype and shape of each array
    <directory>/<step>/manifest.json  sha256 and size of every file above; written last
    <directory>/<step>/unfinished     until then
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
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from fope_jax.processes.agreement import AGREE_SECONDS, fail_together
from fope_jax.processes.collectives import broadcast_from_process_0, gather_texts, is_main_process
from fope_jax.storage.directories import list_file_sizes, move_tree, remove_tree, tree_sha256
from fope_jax.storage.paths import absolute_path
from fope_jax.storage.run_paths import QUARANTINE
from fope_jax.storage.step_save import (
    MANIFEST,
    METADATA,
    NOT_LISTED,
    UNFINISHED,
    StepSave,
    StoredItem,
    begin_step,
    is_unfinished,
    remove_unfinished_step,
)

log = logging.getLogger(__name__)

_ATTEMPTS, _SECONDS_BETWEEN = 20, 0.1  # to remove the files of a failed save
_REASON = 400  # characters of a library's message; some have pages
_SHOWN = 3  # differing arrays named in an error


class CheckpointError(ValueError):
    """A checkpoint is damaged, belongs to another model, or cannot be written."""


class CheckpointStore:
    """The checkpoints of one run, on disk or in a bucket; the newest ``keep`` are kept.

    All processes of one run write together into one shared directory; others may read meanwhile.
    Arrays can be restored onto other devices than they were saved from.

    Args:
      directory: of the steps.
      keep: how many of the newest steps stay.
      keep_period: steps that are multiples of it stay too, for ever; None for none.
    """

    def __init__(
        self, directory: str | os.PathLike[str], keep: int = 2, keep_period: int | None = None
    ):
        self.directory = absolute_path(directory)
        self.keep, self.keep_period = keep, keep_period
        self._verified: set[int] = set()
        self._handler = ocp.StandardCheckpointHandler()
        self._under_way: StepSave | None = None

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        metadata: Mapping[str, Any],
        shared: Mapping[str, StoredItem] = MappingProxyType({}),
    ) -> None:
        """`start_save` and `wait`: returns when every file and the manifest are in storage."""
        self.start_save(step, items, metadata, shared)
        self.wait()

    def start_save(
        self,
        step: int,
        items: Mapping[str, Any],
        metadata: Mapping[str, Any],
        shared: Mapping[str, StoredItem] = MappingProxyType({}),
    ) -> StepSave:
        """Begins to write one step, after the one before; returns when arrays may change.

        Args:
          step: optimizer updates done.
          items: name -> pytree of arrays; an empty tree is recorded without files.
          metadata: JSON values.
          shared: name -> item of another run, whose files get a second name here (hard links), so
            that neither run needs the other; copied where the disk has no links, and in buckets.

        Returns:
          The save; all processes must `wait` for it together.

        Raises:
          CheckpointError: the step before, or this one, cannot be written; others are untouched.
        """
        self.wait()
        path, trees = self.directory / str(step), _filled(items)
        shapes = {name: _describe(tree) for name, tree in items.items()}
        shapes |= {name: item.arrays for name, item in shared.items()}
        content = {"step": step, "metadata": dict(metadata), "items": shapes}
        try:
            with fail_together():
                if is_main_process():
                    self._remove_unfinished()
                    if path.is_dir() and any(path.iterdir()):
                        log.warning(
                            "%s was there before: moved to %s", path, self._quarantine(step)
                        )
                    remove_tree(path)  # an empty one
                    begin_step(path, trees)
        except Exception as error:
            if is_main_process():
                self._remove_failed(path)
            raise _save_error(path, error) from error

        def end(error: Exception | None) -> None:
            if error is not None:
                self._remove_failed(path)
            else:
                self._remove_older(step)

        self._under_way = StepSave(self._handler, path, trees, content, shared, end)
        return self._under_way

    def wait(self) -> None:
        """Waits for the save under way, if there is one; all processes together.

        Raises:
          CheckpointError: in all processes, if that step is not valid; names it.
        """
        save = self._under_way
        if save is None:
            return
        save.join()
        self._under_way = None
        try:
            with fail_together():
                if save.error is not None:
                    raise save.error
        except Exception as error:
            raise _save_error(save.path, error) from error
        self._verified.add(save.step)

    def latest_valid_step(self, quarantine: bool = False) -> int | None:
        """The newest step whose files match its manifest; None if no save has finished.

        All processes read the newest step, a share each; process 0 checks the others if need be,
        and if it fails, all fail. Warns of newer damaged steps.

        Args:
          quarantine: move those steps aside. Only for the writer: to readers a save in progress
            looks like one that was cut off.

        Raises:
          CheckpointError: all finished checkpoints are damaged; starting over would lose the run.
        """
        found, digests = None, self._hash_newest()
        with fail_together():
            if is_main_process():
                found = self._newest_valid_step(quarantine, digests)
        step = broadcast_from_process_0(-1 if found is None else found)
        if step < 0:
            return None
        self._verified.add(step)
        return step

    def _hash_newest(self) -> dict[str, dict[str, Any]]:
        """Digests of the newest step, each process reads its share; empty with one process."""
        step, count = broadcast_from_process_0(self.newest_step()), jax.process_count()
        if count == 1 or step < 0:
            return {}
        path, own = self.directory / str(step), {}
        with fail_together():
            names = list(list_file_sizes(path))
            share = names[jax.process_index() :: count]
            own = tree_sha256(path, skip={*names}.difference(share))
        parts = gather_texts(json.dumps(own), AGREE_SECONDS)
        return {name: digest for part in parts for name, digest in json.loads(part).items()}

    def _newest_valid_step(
        self, quarantine: bool, digests: Mapping[str, dict[str, Any]]
    ) -> int | None:
        """``digests`` are those of the newest step, if they are known."""
        damaged: dict[int, str] = {}
        for step in self._steps():
            damage = self._damage(step, digests)
            digests = {}
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
        restored = {
            name: self._handler.restore(
                epath.Path(path / name),
                args=ocp.args.StandardRestore(jax.tree.map(_with_sharding, tree)),
            )
            for name, tree in _filled(abstract_items).items()
        }
        return {**abstract_items, **restored}

    def with_stored_dtypes(self, step: int, item: str, abstract: Any) -> Any:
        """``abstract`` with the dtypes stored in ``item`` of ``step``, matched by name."""
        stored = self._content(step)["items"].get(item, {})

        def with_dtype(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            dtype = stored.get(_name(path), "").partition("[")[0] or leaf.dtype
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

        return jax.tree_util.tree_map_with_path(with_dtype, abstract)

    def close(self) -> None:
        """Waits for what this process writes, also where another one has failed."""
        if self._under_way is not None:
            self._under_way.join()
            if self._under_way.error is not None:
                log.warning("%s", _save_error(self._under_way.path, self._under_way.error))
        self._handler.close()

    def _steps(self) -> list[int]:
        """Steps with a directory, newest first, without unfinished saves."""
        found = [path for path in self._directories() if not is_unfinished(path)]
        return sorted((int(path.name) for path in found), reverse=True)

    def _directories(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [p for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir()]

    def _content(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step)
        if is_unfinished(path):
            raise CheckpointError(
                f"checkpoint {path} is not whole: its save is under way, or was cut off"
            )
        self.check_exists(step)
        damage = self._damage(step)
        if damage is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: {damage}")
        return json.loads((path / METADATA).read_text())

    def check_exists(self, step: int) -> None:
        """Raises CheckpointError, with the steps that there are, if there is no such step."""
        if step not in self._steps():
            steps = ", ".join(map(str, sorted(self._steps()))) or "none"
            path = self.directory / str(step)
            raise CheckpointError(f"checkpoint {path} does not exist; there are: {steps}")

    def _damage(
        self, step: int, digests: Mapping[str, dict[str, Any]] = MappingProxyType({})
    ) -> str | None:
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
        found = tree_sha256(path, NOT_LISTED, digests)
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
                if self.keep_period is None or old % self.keep_period:
                    remove_tree(self.directory / str(old))
        except Exception as error:  # of any bucket library; the new step is already saved
            log.warning("older checkpoints in %s cannot be removed: %s", self.directory, error)

    def _remove_failed(self, path: Path) -> None:
        """Removes the files of a failed save; retries, as its threads may still be writing."""
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(OSError):
                remove_unfinished_step(path)
            time.sleep(_SECONDS_BETWEEN)
            with contextlib.suppress(OSError):
                if not path.exists():
                    return
        log.warning("left by a save that failed, and in use: %s", path)

    def _remove_unfinished(self) -> None:
        """Removes saves that were cut off; by process 0, with no save under way."""
        with contextlib.suppress(OSError):  # the save itself reports the error
            for path in self._directories():
                if is_unfinished(path):
                    remove_unfinished_step(path)
                else:
                    (path / UNFINISHED).unlink(missing_ok=True)  # killed after the manifest
            for path in self.directory.glob(f"*{_TEMPORARY}*"):
                remove_tree(path)


_TEMPORARY = ".orbax-checkpoint-tmp"  # of saves by earlier versions


def _save_error(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:_REASON] or type(error).__name__
    return CheckpointError(f"cannot save checkpoint {path}: {reason}")


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
