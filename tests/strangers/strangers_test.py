"""Position embeddings of somebody else's package, through every verb, without touching ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fope_jax.main import main
from fope_jax.sweep import queue
from fope_jax.sweep.runs import Extend, Train, check_sweep

HERE = Path(__file__).parent
MODULES = {"sandwich": "Sandwich", "weighted_rotary": "WeightedRotary"}
SPECS = {module: f"their_package.{module}:{cls}" for module, cls in MODULES.items()}


@pytest.fixture(autouse=True)
def their_package_is_installed(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture(scope="module")
def configs(runs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("configs")
    for module, spec in SPECS.items():
        values = runs.values(method=spec, steps=4, log_every=1) | {"name": module}
        values["evaluate"] = {"num_windows": 2, "position_windows": 1, "passkey_trials": 0}
        (directory / f"{module}.py").write_text(
            "import json\nfrom ml_collections import ConfigDict\n\n\n"
            f"def get_config(arg):\n    return ConfigDict(json.loads('''{json.dumps(values)}'''))\n"
        )
    return directory


def rows_of(run, kind):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.slow  # five commands
@pytest.mark.parametrize("module", MODULES)
def test_trained_evaluated_and_extended(configs, tmp_path, module):
    run, child = tmp_path / "run", tmp_path / "child"
    assert main(["train", "--config", str(configs / f"{module}.py"), "--workdir", str(run)]) == 0
    assert main(["evaluate", "--run", str(run)]) == 0
    nats = {row["context"]: row["nats"] for row in rows_of(run, "perplexity")}
    assert len(nats) > 3 and np.isfinite(list(nats.values())).all()
    extend = ["extend", "--from", str(run), "--method", "same", "--length", "32"]
    assert main([*extend, "--workdir", str(child), "--config.train.steps=2"]) == 0
    assert json.loads((child / "config.json").read_text())["position"]["method"] == SPECS[module]
    assert main(["doctor", str(child)]) == 0
    assert main(["report", str(run), str(child), "-o", str(tmp_path / "report")]) == 0


def test_a_run_goes_on_with_a_method_that_the_command_names(rope, tmp_path):
    """As `fope train --config.position.method` does; the module needs no leave."""
    extend = ["extend", str(rope), "--method", SPECS["weighted_rotary"], "--length", "32"]
    extend += ["--workdir", str(tmp_path / "run"), "--config.train.steps=1", "--no-evaluate"]
    code = "import sys; from fope_jax.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *extend], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "amplitudes drawn" in done.stderr
    position = json.loads((tmp_path / "run" / "config.json").read_text())["position"]
    assert position == {"method": SPECS["weighted_rotary"], "theta": 10_000.0}
    (row,) = rows_of(tmp_path / "run", "train")
    assert np.isfinite(row["loss"])


def test_a_sweep_allows_its_runs_the_modules_that_its_files_name(configs, tmp_path, monkeypatch):
    """Its commands are processes of their own; those that read a run's config.json need leave."""
    script, notes = tmp_path / "fake.py", tmp_path / "commands"
    script.write_text(
        "import sys\nwith open(sys.argv[1], 'a') as notes:\n    print(*sys.argv[2:], file=notes)\n"
    )
    monkeypatch.setattr(queue, "PROGRAM", (sys.executable, str(script), str(notes)))
    workdir = tmp_path / "sweep"
    for name in ("theirs", "longer"):
        (workdir / name).mkdir(parents=True)
    runs = [Train("theirs", str(configs / "sandwich.py")), Extend("longer", "theirs", "same", 32)]
    queue.run_sweep(check_sweep(runs), workdir)
    commands = [line.split() for line in notes.read_text().splitlines()]
    assert [command[0] for command in commands] == ["train", "evaluate", "extend", "evaluate"]
    assert all("--allow-module=their_package.sandwich" in command for command in commands)


@pytest.mark.slow
def test_drawn(tmp_path):
    assert main(["gallery", "-o", str(tmp_path), "--methods", *SPECS.values()]) == 0
    page = (tmp_path / "index.html").read_text()
    assert all(spec in page for spec in SPECS.values())


@pytest.mark.fast("not allowed")
@pytest.mark.parametrize(
    "option, code, shown",
    [
        ((), 2, "--allow-module their_package.sandwich"),
        (("--allow-module", "their_package.sandwich"), 0, "their_package imported"),
        (("--allow-module", "no_such_package"), 2, "'no_such_package' cannot be imported"),
    ],
    ids=["not allowed", "allowed", "no such module"],
)
def test_a_run_from_elsewhere_brings_no_code_of_its_own(tmp_path, option, code, shown):
    """A config.json that names a module is data of somebody else: only its reader lets it run."""
    run = tmp_path / "run"
    run.mkdir()
    values = {
        "name": "theirs",
        "seed": 0,
        "position": {"method": SPECS["sandwich"]},
        "model": {"vocab_size": 8, "d_model": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8},
        "data": {"corpus": "text", "train_files": ["x"], "validation_files": ["x"]},
        "train": {"steps": 1, "batch_size": 1, "length": 8},
    }
    (run / "config.json").write_text(json.dumps(values))
    program = (
        "import sys; from fope_jax.main import main\n"
        "from fope_jax.command_line.parser import VERBS\n"
        "import fope_jax.evaluate.restore as restore\n"
        "def run(arguments):\n"
        "    restore.read_experiment(arguments.run)\n"
        "    print('their_package' in sys.modules and 'their_package imported')\n"
        "VERBS['evaluate'] = VERBS['evaluate']._replace(run=run)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "evaluate", "--run", str(run), *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
