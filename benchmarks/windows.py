"""What a sliding window saves in one layer's attention: time, memory, and work on a TPU.

    python -m benchmarks.windows time      seconds, in turn with full attention
    python -m benchmarks.windows memory    temporary bytes as compiled; runs nothing
    python -m benchmarks.windows tpu       by the TPU compiler; no TPU needed

A step is the forward pass and the gradients of q, k, v and whatever else the layer trains. Time and
memory are of the chunked attention on this machine's CPU, in float32, tpu of both kernels in
bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.cost import ratio, time_interleaved
from benchmarks.memory import exponent
from benchmarks.worker import needs_compiler_environment, run_for_compiler
from fope_jax.model.context_parallel import sharded_attention
from fope_jax.model.sharding import MeshConfig, make_mesh
from fope_jax.position import NoPE
from fope_jax.position.base import Layer
from fope_jax.tpu.flops import program_flops
from fope_jax.tpu.hlo import measure_traffic
from fope_jax.tpu.topology import topology_devices

HEAD_DIM = 64


class Case(NamedTuple):
    """One layer's attention over one row of one document.

    Attributes:
      label: in the table.
      length: tokens.
      heads: of queries, and of keys.
      window: tokens; None is full attention.
      width: E of q and k; 2 ``HEAD_DIM`` as in PoPE.
      sums: whether a running sum is added to the logits, as in FoX.
      sinks: whether there are attention sinks.
    """

    label: str
    length: int
    heads: int
    window: int | None = None
    width: int = HEAD_DIM
    sums: bool = False
    sinks: bool = False


def inputs(case: Case, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What is differentiated."""
    row, width = (1, case.length, case.heads), case.width
    shapes = {"q": (*row, width), "k": (*row, width), "v": (*row, HEAD_DIM)}
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    if case.sums:
        arrays["sums"] = jax.ShapeDtypeStruct((*row, 2), jnp.float32)
    if case.sinks:
        arrays["sinks"] = jax.ShapeDtypeStruct((case.heads,), jnp.float32)
    return arrays


def program(case: Case, backend: str, *, step: bool) -> Callable[..., Any]:
    """Of the inputs alone, or of the inputs and the gradient of the output if it is a step."""

    def forward(arrays):
        positions = jnp.arange(case.length, dtype=jnp.int32)[None]
        return sharded_attention(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            positions=positions,
            segments=jnp.ones_like(positions),
            variables={},
            constants={},
            position=Layer(NoPE(), window=case.window),
            sums=arrays.get("sums"),
            sinks=arrays.get("sinks"),
            backend=backend,
        )

    def forward_and_backward(arrays, d_out):
        out, pull = jax.vjp(forward, arrays)
        return out, pull(d_out)

    return jax.jit(forward_and_backward if step else forward)


def arguments(case: Case, dtype: Any, *, step: bool) -> list[Any]:
    arrays = inputs(case, dtype)
    return [arrays, arrays["v"]] if step else [arrays]


# ---------------------------------------------------------------------------- time and memory


def time_table(lengths: Sequence[int], heads: int, window: int, rounds: int) -> str:
    """Markdown; a ratio is the median of those within a round, with its quartiles."""
    lines = [
        f"| T | program | full, s | window {window}, s | window / full | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    for length in lengths:
        pair = [Case("full", length, heads), Case("window", length, heads, window)]
        for step in (False, True):
            runs = [_run(case, step=step) for case in pair]
            seconds = time_interleaved(runs, rounds)
            found = ratio(seconds[1], seconds[0], "full")
            lines.append(
                f"| {length:,} | {'step' if step else 'forward'} | {min(seconds[0]):.2f} "
                f"| {min(seconds[1]):.2f} | {found.median:.3f} "
                f"| {found.low:.3f} to {found.high:.3f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _run(case: Case, *, step: bool) -> Callable[[], Any]:
    """Compiled and run once."""
    shapes = arguments(case, jnp.float32, step=step)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    arrays = jax.tree.unflatten(tree, [jax.random.normal(k, x.shape, x.dtype) for k, x in pairs])
    run = program(case, "chunked", step=step)
    jax.block_until_ready(run(*arrays))
    return lambda: run(*arrays)


def memory_table(lengths: Sequence[int], heads: int, window: int) -> str:
    """Markdown, MB of temporaries of a step."""
    head = " | ".join(f"{length:,}" for length in lengths)
    lines = [f"| attention | {head} | exponent |", "|---|" + "---|" * (len(lengths) + 1)]
    for label, of_label in (("full", None), (f"window {window}", window)):
        sizes = {}
        for length in lengths:
            case = Case(label, length, heads, of_label)
            shapes = arguments(case, jnp.float32, step=True)
            compiled: Any = program(case, "chunked", step=True).lower(*shapes).compile()
            sizes[length] = compiled.memory_analysis().temp_size_in_bytes
        cells = " | ".join(f"{size / 1e6:,.1f}" for size in sizes.values())
        lines.append(f"| {label} | {cells} | {exponent(sizes):.2f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- TPU


def tpu_table(lengths: Sequence[int], heads: int, window: int, topology: str) -> str:
    """Markdown: operations of a step, and bytes to and from memory and held in it.

    Operations are those of the blocks that the kernel computes. Splash pads heads to 128.
    """
    mesh = make_mesh(MeshConfig(), topology_devices(topology)[:1])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    lines = [
        "| T | kernel | layer | GFLOP forward | GFLOP step | MB moved in a step | MB held |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in lengths:
        layers = [
            Case("full", length, heads),
            Case(f"window {window}", length, heads, window),
            Case("wide q and k, full", length, heads, width=2 * HEAD_DIM),
            Case(f"wide q and k, window {window}", length, heads, window, 2 * HEAD_DIM),
            Case(f"sinks, window {window}", length, heads, window, sinks=True),
            Case("running sums, full", length, heads, sums=True),
            Case(f"running sums, window {window}", length, heads, window, sums=True),
        ]
        for backend in ("splash", "pallas"):
            for case in layers:
                if case.sums and backend == "splash":
                    continue
                cells = _compile(case, backend, mesh, replicated)
                lines.append(f"| {length:,} | {backend} | {case.label} | {cells} |")
                print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _compile(case: Case, backend: str, mesh: Any, sharding: Any) -> str:
    operations = []
    with jax.set_mesh(mesh):
        for step in (False, True):
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                arguments(case, jnp.bfloat16, step=step),
            )
            traced = program(case, backend, step=step).trace(*shapes)
            operations.append(program_flops(traced.jaxpr, lambda names: 1.0) / 1e9)
        compiled: Any = traced.lower().compile()
    moved = measure_traffic(compiled.as_text(), lambda names: 1.0).hbm
    held = compiled.memory_analysis().peak_memory_in_bytes
    return " | ".join(
        [*(f"{x:,.1f}" for x in operations), f"{moved / 1e6:,.0f}", f"{held / 1e6:,.0f}"]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("time", "memory", "tpu"))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row")
    parser.add_argument("--window", type=int, default=512, help="tokens that a query sees")
    parser.add_argument("--heads", type=int, help="default 4; 8 for tpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each program")
    parser.add_argument("--topology", default="v5e:2x2", help="one chip of it is compiled for")
    args = parser.parse_args(argv)
    if args.what == "tpu" and needs_compiler_environment():
        return run_for_compiler("benchmarks.windows", argv)
    if args.what == "memory":
        lengths = args.lengths or [4096, 8192, 16384, 32768, 65536]
        print(memory_table(lengths, args.heads or 4, args.window))
        return 0
    lengths = args.lengths or [4096, 32768]
    if args.what == "time":
        print(time_table(lengths, args.heads or 4, args.window, args.rounds))
    else:
        print(tpu_table(lengths, args.heads or 8, args.window, args.topology))
    return 0


if __name__ == "__main__":
    sys.exit(main())
