"""TensorFlow, seqio and TFDS; the only module that imports them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from fope_jax.extras import require


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Silences file descriptor 2, where the libraries report past Python that they find no GPU."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _without_notices():
    tf: Any = require("tensorflow", "data")
    seqio: Any = require("seqio", "data")
    tfds: Any = require("tensorflow_datasets", "data")
tf.config.set_visible_devices([], "GPU")  # leaves the GPU's memory to JAX
