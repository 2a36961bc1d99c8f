"""Retrieval tasks: windows of an exact number of tokens, generated from a seed, with an answer.

Training (`fope_jax.data.task_mixture`) and test (`fope_jax.evaluate.retrieval`) use different
items, see `base.split_of`. This module imports nothing, because configs read these names.
"""

TASKS = (
    "recall",
    "recall_64_keys",
    "copy",
    "passkey",
    "multi_key",
    "multi_value",
    "multi_query",
    "every_key",
    "variable_tracking",
    "common_words",
)
PASSKEY_TEMPLATES = ("compact", "standard")  # of `passkey.TEMPLATES`
