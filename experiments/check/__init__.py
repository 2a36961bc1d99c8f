"""Numbers on pages against the committed rows: `python -m experiments.check`."""
