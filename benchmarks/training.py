"""A training step of ours beside the same model in Hugging Face transformers, on the same CPU.

    python -m benchmarks.training --size 60m --length 512 --batch 2
    python -m benchmarks.training --dtype bfloat16

Each of the two lives in a process of its own, so that neither library's threads wait in the
other's way, and they step in turn, so that a ratio of neighbours sees the same machine. Both do a
forward and a backward pass, clip by the global norm, and step AdamW. The other side is
LlamaForCausalLM with SDPA attention, its own loss, and the fused AdamW of PyTorch. Weights and
moments are float32 on both sides; `--dtype bfloat16` is that of our activations, and autocast on
the other side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cost import ratio
from benchmarks.worker import Worker

SIDES = ("fope_jax", "huggingface")
BESIDE = "huggingface: pip install torch==2.13.0 transformers==5.24.0"


class Work(NamedTuple):
    """What both sides train.

    Attributes:
      size: a preset of ``fope_jax.model.presets``.
      length: tokens of a window.
      batch: windows of a step.
      dtype: of activations and matrix products, "float32" or "bfloat16".
    """

    size: str
    length: int
    batch: int
    dtype: str = "float32"


def products(work: Work) -> float:
    """Floating point operations of a step that matrix products must do, see ``model_flops``.

    >>> round(products(Work("60m", 512, 2)) / 1e9)
    377
    """
    from benchmarks.cost import make_config
    from fope_jax.position import NoPE
    from fope_jax.tpu.flops import model_flops

    return model_flops(make_config(work.size, None, None), NoPE(), work.batch, work.length)


def fope_jax_side(work: Work) -> tuple[Callable[[], None], Callable[[int], float]]:
    """A step of ours with RoPE, and the rate of a square product in operations a second."""
    import jax
    import jax.numpy as jnp

    from benchmarks.cost import contestants, make_batch, make_config
    from fope_jax.position import RoPE

    # In a row, as the other side has them: on a CPU a scan pays for copies of what it stacks.
    config = dataclasses.replace(
        make_config(work.size, None, None), scan_layers=False, dtype=work.dtype
    )
    batch = make_batch(config.vocab_size, work.batch, work.length, packed=False)
    (contestant,), shared = contestants({"rope": RoPE()}, config, batch)
    state = [shared, contestant.own]

    def step() -> None:
        state[:] = contestant.step(*state)

    def rate(size: int) -> float:
        x = jnp.ones((size, size), work.dtype)
        run = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
        return _rate(lambda: run(x, x).block_until_ready(), size)

    return step, rate


def huggingface_side(work: Work) -> tuple[Callable[[], None], Callable[[int], float]]:
    """The same two of PyTorch: the step of ``LlamaForCausalLM``, the rate of a product."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.cost import make_batch, make_config

    ours = make_config(work.size, None, None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.d_model,
            intermediate_size=ours.mlp_dim,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_heads,
            max_position_embeddings=work.length,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    batch = make_batch(ours.vocab_size, work.batch, work.length, packed=False)
    tokens = torch.from_numpy(batch.tokens).long()
    targets = torch.from_numpy(batch.targets).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=work.dtype == "bfloat16"):
            loss = model(input_ids=tokens, shift_labels=targets, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def rate(size: int) -> float:
        x = torch.ones((size, size), dtype=getattr(torch, work.dtype))
        return _rate(lambda: x @ x, size)

    return step, rate


def _rate(run: Callable[[], Any], size: int) -> float:
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def work_for(side: str, work: Work) -> None:
    """The process of one side: does what stdin asks for and answers in JSON, line by line."""
    answer = sys.stdout
    sys.stdout = sys.stderr
    step, rate = {"fope_jax": fope_jax_side, "huggingface": huggingface_side}[side](work)
    for line in sys.stdin:
        if json.loads(line) == ["rate"]:
            found = rate(2048)
        else:
            start = time.perf_counter()
            step()
            found = time.perf_counter() - start
        print(json.dumps(found), file=answer, flush=True)


class Side(Worker):
    """A process that steps when asked to."""

    def __init__(self, side: str, work: Work) -> None:
        command = [sys.executable, "-m", "benchmarks.training", "--worker", side]
        for name, value in work._asdict().items():
            command += [f"--{name}", str(value)]
        super().__init__(side, command, BESIDE)


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Seconds of each side's steps, in turn, and the best rate of a matrix product of either."""
    sides = [Side(name, work) for name in SIDES]
    try:
        for side in sides:
            first, warm = side.ask("step"), side.ask("step")
            print(f"{side.name}: first step {first:.1f} s, then {warm:.2f} s", file=sys.stderr)
        rates = {side.name: max(side.ask("rate") for _ in range(3)) for side in sides}
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(rounds):
            for side in sides[:: -1 if number % 2 else 1]:
                seconds[side.name].append(side.ask("step"))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    finally:
        for side in sides:
            side.stop()
    return {"work": work._asdict(), "seconds": seconds, "rates": rates}


def render(result: dict[str, Any]) -> str:
    work = Work(**result["work"])
    tokens, best = work.batch * work.length, max(result["rates"].values())
    base = result["seconds"]["huggingface"]
    lines = [
        f"{work.size}, T = {work.length}, B = {work.batch}, {work.dtype}; best rate of a product "
        f"{best / 1e9:.0f} GFLOP/s; {products(work) / 1e9:.0f} GFLOP of products a step",
        "",
        "| side | s/step | tokens/s | speed beside huggingface | share of the rate of products |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in result["seconds"].items():
        middle = sorted(seconds)[len(seconds) // 2]
        speed = ratio(base, seconds, "huggingface")
        spread = f"{speed.median:.2f} ({speed.low:.2f} to {speed.high:.2f})"
        share = products(work) / middle / best
        lines.append(f"| {name} | {middle:.2f} | {tokens / middle:.0f} | {spread} | {share:.0%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--size", default="60m")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=2, help="windows of a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each side")
    parser.add_argument("--json", type=Path, help="where to write every number")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    work = Work(arguments.size, arguments.length, arguments.batch, arguments.dtype)
    if arguments.worker:
        work_for(arguments.worker, work)
        return 0
    result = measure(work, arguments.rounds)
    print(render(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
