"""Trains, and writes down which example lay in which row of each step's batch, as devices had it.

    python -m tests.faults.examples OUT CONFIG WORKDIR STOP AXIS=N,...

One of several processes under tpu_scripts/local.sh; each writes the rows that its devices hold.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.processes.start import initialize


class Enough(Exception):
    """Where this program stops training."""


def main() -> None:
    out, config, workdir, stop, mesh = sys.argv[1:]
    initialize()
    import jax

    from fope_jax.config import build_experiment, load_config
    from fope_jax.data import task_mixture
    from fope_jax.train import loop

    overrides = [f"mesh.{part}" for part in mesh.split(",")]
    experiment = build_experiment(load_config(config, overrides))
    seen: list[dict[str, Any]] = []
    shard_batch, iterate = loop.shard_batch, task_mixture.Loader.iterate

    def counted(self: Any, start_step: int = 0, num_steps: int | None = None):
        for step, batch in enumerate(iterate(self, start_step, num_steps), start_step):
            if step == int(stop):
                raise Enough
            yield batch

    def kept(batch: Any, on: Any) -> Any:
        placed = shard_batch(batch, on)
        for shard in placed.tokens.addressable_shards:
            first = shard.index[0].start or 0
            for row, tokens in enumerate(np.asarray(shard.data), start=first):
                seen.append({"call": calls[0], "row": row, "tokens": tokens.tolist()})
        calls[0] += 1
        return placed

    calls = [0]
    loop.shard_batch, task_mixture.Loader.iterate = kept, counted
    with contextlib.suppress(Enough):
        loop.train(experiment, workdir)
    path = Path(out) / f"{stop}-{jax.process_index()}.json"
    path.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
