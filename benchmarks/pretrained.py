"""A run with a pretrained model beside transformers and PyTorch: scoring, decoding, memory.

    python -m benchmarks.pretrained RUN --lengths 2048 8192 --batch 4 --prompt 512 --tokens 64
    python -m benchmarks.pretrained RUN --lengths --tokens 0 --memory 32768
    python -m benchmarks.pretrained RUN --dtype bfloat16

The run is exported once, so both sides have the same weights, in float32 or in `--dtype`. Each side
lives in a process of its own, and they work in turn, so that a ratio of neighbours sees the same
machine. Scoring is the forward pass and the loss of every token, with the logits of a few hundred
tokens at once. Decoding is greedy, with a cache: the seconds of a prompt and TOKENS + 1 tokens less
those of the prompt and one token. Memory is the peak of a fresh process that scores one window.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.worker import Worker

SIDES = ("fope_jax", "transformers")
BESIDE = "transformers: pip install torch==2.13.0 transformers==5.24.0, or --python PATH"
LOGITS_AT_ONCE = 2**24
_KB = 1024 if sys.platform != "darwin" else 1  # of ru_maxrss


class Model(NamedTuple):
    """One side's model.

    Attributes:
      score: tokens ``[T + 1]`` to the mean nats of the last T.
      write: prompts ``[B, T]`` and a count to greedy tokens ``[B, count]``, as lists.
      versions: of the libraries.
    """

    score: Callable[[Any], float]
    write: Callable[[Any, int], list[list[int]]]
    versions: str


def fope_jax_model(run: str, dtype: str) -> Model:
    import dataclasses
    from functools import partial

    import jax
    import numpy as np

    from fope_jax.evaluate.restore import evaluation_graphdef, load_run
    from fope_jax.evaluate.scoring import model_scorer
    from fope_jax.model.decode import greedy_decode, prefill
    from fope_jax.model.transformer import merge, split

    loaded = load_run(run)
    config = dataclasses.replace(loaded.experiment.model, dtype=dtype, param_dtype=dtype)
    experiment = dataclasses.replace(loaded.experiment, model=config)
    graphdef, (params, constants) = evaluation_graphdef(experiment), split(loaded.model)[1:]
    arrays = jax.tree.map(lambda x: x.astype(dtype), params), constants
    scorer = model_scorer(merge(graphdef, *arrays))

    @partial(jax.jit, static_argnames="count")
    def write(arrays: Any, prompts: Any, count: int) -> Any:
        model = merge(graphdef, *arrays)
        segments = jax.numpy.ones_like(prompts)
        return greedy_decode(model, *prefill(model, prompts, segments, count), count)

    def mean_nats(tokens: Any) -> float:
        return float(np.mean(scorer(tokens[None, :-1], tokens[None, 1:])[0]))

    return Model(
        mean_nats,
        lambda prompts, count: np.asarray(write(arrays, prompts, count)).tolist(),
        f"jax {jax.__version__}",
    )


def transformers_model(checkpoint: str, dtype: str) -> Model:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def mean_nats(tokens: Any) -> float:
        ids = torch.from_numpy(tokens).long()
        hidden = model.model(input_ids=ids[None, :-1], use_cache=False).last_hidden_state[0]
        pieces = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
        nats = [
            torch.nn.functional.cross_entropy(model.lm_head(x).float(), targets, reduction="sum")
            for x, targets in zip(hidden.split(pieces), ids[1:].split(pieces), strict=True)
        ]
        return float(sum(nats)) / len(hidden)

    @torch.inference_mode()
    def write(prompts: Any, count: int) -> list[list[int]]:
        ids = torch.from_numpy(prompts).long()
        options: Any = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
        )
        return written[:, ids.shape[1] :].tolist()

    versions = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
    return Model(mean_nats, write, versions)


def work_for(side: str, source: str, dtype: str) -> None:
    """The process of one side: does what a line of stdin asks for and answers in JSON."""
    import numpy as np

    answer = sys.stdout
    sys.stdout = sys.stderr
    model = {"fope_jax": fope_jax_model, "transformers": transformers_model}[side](source, dtype)
    for line in sys.stdin:
        task, tokens, *count = json.loads(line)
        array = np.asarray(tokens, np.int32)
        began = time.perf_counter()
        found: Any = None
        if task == "score":
            found = model.score(array)
        elif task == "write":
            found = model.write(array, *count)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KB
        row = {"seconds": seconds, "found": found, "peak": peak, "versions": model.versions}
        print(json.dumps(row), file=answer, flush=True)


class Side(Worker):
    """A process with one side's model."""

    def __init__(self, name: str, python: str, source: str, dtype: str = "float32") -> None:
        command = [python, "-m", "benchmarks.pretrained", source, "--worker", name]
        command += ["--dtype", dtype]
        super().__init__(name, command, BESIDE)


def measure(
    start: Callable[[str], Side],
    draw: Callable[[int, int], list[list[int]]],
    lengths: list[int],
    decode: tuple[int, int, int],
    rounds: int,
) -> dict[str, Any]:
    """Scoring and decoding by both sides in turn.

    Args:
      start: name of a side to its process.
      draw: rows and tokens a row to random tokens.
      lengths: tokens of the scored windows.
      decode: rows, tokens of a prompt, and tokens to write after the first; 0 for no decoding.
      rounds: of each measurement, after a first that compiles.

    Returns for each task and side the ``seconds`` and what was ``found``; and the ``versions``.
    """
    batch, prompt, count = decode
    tasks: dict[str, tuple[Any, ...]] = {
        f"score {length}": ("score", draw(1, length + 1)[0]) for length in lengths
    }
    if count:
        prompts = draw(batch, prompt)
        tasks["first token"] = ("write", prompts, 1)
        tasks["all tokens"] = ("write", prompts, count + 1)
    sides = [start(name) for name in SIDES]
    rows: dict[str, Any] = {task: {side.name: [] for side in sides} for task in tasks}
    try:
        versions = {side.name: side.ask("hello", [])["versions"] for side in sides}
        found = {task: {x.name: x.ask(*tasks[task])["found"] for x in sides} for task in tasks}
        for number in range(rounds):
            for task, request in tasks.items():
                for side in sides[:: -1 if number % 2 else 1]:
                    rows[task][side.name].append(side.ask(*request)["seconds"])
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        for side in sides:
            side.stop()
    return {"seconds": rows, "found": found, "versions": versions, "decode": decode}


def peak_memory(side: Side, tokens: list[int]) -> dict[str, Any]:
    """Bytes with the weights alone, peak bytes and seconds of the first window of a process."""
    try:
        loaded = side.ask("hello", [])["peak"]
        return side.ask("score", tokens) | {"loaded": loaded, "length": len(tokens) - 1}
    finally:
        side.stop()


def render(result: dict[str, Any]) -> str:
    """Tables of tokens a second, with the ratio within a round; and how far results differ."""
    from benchmarks.cost import ratio

    seconds, found = result["seconds"], result["found"]
    batch, prompt, count = result["decode"]
    work = {task: int(task.split()[1]) for task in seconds if task.startswith("score")}
    times = {task: seconds[task] for task in work}
    notes = [f"{side}: {versions}" for side, versions in result["versions"].items()]
    for task in work:
        ours, theirs = (found[task][side] for side in SIDES)
        notes.append(f"{task}: {ours:.5f} and {theirs:.5f} nats a token")
    if count:
        task = f"decode {batch} x {count} after {prompt}"
        work[task] = batch * count
        pairs = {
            side: zip(seconds["all tokens"][side], seconds["first token"][side], strict=True)
            for side in SIDES
        }
        times[task] = {side: [a - b for a, b in rows] for side, rows in pairs.items()}
        ours, theirs = (sum(found["all tokens"][side], []) for side in SIDES)
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        notes.append(f"{task}: {equal} of {len(ours)} tokens equal")
    lines = [
        "| task | " + " | ".join(f"{side}, tokens/s" for side in SIDES) + " | speed | quartiles |",
        "|---|---|---|---|---|",
    ]
    for task, tokens in work.items():
        ours, theirs = (times[task][side] for side in SIDES)
        rates = " | ".join(f"{tokens / sorted(x)[len(x) // 2]:,.0f}" for x in (ours, theirs))
        speed = ratio(theirs, ours, "transformers")
        lines.append(
            f"| {task} | {rates} | {speed.median:.2f} | {speed.low:.2f} to {speed.high:.2f} |"
        )
    return "\n".join([*lines, "", *notes])


def render_memory(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| side | T | s, first window | GB, loaded | GB, peak | nats a token |",
        "|---|---|---|---|---|---|",
    ]
    for side, row in rows.items():
        lines.append(
            f"| {side} | {row['length']:,} | {row['seconds']:.0f} | {row['loaded'] / 1e9:.2f} | "
            f"{row['peak'] / 1e9:.2f} | {row['found']:.5f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="a run, as made by `fope import`")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192], help="to score")
    parser.add_argument("--batch", type=int, default=4, help="rows that are decoded")
    parser.add_argument("--prompt", type=int, default=512, help="tokens before those decoded")
    parser.add_argument("--tokens", type=int, default=64, help="to decode a row; 0: none")
    parser.add_argument("--memory", type=int, metavar="T", help="window of the memory of a process")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="that has torch and transformers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as well")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        work_for(arguments.worker, arguments.run, arguments.dtype)
        return 0
    import numpy as np

    from fope_jax.evaluate.restore import read_experiment
    from fope_jax.interop.run_export import export_run

    vocab_size = read_experiment(Path(arguments.run)).model.vocab_size
    random = np.random.default_rng(0)

    def draw(rows: int, length: int) -> list[list[int]]:
        return random.integers(0, vocab_size, (rows, length)).tolist()

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = str(Path(directory) / "checkpoint")
        export_run(arguments.run, checkpoint)
        sources = {
            "fope_jax": (sys.executable, arguments.run),
            "transformers": (arguments.python, checkpoint),
        }

        def start(name: str) -> Side:
            python, source = sources[name]
            return Side(name, python, source, arguments.dtype)

        if arguments.lengths or arguments.tokens:
            decode = (arguments.batch, arguments.prompt, arguments.tokens)
            result = measure(start, draw, arguments.lengths, decode, arguments.rounds)
            print(render(result), flush=True)
        if arguments.memory is not None:
            (tokens,) = draw(1, arguments.memory + 1)
            result["memory"] = {name: peak_memory(start(name), tokens) for name in SIDES}
            print(render_memory(result["memory"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
