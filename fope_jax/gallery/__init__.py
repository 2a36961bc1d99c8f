"""Figures and a table of the position embeddings (``fope gallery|methods``)."""
