"""Our side: training steps, what methods cost beside RoPE, and attention alone."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.cost import interleave, make_batch, make_config, ratio
from benchmarks.gpu.correctness import one_line
from benchmarks.gpu.units import Unit
from fope_jax.config import TrainConfig
from fope_jax.gallery.examples import examples
from fope_jax.model.backends import CUDNN_MAX_LENGTH, choose_backend, gpu_compute_capability
from fope_jax.model.context_parallel import sharded_attention
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import NoPE
from fope_jax.position.base import Layer, PositionEmbedding
from fope_jax.tpu.flops import model_flops
from fope_jax.train.optim import make_optimizer
from fope_jax.train.step import TrainState, train_step
from fope_jax.typing import Batch

MEASURED_SECONDS = 2.0  # of steps, after two that are left out
ROUNDS = 6  # of steps in turn
HEADS, HEAD_DIM = 8, 64  # of attention alone

# Peak of dense products in bfloat16, 1e12 operations a second, from NVIDIA's data sheets; the first
# name in a device's kind counts. `--peak` states another.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}

Row = dict[str, Any]


def device_peak(kind: str) -> float | None:
    """Operations a second of a device by its kind; None if unknown.

    >>> device_peak("NVIDIA H100 80GB HBM3"), device_peak("cpu")
    (989400000000000.0, None)
    """
    found = (peak * 1e12 for name, peak in PEAKS.items() if name in kind)
    return next(found, None)


def machine_row() -> Row:
    """Device, versions, the rate of a large product, and whether TensorFlow was imported."""
    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    size, dtype = (8192, jnp.bfloat16) if is_gpu else (256, jnp.float32)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    seconds = _seconds(lambda: product(x, x))
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "compute_capability": gpu_compute_capability(device),
        "bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "product_rate": 2 * size**3 / seconds,
        "peak": device_peak(device.device_kind),
        "imports_tensorflow": "tensorflow" in sys.modules,
    }


# ---------------------------------------------------------------------------- training steps


class TrainingStep:
    """A compiled training step of one method, with its state; each call is one update."""

    def __init__(self, unit: Unit, method: PositionEmbedding, batch: Batch) -> None:
        is_gpu = jax.default_backend() == "gpu"
        config = dataclasses.replace(
            make_config(unit.size, None, None),
            dtype="bfloat16" if is_gpu else "float32",
            remat=unit.remat,
        )
        settings = TrainConfig(
            steps=10_000, batch_size=unit.batch, length=unit.length, learning_rate=1e-4
        )
        optimizer = make_optimizer(dataclasses.replace(settings, warmup_steps=0))
        graphdef, params, self.constants = split(Transformer(config, method, rngs=nnx.Rngs(0)))
        self.state = TrainState(params, jax.jit(optimizer.init)(params))
        self.batch, self.flops = batch, model_flops(config, method, unit.batch, unit.length)
        layers = method.layers()
        self.attention = choose_backend(
            "auto",
            platform=jax.default_backend(),
            layers=layers,
            length=unit.length,
            shape=config.shape,
            dtype=config.dtype,
            compute_capability=gpu_compute_capability(jax.devices()[0]),
        )
        began = time.perf_counter()
        arguments = (graphdef, optimizer, self.state, self.constants, batch)
        self.compiled: Any = train_step.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - began

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.constants, self.batch)
        return metrics

    def loss(self) -> float:
        """Nats per token of one more update, whose end this waits for."""
        metrics = self()
        return float(metrics.nats) / float(metrics.tokens)

    @property
    def bytes_held(self) -> int:
        """Arguments, results and temporaries of the program, what it donates counted once."""
        m = self.compiled.memory_analysis()
        held = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
        return held - m.alias_size_in_bytes


def training_row(unit: Unit) -> Row:
    """Seconds of a step with RoPE, run one after the other as in training, and its memory."""
    batch = _batch(unit)
    step = TrainingStep(unit, examples(unit.length)[unit.methods[0]], batch)
    first = step.loss()
    step.loss()
    count, seconds = 0, 0.0
    began = time.perf_counter()
    while seconds < MEASURED_SECONDS and count < 200:
        metrics = [step() for _ in range(2)]  # the next is on its way while the last one runs
        jax.block_until_ready(metrics)
        count, seconds = count + 2, time.perf_counter() - began
    return {
        "seconds": seconds / count,
        "steps": count,
        "compile_seconds": step.compile_seconds,
        "flops": step.flops,
        "bytes": step.bytes_held,
        "attention": step.attention.name,
        "reason": step.attention.reason,
        "remat": unit.remat,
        "losses": [first, step.loss()],
    }


def cost_row(unit: Unit) -> Row:
    """Seconds of a step of each method, in turn, as ratios within a round; and its memory."""
    batch, known = _batch(unit), examples(unit.length)
    steps, failed = {}, {}
    for label in unit.methods:
        try:
            steps[label] = TrainingStep(unit, known[label], batch)
            for _ in range(2):
                steps[label].loss()
        except Exception as error:  # out of memory: the other methods go on
            steps.pop(label, None)
            failed[label] = one_line(error)
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    labels = list(steps)
    for order in interleave(len(labels), ROUNDS):
        for index in order:
            began = time.perf_counter()
            jax.block_until_ready(steps[labels[index]]())
            seconds[labels[index]].append(time.perf_counter() - began)
    methods = {}
    for label, step in steps.items():
        methods[label] = {
            "seconds": statistics.median(seconds[label]),
            "bytes": step.bytes_held,
            "attention": step.attention.name,
        }
        if "rope" in seconds:
            compared = ratio(seconds[label], seconds["rope"], "rope")
            quartiles = [compared.low, compared.median, compared.high]
            methods[label]["beside_rope"] = quartiles
    return {"methods": methods, "failed": failed}


def _batch(unit: Unit) -> Batch:
    vocabulary = make_config(unit.size, None, None).vocab_size
    return jax.device_put(make_batch(vocabulary, unit.batch, unit.length, packed=False))


# ---------------------------------------------------------------------------- attention alone


def attention_row(unit: Unit) -> Row:
    """Seconds of attention forward and backward by each program, over rows of one document.

    "causal" is cuDNN with its own causal rule instead of a mask, which takes no packed rows; it
    says what the mask costs.
    """
    is_gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if is_gpu else jnp.float32
    shape = (unit.batch, unit.length, HEADS, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, shape, dtype) for key in keys)
    positions = jnp.arange(unit.length, dtype=jnp.int32)[None]
    segments = jnp.ones_like(positions)

    def through(backend: str) -> Callable[..., Any]:
        return lambda q, k, v: sharded_attention(
            *(q, k, v),
            positions=positions,
            segments=segments,
            variables={},
            constants={},
            position=Layer(NoPE()),
            sums=None,
            sinks=None,
            backend=backend,
        )

    def causal(q, k, v):
        implementation = "cudnn" if is_gpu else "xla"
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    programs = {"chunked": through("chunked"), "causal": causal}
    failed = {}
    if is_gpu and unit.length <= CUDNN_MAX_LENGTH:
        programs["cudnn"] = through("cudnn")
    else:
        failed["cudnn"] = f"it needs a GPU, and at most {CUDNN_MAX_LENGTH:,} tokens"
    seconds = {}
    for name, program in programs.items():

        def step(q, k, v, d_out, program=program):
            out, pull = jax.vjp(program, q, k, v)
            return out, pull(d_out)

        try:
            compiled = jax.jit(step).lower(q, k, v, d_out).compile()
            seconds[name] = _seconds(lambda compiled=compiled: compiled(q, k, v, d_out))
        except Exception as error:  # of memory or cuDNN: the others go on
            failed[name] = one_line(error)
    pairs = unit.batch * HEADS * unit.length**2 / 2
    return {"seconds": seconds, "flops": 12 * pairs * HEAD_DIM, "failed": failed}


def _seconds(run: Callable[[], Any], tries: int = 5) -> float:
    """The shortest of some runs, each long enough to time; the first is left out."""
    jax.block_until_ready(run())
    found = []
    for _ in range(tries):
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(4)])
        found.append((time.perf_counter() - began) / 4)
    return min(found)
