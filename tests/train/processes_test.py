"""Several real processes, as on a pod: `fope train` and `evaluate` under tpu_scripts/local.sh."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fope_jax.config import build_experiment, load_config
from fope_jax.data.build import build
from fope_jax.evaluate.run import evaluate
from fope_jax.train import loop

ROOT = Path(__file__).parents[2]
FOPE = [str(Path(sys.executable).parent / "fope")]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"
CONFIG = """
from ml_collections import ConfigDict
def get_config(arg=""):
    return ConfigDict({{
        "name": "fope", "seed": 1,
        "model": {{"vocab_size": 320, "d_model": 32, "num_layers": 2, "num_heads": 4,
                  "num_kv_heads": 2, "mlp_dim": 32, "attention_block": 24,
                  "attention": arg or "auto"}},
        "position": {{"method": "fope"}},
        "data": {{"corpus": "text", "train_files": ["{0}/train_*.txt"],
                 "validation_files": ["{0}/validation.txt"], "tokenizer": "bytes",
                 "cache_dir": "{0}/cache"}},
        "train": {{"steps": 20, "batch_size": 8, "length": 64, "learning_rate": 1e-2,
                  "warmup_steps": 2, "log_every": 1, "save_every": 10, "keep": 3}},
        "evaluate": {{"lengths": [1, 2], "num_windows": 6, "position_windows": 3,
                     "scored_tokens": 32, "passkey_trials": 0, "batch_tokens": 512}},
    }})
"""
# Processes, devices of each, mesh.
SETUPS = {
    "one device": (1, 1, {}),
    "8 in one process": (1, 8, {"tensor": 2, "context": 2}),
    "2 x 4": (2, 4, {"context": 2, "data": 2}),
    "4 x 2": (4, 2, {"tensor": 2}),
}
SMALL = (2, 1, {"data": 2})  # compiles fast


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    random = np.random.default_rng(0)
    for name in ("train_0", "train_1", "validation"):
        words = random.permutation(TEXT.split() * 400)
        (folder / f"{name}.txt").write_text(" ".join(words))
    (folder / "config.py").write_text(CONFIG.format(folder))
    build(build_experiment(load_config(str(folder / "config.py"))).data)
    return folder / "config.py"


def launch(processes, devices, arguments):
    """Runs a command as that many processes; returns what they printed."""
    command = [ROOT / "tpu_scripts/local.sh", "--processes", processes, "--devices", devices]
    done = subprocess.run(
        [str(part) for part in [*command, "--", *arguments]],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(config, workdir, setup):
    processes, devices, mesh = (SETUPS | {"2 x 1": SMALL})[setup]
    given = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    return launch(
        processes, devices, [*FOPE, "train", "--config", config, "--workdir", workdir, *given]
    )


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row["loss"] for row in rows]), [row["tokens"] for row in rows]


def arrays(workdir, step):
    """Every array of a checkpoint, read by Orbax alone."""
    found = {}
    for item in ("params", "constants", "optimizer"):
        path, reader = workdir / "checkpoints" / str(step) / item, ocp.PyTreeCheckpointer()
        there = reader.metadata(path).item_metadata.tree
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
        tree = reader.restore(path, restore_args=wanted)
        for path, leaf in ocp.tree.to_flat_dict(tree, sep="/").items():
            found[f"{item}/{path}"] = np.asarray(leaf)
    return found


def read_again(workdir, out, setup):
    """Restores the last checkpoint of ``workdir`` on other devices, and saves it from there."""
    processes, devices, mesh = SETUPS[setup]
    command = [sys.executable, "-m", "tests.train.resave", workdir, 20, out, json.dumps(mesh)]
    launch(processes, devices, command)


def assert_same_bits(left, right):
    assert left.keys() == right.keys() and len(left) > 10
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


def scores(workdir, kinds=("perplexity", "position")):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["kind"] in kinds]


def test_two_processes_train_and_save_as_one_does(config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    simple = f"{config}:reference"  # compiles in half of the time
    loop.train(build_experiment(load_config(simple)), one)
    printed = train(simple, two, "2 x 1")
    assert printed.count("run in ") == 1, "one process speaks for all"
    assert_same_training(two, one)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(config, tmp_path):
    """A run of two processes, scored on its devices and on one."""
    two = tmp_path / "two"
    train(config, two, "2 x 1")
    launch(2, 2, [*FOPE, "evaluate", "--run", two, "--mesh", "context=2"])
    found = scores(two)
    evaluate(two, force=True)
    expected = scores(two)
    assert len(found) == len(expected) > 4
    for here, there in zip(found, expected, strict=True):
        assert here["nats"] == pytest.approx(there["nats"], rel=1e-5)
        assert {**here, "nats": 0} == {**there, "nats": 0}


@pytest.mark.slow
def test_every_setup_trains_alike_and_reads_the_checkpoints_of_every_other(config, tmp_path):
    for setup in SETUPS:
        train(config, tmp_path / setup, setup)
        assert_same_training(tmp_path / setup, tmp_path / "one device")
    for writer in SETUPS:
        for reader in SETUPS:
            out = tmp_path / f"{writer} read by {reader}"
            read_again(tmp_path / writer, out, reader)
            assert_same_bits(arrays(tmp_path / writer, 20), arrays(out, 20))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_other_processes(config, tmp_path):
    train(config, tmp_path / "whole", "one device")
    for setup in ("4 x 2", "2 x 4"):
        workdir = tmp_path / setup
        shutil.copytree(tmp_path / "whole", workdir)
        shutil.rmtree(workdir / "checkpoints/20")
        train(config, workdir, setup)
        assert_same_training(workdir, tmp_path / "whole")


@pytest.mark.slow
def test_an_extension_is_that_of_one_device_in_several_processes(config, tmp_path):
    """Its start, its updates, what is measured meanwhile, and the evaluation at the end."""
    train(config, tmp_path / "parent", "one device")
    for setup in ("one device", "2 x 4"):
        processes, devices, mesh = SETUPS[setup]
        given = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        command = ["extend", "--from", tmp_path / "parent", "--method", "fope", "--length", "128"]
        steps = ["--config.train.steps=4", "--config.train.evaluate_every=2"]
        printed = launch(
            processes, devices, [*FOPE, *command, "--workdir", tmp_path / setup, *steps, *given]
        )
        assert printed.count("run in ") == 1
    one, several = tmp_path / "one device", tmp_path / "2 x 4"
    starts = [json.loads((run / "lineage.json").read_text()) for run in (one, several)]
    for key in ("parent", "child", "parent_at_new_length"):
        assert starts[0]["start"][key] == pytest.approx(starts[1]["start"][key], rel=1e-5)
    assert starts[0]["child"] == starts[1]["child"] and starts[0]["data"] == starts[1]["data"]
    np.testing.assert_allclose(losses(several)[0], losses(one)[0], rtol=1e-5)
    for kinds in (("validation",), ("perplexity", "position")):
        pairs = zip(scores(one, kinds), scores(several, kinds), strict=True)
        for here, there in pairs:
            assert here["nats"] == pytest.approx(there["nats"], rel=1e-5)
            assert {**here, "nats": 0} == {**there, "nats": 0}
    assert [row["step"] for row in scores(one, ("validation",))] == [0, 2, 4]
    assert scores(one)


def assert_same_training(workdir, of):
    found, tokens = losses(workdir)
    expected, same_tokens = losses(of)
    assert len(found) == 20
    assert expected[0] - expected[-1] > 0.5, "there was something to learn"
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert tokens == same_tokens


# ---------------------------------------------------------------------------- not started alike

PATIENCE = (
    "import sys; from fope_jax import main; from fope_jax.storage import lock; "
    "lock.SHARED_SECONDS = 2; sys.exit(main.main())"
)


def start_apart(lines, environments=({}, {})):
    """Two processes of one run, each with its own command line; their codes and what they say."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    shared = {
        "FOPE_COORDINATOR": coordinator,
        "FOPE_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PATIENCE, *map(str, line)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | shared | {"FOPE_PROCESS_ID": str(process)} | own,
        )
        for process, (line, own) in enumerate(zip(lines, environments, strict=True))
    ]
    try:
        return [(process.communicate(timeout=120)[0], process.returncode) for process in both]
    finally:
        for process in both:
            process.kill()


# What the second process has otherwise: arguments, environment; what both must say.
APART = {
    "a value": (["--config.train.length=32"], {}, "train.length = 64 in process 0"),
    "no token cache": (["--config.data.cache_dir=nowhere"], {}, "there is no token cache of"),
    "devices": (
        [],
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        "devices = 2 in process 0, 1 in process 1",
    ),
    "a seed": (["--config.seed=2"], {}, "seed = 1 in process 0"),
    "how often it saves": (["--config.train.save_every=5"], {}, "train.save_every = 10 in process"),
    "a mesh": (["--config.mesh.tensor=2"], {}, "mesh.tensor = 1 in process 0"),
    "precision": ([], {"JAX_ENABLE_X64": "1"}, "jax_enable_x64 = false in process 0"),
    "a value that is none": (["--config.train.stpes=1"], {}, "config.train.stpes is unknown"),
    "no configuration": (["--config", "nowhere.py"], {}, "'nowhere.py' does not exist"),
}


@pytest.mark.slow  # agreement_test has the messages
@pytest.mark.parametrize("name", APART)
def test_processes_that_were_not_started_alike_all_end_and_say_why(config, tmp_path, name):
    arguments, environment, message = APART[name]
    line = ["train", "--config", config, "--workdir", tmp_path / "run"]
    for text, code in start_apart([line, [*line, *arguments]], ({}, environment)):
        assert code == 2, text
        assert message in text and "Traceback" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_token_cache_may_lie_elsewhere_on_each_host(config, tmp_path):
    """Its content is what must be the same."""
    copy = shutil.copytree(config.parent / "cache", tmp_path / "cache")
    line = ["train", "--config", config, "--workdir", tmp_path / "run", "--config.train.steps=2"]
    both = start_apart([line, [*line, f"--config.data.cache_dir={copy}"]])
    assert [code for _, code in both] == [0, 0], both


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_found_before_the_first_step(config, tmp_path):
    line = ["train", "--config", config, "--workdir"]
    both = start_apart([[*line, tmp_path / "here"], [*line, tmp_path / "there"]])
    for text, code in both:
        assert code == 2, text
        assert f"workdir {tmp_path}/there is not the directory of process 0" in text
        assert "gs://BUCKET/PATH" in text and "Traceback" not in text
    assert f"process 1 (host {socket.gethostname()}): workdir" in both[0][0]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["evaluate", "extend"])
def test_other_verbs_compare_as_well(config, tmp_path, verb):
    run = tmp_path / "run"
    line = ["train", "--config", config, "--workdir", run, "--config.train.steps=2"]
    launch(1, 1, [*FOPE, *line])
    given, other = {
        "evaluate": (["--run", run], ["--protocols", "chunks"]),
        "extend": (
            ["--from", run, "--length", 128, "--workdir", tmp_path / "new", "--method", "same"],
            ["--optimizer", "reset"],
        ),
    }[verb]
    for text, code in start_apart([[verb, *given], [verb, *given, *other]]):
        assert code == 2 and "started alike; different: " in text, text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
