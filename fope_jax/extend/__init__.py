"""Training on: what may follow what, the arrays carried over, and the run at the longer length."""
