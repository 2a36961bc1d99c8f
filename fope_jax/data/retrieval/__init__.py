"""Retrieval tasks: windows of an exact number of tokens, generated from a seed, with an answer.

The same tasks train a model (`fope_jax.data.lessons`) and test it (`fope_jax.evaluate.retrieval`).
What is drawn for the one is never drawn for the other: see ``HALVES`` in ``base``.
"""
