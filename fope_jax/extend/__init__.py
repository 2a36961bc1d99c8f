"""Continues training at a longer length: allowed methods, carried arrays, and the new run."""
