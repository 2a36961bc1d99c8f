"""Retrieval tasks: windows of an exact number of tokens, generated from a seed, with an answer.

The same tasks train a model (`fope_jax.data.task_mixture`) and test it
(`fope_jax.evaluate.retrieval`). What is drawn for the one is never drawn for the other: see
``ITEM_SPLITS`` in ``base``. This module imports nothing, because configurations read ``TASKS``.
"""

TASKS = (
    "recall",
    "copy",
    "passkey",
    "multi_key",
    "multi_value",
    "multi_query",
    "variable_tracking",
    "common_words",
)
