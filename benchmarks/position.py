"""What position embeddings cost, in time, memory and accuracy.

    python -m benchmarks.position cost --size 60m --lengths 512 --batch 2
    python -m benchmarks.position rotation
    python -m benchmarks.position memory
    python -m benchmarks.position phases

Tables go to stdout, progress to stderr. Results are in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax

from benchmarks import cost, memory, phases, rotation
from fope_jax.gallery.examples import EXAMPLES, choose, examples
from fope_jax.model.config import TransformerConfig
from fope_jax.model.presets import PRESETS
from fope_jax.position.base import ModelShape
from fope_jax.position.rotation import inverse_frequencies
from fope_jax.processes.cores import available_cores
from fope_jax.train.workdir import git_commit

COMPARED = ["nope", "rope", "fope", "alibi", "t5", "kerple", "fire", "cope"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns the exit code, 2 after a user's error."""
    arguments = build_parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    print(provenance(), flush=True)
    try:
        results = arguments.run(arguments)
    except ValueError as error:
        print(f"benchmarks.position: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        facts = {"provenance": provenance(), "arguments": _plain(vars(arguments))}
        arguments.json.write_text(json.dumps(facts | {"results": results}, indent=1))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.position",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(json=None)
    kinds = parser.add_subparsers(required=True, metavar="BENCHMARK")

    def add(name: str, run: Any, text: str, methods: list[str] | None) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=text, description=text)
        kind.set_defaults(run=run)
        kind.add_argument("--methods", nargs="+", default=methods, metavar="LABEL")
        kind.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as well")
        return kind

    step = add("cost", run_cost, "seconds of a training step, interleaved", COMPARED)
    step.add_argument("--size", choices=sorted(PRESETS), default="60m", help="of the model")
    step.add_argument("--layers", type=_count, help="in place of the preset's")
    step.add_argument("--vocab", type=_count, help="in place of the preset's")
    step.add_argument("--block", type=_count, help="tokens of a block of chunked attention")
    step.add_argument("--lengths", type=_count, nargs="+", default=[512, 4096], help="tokens")
    step.add_argument("--batch", type=_count, default=1, help="rows of a step")
    step.add_argument("--rounds", type=_count, default=7, help="steps timed of each method")
    step.add_argument("--packed", action="store_true", help="several documents a row")
    step.add_argument(
        "--processes", type=_count, default=1, help="measure in so many processes and pool"
    )

    turn = add(
        "rotation", run_rotation, "milliseconds of a step's rotations", ["rope", "fope", "xpos"]
    )
    turn.add_argument("--size", choices=sorted(PRESETS), default="60m", help="of the model")
    turn.add_argument("--lengths", type=_count, nargs="+", default=[512, 4096], help="tokens")
    turn.add_argument("--tokens", type=_count, default=4096, help="of a step; rows are tokens / T")
    turn.add_argument("--rounds", type=_count, default=30, help="steps timed of each method")

    grow = add("memory", run_memory, "temporary memory of chunked attention with a bias", None)
    lengths = [4096 * 2**k for k in range(5)]
    grow.add_argument("--lengths", type=_count, nargs="+", default=lengths, help="tokens")
    grow.add_argument("--heads", type=_count, default=8)
    grow.add_argument("--head-dim", type=_count, default=64)

    add("phases", run_phases, "errors of phases and biases at long positions", None)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of 1 or more")
    return int(text)


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that JSON holds: all but the function to run and the file to write."""
    return {k: v for k, v in arguments.items() if isinstance(v, int | str | list | None)}


def provenance() -> str:
    """Date, commit, machine and versions in one line."""
    commit = git_commit(Path(__file__).parent) or "unknown"
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    return (
        f"{date.today()}, commit {commit}, {platform.machine()}, {len(available_cores())} cores, "
        f"{devices}, jax {jax.__version__}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- benchmarks


def run_cost(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    config = cost.make_config(arguments.size, arguments.layers, arguments.vocab, arguments.block)
    if arguments.processes == 1:
        runs = [_measure_here(arguments, config)]
    else:
        runs = [_measure_elsewhere(arguments.argv) for _ in range(arguments.processes)]
    results = []
    for index, length in enumerate(arguments.lengths):
        methods = choose(arguments.methods, examples(length, config.shape.head_dim))
        print(
            f"\n### T = {length:,}: {arguments.size}, {config.num_layers} layers, vocabulary "
            f"{config.vocab_size:,}, B = {arguments.batch}, {arguments.batch * length:,} tokens a "
            f"step, {config.dtype}, {'packed' if arguments.packed else 'one document a row'}\n",
            flush=True,
        )
        seconds = [run[index] for run in runs]
        print(cost.cost_table(cost.costs(seconds, methods)), flush=True)
        results.append({"length": length, "seconds": seconds})
    return results


def _measure_here(
    arguments: argparse.Namespace, config: TransformerConfig
) -> list[dict[str, list[float]]]:
    """Seconds by label and round, for each length."""
    results = []
    for length in arguments.lengths:
        methods = choose(arguments.methods, examples(length, config.shape.head_dim))
        batch = cost.make_batch(config.vocab_size, arguments.batch, length, arguments.packed)
        field, shared = cost.contestants(methods, config, batch)
        results.append(cost.measure(field, shared, arguments.rounds, say))
    return results


def _measure_elsewhere(argv: list[str]) -> list[dict[str, list[float]]]:
    """The same in a process of its own, whose buffers lie elsewhere in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "benchmarks.position", *argv]
        command += ["--processes", "1", "--json", str(path)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return [result["seconds"][0] for result in json.loads(path.read_text())["results"]]


def run_rotation(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shape = cost.make_config(arguments.size, None, None).shape
    results = []
    for length in arguments.lengths:
        methods = choose(arguments.methods, examples(length, shape.head_dim))
        batch = max(1, arguments.tokens // length)
        found = rotation.rotations(methods, shape, batch, length, arguments.rounds)
        print(f"\n### T = {length:,}: {arguments.size}, {shape.num_layers} layers, B = {batch}\n")
        print(rotation.rotation_table(found), flush=True)
        results.append({"length": length, "rotations": [row._asdict() for row in found]})
    return results


def run_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    heads, head_dim = arguments.heads, arguments.head_dim
    shape = ModelShape(heads * head_dim, 1, heads, heads, head_dim)
    known = examples(min(arguments.lengths), head_dim)
    biased = [n for n, m in known.items() if m.kind in ("bias", "contextual")]
    found = []
    for label, method in choose(arguments.methods or ["nope", *biased], known).items():
        found.append(memory.growth(label, method, shape, arguments.lengths))
        say(f"{label}: exponent {found[-1].exponent:.2f}")
    print(f"\nMB of temporaries, forward and backward, B = 1, N = {heads}, H = {head_dim}\n")
    print(memory.memory_table(found, shape), flush=True)
    return [row._asdict() for row in found]


def run_phases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shape = ModelShape(256, 4, 4, 4, 64)
    phase, bias, skipped = [], [], []
    for label, method in choose(arguments.methods, EXAMPLES).items():
        if method.frequencies(shape.head_dim) is not None:
            phase.append(phases.phase_errors(label, method, shape))
        elif method.kind == "bias":
            errors = phases.bias_errors(label, method, shape)
            bias += [errors] if errors else []
            skipped += [] if errors else [label]
        say(label)
    grid = inverse_frequencies(shape.head_dim)
    plainer = [phases.plain_errors(grid), phases.bfloat16_errors(grid)]
    if phase:
        print(f"\nWorst error of cosine and sine in the {phases.WINDOW} tokens up to a position\n")
        print(phases.errors_table([*phase, *plainer]))
    if bias:
        print("\nWorst relative change of a bias when query and key move out by a position\n")
        print(phases.errors_table(bias))
    if skipped:
        print(f"\nDepends on the position by design: {', '.join(skipped)}")
    return [row._asdict() for row in [*phase, *plainer, *bias]]


if __name__ == "__main__":
    sys.exit(main())
