"""Time and memory of evaluation against length, as `fope evaluate` scores its windows.

    python -m benchmarks.evaluation --size 60m --lengths 512 2048 8192 32768

Each length is scored in a process of its own, whose peak resident memory is then what that length
takes, weights, program and Python included. One window a time, random weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCORED = 256  # targets at the end of a window, as with a training length of 512
_KB = 1024 if sys.platform != "darwin" else 1  # of ru_maxrss


def score_once(size: str, method: str, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of each window after the first, and the peak memory of this process in bytes."""
    import numpy as np
    from flax import nnx

    from fope_jax.evaluate.scoring import model_scorer
    from fope_jax.gallery.examples import examples
    from fope_jax.model.config import TransformerConfig
    from fope_jax.model.presets import PRESETS
    from fope_jax.model.transformer import Transformer

    config = TransformerConfig(**PRESETS[size])
    position = examples(512, config.shape.head_dim)[method]
    scorer = model_scorer(Transformer(config, position, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    seconds = []
    for _ in range(rounds + 1):
        tokens = random.integers(0, config.vocab_size, (1, length + 1), dtype=np.int32)
        began = time.perf_counter()
        nats, _ = scorer(tokens[:, :-1], tokens[:, -SCORED:])
        if not np.isfinite(np.asarray(nats)).all():
            raise SystemExit(f"{method} at {length} tokens: the loss is not finite")
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KB
    return {"method": method, "length": length, "seconds": seconds[1:], "peak_bytes": peak}


def render(results: list[dict[str, Any]]) -> str:
    lines = [
        "| method | T | s/window | µs/token | peak memory, GB | MB more per 1,000 tokens more |",
        "|---|---|---|---|---|---|",
    ]
    before: dict[str, dict[str, Any]] = {}
    for row in results:
        length, middle = row["length"], sorted(row["seconds"])[len(row["seconds"]) // 2]
        last, growth = before.get(row["method"]), ""
        if last:
            more = row["peak_bytes"] - last["peak_bytes"]
            growth = f"{more / 1e6 / (length - last['length']) * 1e3:.1f}"
        lines.append(
            f"| {row['method']} | {length:,} | {middle:.2f} | {1e6 * middle / length:.0f} | "
            f"{row['peak_bytes'] / 1e9:.2f} | {growth} |"
        )
        before[row["method"]] = row
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", default="60m", help="of the model")
    parser.add_argument("--methods", nargs="+", default=["rope", "fope", "alibi"], metavar="LABEL")
    lengths = [512 * 4**k for k in range(4)]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens")
    parser.add_argument("--rounds", type=int, default=1, help="windows timed after the first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as well")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        (method,), (length,) = arguments.methods, arguments.lengths
        print(json.dumps(score_once(arguments.size, method, length, arguments.rounds)))
        return 0
    results = []
    for method in arguments.methods:
        for length in sorted(arguments.lengths):
            print(f"{method}, {length:,} tokens", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benchmarks.evaluation", "--one", "--size"]
            command += [arguments.size, "--methods", method, "--lengths", str(length)]
            command += ["--rounds", str(arguments.rounds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                return done.returncode
            results.append(json.loads(done.stdout))
    print(render(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
