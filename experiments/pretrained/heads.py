"""What each head attends to in a long window, and how large q and k are at each frequency.

A window is ten needles in a book (`every_key`), and after it all ten questions in turn with their
answers. So one forward pass shows how heads read the book (the queries before the questions), and
which of them look at the needle when its number is to be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pretrained.measure import key_trials
from fope_jax.model.attention import layer_arguments
from fope_jax.model.transformer import Activations, Transformer, merge, split
from fope_jax.typing import Array

READING = 256  # queries before the first question
RECENT = 64  # tokens


class Window(NamedTuple):
    """Tokens, and where attention is looked at; indices in the window.

    Attributes:
      tokens: ``[T]`` int32.
      reading: ``[R]`` queries before the first question.
      writing: ``[Q, A]`` queries that predict the tokens of each answer.
      numbers: ``[Q, A]`` the same tokens in the needles.
    """

    tokens: np.ndarray
    reading: np.ndarray
    writing: np.ndarray
    numbers: np.ndarray


def make_window(cache: Any, context: int, window: int) -> Window:
    """A window of ``context`` tokens with all questions and answers at its end.

    Raises:
      ValueError: a needle is not in the window as its question and answer are written.
    """
    one = key_trials(cache, "corpus", context, window)[0]
    asked = one.question_length + one.answer_length
    trials = key_trials(cache, "corpus", context - 9 * asked, window)
    before = trials[0].tokens[:-asked]
    tokens = np.concatenate([before, *(trial.tokens[-asked:] for trial in trials)])
    starts = [_place(before, trial.tokens[-asked:]) for trial in trials]
    answer = np.arange(one.question_length, asked)
    questions = len(before) + asked * np.arange(len(trials))
    return Window(
        tokens.astype(np.int32),
        reading=np.arange(len(before) - READING, len(before)),
        writing=questions[:, None] + answer - 1,
        numbers=np.array(starts)[:, None] + answer,
    )


def _place(tokens: np.ndarray, part: np.ndarray) -> int:
    """Where ``part`` begins in ``tokens``; ValueError unless it is there once."""
    views = np.lib.stride_tricks.sliding_window_view(tokens, len(part))
    places = np.flatnonzero((views == part).all(axis=1))
    if len(places) != 1:
        raise ValueError(
            f"the needle {part.tolist()} stands {len(places)} times in the window; expected once: "
            "the tokenizer writes it otherwise after the haystack"
        )
    return int(places[0])


class HeadStatistics(NamedTuple):
    """One layer's; N heads, P frequencies.

    Attributes:
      first, recent: ``[N]`` share of attention on the first token, and on the last ``RECENT`` with
        the query itself.
      distance, entropy: ``[N]`` mean tokens back, and nats.
      needle, others: ``[N, Q]`` share on the number that is to be written, and on the nine others;
        means over the tokens of the answer.
      q_size, k_size: ``[P]`` mean length of a pair of dimensions, over tokens and heads.
    """

    first: Array
    recent: Array
    distance: Array
    entropy: Array
    needle: Array
    others: Array
    q_size: Array
    k_size: Array


def head_observer(window: Window) -> Callable[[Activations], HeadStatistics]:
    """The observer of ``Transformer.forward`` for one window, for plain rotations.

    Raises (when called):
      ValueError: the method adds a bias or more to the product of q and k.
    """
    length = len(window.tokens)
    keys = jnp.arange(length)

    def weights(a: Activations, queries: np.ndarray) -> Array:
        """Attention ``[N, queries, T]``."""
        q, k = a.rotated_q[0][queries.ravel()], a.rotated_k[0]
        q = q.reshape(*q.shape[:1], k.shape[1], -1, q.shape[-1])
        logits = jnp.einsum("qkgh,tkh->kgqt", q, k, preferred_element_type=jnp.float32)
        logits = logits.reshape(-1, *logits.shape[2:]) / np.sqrt(a.v.shape[-1])
        return jax.nn.softmax(jnp.where(keys <= queries.ravel()[:, None], logits, -jnp.inf))

    def observe(a: Activations) -> HeadStatistics:
        further = [name for name, value in layer_arguments(a.position).items() if value is not None]
        if further or a.sums is not None or a.sinks is not None:
            raise ValueError(
                f"{type(a.position.method).__name__} has more than a rotation ({further}): heads "
                "are measured for rotations alone"
            )
        reading = weights(a, window.reading)
        back = window.reading[:, None] - keys
        logs = jnp.log(jnp.where(reading > 0, reading, 1.0))
        writing = weights(a, window.writing)
        answers, tokens = window.writing.shape
        on_numbers = writing[:, :, window.numbers.ravel()]
        on_numbers = on_numbers.reshape(-1, answers, tokens, answers, tokens).sum(-1).mean(2)
        needle = jnp.diagonal(on_numbers, axis1=1, axis2=2)
        half = a.q.shape[-1] // 2

        def sizes(x: Array) -> Array:
            return jnp.hypot(x[..., :half], x[..., half:]).mean(axis=(0, 1, 2))

        return HeadStatistics(
            first=reading[..., 0].mean(-1),
            recent=jnp.where((back >= 0) & (back < RECENT), reading, 0).sum(-1).mean(-1),
            distance=(reading * jnp.maximum(back, 0)).sum(-1).mean(-1),
            entropy=-(reading * logs).sum(-1).mean(-1),
            needle=needle,
            others=on_numbers.sum(-1) - needle,
            q_size=sizes(a.q),
            k_size=sizes(a.k),
        )

    return observe


def measure_heads(model: Transformer, cache: Any, context: int, window: int) -> dict[str, Any]:
    """``HeadStatistics`` of every layer in one window, as lists ``[L, ...]`` of four digits."""
    placed = make_window(cache, context, window)
    graphdef, params, constants = split(model)

    @jax.jit
    def forward(params: Any, constants: Any, tokens: Array) -> HeadStatistics:
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
        model = merge(graphdef, params, constants)
        observer = head_observer(placed)
        return model.forward(tokens[None], positions, jnp.ones_like(positions), observer)[1]

    measured = forward(params, constants, jnp.asarray(placed.tokens))
    return {name: _rounded(np.asarray(x)) for name, x in measured._asdict().items()}


def _rounded(x: np.ndarray) -> list[Any]:
    return [_rounded(row) if row.ndim else float(f"{row:.4g}") for row in x]
