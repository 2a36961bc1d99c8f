"""What is on disk or in a bucket: files, checkpoints, and the lock of a run."""
