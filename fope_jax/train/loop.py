"""Training, from a new or half-done workdir to the last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from fope_jax.checkpoint import CheckpointError, CheckpointStore
from fope_jax.config import Experiment, check_vocabulary
from fope_jax.data.cache import open_cache
from fope_jax.data.config import Packing
from fope_jax.data.lessons import AnyLoader, make_loader
from fope_jax.evaluate.identity import check_fingerprint, position_identity
from fope_jax.evaluate.metrics import METRICS, read_rows, replace_rows
from fope_jax.files import as_path
from fope_jax.model.sharding import batch_sharding, place
from fope_jax.processes import is_first, wait_for_all
from fope_jax.train.metrics import MetricsLog
from fope_jax.train.optim import learning_rate
from fope_jax.train.state import (
    StatePlan,
    at_stage,
    draw_constants,
    lower_planned,
    new_state,
    place_constants,
    plan_state,
)
from fope_jax.train.step import StepMetrics, TrainState, all_finite
from fope_jax.train.workdir import CHECKPOINTS, open_workdir, record_run
from fope_jax.typing import Batch

log = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """The loss, a gradient or a parameter is no longer a number; the message names the step."""


def train(experiment: Experiment, workdir: str | Path) -> None:
    """Trains ``experiment`` in ``workdir`` to its last step, from the newest valid checkpoint.

    Called again after an interruption it goes on and ends with the same bits as a run that was
    never interrupted (same machine and device count); called again after the end it returns.

    Raises:
      ConfigError: the workdir holds another experiment, or tokenizer and model do not fit.
      CheckpointError: the checkpoints are of another model, position embedding or corpus, or one
        cannot be written.
      NonFiniteError: nothing after the last finite checkpoint has been saved.
      OSError: the workdir cannot be written, or the token cache is missing or damaged.
    """
    workdir, config = as_path(workdir), experiment.train
    stages = [(stage, plan_state(at_stage(experiment, stage))) for stage in config.stages]
    plan = stages[-1][1]  # state and constants are the same in all of them

    # ------------------------------------------------------------------ what there is already
    if is_first():
        open_workdir(workdir, experiment)
    wait_for_all("workdir")
    store = CheckpointStore(workdir / CHECKPOINTS, keep=config.keep)
    found = store.latest_valid_step()
    start = found or 0
    stages = [(stage, own) for stage, own in stages if stage.stop > start]
    if start >= config.steps:
        log.info("%s is finished: %d steps are trained", workdir, start)
        store.close()
        return

    # ------------------------------------------------------------------ data
    cache = open_cache(experiment.data, "train")
    check_vocabulary(cache.tokenizer.vocab_size, experiment.model)
    packing = experiment.data.packing
    loaders = [
        make_loader(
            experiment.data,
            cache,
            length=stage.length,
            batch_size=stage.batch_size,
            seed=experiment.seed,
        )
        for stage, _ in stages
    ]
    for (stage, _), loader in zip(stages, loaders, strict=True):
        log.info(
            "data: %s; %d x %d tokens a step (steps %d to %d)",
            loader.about, stage.batch_size, stage.length, stage.start + 1, stage.stop,
        )  # fmt: skip

    # ------------------------------------------------------------------ model and optimizer
    # Later rows are written again as their steps come again; left in place they count twice.
    dropped = 0
    if is_first():
        dropped = replace_rows(workdir / METRICS, lambda row: row.get("step", 0) > start, [])
    if found is None:
        constants = place_constants(draw_constants(experiment), plan)
        state = new_state(experiment, plan)
    else:
        state, constants = _restore(store, start, experiment, plan, cache.fingerprint)
        log.info("resuming %s at step %d (%d later rows dropped)", workdir, start, dropped)
    shape = experiment.model.shape
    position, identity = position_identity(experiment.position, shape, constants)
    identity["data"] = cache.fingerprint
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
    if is_first():
        record_run(workdir, facts, start)

    # ------------------------------------------------------------------ steps
    meter = Meter(experiment, _last_seconds(workdir))
    with (
        MetricsLog(workdir, start) if is_first() else contextlib.nullcontext() as metrics_log,
        tqdm(
            total=config.steps, initial=start, desc=experiment.name, unit="step",
            disable=not is_first(),
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        ) as bar,
    ):  # fmt: skip
        for (stage, own), loader in zip(stages, loaders, strict=True):
            begin = max(start, stage.start)
            seconds, step_function = _compile(own, loader, begin + config.data_start, experiment)
            if metrics_log:
                row = {"kind": "time", "phase": "compile", "step": begin, "seconds": seconds}
                metrics_log.write(row)
            remaining = loader.iterate(begin + config.data_start, stage.stop - begin)
            batches = TimedIterator(remaining)
            meter.restart(batches)
            for step, batch in enumerate(batches, start=begin + 1):
                state, metrics = step_function(
                    state, constants, put(share_positions(batch, packing), own.mesh)
                )
                meter.add(metrics)
                bar.update()
                saves = step % config.save_every == 0 or step == config.steps
                # A save ends a row, so that a resumed run writes the rows of the unbroken one; so
                # does a stage, whose clock is its own.
                if saves or step % config.log_every == 0 or step == stage.stop:
                    row = meter.row(step, batches)
                    if metrics_log:
                        metrics_log.write(row)
                    bar.set_postfix_str(
                        f"loss {row['loss']:.3f}, {row['tokens_per_second'] / 1e3:.1f}k tokens/s, "
                        f"data wait {row['data_wait_fraction']:.1%}",
                        refresh=False,
                    )
                if saves:
                    if not all_finite(state):
                        raise NonFiniteError(
                            f"a parameter is not finite after step {step}; {ADVICE}"
                        )
                    items = {
                        "params": state.params,
                        "constants": constants,
                        "optimizer": state.optimizer,
                    }
                    if metrics_log:
                        metrics_log.flush()
                    store.save(step, items, identity)
                    meter.restart(batches)
    store.close()
    log.info("trained %d steps; checkpoint %s", config.steps, store.directory / str(config.steps))


def _compile(
    plan: StatePlan, loader: AnyLoader, step: int, experiment: Experiment
) -> tuple[float, Callable[..., tuple[TrainState, StepMetrics]]]:
    """The program of a step like batch ``step`` of ``loader``, and the seconds it took."""
    batch = share_positions(loader.batch(step), experiment.data.packing)
    began = time.perf_counter()
    compiled = lower_planned(plan, put(batch, plan.mesh), experiment.train.accumulate).compile()
    seconds = time.perf_counter() - began
    log.info("compiled in %.1f s", seconds)
    return seconds, compiled


def put(batch: Batch, mesh: Mesh) -> Batch:
    """A host batch, cut up over the devices of all processes."""
    return jax.tree.map(lambda x: place(x, batch_sharding(x, mesh)), batch)


def share_positions(batch: Batch, packing: Packing) -> Batch:
    """Positions as ``[1, T]`` where the packing makes those of all rows the same.

    Everything that depends on positions alone is then computed once a batch, not once a row.
    """
    if packing == "windows":
        return batch._replace(positions=batch.positions[:1])
    return batch


ADVICE = "nothing has been saved since the last checkpoint; a lower train.learning_rate may help"


def _restore(
    store: CheckpointStore, step: int, experiment: Experiment, plan: StatePlan, data: str
) -> tuple[TrainState, Any]:
    stored, where = store.metadata(step), str(store.directory / str(step))
    if stored["data"] != data:
        raise CheckpointError(
            f"{where}: its data fingerprint is {stored['data']}, this run's is {data}; the data"
            " has changed since the checkpoint was written"
        )
    position, shape = experiment.position, experiment.model.shape
    check_fingerprint(stored, position, shape, None, where)
    wanted = plan.state
    items = {"params": wanted.params, "constants": plan.constants, "optimizer": wanted.optimizer}
    restored = store.restore(step, items)
    check_fingerprint(stored, position, shape, restored["constants"], where)
    return TrainState(restored["params"], restored["optimizer"]), restored["constants"]


def _last_seconds(workdir: Path) -> float:
    rows = [row for row in read_rows(workdir / METRICS) if row["kind"] == "train"]
    return rows[-1]["seconds"] if rows else 0.0


class TimedIterator:
    """Hands on batches and adds up the seconds spent waiting for them in ``waited``."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches = iter(batches)
        self.waited = 0.0

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - began


class Meter:
    """Collects the metrics of steps on the device and turns them into one row.

    Fetching them every step would make the host wait for the device each time.
    """

    def __init__(self, experiment: Experiment, seconds_before: float):
        self._config = experiment.train
        self._pending: list[StepMetrics] = []
        self._waited = 0.0
        self._row_began = time.perf_counter()
        self._run_began = self._row_began - seconds_before

    def add(self, metrics: StepMetrics) -> None:
        """Remembers the metrics of one more step, without fetching them."""
        self._pending.append(metrics)

    def restart(self, batches: TimedIterator) -> None:
        """Begins the next row's clock now: what came before, such as a save, is not training."""
        self._waited, self._row_began = batches.waited, time.perf_counter()

    def row(self, step: int, batches: TimedIterator) -> dict[str, Any]:
        """The train row of the steps since the last row, of which ``step`` is the newest.

        ``grad_norm`` is the mean over those steps, ``learning_rate`` that of the newest.

        Raises:
          NonFiniteError: naming the first step with a loss or gradient that is not finite.
        """
        nats, tokens, norms = np.asarray(jax.device_get(self._pending), np.float64).T
        first = step - len(self._pending) + 1
        for offset, (loss, norm) in enumerate(zip(nats / tokens, norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteError(
                    f"step {first + offset}: loss is {loss}, gradient norm {norm}; {ADVICE}"
                )
        now, config = time.perf_counter(), self._config
        elapsed = now - self._row_began
        positions = len(self._pending) * config.batch_size * config.length
        row = {
            "kind": "train",
            "step": step,
            "tokens_seen": step * config.batch_size * config.length,
            "nats": float(nats.sum()),
            "tokens": float(tokens.sum()),
            "loss": float(nats.sum() / tokens.sum()),
            "grad_norm": float(norms.mean()),
            "learning_rate": float(learning_rate(config, step - 1)),
            "tokens_per_second": positions / elapsed,
            "data_wait_fraction": (batches.waited - self._waited) / elapsed,
            "seconds": now - self._run_began,
        }
        self._pending = []
        self.restart(batches)
        return row
