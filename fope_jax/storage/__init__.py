"""Files, checkpoints and the lock of a run, on disk or in a bucket."""
