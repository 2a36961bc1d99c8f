"""Names of the evaluation protocols in configurations, rows and reports, in the order of pages."""

ON_TEXT = (
    "same-tokens",
    "sliding-window",
    "chunks",
    "document-resets",
    "no-resets",
    "long-window",
    "from-start",
)
PASSKEY, RETRIEVAL = "passkey", "retrieval"
PROTOCOLS = (*ON_TEXT, PASSKEY, RETRIEVAL)
