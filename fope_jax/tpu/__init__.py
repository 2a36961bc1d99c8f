"""Memory, work and traffic of a training step on a TPU slice, without the slice: `fope plan`."""
