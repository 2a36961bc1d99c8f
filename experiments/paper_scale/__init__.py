"""Retrieval beyond 512 tokens at the paper's head dimension, for one accelerator."""
