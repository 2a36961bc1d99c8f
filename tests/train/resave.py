"""Restores a checkpoint on the devices of this program, and saves it from there.

python -m tests.train.resave WORKDIR STEP OUT '{"tensor": 2}'
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from fope_jax.processes.start import initialize

if __name__ == "__main__":
    initialize()
    from fope_jax.evaluate.restore import read_experiment
    from fope_jax.model.sharding import MeshConfig
    from fope_jax.storage.checkpoint import CheckpointStore
    from fope_jax.train.state import plan_state
    from fope_jax.train.workdir import CHECKPOINTS

    workdir, step, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    mesh = MeshConfig(**json.loads(sys.argv[4]))
    plan = plan_state(dataclasses.replace(read_experiment(workdir), mesh=mesh))
    store = CheckpointStore(workdir / CHECKPOINTS)
    items = {
        "params": plan.state.params,
        "constants": plan.constants,
        "optimizer": plan.state.optimizer,
    }
    restored = store.restore(step, items)
    CheckpointStore(out / CHECKPOINTS).save(step, restored, store.metadata(step))
