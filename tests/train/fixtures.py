"""A small text corpus, experiments on it, and what tests read of the runs they make.

A plugin of pytest, so that the folders that use it share one corpus; it imports nothing heavy
before a test asks for it.
"""

import contextlib
from dataclasses import fields

import jax
import numpy as np
import pytest

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"


class Interrupted(Exception):
    """What `Runs.interrupt` raises in the middle of training."""


def extend_with_yarn(parent, workdir, *overrides):
    """The command that goes on for 5 updates at 32 tokens."""
    command = ["extend", "--from", str(parent), "--method", "yarn", "--length", "32"]
    command += ["--workdir", str(workdir), "--config.train.steps=5", "--config.train.save_every=2"]
    return [*command, *overrides]


class Runs:
    """Experiments on one corpus, and the numbers of runs."""

    Interrupted = Interrupted

    def __init__(self, data):
        self.data = data

    def values(self, data=None, method="fope", **train_changes):
        """A configuration as a dict; ``method`` is a name or a mapping with its knobs."""
        return {
            "name": "fope",
            "seed": 1,
            "model": {
                "vocab_size": 300,
                "d_model": 16,
                "num_layers": 1,
                "num_heads": 2,
                "mlp_dim": 16,
                "attention": "reference",
            },
            "position": {"method": method} if isinstance(method, str) else method,
            "data": data or self.data,
            "train": {
                "steps": 12,
                "batch_size": 2,
                "length": 16,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "log_every": 3,
                "save_every": 4,
            }
            | train_changes,
        }

    def experiment(self, data=None, **changes):
        from fope_jax.config import build_experiment

        return build_experiment(self.values(data, **changes))

    @staticmethod
    def arrays(workdir, step):
        """Every array of a checkpoint as bytes, through Orbax and not through our own restore."""
        import orbax.checkpoint as ocp

        step = workdir.absolute() / "checkpoints" / str(step)
        with ocp.StandardCheckpointer() as reader:
            tree = {path.name: reader.restore(path) for path in step.iterdir() if path.is_dir()}
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}

    @staticmethod
    def losses(workdir):
        from fope_jax.evaluate.metrics import read_rows

        rows = read_rows(workdir / "metrics.jsonl")
        return [
            (r["step"], r["nats"], r["tokens"], r["grad_norm"])
            for r in rows
            if r["kind"] == "train"
        ]

    @staticmethod
    def interrupt(module, patch, at):
        """Makes training raise Interrupted before it sees batch ``at`` of the stream."""

        class Loader(module.Loader):
            def iterate(self, start, count):
                for step, batch in enumerate(super().iterate(start, count), start):
                    if step == at:
                        raise Interrupted
                    yield batch

        patch.setattr(module, "Loader", Loader)


COMPILED_STEPS = {}  # by what a step is made of, and shapes of a batch
INITIAL = {}  # states and constants, by what they are made of
# Settings of training that no program reads.
OUTSIDE = {"log_every", "save_every", "evaluate_every", "keep", "keep_period", "tracker"}
OUTSIDE |= {"grace_seconds", "on_save_error"}


def made_of(plan):
    """What the programs of a plan are made of."""
    own = plan.experiment
    train = [getattr(own.train, f.name) for f in fields(own.train) if f.name not in OUTSIDE]
    return own.model, own.position, own.seed, tuple(train), plan.mesh


def made_once(make):
    """``make(plan)`` of one model, optimizer and mesh is called once; a step takes a copy of it."""

    def initial(plan):
        key = make.__name__, made_of(plan)
        if key not in INITIAL:
            INITIAL[key] = make(plan)
        return jax.tree.map(lambda x: x.copy(), INITIAL[key])

    return initial


@contextlib.contextmanager
def compiling_once():
    """A step of one experiment is compiled once, however many runs make it, and so is its start."""
    from fope_jax.train import loop, state

    class Traced:
        def __init__(self, plan, batch):
            self.plan, self.batch = plan, batch

        def lower(self):
            return self

        def compile(self, compiler_options):
            shapes = tuple((x.shape, str(x.dtype)) for x in self.batch)
            key = (made_of(self.plan), shapes)
            if key not in COMPILED_STEPS:
                lowered = state.trace_step(self.plan, self.batch).lower()
                COMPILED_STEPS[key] = lowered.compile(compiler_options=compiler_options)
            return COMPILED_STEPS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "trace_step", Traced)
        for make in (state.init_train_state, state.init_constants):
            patch.setattr(loop, make.__name__, made_once(make))
        yield


@pytest.fixture(scope="module")
def compile_once():
    with compiling_once():
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    from fope_jax.data.build import build

    directory = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for name in ("train_0", "train_1", "validation"):
        words = rng.permutation(TEXT.split() * 40)
        (directory / f"{name}.txt").write_text(" ".join(words))
    config = {
        "corpus": "text",
        "train_files": [f"{directory}/train_*.txt"],
        "validation_files": [f"{directory}/validation.txt"],
        "tokenizer": "bytes",
        "cache_dir": str(directory / "cache"),
    }
    made = Runs(config)
    build(made.experiment().data)
    return made


@pytest.fixture(scope="session")
def rope(runs, tmp_path_factory):
    """12 updates of RoPE at 16 tokens, the checkpoints of 8 and 12 kept."""
    from fope_jax.train.loop import train

    workdir = tmp_path_factory.mktemp("runs") / "rope"
    with compiling_once():
        train(runs.experiment(method="rope"), workdir)
    return workdir


@pytest.fixture(scope="session")
def fope(runs, tmp_path_factory):
    """One update of FoPE whose coefficients are trained."""
    from fope_jax.train.loop import train

    workdir = tmp_path_factory.mktemp("runs") / "fope"
    method = {"method": "fope", "theta": 100.0, "learnable": True}
    with compiling_once():
        train(runs.experiment(method=method, steps=1), workdir)
    return workdir
