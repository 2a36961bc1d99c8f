"""`fope extend`: a trained run with another position embedding, trained further or as it is."""

from __future__ import annotations

import argparse
import shlex

from fope_jax.command_line.common import join_processes, print_once, verb
from fope_jax.storage.paths import check_bucket
from fope_jax.train.options import add_extend_options, add_processes


@verb(add_extend_options, add_processes)
def extend(arguments: argparse.Namespace) -> None:
    """go on from a trained run at a longer length, or only change its positions

    examples:
      fope extend runs/rope --method yarn --length 256 --workdir runs/rope_yarn
      fope extend runs/rope/500 --method fope --length 256 --workdir runs/rope_fope
      fope extend runs/rope --method drope --length 128 --workdir runs/rope_drope
      fope extend runs/rope --method yarn --length 512 --workdir runs/yarn_512 --no-train
      fope extend runs/rope --method sliding_window --length 256 --workdir runs/window \\
          --config.position.window=64
      fope extend runs/long --method fope --length 64 --workdir runs/short --allow-shorter
      fope extend runs/fope --method yarn --length 256 --workdir runs/fope_yarn \\
          --config.position.scaling_order=after_clip --config.position.factor=16
      fope extend runs/alibi --method same --length 256 --workdir runs/alibi_256 \\
          --config.train.steps=100
      fope extend hf:models/SmolLM-1.7B --method fope --length 4096 --workdir runs/smollm \\
          --config configs/paper/smollm_4096.py:weights=models/SmolLM-1.7B

    METHOD is "same", the name of a method (`fope methods`), or that of a scaling (yarn, pi, ntk,
    llama3, longrope, clip, ...) for a model with frequencies; "inner" takes a window or a logit
    scaling away. MODULE:CLASS is a method or scaling of your own; a method follows a parent of its
    kind (rotation, bias, ...) and keeps the parent's knobs of the same names. From RoPE, fope is
    the form that changes the parent least; that of the released code is
    --config.position.preset=official. drope trains at the parent's own length.

    The same command again goes on from the newest checkpoint. --no-train makes a run of step 0 that
    `fope evaluate`, generate, export and extend take; files of its parent's checkpoint get a second
    name in it, so that either run may be deleted. `fope evaluate RUN --as yarn:factor=4` measures
    without a run of its own.
    """
    join_processes(arguments)
    from fope_jax.config import load_config
    from fope_jax.extend.run import extend
    from fope_jax.processes.agreement import fail_together

    with fail_together():
        for directory in (arguments.parent, arguments.workdir):
            if not isinstance(directory, str):
                check_bucket(directory)
        config = load_config(arguments.config) if arguments.config else None
    extend(
        arguments.parent,
        arguments.method,
        arguments.length,
        arguments.workdir,
        optimizer=arguments.optimizer,
        match=arguments.match,
        warn_above=arguments.warn_above,
        overrides=arguments.overrides,
        config=config,
        accept_position=arguments.accept_position,
        should_evaluate=not arguments.no_evaluate,
        allow_shorter=arguments.allow_shorter,
        no_train=arguments.no_train,
    )
    print_once(f"run in {arguments.workdir}")
    if arguments.no_train:
        print_once(f"next: {shlex.join(['fope', 'evaluate', str(arguments.workdir)])}")
