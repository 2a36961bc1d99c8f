"""AdamW with the paper's learning rate schedule and gradient clipping."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

from fope_jax.config import TrainConfig
from fope_jax.typing import Array


def learning_rate(config: TrainConfig, step: Array | int) -> Array:
    """The rate of the update after ``step`` finished ones, float32.

    With s = S + step + 1, S = ``schedule_start``, W warmup steps, N = S + ``decay_steps`` (without
    them S + ``steps``), and the final fraction a:

        s <= W     rate = peak * s / W
        cosine     rate = peak * (a + (1 - a) * (1 + cos(pi * (s - W) / (N - W))) / 2), up to N
        constant   rate = peak

    so the first update has a rate above 0, and those from the last of the decay on ``a * peak``.

    >>> config = TrainConfig(steps=100, batch_size=1, length=8, learning_rate=1.0, warmup_steps=10)
    >>> [round(float(learning_rate(config, step)), 3) for step in (0, 9, 54, 99)]
    [0.1, 1.0, 0.55, 0.1]

    Reference: the schedule of OLMo, which the paper's models were trained with.
    """
    update = jnp.asarray(step, jnp.float32) + np.float32(config.schedule_start + 1)
    warmup = jnp.minimum(update / max(1, config.warmup_steps), 1.0)
    if config.schedule == "constant":
        return config.learning_rate * warmup
    end = config.schedule_start + (config.decay_steps or config.steps)
    decay_steps = max(1, end - config.warmup_steps)
    progress = jnp.clip((update - config.warmup_steps) / decay_steps, 0.0, 1.0)
    fraction = config.final_learning_rate_fraction
    cosine = fraction + (1.0 - fraction) * (1.0 + jnp.cos(jnp.pi * progress)) / 2.0
    return config.learning_rate * warmup * cosine


def unfinished_warmup(config: TrainConfig) -> str:
    """What a warmup that lasts longer than the run makes of its learning rate; "" if it ends.

    >>> unfinished_warmup(TrainConfig(steps=20, batch_size=1, length=8)).partition(": ")[0]
    'train.warmup_steps = 10000, train.steps = 20'
    """
    if config.schedule_start + config.steps >= config.warmup_steps:
        return ""
    start = f" after {config.schedule_start} of before" if config.schedule_start else ""
    return (
        f"train.warmup_steps = {config.warmup_steps}, train.steps = {config.steps}{start}: the "
        f"learning rate rises to {float(learning_rate(config, config.steps - 1)):.3g} at the last "
        f"update and never reaches train.learning_rate = {config.learning_rate:g}"
    )


def describe_rate(config: TrainConfig) -> str:
    """The learning rate at the end of a run that was trained longer, in words.

    >>> config = TrainConfig(steps=99, batch_size=1, length=8, warmup_steps=9, decay_steps=50)
    >>> describe_rate(config)
    'learning rate 6e-05, constant since its cosine decay ended at step 50'
    """
    decay = config.decay_steps or config.steps
    if config.schedule == "cosine" and decay >= config.steps:
        return f"cosine decay of the learning rate up to step {decay:,}"
    rate = f"learning rate {float(learning_rate(config, config.steps - 1)):.3g}, constant"
    is_cosine = config.schedule == "cosine"
    return f"{rate} since its cosine decay ended at step {decay:,}" if is_cosine else rate


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW: clipping by global norm, Adam, decoupled weight decay, learning rate.

        g <- g * min(1, clip / |g|)
        p <- p - rate * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)

    Its state is float32 for any parameter dtype: in bfloat16 v would never move, since with
    b2 = 0.999 a step changes it by less than the dtype resolves. Position constants get no update.

    Reference: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2.
    """
    clip = config.gradient_clip
    adamw = optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda count: learning_rate(config, count)),
    )
    return optax.GradientTransformation(
        lambda params: adamw.init(optax.tree.cast(params, jnp.float32)), adamw.update
    )
