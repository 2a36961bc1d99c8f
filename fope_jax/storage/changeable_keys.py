"""Keys of a run's config.json that may change when it resumes, and that tell no two runs apart.

They change what is reported or stored, where text lies (its content is compared with the
checkpoint's), or how numbers are computed, up to rounding. Those for bad steps may change too, so
that a run stopped by one can resume.
"""

CHANGEABLE_SECTIONS = ("evaluate.", "mesh.")
CHANGEABLE_KEYS = (
    "name",
    "model.scan_layers",
    "model.remat",
    "model.attention",
    "model.attention_block",
    "model.derivatives",
    "train.accumulate",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.keep_period",
    "train.grace_seconds",
    "train.evaluate_every",
    "train.tracker",
    "train.on_save_error",
    "train.compiler_options",
    "train.on_bad_step",
    "train.max_skipped",
    "train.spike_factor",
    "data.cache_dir",
    "data.train_files",
    "data.validation_files",
    "data.tfds_data_dir",
    "data.copy_shards",
    "data.max_bad_documents",
    "data.max_damaged_files",
)


def is_changeable(key: str) -> bool:
    """Whether a key may change when a run resumes.

    >>> is_changeable("model.remat"), is_changeable("mesh.data"), is_changeable("seed")
    (True, True, False)
    """
    return key in CHANGEABLE_KEYS or key.startswith(CHANGEABLE_SECTIONS)
