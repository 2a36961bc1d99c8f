"""Continuations of prompts, greedy answers of a model, and the nats of given answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fope_jax.config.fields import check_seed
from fope_jax.evaluate.restore import NonFiniteError
from fope_jax.model.decode import KVCache, forward_cached, greedy_decode, prefill, sample_decode
from fope_jax.model.losses import token_nats
from fope_jax.model.sharding import axis_size, device_put_sharded, partition_spec
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array

Answerer = Callable[..., tuple[Any, Any]]  # see ``model_answerer``
Sampler = Callable[..., list[int]]  # see ``model_sampler``


def model_answerer(model: Transformer, mesh: Mesh | None = None) -> Answerer:
    """Makes the answerer of a model, jitted once for each shape.

    Args:
      model: its arrays are sharded over ``mesh``, if given.
      mesh: devices of all processes. Rows are split over its "data" and "fsdp" axes.

    Returns:
      ``(prompts [B, T], answers [B, R, A]) -> (written, nats)``: greedy tokens ``[B, A]`` int32, -1
      where logits are not finite; and nats ``[B, R, A]`` float32 of each answer's tokens. With a
      third argument, ``questions [B, Q, P]``, each is read after the prompt without the others:
      ``answers [B, Q, R, A]``, and ``[B, Q, A]`` and ``[B, Q, R, A]`` come back. The prompt is read
      once. A fourth, ``positions [B, T + P + A - 1]``, are those of a prompt, a question and an
      answer; without it they are 0, 1, 2, ...
    """
    graphdef, params, constants = split(model)

    def answer(
        params: Any,
        constants: Any,
        prompts: Array,
        answers: Array,
        questions: Array | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, Array]:
        model = merge(graphdef, params, constants)
        count, asked = answers.shape[-1], 0 if questions is None else questions.shape[2]
        room = asked + answer_room(count)
        size = prompts.shape[1]
        if positions is None:
            whole = jnp.arange(size + asked + count - 1, dtype=jnp.int32)
            positions = jnp.broadcast_to(whole, (len(prompts), len(whole)))
        of_prompt, of_question, of_answer = jnp.split(positions, [size, size + asked], axis=1)
        segments = jnp.ones_like(prompts)
        hidden, cache, _ = prefill(model, prompts, segments, room, of_prompt)
        unembedding = model.unembedding_matrix()

        def answer_after(hidden: Array, cache: KVCache, answers: Array) -> tuple[Array, Array]:
            def answer_nats(answer: Array) -> Array:
                """Nats ``[B, A]`` of one answer to each prompt."""
                states = hidden[:, -1:]
                if count > 1:
                    segments = jnp.ones_like(answer[:, :-1])
                    after, _ = forward_cached(
                        model, cache, answer[:, :-1], of_answer, segments, keep=False
                    )
                    states = jnp.concatenate([states, after], axis=1)
                return token_nats(states, unembedding, answer)[0]

            nats = jax.vmap(answer_nats, in_axes=1, out_axes=1)(answers)
            return greedy_decode(model, hidden, cache, of_answer, count), nats

        def ask(asking: tuple[Array, Array]) -> tuple[Array, Array]:
            question, answers = asking
            segments = jnp.ones_like(question)
            hidden, longer = forward_cached(model, cache, question, of_question, segments)
            return answer_after(hidden, longer, answers)

        if questions is None:
            return answer_after(hidden, cache, answers)
        in_turn = jax.lax.map(ask, (questions.swapaxes(0, 1), answers.swapaxes(0, 1)))
        return jax.tree.map(lambda x: x.swapaxes(0, 1), in_turn)

    if mesh is None:
        jitted = jax.jit(answer)
        return lambda *batch: jitted(params, constants, *batch)
    return partial(by_rows(answer, mesh), params, constants)


def answer_room(count: int) -> int:
    """Tokens after a prompt that the cache has room for, to read answers of ``count`` tokens."""
    return max(1, count - 1)  # a cache has room for one, even if nothing is read after one token


def by_rows(function: Callable[..., Any], mesh: Mesh, static: Sequence[str] = ()) -> Callable:
    """Jits ``function(params, constants, *arrays, **static)``, whose arrays and results have rows.

    Returns:
      The same function of NumPy arrays, or None. Rows are split over the mesh's "data" and "fsdp"
      axes, filled with copies where they do not divide; results are whole, in all processes.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(function, static_argnames=static, out_shardings=replicated)
    of_rows, step = NamedSharding(mesh, partition_spec(("batch",))), axis_size(mesh, "batch")

    def on_mesh(params: Any, constants: Any, *arrays: Any, **settings: Any) -> Any:
        count = len(arrays[0])
        filled = np.resize(np.arange(count), count + -count % step)
        split = jax.tree.map(lambda x: device_put_sharded(x[filled], of_rows), arrays)
        results = jitted(params, constants, *split, **settings)
        return jax.tree.map(lambda x: np.asarray(x)[:count], results)

    return on_mesh


def model_sampler(model: Transformer) -> Sampler:
    """Makes the sampler of a model, which continues one prompt.

    Prompts and counts are padded to powers of two, so that few programs are compiled.

    Returns:
      ``(prompt, count, *, stop=None, temperature=0.0, seed=0) -> tokens``: at most ``count`` tokens
      after ``prompt``, up to and without ``stop``. For the arguments see ``sample_decode``. It
      raises ValueError where prompt and count are longer than the position embedding is defined
      for and for a seed that is not 0 to 2**32 - 1, and NonFiniteError where logits are not finite.
    """
    graphdef, *arrays = split(model)
    limit = model.position.limits.max_length

    @partial(jax.jit, static_argnames=("room", "stop"))
    def draw(arrays: Any, tokens: Array, segments: Array, *, room: int, **settings: Any) -> Array:
        model = merge(graphdef, *arrays)
        return sample_decode(model, *prefill(model, tokens, segments, room), room, **settings)

    def sample(
        prompt: Sequence[int],
        count: int,
        *,
        stop: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[int]:
        check_sample_length(model, len(prompt), count)
        check_seed("seed", seed)
        room = padded_length(count, None if limit is None else limit - len(prompt))
        size = padded_length(len(prompt), None if limit is None else limit - room)
        window = pad_left([prompt], size, 0)
        settings = {"temperature": np.float32(temperature), "key": jax.random.key(seed)}
        drawn = draw(arrays, *window, room=room, stop=stop, count=np.int32(count), **settings)
        written = np.asarray(drawn)[0, :count].tolist()
        if stop in written:
            written = written[: written.index(stop)]
        if -1 in written:
            raise NonFiniteError(
                f"the logits after {len(prompt) + written.index(-1)} tokens are not finite (NaN or "
                "infinity): no token can be drawn"
            )
        return written

    return sample


def check_sample_length(model: Transformer, length: int, count: int) -> None:
    """Raises ValueError if a model cannot write ``count`` tokens after ``length`` tokens."""
    limit = model.position.limits.max_length
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise ValueError(f"{count} new tokens; accepted: a whole number, 1 or more")
    if limit is not None and length + count > limit:
        raise ValueError(
            f"a prompt of {length} tokens and {count} new ones: {type(model.position).__name__} is "
            f"defined for at most {limit} together"
        )


def padded_length(length: int, most: int | None, least: int = 16) -> int:
    """The next power of two, at most ``most``, so that few shapes are compiled.

    >>> padded_length(17, None), padded_length(17, 20), padded_length(1, None)
    (32, 20, 16)
    """
    size = max(least, 1 << max(0, length - 1).bit_length())
    return size if most is None else min(size, most)


def pad_left(rows: Sequence[Sequence[int]], size: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments ``[B, size]``, padded on the left."""
    tokens = np.full((len(rows), size), pad, np.int32)
    segments = np.zeros((len(rows), size), np.int32)
    for i, row in enumerate(rows):
        tokens[i, size - len(row) :], segments[i, size - len(row) :] = row, 1
    return tokens, segments
