"""`fope plan`: what a TPU slice would say, without one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

from fope_jax.command_line.common import (
    load_experiment,
    option,
    out,
    split_commas,
    verb,
    whole_numbers,
)
from fope_jax.storage.directories import check_output
from fope_jax.storage.paths import user_cache_dir
from fope_jax.train.options import add_config


@verb(
    add_config,
    option(
        "--topology",
        nargs="+",
        action="extend",
        required=True,
        metavar="SLICE",
        help="such as v5e:4x4 v5p:4x4x4 v6e:16x16, or 2xv5e:4x4 for two slices",
    ),
    option("--method", metavar="LABEL,...", help="such as rope,fope (that of the configuration)"),
    option("--length", metavar="TOKENS,...", help="such as 512,4096 (that of the configuration)"),
    option("--size", metavar="PRESET,...", help="such as 60m,1200m (that of the configuration)"),
    option(
        "--mesh", metavar="AXIS=N,...", help="such as fsdp=8,tensor=2 (that of the configuration)"
    ),
    option(
        "--compiler-option",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="of XLA, in place of the tuned ones (train.compiler_options)",
    ),
    option(
        "--compare-options",
        action="store_true",
        help="compile each case also without compiler options, and say what they change",
    ),
    option("--jobs", type=int, help="compilations at once (as many as cores and memory allow)"),
    option("--no-cache", action="store_true", help="compile again what was compiled before"),
    out("directory for plan.md, .jsonl and .html", required=False),
)
def plan(arguments: argparse.Namespace) -> None:
    """memory, time and bounds of a TPU slice, without one

    examples:
      fope plan --config configs/paper/c4_books.py --topology v5e:4x4
      fope plan --config configs/quickstart.py --topology v5e:4x4 v5p:4x4x4 --length 512,4096
    """
    # With the TPU compiler installed, jax would look for a TPU, here and in every compilation.
    os.environ["JAX_PLATFORMS"] = "cpu"
    experiment = load_experiment(arguments)
    if arguments.compiler_option:
        options = tuple(arguments.compiler_option)
        train = dataclasses.replace(experiment.train, compiler_options=options)
        experiment = dataclasses.replace(experiment, train=train)
    from fope_jax.model.sharding import MeshConfig
    from fope_jax.tpu import plan, table

    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}; accepted: 1 or more")
    cases = plan.make_cases(
        experiment,
        topologies=arguments.topology,
        methods=split_commas(arguments.method or None),
        lengths=whole_numbers("--length", arguments.length or None),
        sizes=split_commas(arguments.size or None),
        mesh=MeshConfig.parse(arguments.mesh) if arguments.mesh else None,
        compare_options=arguments.compare_options,
    )
    count = 0

    def report_case(case: plan.Case, row: plan.Row) -> None:
        nonlocal count
        count += 1
        state = "from the cache" if row.get("cached") else f"{row.get('compile_seconds', 0):.0f} s"
        print(
            f"{count} of {len(cases)}: {case.topology} {case.size} {case.method} "
            f"{row['length']} tokens, {state}",
            file=sys.stderr,
        )

    if arguments.out:
        check_output(arguments.out, "the plan")
    cache = None if arguments.no_cache else user_cache_dir()
    rows = plan.plan(cases, cache=cache, jobs=arguments.jobs, done=report_case)
    print(table.to_markdown(rows))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / "plan.jsonl").write_text(lines)
        (arguments.out / "plan.md").write_text(table.to_markdown(rows) + "\n")
        table.write_page(rows, arguments.out / "plan.html")
    if all("error" in row for row in rows):
        raise ValueError(f"none of these steps is possible: {rows[0]['error']}")
