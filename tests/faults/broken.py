"""The trials tried: each promise is broken on purpose, and the fault's trial has to find it.

`python -m tests.faults --broken` does it. A break is made inside the training alone, so that the
unbroken run that a trial compares with stays as it is.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import world
from tests.faults.fault import Fault


def replace(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute that ``owner`` has; AttributeError where the code no longer has it.

    Without that error a renamed function would leave its promise whole, and nothing broken.
    """
    getattr(owner, name)
    setattr(owner, name, value)


def rows_are_kept() -> None:
    from fope_jax.train import loop

    replace(loop, "_is_rewritten", lambda row, start, must_evaluate: False)


def a_batch_is_left_out() -> None:
    from fope_jax.data import task_mixture

    class Loader(task_mixture.Loader):
        def iterate(self, start_step=0, num_steps=None):
            return super().iterate(start_step + bool(start_step), num_steps)

    replace(task_mixture, "Loader", Loader)


def a_bit_changes_in_restoring() -> None:
    import jax
    import jax.numpy as jnp

    from fope_jax.train import loop

    restore = loop.restore_checkpoint

    def restored(*arguments):
        state, *rest = restore(*arguments)
        leaves, tree = jax.tree.flatten(state.params)
        leaves[0] = jnp.nextafter(leaves[0], jnp.inf)
        return state._replace(params=tree.unflatten(leaves)), *rest

    replace(loop, "restore_checkpoint", restored)


def a_manifest_comes_first() -> None:
    from fope_jax.storage import checkpoint, step_save

    write = step_save.write_json

    def written(path, content):
        if path.name == step_save.METADATA:  # its file is not among those that are hashed
            write(path.with_name(step_save.MANIFEST), {"files": {}})
        write(path, content)

    replace(step_save, "write_json", written)
    replace(checkpoint.CheckpointStore, "_damage", damage_by_manifest_alone)


def damage_by_manifest_alone(store, step: int, digests=None) -> str | None:
    from fope_jax.storage.step_save import MANIFEST

    return None if (store.directory / str(step) / MANIFEST).exists() else "no manifest"


def damage_is_not_looked_for() -> None:
    from fope_jax.storage.checkpoint import CheckpointStore

    replace(CheckpointStore, "_damage", damage_by_manifest_alone)


def no_checkpoint_is_no_error() -> None:
    from fope_jax.train import loop

    replace(loop, "check_checkpoints_present", lambda workdir, newest_valid: None)


def damaged_checkpoints_are_no_error() -> None:
    from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore

    newest_valid_step = CheckpointStore._newest_valid_step

    def found(*arguments):
        with contextlib.suppress(CheckpointError):
            return newest_valid_step(*arguments)

    replace(CheckpointStore, "_newest_valid_step", found)
    no_checkpoint_is_no_error()


def the_signal_is_not_heeded() -> None:
    from fope_jax.train.preemption import Preemption

    replace(Preemption, "is_requested", lambda self: False)


def the_row_under_way_is_forgotten() -> None:
    from fope_jax.train.metrics import MetricsBuffer

    replace(MetricsBuffer, "state", lambda self: None)


def a_full_disk_is_not_told() -> None:
    from fope_jax.storage.checkpoint import CheckpointStore

    wait = CheckpointStore.wait

    def waited(*arguments):
        with contextlib.suppress(Exception):
            wait(*arguments)

    replace(CheckpointStore, "wait", waited)


def bad_steps_are_made() -> None:
    from fope_jax.train.bad_steps import Guard

    judge = Guard.judge

    def good(*arguments):
        accepted, seen = judge(*arguments)
        return accepted | True, seen

    replace(Guard, "judge", good)


def spikes_are_missed() -> None:
    from fope_jax.train import bad_steps

    replace(bad_steps, "WARMUP", 10**6)


def the_lock_is_open() -> None:
    from fope_jax.train import loop

    @contextlib.contextmanager
    def lock_run(*arguments, **named):
        yield None

    replace(loop, "lock_run", lock_run)


def configurations_are_not_compared() -> None:
    from fope_jax.train import workdir

    replace(workdir, "incompatible_changes", lambda old, new: [])


def tokens_are_not_looked_at() -> None:
    from fope_jax.train import loop

    replace(loop, "check_tokens", lambda batch, step, vocab_size: None)


def time_is_the_walls() -> None:
    for name in ("perf_counter", "monotonic"):
        replace(time, name, lambda: time.time())


class Break(NamedTuple):
    """A promise that is broken.

    Attributes:
      make: breaks it in the process that calls.
      fault: name of the fault whose trial finds it.
      seed: of the trial.
    """

    make: Callable[[], None]
    fault: str
    seed: int = 0


BREAKS = {
    one.make.__name__: one
    for one in (
        Break(rows_are_kept, "kill -9 between metrics and checkpoint"),
        Break(a_batch_is_left_out, "kill -9 between metrics and checkpoint", 1),
        Break(a_bit_changes_in_restoring, "kill -9 between metrics and checkpoint", 1),
        # Killed after metadata.json, before the manifest: stops.IN_A_SAVE[4].
        Break(a_manifest_comes_first, "kill -9 inside a save", 4),
        Break(damage_is_not_looked_for, "newest checkpoint damaged", 4),
        Break(no_checkpoint_is_no_error, "every checkpoint damaged or gone", 1),
        Break(damaged_checkpoints_are_no_error, "every checkpoint damaged or gone"),
        Break(the_signal_is_not_heeded, "SIGTERM"),
        Break(the_row_under_way_is_forgotten, "SIGTERM"),
        Break(a_full_disk_is_not_told, "no space for a checkpoint, on_save_error = stop"),
        Break(bad_steps_are_made, "one loss that is no number, on_bad_step = skip"),
        Break(spikes_are_missed, "a spike in the loss"),
        Break(the_lock_is_open, "two trainers in one workdir"),
        Break(
            configurations_are_not_compared,
            "another model, dtype, position embedding, tokenizer, length or seed",
            4,
        ),
        Break(tokens_are_not_looked_at, "a token beyond the vocabulary"),
        Break(time_is_the_walls, "a clock that jumps"),
    )
}


def finds(broken: Break, faults: Iterable[Fault]) -> str | None:
    """The assertion that finds the break; None where none does.

    The trial first passes without it, which also makes the unbroken runs that it compares with.
    """
    (fault,) = (fault for fault in faults if fault.name == broken.fault)
    # A training that the trial no longer waits for may write there still.
    with tempfile.TemporaryDirectory(prefix="fope-fault-", ignore_cleanup_errors=True) as directory:
        fault.trial(Path(directory) / "whole", broken.seed)
        world.harm_of_all["broken"] = broken.make.__name__
        try:
            fault.trial(Path(directory) / "broken", broken.seed)
        except AssertionError as error:
            return traceback.extract_tb(error.__traceback__)[-1].line
        finally:
            del world.harm_of_all["broken"]
    return None
