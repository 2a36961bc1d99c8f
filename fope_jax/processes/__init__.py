"""Several processes as one run: start, agreement, collectives and signals."""
