"""Training, from a new or half-done workdir to the last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from fope_jax.config import Experiment, check_vocabulary
from fope_jax.data.cache import TokenCache, open_cache
from fope_jax.data.config import Packing
from fope_jax.data.task_mixture import BatchLoader, make_stage_loaders
from fope_jax.evaluate.agreement import check_processes_agree
from fope_jax.evaluate.fingerprint import check_fingerprint, checkpoint_fingerprint
from fope_jax.evaluate.metrics import METRICS, read_rows, replace_rows
from fope_jax.evaluate.validation import VALIDATION, ValidationFn, format_losses, make_validation_fn
from fope_jax.model.sharding import batch_sharding, device_put_sharded
from fope_jax.processes.agreement import fail_together
from fope_jax.processes.collectives import broadcast_from_process_0, is_main_process
from fope_jax.processes.signals import Stopped, signal_name
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.lock import RunLock, lock_run
from fope_jax.storage.paths import as_path
from fope_jax.train.bad_steps import check_tokens, dump_batches_of_bad_steps
from fope_jax.train.checkpoints import Saver, check_checkpoints_present
from fope_jax.train.goodput import PhaseTimer
from fope_jax.train.meter import MetricsBuffer, TimedIterator
from fope_jax.train.metrics import MetricsWriter
from fope_jax.train.preemption import Preempted, preemption
from fope_jax.train.state import (
    StatePlan,
    experiment_at_stage,
    init_constants,
    init_guard_state,
    init_train_state,
    lower_step,
    plan_state,
    restore_arrays,
    shard_constants,
)
from fope_jax.train.step import StepMetrics, TrainState
from fope_jax.train.workdir import (
    CHECKPOINTS,
    check_disk_space,
    check_workdir,
    open_workdir,
    write_run_info,
)
from fope_jax.typing import Batch

log = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    workdir: str | Path,
    accept_position: str | None = None,
    *,
    seconds_before: float = 0.0,
) -> None:
    """Trains ``experiment`` in ``workdir`` to its last step, from the newest valid checkpoint.

    Called again after an interruption it goes on and ends with the same bits as a run that was
    never interrupted (same machine and device count); called again after the end it returns.

    Args:
      experiment: what to train.
      workdir: of the run; held against other writers meanwhile.
      accept_position: see ``check_fingerprint``.
      seconds_before: that this process has spent on the run already, for its account of time.

    Raises:
      ConfigError: the workdir holds another experiment, or tokenizer and model do not fit.
      CheckpointError: the checkpoints are of another model, position embedding or corpus, they are
        all damaged or gone, or one cannot be written.
      BadStepError: nothing after the last finite checkpoint has been saved.
      Preempted: SIGTERM, SIGINT or SIGHUP came; the step after which it ended has been saved.
      Stopped: one of them came before the first step, so that there was nothing to save.
      LockError: another process writes into the workdir.
      OSError: the workdir cannot be written, or the token cache is missing or damaged.
    """
    workdir = as_path(workdir)
    splits = ("train", *(experiment.evaluate.splits if experiment.train.evaluate_every else ()))
    check_processes_agree(experiment, {"--accept-position": accept_position}, splits)
    with lock_run(workdir, "train") as lock:
        _train(experiment, workdir, accept_position, lock, PhaseTimer(seconds_before))


class _Data(NamedTuple):
    """Where the batches come from, and what measures meanwhile, if anything."""

    cache: TokenCache
    loaders: list[BatchLoader]
    measure: ValidationFn | None


def _open_data(experiment: Experiment, mesh: Mesh) -> _Data:
    """Opens all text that a training reads, a loader for each stage; whatever cannot be is raised.

    Raises:
      CacheError: the token cache is missing or damaged.
      ValueError: what is read and the model, the batch or the evaluation do not fit.
    """
    config = experiment.train
    cache = open_cache(experiment.data, "train")
    check_vocabulary(cache.tokenizer.vocab_size, experiment.model)
    loaders = make_stage_loaders(
        experiment.data, cache, config.stages, seed=experiment.seed, data_start=config.data_start
    )
    measure = None
    if config.evaluate_every is not None:
        measure = make_validation_fn(experiment, cache.fingerprint, mesh)
    return _Data(cache, loaders, measure)


def _train(
    experiment: Experiment,
    workdir: Path,
    accept_position: str | None,
    lock: RunLock | None,
    account: PhaseTimer,
) -> None:
    config = experiment.train

    # ------------------------------------------------------------------ what can be checked
    # Nothing is written before the state is there, and where one process refuses all of them do.
    store = CheckpointStore(workdir / CHECKPOINTS, keep=config.keep)
    data = None
    with fail_together():
        stages = [
            (stage, plan_state(experiment_at_stage(experiment, stage))) for stage in config.stages
        ]
        plan = stages[-1][1]  # state and constants are the same in all of them
        if is_main_process():
            check_workdir(workdir, experiment)
        if store.newest_step() < config.steps:  # a run that is finished needs no text any more
            data = _open_data(experiment, plan.mesh)
            check_disk_space(workdir, plan, config)

    # ------------------------------------------------------------------ what there is already
    with account.phase("restore"):
        found = store.latest_valid_step(quarantine=True)
    with fail_together():
        if is_main_process():
            check_checkpoints_present(workdir, found)
    start = found or 0
    # A checkpoint is written before the evaluation of its step, which may have been cut off since.
    evaluates_first = bool(
        broadcast_from_process_0(_is_evaluation_missing(workdir, experiment, start))
    )
    if start >= config.steps and not evaluates_first:
        if is_main_process():
            open_workdir(workdir, experiment)
        log.info("%s is finished: %d steps are trained", workdir, start)
        store.close()
        return
    with fail_together():
        cache, loaders, measure = data or _open_data(experiment, plan.mesh)
    packing = experiment.data.packing
    loaders = [own for own, (stage, _) in zip(loaders, stages, strict=True) if stage.stop > start]
    stages = [(stage, own) for stage, own in stages if stage.stop > start]
    for (stage, _), loader in zip(stages, loaders, strict=True):
        log.info(
            "data: %s; %d x %d tokens a step (steps %d to %d)",
            loader.summary,
            stage.batch_size,
            stage.length,
            stage.start + 1,
            stage.stop,
        )

    def loader_of(step: int) -> BatchLoader:
        behind = sum(stage.stop < step for stage, _ in stages)
        return loaders[behind]

    # ------------------------------------------------------------------ model and optimizer
    carried = None
    if found is None:
        constants = shard_constants(init_constants(experiment), plan)
        state = init_train_state(experiment, plan)
    else:
        with account.phase("restore"):
            state, constants, carried = _restore(
                store, start, experiment, plan, cache.fingerprint, accept_position
            )
    # Later rows are written again as their steps come again; left in place they count twice.
    dropped = 0
    if is_main_process():
        open_workdir(workdir, experiment)
        if lost := _seconds_after(workdir, start):
            account.add("lost", lost)
        dropped = replace_rows(
            workdir / METRICS,
            lambda row: (
                _comes_again(row, start)
                or (evaluates_first and _is_validation(row) and row["step"] == start)
            ),
            [],
        )
    if found is not None:
        log.info("resuming %s at step %d (%d later rows dropped)", workdir, start, dropped)
    shape = experiment.model.shape
    position, identity = checkpoint_fingerprint(experiment.position, shape, constants)
    identity |= {"data": cache.fingerprint, "window": config.length}
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    log.info("model: %s parameters, position %s", f"{parameters:,}", position.summary)
    log.info("attention: %s (%s)", *plan.attention)
    facts = {
        "name": experiment.name,
        "seed": experiment.seed,
        "parameters": parameters,
        "position": {"hash": position.hash, "summary": position.summary},
        "data": {"fingerprint": cache.fingerprint, "tokens": cache.num_tokens},
    }
    if is_main_process():
        write_run_info(workdir, facts, start)

    # ------------------------------------------------------------------ steps
    meter = MetricsBuffer(experiment, _last_seconds(workdir), carried)
    saver = Saver(store, config, identity, lock)
    with (
        MetricsWriter(workdir, start, tolerant=saver.tolerant)
        if is_main_process()
        else contextlib.nullcontext() as metrics_log,
        tqdm(
            total=config.steps,
            initial=start,
            desc=experiment.name,
            unit="step",
            disable=not is_main_process(),
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        ) as bar,
        dump_batches_of_bad_steps(workdir, loader_of, config.data_start),
        preemption() as asked_to_stop,
    ):

        def write_times(step: int) -> None:
            for row in account.rows(step):
                if metrics_log:
                    metrics_log.write(row)

        def save(step: int, last: bool) -> bool:
            with account.phase("save"):
                done = saver.save(step, state, constants, meter.carry(), metrics_log, last)
            write_times(step)
            return done

        def preempted(step: int, number: int) -> Preempted:
            return Preempted(
                f"stopped by {signal_name(number)} after step {step}; the same command goes on "
                f"from checkpoint {store.directory / str(step)}",
                number,
            )

        def evaluate(step: int, saved: bool) -> None:
            # A signal leaves its rows out: the run that goes on from this step makes them first.
            assert measure
            where = asked_to_stop.nothing_to_save() if saved else contextlib.nullcontext()
            try:
                with where:
                    rows = measure(step, state.params, constants, asked_to_stop.check)
            except Stopped as stop:
                if not saved:
                    save(step, last=True)
                if not step:  # there is no checkpoint that anything could go on from
                    raise
                raise preempted(step, stop.number) from stop
            log.info("step %d: validation loss (tokens of context) %s", step, format_losses(rows))
            if metrics_log:
                for row in rows:
                    metrics_log.write(row)

        if not stages:
            account.started()
            write_times(start)
            evaluate(start, saved=True)
        for (stage, own), loader in zip(stages, loaders, strict=True):
            begin = max(start, stage.start)
            unsaved = contextlib.nullcontext() if begin > start else asked_to_stop.nothing_to_save()
            with account.phase("compile"), unsaved:
                step_function = _compile(own, loader, begin + config.data_start, experiment)
            if begin == start:
                account.started()
            write_times(begin)
            if begin == start and evaluates_first:
                evaluate(start, saved=True)
            remaining = loader.iterate(begin + config.data_start, stage.stop - begin)
            batches = TimedIterator(remaining)
            meter.restart(batches)
            for step, batch in enumerate(batches, start=begin + 1):
                check_tokens(batch, step, experiment.model.vocab_size)
                state, metrics = step_function(
                    state, constants, shard_batch(share_positions(batch, packing), own.mesh)
                )
                meter.add(metrics)
                bar.update()
                stops = asked_to_stop(step)
                saves = step % config.save_every == 0 or step == config.steps
                measures = measure is not None and _is_evaluated_after(experiment, step)
                # A save ends a row, so that a resumed run writes the rows of the unbroken one; so
                # do a stage and an evaluation, whose clocks are their own. SIGTERM does not: its
                # checkpoint carries what the row has so far.
                timely = step % config.log_every == 0 or step == stage.stop
                ends_row = saves or measures or timely
                if ends_row or stops:
                    waited, elsewhere = meter.fetch(step, batches)
                    account.add("data", waited)
                    account.add("step", elsewhere)
                if ends_row:
                    row = meter.row(step)
                    if metrics_log:
                        metrics_log.write(row)
                    bar.set_postfix_str(
                        f"loss {row['loss']:.3f}, {row['tokens_per_second'] / 1e3:.1f}k tokens/s, "
                        f"data wait {row['data_wait_fraction']:.1%}",
                        refresh=False,
                    )
                saved = False
                if saves or stops:
                    saved = save(step, last=stops or step == config.steps)
                    meter.restart(batches)
                if stops and (step < config.steps or measures):
                    raise preempted(step, asked_to_stop.number)
                if measures:
                    evaluate(step, saved)
                    meter.restart(batches)
    store.close()
    log.info("trained %d steps; checkpoint %s", config.steps, store.directory / str(config.steps))


def _is_evaluated_after(experiment: Experiment, step: int) -> bool:
    """Whether the model is measured after ``step`` updates."""
    every, steps = experiment.train.evaluate_every, experiment.train.steps
    return every is not None and (step % every == 0 or step == steps)


def _is_evaluation_missing(workdir: Path, experiment: Experiment, start: int) -> bool:
    """Whether a run that goes on after update ``start`` has that step's evaluation to make.

    The row of its time comes last, and says that all others are there.
    """
    if not is_main_process() or not _is_evaluated_after(experiment, start):
        return False
    rows = [row for row in read_rows(workdir / METRICS) if row.get("phase") == VALIDATION]
    return start == 0 or start not in [row["step"] for row in rows]


def _is_validation(row: dict[str, Any]) -> bool:
    return VALIDATION in (row["kind"], row.get("phase"))


def _comes_again(row: dict[str, Any], start: int) -> bool:
    """Whether a run that goes on after update ``start`` writes ``row`` itself."""
    if start == 0 and _is_validation(row):
        return True  # that before the first update, which no checkpoint tells to be complete
    return row.get("step", 0) > start


def _compile(
    plan: StatePlan, loader: BatchLoader, step: int, experiment: Experiment
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The program of a step like batch ``step`` of ``loader``."""
    batch = share_positions(loader.batch(step), experiment.data.packing)
    began = time.perf_counter()
    compiled = lower_step(
        plan, shard_batch(batch, plan.mesh), experiment.train.accumulate
    ).compile()
    log.info("compiled in %.1f s", time.perf_counter() - began)
    return compiled


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A host batch, cut up over the devices of all processes."""
    return jax.tree.map(lambda x: device_put_sharded(x, batch_sharding(x, mesh)), batch)


def share_positions(batch: Batch, packing: Packing) -> Batch:
    """Positions as ``[1, T]`` where the packing makes those of all rows the same.

    Everything that depends on positions alone is then computed once a batch, not once a row.
    """
    if packing == "windows":
        return batch._replace(positions=batch.positions[:1])
    return batch


def _restore(
    store: CheckpointStore,
    step: int,
    experiment: Experiment,
    plan: StatePlan,
    data: str,
    accept_position: str | None,
) -> tuple[TrainState, Any, dict[str, Any] | None]:
    stored, where = store.metadata(step), str(store.directory / str(step))
    config = experiment.train
    if stored["data"] != data:
        raise CheckpointError(
            f"{where}: its data fingerprint is {stored['data']}, this run's is {data}; the data"
            " has changed since the checkpoint was written"
        )
    position, shape = experiment.position, experiment.model.shape
    check_fingerprint(stored, position, shape, None, where, accept_position)
    restored = restore_arrays(store, step, plan)
    check_fingerprint(stored, position, shape, restored["constants"], where, accept_position)
    if config.first_lengths and 0 < step < config.stages[-1].start and "window" not in stored:
        log.warning(
            "%s was written when each length had an order of its own: the rest of "
            "train.first_lengths is cut from windows of %d tokens, in another order, so that some "
            "of this epoch's text comes again and some does not come",
            where,
            config.length,
        )
    guard = init_guard_state(stored.get("guard"), plan)
    state = TrainState(restored["params"], restored["optimizer"], guard)
    return state, restored["constants"], stored.get("row")


def _seconds_after(workdir: Path, step: int) -> float:
    """Seconds of training in the rows after ``step``."""
    rows = [row for row in read_rows(workdir / METRICS) if row["kind"] == "train"]
    kept = [row["seconds"] for row in rows if row["step"] <= step]
    return rows[-1]["seconds"] - max(kept, default=0.0) if len(kept) < len(rows) else 0.0


def _last_seconds(workdir: Path) -> float:
    rows = [row for row in read_rows(workdir / METRICS) if row["kind"] == "train"]
    return rows[-1]["seconds"] if rows else 0.0
