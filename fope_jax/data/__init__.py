"""From text to batches: corpora, tokenizers, the token cache on disk, and the loader.

    text --corpora, tasks (seqio)--> documents --tokenizer--> tokens --cache--> loader --> Batch

Importing this package costs nothing: the modules below it bring in what they need, and TensorFlow
is imported by `fope_jax.data.tf_libraries` alone, which only a build needs.
"""

from fope_jax.data.config import DataConfig as DataConfig
