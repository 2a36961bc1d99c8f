"""The training loop: from a new or partly trained workdir to the last checkpoint."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from fope_jax.config import Experiment, Stage, TrainConfig, check_vocabulary, experiment_to_dict
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.description import changed_text, changed_text_line, data_lines
from fope_jax.data.random_positions import PositionDraw, RandomPositions
from fope_jax.data.task_mixture import BatchLoader, make_stage_loaders
from fope_jax.evaluate.agreement import check_processes_agree
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.metrics import METRICS, read_rows, replace_rows
from fope_jax.evaluate.run_data import RunData, describe_data, find_run_data
from fope_jax.evaluate.validation import VALIDATION, ValidationFn, find_validation_fn, format_losses
from fope_jax.logs import is_quiet
from fope_jax.processes.agreement import fail_together
from fope_jax.processes.collectives import broadcast_from_process_0, is_main_process
from fope_jax.processes.signals import Stopped, signal_name
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.lock import lock_run
from fope_jax.storage.paths import as_path, is_in_bucket
from fope_jax.train.bad_steps import check_tokens, dump_batches_of_bad_steps
from fope_jax.train.checkpoints import (
    CheckpointSaver,
    check_checkpoints_present,
    restore_checkpoint,
)
from fope_jax.train.compiler_options import compile_step
from fope_jax.train.goodput import PhaseTimer
from fope_jax.train.metrics import MetricsBuffer, MetricsWriter
from fope_jax.train.optim import unfinished_warmup
from fope_jax.train.preemption import Preempted, preemption
from fope_jax.train.save_time import checkpoint_bytes, describe_save, measured_rate
from fope_jax.train.state import (
    experiment_at_stage,
    init_constants,
    init_train_state,
    own_rows,
    plan_state,
    shard_batch,
    share_positions,
    trace_step,
)
from fope_jax.train.tracker import SafeTracker, Tracker, find_tracker
from fope_jax.train.workdir import (
    CHECKPOINTS,
    check_disk_space,
    check_workdir,
    has_checkpoint,
    open_workdir,
    save_tokenizer,
    write_run_info,
)

log = logging.getLogger(__name__)


class StepEvents(NamedTuple):
    is_eval_step: bool
    is_checkpoint_step: bool
    is_last_step: bool
    should_log: bool


def events_after(step: int, config: TrainConfig, stage: Stage) -> StepEvents:
    is_last, interval = step == config.steps, config.evaluation_interval
    is_eval = interval is not None and (is_last or step % interval == 0)
    is_checkpoint = is_last or step % config.save_every == 0
    # Evaluations and stages end a row: the time they take is not training. Without the checkpoint
    # here, a resumed run would write other rows than an unbroken one.
    ends_row = is_eval or is_checkpoint or step % config.log_every == 0 or step == stage.stop
    return StepEvents(is_eval, is_checkpoint, is_last, should_log=ends_row)


def train(
    experiment: Experiment,
    workdir: str | Path,
    accept_position: str | None = None,
    *,
    seconds_before: float = 0.0,
    note: str | None = None,
    tracker: Tracker | None = None,
) -> None:
    """Trains ``experiment`` in ``workdir`` to its last step, from the newest valid checkpoint.

    A run that is interrupted and resumed ends with the same bits as an uninterrupted one (on the
    same machine and device count). A finished run returns at once.

    Args:
      experiment: what to train.
      workdir: directory of the run; locked during training.
      accept_position: see ``check_fingerprint``.
      seconds_before: seconds this process has already spent on the run.
      note: a line about the run to log once training begins.
      tracker: gets the numbers of rows, in place of what ``train.tracker`` makes.

    Raises:
      ConfigError: the workdir holds another experiment, or tokenizer and model do not fit.
      CheckpointError: the checkpoints do not fit the run or are lost, or one cannot be written.
      BadStepError: a bad step ended the run, or a parameter is not finite.
      Preempted: SIGTERM, SIGINT or SIGHUP arrived; the last step has been saved.
      Stopped: one of these signals arrived before the first step; nothing was saved.
      LockError: another process writes into the workdir.
      CacheError: the token cache is missing or damaged.
      OSError: the workdir cannot be written.
    """
    workdir, config = as_path(workdir), experiment.train
    splits = ("train", *(experiment.evaluate.splits if config.evaluation_interval else ()))
    source = RunData(experiment.data)
    if has_checkpoint(workdir):
        source = find_run_data(workdir, experiment.data)
    check_processes_agree(experiment, {"--accept-position": accept_position}, splits, source)
    with contextlib.ExitStack() as stack:
        lock, timer = stack.enter_context(lock_run(workdir, "train")), PhaseTimer(seconds_before)

        # -------------------------------------------------------------- checks
        # Nothing is written before the state exists: a run that fails here leaves no trace.
        store = CheckpointStore(workdir / CHECKPOINTS, config.keep, config.keep_period)
        stack.callback(store.close)
        data = None
        with fail_together():
            make_tracker = _find_tracker(experiment, workdir, tracker)
            stages = [
                (stage, plan_state(experiment_at_stage(experiment, stage)))
                for stage in config.stages
            ]
            plan = stages[-1][1]  # all stages have the same state and constants
            if is_main_process():
                check_workdir(workdir, experiment)
            if store.newest_step() < config.steps:  # a finished run needs no text
                data = _open_data(experiment, source, plan.mesh)
                check_disk_space(workdir, plan, config)

        # -------------------------------------------------------------- progress so far
        with timer.phase("restore"):
            newest_valid = store.latest_valid_step(quarantine=True)
        start, rows = newest_valid or 0, []
        with fail_together():
            if is_main_process():
                check_checkpoints_present(workdir, newest_valid)
                rows = read_rows(workdir / METRICS)
        # A checkpoint is written before its step is evaluated: the evaluation may be incomplete.
        must_evaluate = (
            events_after(start, config, config.stages[-1]).is_eval_step and is_main_process()
        )
        must_evaluate = bool(
            broadcast_from_process_0(must_evaluate and _lacks_evaluation(rows, start, config))
        )
        if start < config.steps or must_evaluate:
            with fail_together():
                data = data or _open_data(experiment, source, plan.mesh)
            must_evaluate = must_evaluate and data[2] is not None
        if start >= config.steps and not must_evaluate:
            # One that was trained longer since keeps its configuration.
            if start == config.steps and is_main_process():
                open_workdir(workdir, experiment)
            log.info("%s is finished: %d steps are trained", workdir, start)
            return
        assert data
        cache, loaders, measure = data
        all_stages = [
            (stage, stage_plan, loader)
            for (stage, stage_plan), loader in zip(stages, loaders, strict=True)
        ]
        stages = [each for each in all_stages if each[0].stop > start]
        for line in data_lines(source.config, cache):
            log.info("%s", line)
        if is_main_process() and (names := changed_text(experiment.data, cache.sources)):
            log.warning("%s", changed_text_line(names))
        for stage, _, loader in stages:
            log.info(
                "data: %s; %d x %d tokens a step (steps %d to %d)",
                loader.summary,
                stage.batch_size,
                stage.length,
                stage.start + 1,
                stage.stop,
            )

        if is_main_process() and (warning := unfinished_warmup(config)):
            log.warning("%s", warning)

        # -------------------------------------------------------------- model and optimizer
        saved_row = None
        if newest_valid is None:
            state, constants = init_train_state(plan), init_constants(plan)
        else:
            with timer.phase("restore"):
                state, constants, saved_row = restore_checkpoint(
                    store, start, experiment, plan, cache.fingerprint, accept_position
                )
        seconds = [(row["step"], row["seconds"]) for row in rows if row["kind"] == "train"]
        kept_seconds = max((s for step, s in seconds if step <= start), default=0.0)
        if is_main_process():
            open_workdir(workdir, experiment)
            if seconds and seconds[-1][0] > start:
                kept = kept_seconds + (saved_row or {}).get("seconds", 0.0)
                kept += _seconds_at_checkpoint(rows, start, must_evaluate)
                timer.add("lost", max(0.0, seconds[-1][1] - kept))
            # The steps after the checkpoint run again; if kept, their rows would count twice.
            dropped = replace_rows(
                workdir / METRICS, lambda row: _is_rewritten(row, start, must_evaluate), []
            )
            if newest_valid is not None:
                log.info("resuming %s at step %d (%d later rows dropped)", workdir, start, dropped)
        position, identity = checkpoint_fingerprint(
            experiment.position, experiment.model.shape, constants
        )
        identity |= {"data": cache.fingerprint, "window": config.length}
        num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
        log.info("model: %s parameters, position %s", f"{num_parameters:,}", position.summary)
        log.info("attention: %s (%s)", *plan.attention)
        size = checkpoint_bytes(state.params, state.optimizer, constants)
        rate, grace = measured_rate(rows), config.grace_seconds
        in_bucket = is_in_bucket(workdir)
        log.info("%s", describe_save(size, jax.process_count(), rate, grace, in_bucket))
        if note:
            log.info("%s", note)
        if is_main_process():
            facts = {
                "name": experiment.name,
                "seed": experiment.seed,
                "parameters": num_parameters,
                "position": {"hash": position.hash, "summary": position.summary},
            }
            save_tokenizer(workdir, cache.tokenizer, experiment.data)
            write_run_info(workdir, facts, start, describe_data(cache, source.config))

        # -------------------------------------------------------------- actions after a step
        is_tolerant = config.on_save_error == "continue"
        buffer, writer = MetricsBuffer(experiment, kept_seconds, saved_row), None
        if is_main_process():
            tracked = SafeTracker(make_tracker) if make_tracker else None
            writer = stack.enter_context(MetricsWriter(workdir, start, is_tolerant, tracked))
        bar = stack.enter_context(
            tqdm(
                total=config.steps,
                initial=start,
                desc=experiment.name,
                unit="step",
                disable=is_quiet() or not is_main_process(),
                mininterval=0.5 if sys.stderr.isatty() else 15.0,
            )
        )

        def write(rows: list[dict[str, Any]]) -> None:
            if writer:
                writer.write(rows)

        def start_save(step: int, is_ordinary: bool) -> bool:
            write(timer.take_rows(step))
            metadata = identity | {"row": buffer.state()}
            return saver.start(step, state, constants, metadata, is_ordinary)

        def preempted(step: int, number: int) -> Preempted:
            return Preempted(
                f"stopped by {signal_name(number)} after step {step}; the same command goes on "
                f"from checkpoint {store.directory / str(step)}",
                number,
            )

        def evaluate(step: int, is_saved: bool) -> str:
            # After a signal its rows are dropped: the resumed run evaluates this step first.
            assert measure
            try:
                with stop.stop_at_once() if is_saved else contextlib.nullcontext():
                    rows = measure(step, state.params, constants, stop.raise_if_requested)
            except Stopped as error:
                if not (is_saved and saver.finish(may_fail=True)):
                    start_save(step, is_ordinary=False)
                    saver.finish()
                if not step:  # there is no checkpoint to resume from
                    raise
                raise preempted(step, error.number) from error
            losses = format_losses(rows)
            log.info("step %d: validation loss (tokens of context) %s", step, losses)
            write(rows)
            return f"validation {losses}, "

        def loader_at(step: int) -> BatchLoader:
            # Bad steps may have begun before the checkpoint, in a stage that is over.
            return next(loader for stage, _, loader in all_stages if step <= stage.stop)

        # -------------------------------------------------------------- steps
        stack.enter_context(dump_batches_of_bad_steps(workdir, loader_at, config.data_start))
        stop = stack.enter_context(preemption())
        saver = CheckpointSaver(store, writer, lock, config)
        stack.callback(saver.close)  # while signals are still noted: a save may take long
        if not stages:
            timer.end_startup()
            write(timer.take_rows(start))
            evaluate(start, is_saved=True)
        validation = ""  # the newest, for the bar
        for stage, stage_plan, loader in stages:
            begin = max(start, stage.start)
            with timer.phase("compile"), contextlib.ExitStack() as interruptible:
                if begin == start:  # no training would be lost
                    interruptible.enter_context(stop.stop_at_once())
                began, example = time.perf_counter(), loader.batch(begin + config.data_start)
                example = shard_batch(share_positions(example, experiment), stage_plan.mesh)
                traced = trace_step(stage_plan, example)
                step_function, options = compile_step(stage_plan, traced)
                took, used = time.perf_counter() - began, ", ".join(options) or "none"
                log.info("compiled in %.1f s, compiler options %s", took, used)
            if begin == start:
                timer.end_startup()
            write(timer.take_rows(begin))
            if begin == start and must_evaluate:
                validation = evaluate(start, is_saved=True)
            batches = loader.iterate(begin + config.data_start, stage.stop - begin)
            buffer.restart_clock()
            for step, batch in enumerate(buffer.time_waiting(batches), start=begin + 1):
                check_tokens(batch, step, experiment.model.vocab_size)
                batch = shard_batch(share_positions(batch, experiment), stage_plan.mesh)
                state, metrics = step_function(state, constants, batch)
                buffer.add(metrics)
                bar.update()
                after, is_preempted = events_after(step, config, stage), stop.is_requested()
                if after.should_log or is_preempted:
                    waited, computing = buffer.fetch(step)
                    timer.add("data", waited)
                    timer.add("step", computing)
                if after.should_log:  # not for a signal: its checkpoint holds the unfinished row
                    row = buffer.take_row(step)
                    write([row])
                    loss = "none" if row["loss"] is None else f"{row['loss']:.3f}"
                    bar.set_postfix_str(
                        f"loss {loss}, {validation}"
                        f"{row['tokens_per_second'] / 1e3:.1f}k tokens/s, "
                        f"data wait {row['data_wait_fraction']:.1%}",
                        refresh=False,
                    )
                is_saved = False
                if after.is_checkpoint_step or is_preempted:
                    is_ordinary = not (is_preempted or after.is_last_step)
                    is_saved = start_save(step, is_ordinary)
                    if is_preempted:
                        saver.finish()
                    buffer.restart_clock()
                else:
                    saver.poll()
                is_eval_step = after.is_eval_step and measure is not None
                if is_preempted and (is_eval_step or not after.is_last_step):
                    raise preempted(step, stop.signal_number)
                if is_eval_step:
                    validation = evaluate(step, is_saved)
                    buffer.restart_clock()
        saver.finish()
        log.info(
            "trained %d steps; checkpoint %s", config.steps, store.directory / str(config.steps)
        )


def _find_tracker(
    experiment: Experiment, workdir: Path, tracker: Tracker | None
) -> Callable[[], Tracker] | None:
    """What makes the tracker of the run once it begins, if it has one."""
    if tracker is not None:
        return lambda: tracker
    if experiment.train.tracker is None:
        return None
    make = find_tracker(experiment.train.tracker)
    return lambda: make(str(workdir), experiment_to_dict(experiment))


def _open_data(
    experiment: Experiment, source: RunData, mesh: Mesh
) -> tuple[TokenCache, list[BatchLoader], ValidationFn | None]:
    """The training tokens, a loader for each stage, and the validation function, if any."""
    config, cache = experiment.train, source.open("train")
    check_vocabulary(cache.tokenizer.vocab_size, experiment.model)
    loaders = make_stage_loaders(
        experiment.data,
        cache,
        config.stages,
        seed=experiment.seed,
        data_start=config.data_start,
        rows_of=functools.partial(own_rows, mesh),
    )
    if config.position_range is not None:
        draw = PositionDraw(config.position_range, config.position_draw, experiment.seed)
        loaders: list[BatchLoader] = [RandomPositions(loader, draw) for loader in loaders]
    measure = find_validation_fn(experiment, source, mesh)
    return cache, loaders, measure


def _lacks_evaluation(rows: list[dict[str, Any]], step: int, config: TrainConfig) -> bool:
    """Whether the evaluation after ``step`` is incomplete; its time row is written last."""
    steps = [row["step"] for row in rows if row.get("phase") == VALIDATION]
    if config.evaluate_every == "auto" and step and not steps:
        return False  # a run of before there was "auto"
    # Step 0 is always evaluated again: without a checkpoint nothing shows that it completed.
    return step == 0 or step not in steps


def _seconds_at_checkpoint(rows: list[dict[str, Any]], start: int, must_evaluate: bool) -> float:
    """What the last process did between step ``start`` and the next, and has rows that are kept.

    Its rows at that step begin with "restore" where it had resumed there itself.
    """
    at_start = [row for row in rows if row["kind"] == "time" and row["step"] == start]
    resumed = [i for i, row in enumerate(at_start) if row["phase"] == "restore"]
    return sum(
        row["seconds"]
        for row in at_start[resumed[-1] if resumed else 0 :]
        if row["phase"] in ("compile", "save", VALIDATION)
        and not _is_rewritten(row, start, must_evaluate)
    )


def _is_rewritten(row: dict[str, Any], start: int, must_evaluate: bool) -> bool:
    """Whether a run that resumes after ``start`` updates writes ``row`` again."""
    if VALIDATION in (row["kind"], row.get("phase")) and (must_evaluate or start == 0):
        return row["step"] >= start
    return row.get("step", 0) > start
