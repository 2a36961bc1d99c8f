"""For how long a save stops training: one that is waited for, beside one in the background.

    python -m benchmarks.saves --parameters 20e6 --saves 3

A jitted update of float32 parameters and AdamW's two moments stands for training; its state is
donated, as a training step's. Both kinds of save are made in turn, into a temporary directory.
``--store-rate`` makes each of them take as long as a store of so many bytes a second would.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import jax

from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.step_save import StepSave
from fope_jax.train.save_time import checkpoint_bytes, format_bytes

ROWS, COLUMNS = 1024, 1024  # of each array


@jax.jit
def make_state(seed: int) -> dict[str, Any]:
    return {"w": jax.random.normal(jax.random.key(seed), (ROWS, COLUMNS))}


def measure(parameters: int, saves: int, store_rate: float | None) -> None:
    count = max(1, parameters // (ROWS * COLUMNS))
    names = ("params", "mu", "nu")
    items = {n: {f"{i}": make_state(i)["w"] for i in range(count)} for n in names}
    size = checkpoint_bytes(items)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.999, tree), donate_argnums=0)
    if store_rate:
        complete = StepSave._complete

        def slowly(save: StepSave, digests: Any) -> None:
            time.sleep(size / store_rate)
            complete(save, digests)

        setattr(StepSave, "_complete", slowly)  # noqa: B010
    rows: dict[str, list[tuple[float, float, int]]] = {"waited for": [], "in the background": []}
    with tempfile.TemporaryDirectory() as directory:
        store, step = CheckpointStore(directory, keep=1), 0
        for _ in range(saves):
            for kind, found in rows.items():
                step, updates = step + 1, 0
                items = jax.block_until_ready(update(items))
                began = time.perf_counter()
                save = store.start_save(step, items, {})
                if kind == "waited for":
                    store.wait()
                stood_still = time.perf_counter() - began
                while not save.is_done:
                    items, updates = jax.block_until_ready(update(items)), updates + 1
                store.wait()
                found.append((stood_still, save.seconds, updates))
        store.close()
    print(f"{format_bytes(size)}, {saves} saves of each kind, medians")
    medians = {}
    for kind, found in rows.items():
        stood_still, seconds, updates = (
            statistics.median(column) for column in zip(*found, strict=True)
        )
        medians[kind] = stood_still
        print(f"{kind:18} {stood_still:8.3f} s of {seconds:8.3f} s; {updates:g} updates meanwhile")
    before, after = medians.values()
    print(f"ratio: training stands still {before / after:.1f} times shorter")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=20e6)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--store-rate", type=float, metavar="BYTES_PER_SECOND")
    arguments = parser.parse_args()
    measure(int(arguments.parameters), arguments.saves, arguments.store_rate)


if __name__ == "__main__":
    main()
