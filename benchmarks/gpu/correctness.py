"""Attention on this device against the reference on a CPU in float32: forward and gradients.

Inputs are rounded to the dtype first, so that what is measured is what a path adds. In float32
products take the highest precision: by default a GPU rounds their factors to 11 bits (TF32), which
would hide a wrong mask. The programs of a group are compiled in threads, which takes most of the
time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.cost import make_batch
from fope_jax.gallery.examples import examples
from fope_jax.model.backends import choose_backend, gpu_compute_capability
from fope_jax.model.config import TransformerConfig
from fope_jax.model.context_parallel import sharded_attention
from fope_jax.model.running_sums import running_sums
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import NoPE
from fope_jax.position.base import Layer, ModelShape, PositionEmbedding
from fope_jax.train.step import batch_loss

HEADS, HEAD_DIM = 4, 64
# Largest error that passes. A layer in float32 sums a row in another order; bfloat16 has 8 bits.
PATH_LIMITS = {"float32": 3e-5, "bfloat16": 0.03}
MODEL_LIMITS = {"float32": 1e-4, "bfloat16": 0.1}

Row = dict[str, Any]


class Case(NamedTuple):
    """One layer's attention; ``width`` is E of q and k, see ``attention.attend`` for the rest."""

    label: str
    packed: bool = False
    window: int | None = None
    chunk: int | None = None
    kv_heads: int = HEADS
    width: int = HEAD_DIM
    sinks: bool = False
    sums: bool = False


def path_cases(length: int) -> list[Case]:
    """Everything a layer may ask of attention, alone and together."""
    window = length // 5
    return [
        Case("packed, window", packed=True, window=window),
        Case("one document"),
        Case("packed", packed=True),
        Case("window", window=window),
        Case("packed, chunks", packed=True, chunk=window),
        Case("grouped heads, packed", packed=True, kv_heads=2),
        Case("wide q and k, window", window=window, width=2 * HEAD_DIM),
        Case("sinks, packed, window", packed=True, window=window, sinks=True),
        Case("running sums, packed", packed=True, sums=True),
    ]


# ---------------------------------------------------------------------------- one layer's attention


def path_rows(batch: int, length: int, count: int | None = None) -> list[Row]:
    """A row for each case, attention program and dtype: the worst errors, or why it cannot run.

    The chunked program gets an odd number of tokens, ``length + 1``, and cudnn an even one.

    Args:
      batch, length: rows and tokens.
      count: of ``path_cases``; None is all.
    """
    checks, rows = [], []
    for case in path_cases(length)[:count]:
        for backend, dtype in (
            ("chunked", "float32"),
            ("chunked", "bfloat16"),
            ("cudnn", "bfloat16"),
        ):
            tokens = length + 1 if backend == "chunked" else length
            row = {"case": case.label, "backend": backend, "dtype": dtype, "length": tokens}
            layer = Layer(NoPE(), window=case.window, chunk=case.chunk)
            if reason := _reason_against(backend, [layer], tokens, dtype, case.sinks, case.sums):
                rows.append(row | {"cannot_run": reason})
                continue
            arrays, places = _path_inputs(case, batch, tokens, dtype)
            checks.append(
                Check(
                    row,
                    _attention_step(layer, "reference"),
                    _attention_step(layer, backend),
                    (jax.tree.map(lambda x: x.astype(np.float32), arrays), *places),
                    (arrays, *places),
                    PATH_LIMITS[dtype],
                    token_error,
                )
            )
    return rows + run_checks(checks)


def _attention_step(layer: Layer, backend: str) -> Callable[..., Any]:
    """The output and the gradients of all arrays, given the output's gradient ``d_out``."""

    def step(arrays, positions, segments):
        def forward(arrays):
            increments = arrays.get("increments")
            return sharded_attention(
                *(arrays[name] for name in "qkv"),
                positions=positions,
                segments=segments,
                variables={},
                constants={},
                position=layer,
                sums=None if increments is None else running_sums(increments),
                sinks=arrays.get("sinks"),
                backend=backend,
            )

        d_out = arrays["d_out"]
        out, pull = jax.vjp(forward, {n: x for n, x in arrays.items() if n != "d_out"})
        return {"out": out} | {f"d_{name}": x for name, x in pull(d_out)[0].items()}

    return step


def _path_inputs(
    case: Case, batch: int, length: int, dtype: str
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))

    heads = (batch, length, HEADS, HEAD_DIM)
    arrays = {
        "q": normal(batch, length, HEADS, case.width),
        "k": normal(batch, length, case.kv_heads, case.width),
        "v": normal(batch, length, case.kv_heads, HEAD_DIM),
        "d_out": normal(*heads),
    }
    if case.sinks:
        arrays["sinks"] = normal(HEADS).astype(np.float32)
    if case.sums:
        arrays["increments"] = -np.abs(normal(*heads[:3])).astype(np.float32) / 50
    drawn = make_batch(2, batch, length, packed=case.packed)
    return arrays, (drawn.positions, drawn.segments)


# ---------------------------------------------------------------------------- whole models


def method_rows(
    group: int, groups: int, batch: int, length: int, labels: Iterable[str] = ()
) -> list[Row]:
    """A row for each method and dtype: loss and gradients of a small model of packed rows.

    Float32 gets an odd number of tokens, ``length + 1``; in bfloat16 a GPU may take cudnn.
    """
    known = examples(length + 1)
    chosen = list(labels or known)[group::groups]
    checks = []
    for label in chosen:
        for dtype, tokens in (("float32", length + 1), ("bfloat16", length)):
            sizes = {"vocab_size": 64, "d_model": 128, "num_layers": 2, "num_heads": 2}
            config = TransformerConfig(
                **sizes, mlp_dim=128, init_std=0.1, attention_block=128, dtype=dtype
            )
            drawn = make_batch(config.vocab_size, batch, tokens, packed=True)
            reference, arrays = _loss_step(config, known[label], exact=True)
            found, _ = _loss_step(config, known[label], exact=False)
            backend = _auto_backends(known[label], tokens, dtype)
            row = {"method": label, "backend": backend, "dtype": dtype, "length": tokens}
            inputs = (*arrays, drawn)
            limit = MODEL_LIMITS[dtype]
            checks.append(Check(row, reference, found, inputs, inputs, limit, array_error))
    return run_checks(checks)


def _loss_step(
    config: TransformerConfig, method: PositionEmbedding, *, exact: bool
) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """Loss and gradients of ``(params, constants, batch)``, and the first two."""
    if exact:
        config = dataclasses.replace(config, attention="reference", dtype="float32")
    graphdef, params, constants = split(Transformer(config, method, rngs=nnx.Rngs(0)))

    def step(params, constants, batch):
        loss_and_gradients = jax.value_and_grad(batch_loss, has_aux=True)
        (nats, tokens), gradients = loss_and_gradients(params, graphdef, constants, batch)
        return {"loss": nats / tokens, "gradients": gradients}

    return step, jax.tree.map(np.asarray, (params, constants))


# ---------------------------------------------------------------------------- comparing


class Check(NamedTuple):
    """Two programs that must agree.

    Attributes:
      row: what is checked.
      reference, found: the programs, the first for a CPU, the second for the device.
      expected_inputs, inputs: their arguments.
      limit: largest error that passes.
      error: of an array and the expected one.
    """

    row: Row
    reference: Callable[..., Any]
    found: Callable[..., Any]
    expected_inputs: tuple[Any, ...]
    inputs: tuple[Any, ...]
    limit: float
    error: Callable[[np.ndarray, np.ndarray], float]


def run_checks(checks: Sequence[Check]) -> list[Row]:
    """A row for each check: ``errors`` by array, the ``worst``, its ``limit``, whether it ``ok``.

    A program that fails to compile or to run is a row with its ``error``.
    """
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        expected = [pool.submit(_compiled, c.reference, c.expected_inputs, cpu) for c in checks]
        found = [pool.submit(_compiled, c.found, c.inputs, device) for c in checks]
    return [
        _compare(check, *programs) for check, *programs in zip(checks, expected, found, strict=True)
    ]


def _compiled(program: Callable[..., Any], inputs: tuple[Any, ...], device: Any) -> Any:
    """A function without arguments that runs the program on the device."""
    arrays = jax.device_put(inputs, device)
    with jax.default_matmul_precision("highest"), jax.default_device(device):
        compiled = jax.jit(program).lower(*arrays).compile()
    return lambda: jax.tree.map(np.asarray, compiled(*arrays))


def _compare(check: Check, reference: Any, found: Any) -> Row:
    try:
        expected, given = reference.result()(), found.result()()
    except Exception as error:  # of XLA's compiler, cuDNN or memory: the next check goes on
        return check.row | {"error": one_line(error), "ok": False}
    pairs = jax.tree_util.tree_leaves_with_path(expected)
    errors = {
        jax.tree_util.keystr(path, simple=True, separator="."): check.error(x, y)
        for (path, y), x in zip(pairs, jax.tree.leaves(given), strict=True)
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] >= 0 else np.inf)
    is_ok = all(error <= check.limit for error in errors.values())  # False for NaN
    return check.row | {
        "worst": errors[worst] if np.isfinite(errors[worst]) else None,
        "worst_array": worst,
        "limit": check.limit,
        "ok": is_ok,
    }


def token_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest ``|found - expected|`` of a vector over H, relative to its size.

    The size is that of the vector or, where that is larger, the mean square over all of them: a
    single wrong token shows, and a vector that happens to be near 0 does not.

    >>> token_error(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    1.0
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    sizes = np.linalg.norm(expected, axis=-1)
    typical = np.sqrt(np.mean(sizes**2))
    return float(np.max(np.linalg.norm(found - expected, axis=-1) / np.maximum(sizes, typical)))


def array_error(found: np.ndarray, expected: np.ndarray) -> float:
    """``|found - expected| / |expected|`` over a whole array; 0 where both are 0.

    >>> round(array_error(np.array([1.0, 2.0]), np.array([1.0, 1.0])), 4)
    0.7071
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    difference = float(np.linalg.norm(found - expected))
    return difference / float(np.linalg.norm(expected)) if difference else 0.0


def one_line(error: BaseException) -> str:
    """The kind and the beginning of the message, which XLA prints over pages."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _reason_against(
    backend: str, layers: list[Layer], length: int, dtype: str, sinks: bool, sums: bool
) -> str:
    """Why the program cannot compute the case on this device; "" if it can."""
    if backend != "chunked" and sums:
        return f"{backend} adds no running sum to the logits"
    try:
        _choose(backend, layers, length, dtype, sinks)
    except ValueError as error:
        return str(error)
    return ""


def _auto_backends(method: PositionEmbedding, length: int, dtype: str) -> str:
    """The attention programs that "auto" takes for the method's layers on this device."""
    chosen = {_choose("auto", [layer], length, dtype) for layer in method.layers()}
    return " and ".join(sorted(chosen))


def _choose(backend: str, layers: list[Layer], length: int, dtype: str, sinks: bool = False) -> str:
    device = jax.devices()[0]
    return choose_backend(
        backend,
        platform=device.platform,
        layers=layers,
        length=length,
        shape=ModelShape(HEADS * HEAD_DIM, 1, HEADS, HEADS, HEAD_DIM),
        dtype=dtype,
        sinks=sinks,
        compute_capability=gpu_compute_capability(device),
    ).name
