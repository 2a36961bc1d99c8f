"""What a training step takes on a TPU slice, found out without one: `fope plan`."""
