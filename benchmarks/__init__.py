"""Benchmarks: what the methods cost, measured on the machine at hand."""
