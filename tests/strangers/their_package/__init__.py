"""Position embeddings of somebody else: nothing in fope_jax knows of them."""
