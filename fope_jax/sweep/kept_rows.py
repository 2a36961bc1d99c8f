"""The rows of a sweep's runs that `--results` keeps."""

from collections.abc import Iterable
from pathlib import Path

from fope_jax.report.rows import read_run
from fope_jax.sweep.runs import PlannedRun


def kept_runs(planned: Iterable[PlannedRun], results: Path) -> set[str]:
    """The names of the runs whose rows are in ``results``, as ``NAME.jsonl``.

    Raises:
      ConfigError: rows of another run stand there, which those of the sweep's would replace.
      ReportError: a file there cannot be read as rows.
    """
    kept = set()
    for run in planned:
        if (path := results / f"{run.name}.jsonl").is_file():
            run.check_same(read_run(path).config, path, "use another --results")
            kept.add(run.name)
    return kept
