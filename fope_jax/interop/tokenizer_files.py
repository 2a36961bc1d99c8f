"""The files of a tokenizer in a Hugging Face checkpoint."""

from __future__ import annotations

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
