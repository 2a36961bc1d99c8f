"""Downstream tasks of a run: `fope evaluate RUN --tasks longbench,ruler,paper,FILE.jsonl`."""
