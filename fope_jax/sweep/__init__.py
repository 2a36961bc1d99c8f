"""Sweeps: the names that a sweep file imports."""

from fope_jax.sweep.runs import Extend as Extend
from fope_jax.sweep.runs import Train as Train
from fope_jax.sweep.runs import product as product
from fope_jax.sweep.runs import zipped as zipped
