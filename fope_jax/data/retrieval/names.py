"""The names of the retrieval tasks, for configurations, which import no numpy."""

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
