"""A training step of ours beside others' of the same model, by the TPU compiler.

    python -m benchmarks.tpu_step --lengths 512 4096
    python -m benchmarks.tpu_step --steps maxtext    # where MaxText is installed too

Needs `pip install '.[tpu-compiler]'` and no TPU; nothing runs. The plain step is what one writes
without a framework: nnx.Linear and nnx.RMSNorm, `jax.nn.dot_product_attention`, each layer
recomputed in the backward pass (nnx.remat), optax's loss and AdamW, parameters sharded along their
first axis and gathered by the partitioner. Both have bfloat16 activations, float32 parameters and
moments, RoPE, and the same tokens a step. MaxText's step is `benchmarks.maxtext_step`. Bytes are
counted alike, from the compiled programs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.maxtext_step import compile_maxtext
from benchmarks.worker import needs_compiler_environment, run_for_compiler
from fope_jax.config import Experiment, build_experiment, load_config
from fope_jax.model.config import TransformerConfig
from fope_jax.model.presets import PRESETS
from fope_jax.model.sharding import make_mesh
from fope_jax.report.markdown import markdown_table
from fope_jax.tpu.compile import measure_step, memory_by_class, parse_out_of_memory
from fope_jax.tpu.flops import model_flops
from fope_jax.tpu.hlo import measure_traffic
from fope_jax.tpu.plan import make_cases
from fope_jax.tpu.topology import parse_topology, topology_devices

CONFIG = "configs/paper/c4_books.py"
HEADINGS = ["T", "step", "memory GB", "HBM GB", "HBM ms", "MFU at most", "compiled s"]


def rope(x: jax.Array) -> jax.Array:
    """Half-split pairs of ``[B, T, N, H]`` at positions 0 to T - 1."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    phase = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * rates
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class PlainLayer(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        width, self.heads = config.d_model, config.num_heads

        def linear(features_in: int, features_out: int) -> nnx.Linear:
            return nnx.Linear(
                features_in, features_out, use_bias=False, dtype=jnp.bfloat16, rngs=rngs
            )

        self.attention_norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.gate, self.up = (linear(width, config.mlp_dim) for _ in range(2))
        self.down = linear(config.mlp_dim, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self.attention_norm(x)
        q, k, v = (
            product(normed).reshape(*x.shape[:2], self.heads, -1)
            for product in (self.query, self.key, self.value)
        )
        attended = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        normed = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))


class PlainTransformer(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(config.vocab_size, config.d_model, dtype=jnp.bfloat16, rngs=rngs)
        self.layers = nnx.List([PlainLayer(config, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.d_model, dtype=jnp.bfloat16, rngs=rngs)
        self.unembedding = nnx.Linear(
            config.d_model, config.vocab_size, use_bias=False, dtype=jnp.bfloat16, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return self.unembedding(self.norm(x)).astype(jnp.float32)


def compile_plain(experiment: Experiment, topology: str) -> Any:
    """The compiled plain step for the model and batch of ``experiment``."""
    config, train = experiment.model, experiment.train
    mesh = make_mesh(experiment.mesh, topology_devices(topology))
    graphdef, params = nnx.split(nnx.eval_shape(lambda: PlainTransformer(config, nnx.Rngs(0))))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(6e-4, b2=0.95))
    moments = jax.eval_shape(optimizer.init, params)

    def sharded(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = P("fsdp") if x.ndim > 1 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    def step(params, moments, tokens, targets):
        def loss(params):
            logits = nnx.merge(graphdef, params)(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    rows = jax.ShapeDtypeStruct((train.batch_size, train.length), jnp.int32)
    state = jax.tree.map(sharded, (params, moments))
    kept = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, None))
    return step.lower(*state, sharded(rows), sharded(rows)).compile()


def measure(
    compile_step: Callable[[Experiment, str], Any], experiment: Experiment, topology: str
) -> dict[str, Any]:
    """As ``measure_step``, what of it the table shows, for a step of others."""
    slice_, train, began = parse_topology(topology), experiment.train, time.perf_counter()
    try:
        compiled = compile_step(experiment, topology)
    except jax.errors.JaxRuntimeError as error:
        if (sizes := parse_out_of_memory(str(error))) is None:
            raise
        return {"fits": False, "needed_bytes": sizes[0], "limit_bytes": sizes[1]}
    moved = measure_traffic(compiled.as_text(), lambda names: 1)
    seconds = moved.hbm / slice_.chip.hbm_bandwidth
    useful = (
        model_flops(experiment.model, experiment.position, train.batch_size, train.length)
        / slice_.num_devices
    )
    return {
        "fits": True,
        "needed_bytes": sum(memory_by_class(compiled).values()),
        "hbm_bytes": moved.hbm,
        "seconds": {"hbm": seconds},
        "mfu_bound": useful / slice_.chip.flops / seconds,
        "compile_seconds": time.perf_counter() - began,
    }


STEPS = {
    "fope_jax": measure_step,
    "plain": partial(measure, compile_plain),
    "maxtext": partial(measure, compile_maxtext),
}


def cells(label: str, length: int, row: dict[str, Any]) -> list[str]:
    needed = f"{row['needed_bytes'] / 1e9:.1f}"
    if not row["fits"]:
        over = f"does not fit {row['limit_bytes'] / 1e9:.1f}"
        return [f"{length:,}", label, f"{needed}: {over}", "", "", "", ""]
    return [
        f"{length:,}",
        label,
        needed,
        f"{row['hbm_bytes'] / 1e9:.1f}",
        f"{1e3 * row['seconds']['hbm']:.0f}",
        f"{row['mfu_bound']:.0%}",
        f"{row['compile_seconds']:.0f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="60m", choices=list(PRESETS))
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--steps", nargs="+", default=["fope_jax", "plain"], choices=list(STEPS))
    args = parser.parse_args(argv)
    if needs_compiler_environment():
        return run_for_compiler("benchmarks.tpu_step", argv)
    experiment = build_experiment(load_config(f"{CONFIG}:position=rope"))
    lines = []
    for case in make_cases(
        experiment, topologies=[args.topology], sizes=[args.size], lengths=args.lengths
    ):
        for name in args.steps:
            row = STEPS[name](case.experiment, args.topology)
            lines.append(cells(name, case.experiment.train.length, row))
            print(*lines[-1], sep=", ", file=sys.stderr, flush=True)
    print(markdown_table(HEADINGS, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
