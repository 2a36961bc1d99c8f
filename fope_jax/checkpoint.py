"""The one door to Orbax: checkpoints that are whole, verified and of the right model.

    <directory>/<step>/<item>/        arrays as Orbax writes them ("params", "optimizer", ...)
    <directory>/<step>/metadata.json  what the caller said; path, dtype and shape of each array
    <directory>/<step>/manifest.json  sha256 and size of every file above; written last

A step counts only with a manifest that its files agree with. Orbax alone casts a wrong dtype,
loads flipped bits and takes a stray empty directory for the newest step, each without a word.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fope_jax.files import absolute, remove_tree, tree_sha256, write_json
from fope_jax.processes import from_first, is_first, wait_for_all

MANIFEST, METADATA = "manifest.json", "metadata.json"
_SHOWN = 3  # differing arrays named in an error; the count says how many there are


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another model, or cannot be written."""


class CheckpointStore:
    """The checkpoints of one run, in ``directory``; the newest ``keep`` stay.

    The directory may be in a bucket. Checking a step then reads all of it from there.

    One run writes, all its processes together and into one directory that all of them see; any
    number may read, also while it writes. Arrays may lie over other devices when they are read
    than when they were written.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        self.directory = absolute(directory)
        self.keep = keep
        self._verified: set[int] = set()
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def save(self, step: int, items: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Writes one step; returns when every file and the manifest are on disk.

        Args:
          step: optimizer updates done.
          items: pytrees of arrays by name; one without arrays is remembered and takes no space.
          metadata: JSON values.

        Raises:
          CheckpointError: nothing of this step counts afterwards; earlier steps are untouched.
        """
        path = self.directory / str(step)
        try:
            if is_first():
                self._remove_unfinished()
                remove_tree(path)
            wait_for_all(f"save {step}")
            args = {name: ocp.args.StandardSave(tree) for name, tree in _filled(items).items()}
            # A directory of this step is left only by a save that was cut off or damaged. Orbax
            # could remove it too (force), but in a bucket it would ask for more rights for that.
            self._orbax.save(path, args=ocp.args.Composite(**args), force=True)
            described = {name: _describe(tree) for name, tree in items.items()}
            content = {"step": step, "metadata": dict(metadata), "items": described}
            if is_first():
                write_json(path / METADATA, content)
                write_json(path / MANIFEST, {"files": tree_sha256(path, skip=MANIFEST)})
            wait_for_all(f"saved {step}")
        except Exception as error:
            if is_first():
                self._remove_unfinished()
            raise CheckpointError(f"cannot save checkpoint {path}: {error}") from error
        self._verified.add(step)
        for old in self._steps()[self.keep :] if is_first() else ():
            remove_tree(self.directory / str(old))

    def latest_valid_step(self) -> int | None:
        """The newest step whose files agree with its manifest; None where nothing was ever saved.

        The first process looks and tells the others. Where it fails it ends, and they with it.

        Warns of each newer step that is damaged, and of saves that were cut off. Empty directories
        are no checkpoints.

        Raises:
          CheckpointError: there are finished checkpoints and all of them are damaged; going on
            from nothing would throw the run away.
        """
        found = self._newest_valid() if is_first() else None
        step = from_first(-1 if found is None else found)
        if step >= 0:
            self._verified.add(step)
        return None if step < 0 else step

    def _newest_valid(self) -> int | None:
        finished = []
        for step in self._steps():
            damage = self._damage(step)
            if damage is None:
                return step
            path = self.directory / str(step)
            warnings.warn(f"checkpoint {path} is damaged: {damage}; skipped", stacklevel=2)
            if (path / MANIFEST).exists():
                finished.append(f"  {path}: {damage}")
        if finished:
            raise CheckpointError(
                "no valid checkpoint is left; bring one back, or move the directory away to start"
                " over:\n" + "\n".join(finished)
            )
        return None

    def metadata(self, step: int) -> dict[str, Any]:
        """What the caller gave `save` for ``step``."""
        return self._content(step)["metadata"]

    def restore(self, step: int, abstract_items: Mapping[str, Any]) -> dict[str, Any]:
        """Reads items of ``step``, bit for bit as they were saved.

        Args:
          abstract_items: for each item wanted, a pytree of arrays or ShapeDtypeStructs; a
            sharding there says where the array goes.

        Raises:
          CheckpointError: damaged files, or arrays of other names, shapes or dtypes than wanted,
            found before any array is read.
        """
        path = self.directory / str(step)
        stored = self._content(step)["items"]
        for name in abstract_items:
            if name not in stored:
                raise CheckpointError(
                    f"checkpoint {path} has no item {name!r}; it has {', '.join(stored)}"
                )
        _compare(path, stored, {name: _describe(tree) for name, tree in abstract_items.items()})
        wanted = _filled(abstract_items)
        args = {n: ocp.args.StandardRestore(jax.tree.map(_placed, t)) for n, t in wanted.items()}
        restored = self._orbax.restore(path, args=ocp.args.Composite(**args)) if args else {}
        return {n: restored[n] if n in wanted else tree for n, tree in abstract_items.items()}

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._orbax.close()

    def _steps(self) -> list[int]:
        """Steps whose directory holds anything, newest first."""
        if not self.directory.is_dir():
            return []
        found = [p for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir()]
        return sorted((int(p.name) for p in found if any(p.iterdir())), reverse=True)

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
        """What is wrong with the files of ``step``; None where they agree with the manifest."""
        path = self.directory / str(step)
        if step in self._verified:
            return None
        try:
            expected = json.loads((path / MANIFEST).read_text())["files"]
        except FileNotFoundError:
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

    def _remove_unfinished(self) -> None:
        with contextlib.suppress(OSError):  # what stands in the way is told by the save itself
            for path in self.directory.glob(f"*{_ORBAX_TEMPORARY}*"):
                remove_tree(path)


_ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"


def _filled(items: Mapping[str, Any]) -> dict[str, Any]:
    """The items that hold arrays: Orbax refuses to write an empty tree."""
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(tree: Any) -> dict[str, str]:
    """``{"layers/query": "float32[8,64]"}`` for the arrays of a pytree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _compare(path: Path, stored: dict, wanted: dict) -> None:
    """Raises CheckpointError with the first differing arrays and both sides of each."""
    differences, count = [], 0
    for item, arrays in wanted.items():
        names = sorted(arrays.keys() | stored[item].keys())
        count += len(names)
        for name in names:
            there, here = stored[item].get(name, "nothing"), arrays.get(name, "nothing")
            if there != here:
                differences.append(f"  {item}/{name}: checkpoint {there}, this model {here}")
    if differences:
        more = ["  ..."] if len(differences) > _SHOWN else []
        raise CheckpointError(
            f"{path} is a checkpoint of another model; {len(differences)} of {count} arrays"
            " differ:\n" + "\n".join(differences[:_SHOWN] + more)
        )
