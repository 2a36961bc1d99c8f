"""Corpora, tokenizers, the token cache on disk, and the loader of batches.

    text --corpora, tasks (seqio)--> documents --tokenizer--> tokens --cache--> loader --> Batch

Only `fope_jax.data.tf_libraries` imports TensorFlow, and only a build needs it.
"""

from fope_jax.data.config import DataConfig as DataConfig
