"""The command line, as a user meets it: what it does, what it refuses, and how it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.restore import read_experiment
from fope_jax.interop.weights import export_weights
from fope_jax.main import main
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import FoPE
from fope_jax.storage.checkpoint import CheckpointStore

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({{
        "name": "fope", "seed": 0,
        "data": {{
            "corpus": "text", "tokenizer": "bytes", "cache_dir": "{0}/cache",
            "train_files": ("{0}/train.txt",), "validation_files": ("{0}/validation.txt",),
        }},
        "model": {{
            "vocab_size": 300, "d_model": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32,
            "attention": "reference",
        }},
        "position": {{"method": arg or "fope"}},
        "train": {{
            "steps": 30, "batch_size": 2, "length": 16, "learning_rate": 1e-2,
            "warmup_steps": 5, "log_every": 2, "save_every": 10,
        }},
        "evaluate": {{
            "lengths": (2,), "num_windows": 4, "position_windows": 0, "passkey_trials": 0,
        }},
    }})
"""
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """A configuration whose token cache has been built by `fope data build`."""
    directory = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for name, count in (("train", 4_000), ("validation", 500)):
        (directory / f"{name}.txt").write_text(" ".join(rng.choice(WORDS, count)))
    path = directory / "config.py"
    path.write_text(CONFIG.format(directory))
    assert main(["data", "build", "--config", str(path)]) == 0
    return str(path)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main(["train", "--config", config, "--workdir", str(workdir)]) == 0
    return workdir


def command(config: str, workdir: Path, *overrides: str) -> list[str]:
    verb = [sys.executable, "-m", "fope_jax.main", "train"]
    return [*verb, "--config", config, "--workdir", str(workdir), *overrides]


def kill_after(line: list[str], workdir: Path, step: int, saved: int = -1) -> None:
    """Starts training by a command line and sends SIGKILL once metrics.jsonl shows ``step``.

    And once a checkpoint of step ``saved`` is written; -1 waits for none.
    """
    store = CheckpointStore(workdir / "checkpoints")
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = read_rows(workdir / "metrics.jsonl")
        if store.newest_step() >= saved and any(
            row["kind"] == "train" and row["step"] >= step for row in rows
        ):
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def arrays(workdir: Path, step: int) -> dict[str, bytes]:
    store = CheckpointStore(workdir / "checkpoints")
    assert store.latest_valid_step() == step
    items = [path for path in (workdir / "checkpoints" / str(step)).iterdir() if path.is_dir()]
    with ocp.StandardCheckpointer() as orbax:
        tree = {item.name: orbax.restore(item) for item in items}
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    assert leaves
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def numbers(workdir: Path) -> list[tuple]:
    rows = read_rows(workdir / "metrics.jsonl")
    names = ("step", "nats", "tokens", "grad_norm", "learning_rate", "tokens_seen")
    return [tuple(row[name] for name in names) for row in rows if row["kind"] == "train"]


@pytest.mark.slow  # of the fast tests of faults one is killed in the same way
def test_killed_a_run_ends_with_the_bits_of_the_unbroken_one(config, unbroken, tmp_path):
    killed = tmp_path / "killed"
    kill_after(command(config, killed), killed, step=12, saved=10)
    done = subprocess.run(command(config, killed), capture_output=True, text=True, check=True)
    assert f"resuming {killed} at step " in done.stderr
    assert numbers(killed) == numbers(unbroken)
    assert arrays(killed, 30) == arrays(unbroken, 30)
    assert not list((killed / "checkpoints").glob("*tmp*"))


def test_a_finished_run_has_nothing_to_do_and_says_so(config, unbroken, capsys):
    before = numbers(unbroken)
    capsys.readouterr()
    assert main(["train", "--config", config, "--workdir", str(unbroken)]) == 0
    again = capsys.readouterr()
    assert f"{unbroken} is finished: 30 steps are trained" in again.err
    assert again.out == f"run in {unbroken}\n" and numbers(unbroken) == before


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 18])
def test_killed_in_either_stage_of_a_curriculum_the_bits_are_those_of_the_unbroken_run(
    config, tmp_path, step
):
    killed, unbroken = (
        command(config, tmp_path / name, "--config.train.first_lengths=8=20")
        for name in ("killed", "unbroken")
    )
    kill_after(killed, tmp_path / "killed", step)
    for line in (killed, unbroken):
        subprocess.run(line, capture_output=True, check=True)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "unbroken")
    assert arrays(tmp_path / "killed", 30) == arrays(tmp_path / "unbroken", 30)


@pytest.mark.slow
def test_killed_an_extension_goes_on_by_the_same_command(unbroken, tmp_path):
    def line(name):
        verb = [sys.executable, "-m", "fope_jax.main", "extend", "--from", str(unbroken)]
        given = ["--method", "fope", "--length", "32", "--config.train.steps=30"]
        return [*verb, *given, "--workdir", str(tmp_path / name)]

    kill_after(line("killed"), tmp_path / "killed", step=12)
    for name in ("killed", "whole"):
        subprocess.run(line(name), capture_output=True, check=True)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert arrays(tmp_path / "killed", 30) == arrays(tmp_path / "whole", 30)


def test_a_run_is_evaluated_and_reported(unbroken, tmp_path, capsys):
    capsys.readouterr()
    assert main(["evaluate", "--run", str(unbroken)]) == 0
    evaluated = capsys.readouterr().out
    assert f"rows in {unbroken}/metrics.jsonl" in evaluated
    assert evaluated.endswith(f"next: fope report {unbroken}  (with other runs, to compare them)\n")
    rows = [r for r in read_rows(unbroken / "metrics.jsonl") if r["kind"] == "perplexity"]
    assert {(r["variant"], r["step"], r["context"]) for r in rows} == {("fope", 30, 32)}
    assert main(["report", str(unbroken)]) == 0
    reported = capsys.readouterr().out
    assert f"report in {unbroken}/report/index.html" in reported
    assert "fope" in (unbroken / "report/index.html").read_text()
    start = reported.index("Perplexity (protocol same-tokens, validation split")
    tables = reported[start : reported.index("\nreport in ")]
    assert tables in evaluated  # the same tables


def test_one_command_evaluates_and_writes_the_page(unbroken, tmp_path, capsys):
    out = tmp_path / "report"
    command = ["evaluate", "--run", str(unbroken), "--protocols"]
    assert main([*command, "all", "--report", str(out)]) == 0
    assert f"report in {out}/index.html" in capsys.readouterr().out
    assert "Perplexity against context length" in (out / "index.html").read_text()
    assert main([*command, "chunk"]) == 2
    assert "'chunk' is no protocol; accepted: same-tokens," in capsys.readouterr().err
    assert main([*command, "same-tokens, chunks"]) == 2
    assert "protocol chunks is asked for, but" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A Hugging Face checkpoint of a model for the tokens of ``config``, without a tokenizer."""
    model = Transformer(
        TransformerConfig(
            vocab_size=300, d_model=16, num_layers=2, num_heads=2, mlp_dim=32, qk_norm="head"
        ),
        FoPE(16, share_layers=True, outputs="surviving"),
        rngs=nnx.Rngs(0),
    )
    _, params, constants = split(model)
    directory = tmp_path / "tiny"
    export_weights(directory, model.config, model.position, params, constants, length=16)
    return directory


def import_command(config: str, checkpoint: Path, workdir: Path) -> list[str]:
    corpus = Path(config).parent
    return [
        "import",
        "--from",
        str(checkpoint),
        "--workdir",
        str(workdir),
        "--config.data.corpus=text",
        "--config.data.tokenizer=bytes",
        f"--config.data.cache_dir={corpus}/cache",
        f"--config.data.train_files={corpus}/train.txt",
        f"--config.data.validation_files={corpus}/validation.txt",
        "--config.evaluate.lengths=2",
        "--config.evaluate.num_windows=4",
        "--config.evaluate.position_windows=0",
        "--config.evaluate.passkey_trials=0",
    ]


@pytest.mark.slow  # tests/interop has it without the command
def test_a_checkpoint_of_hugging_face_becomes_a_run_and_a_checkpoint_again(
    config, checkpoint, tmp_path, capsys
):
    workdir = tmp_path / "run"
    assert main(import_command(config, checkpoint, workdir)) == 0
    shown = capsys.readouterr().out
    assert f"{checkpoint}: 14,832 parameters, position fope(" in shown
    assert shown.endswith(f"run in {workdir}\n")
    assert main(["data", "build", "--config", str(workdir / "config.json")]) == 0  # it is there
    assert main(["evaluate", "--run", str(workdir)]) == 0
    rows = [r for r in read_rows(workdir / "metrics.jsonl") if r["kind"] == "perplexity"]
    assert {(r["variant"], r["step"], r["context"]) for r in rows} == {("tiny", 0, 32)}
    assert 250 < np.exp(sum(r["nats"] for r in rows) / sum(r["tokens"] for r in rows)) < 350
    assert main(["report", str(workdir), "-o", str(tmp_path / "report")]) == 0

    capsys.readouterr()
    for name, run in (("newest", workdir), ("named", workdir / "0")):
        assert main(["export", "--run", str(run), "-o", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.endswith(f"checkpoint in {tmp_path / name}\n")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (checkpoint / file).read_bytes()

    # No run begins there: it would be trained from new weights and write over these.
    command = ["train", "--config", str(workdir / "config.json"), "--workdir", str(workdir)]
    assert main(command) == 2
    assert f"holds weights imported from {checkpoint}" in capsys.readouterr().err


def test_a_tokenizer_goes_with_its_weights(checkpoint, tmp_path):
    """It goes as it is, byte for byte: this one has no decoder, which only text needs."""
    tokenizer = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    (checkpoint / "tokenizer.json").write_text(tokenizer)
    for name in ("tokenizer_config.json", "other.json"):
        (checkpoint / name).write_text(name)
    workdir, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", "--from", str(checkpoint), "--workdir", str(workdir)]) == 0
    experiment = read_experiment(workdir)
    assert experiment.data.tokenizer == str(checkpoint / "tokenizer.json")
    assert (experiment.train.length, experiment.model.qk_norm) == (16, "head")
    assert main(["export", "--run", str(workdir), "-o", str(out), "--dtype", "bfloat16"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "tokenizer.json").read_text() == tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.model.d_model=32", "config.model.d_model = 32, but the weights are of 16;"),
        ("--config.position.sigma=0.6", "config.position.sigma = 0.6, but the weights are of 0.3"),
        ("--config.train.stpes=3", "config.train.stpes is unknown (nearest: train.steps)"),
    ],
)
def test_an_import_cannot_change_the_model(config, checkpoint, tmp_path, capsys, change, message):
    assert main([*import_command(config, checkpoint, tmp_path / "run"), change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fope: config.") and message in error
    assert not (tmp_path / "run").exists()


def test_weights_without_a_tokenizer_ask_for_one(checkpoint, unbroken, tmp_path, capsys):
    assert main(["import", "--from", str(checkpoint), "--workdir", str(tmp_path / "run")]) == 2
    assert "has no tokenizer.json: say which one its tokens are of" in capsys.readouterr().err
    # FoPE as it is trained by default has coefficients for each layer.
    assert main(["export", "--run", str(unbroken), "-o", str(tmp_path / "out")]) == 2
    assert "share_layers=False with 2 layers: engines hold one set" in capsys.readouterr().err
    wrong = ["export", "--run", str(unbroken / "30"), "--step", "50", "-o", str(tmp_path / "out")]
    assert main(wrong) == 2
    assert "30 and --step 50: leave one out" in capsys.readouterr().err


@pytest.mark.slow  # tests/spectrum/run_test.py has it without the command
def test_the_spectra_of_a_run_are_measured_and_shown(unbroken, capsys):
    command = ["spectrum", str(unbroken), "--lengths", "2", "--windows", "2"]
    assert main([*command, "--untrained"]) == 0
    shown = capsys.readouterr().out
    assert f"2 rows in {unbroken}/metrics.jsonl" in shown
    assert f"spectra in {unbroken}/spectrum/index.html" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run, or --demo"),
        (["--demo"], "--demo needs -o, the directory of its page"),
        (["run", "--demo", "-o", "page"], "run: --demo needs no run; leave one of the two out"),
        (["run", "--lengths", "1,x"], "--lengths 1,x: 'x' is no whole number"),
        (["gs://bucket/run"], "gs://bucket/run is in a bucket: give -o, a directory of this"),
        (["nowhere"], "nowhere is no run: there is no such directory"),
        (["hf:a/b"], "hf:a/b is no run: it names weights; `fope import hf:a/b --workdir RUN`"),
    ],
)
def test_spectra_that_cannot_be_measured_say_why(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["spectrum", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_data_inspect_shows_the_splits(config, capsys):
    assert main(["data", "inspect", "--config", config]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown and "validation" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.stpes=3"], "config.train.stpes is unknown (nearest: train.steps)"),
        (["--config.train.steps=x"], "config.train.steps = 'x' is str; accepted: int"),
        (["--config.model.head_dim=7"], "head_dim"),
        (["--config.position.method=roap"], "unknown position embedding 'roap'; did you mean"),
        (["--config.model.vocab_size=9"], "but config.model.vocab_size = 9"),
        (["--config.data.train_files=/nowhere/*.txt"], "build it: fope data build"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(config, tmp_path, capsys, arguments, message):
    base = ["train", "--config", config, "--workdir", str(tmp_path / "run")]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fope: ") and error.count("\n") == 1
    assert message in error
    assert main([*base, *arguments, "--traceback"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_error_in_a_users_module_names_its_line(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom fope_jax.position import RoPE\n\n"
        "@dataclass(frozen=True)\nclass Mine(RoPE):\n"
        "    def rotate(self, variables, tables, q, k):\n        raise ValueError('no')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = ["train", "--config", f"{config}:mine:Mine", "--workdir", str(tmp_path / "run")]
    assert main(line) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"fope: no ({tmp_path}/mine.py, line 7)"


def test_an_unwritable_workdir_is_one_line(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "--config", config, "--workdir", str(tmp_path / "file/run")]) == 2
    assert capsys.readouterr().err == (
        f"fope: cannot write to workdir {tmp_path}/file/run: Not a directory\n"
    )


def test_a_defect_of_ours_keeps_its_traceback(config, tmp_path, monkeypatch):
    from fope_jax.train import loop

    def defect(*_, **__):
        raise ZeroDivisionError("defect")

    monkeypatch.setattr(loop, "train", defect)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--config", config, "--workdir", str(tmp_path)])


def test_interrupting_says_how_to_go_on(config, tmp_path, monkeypatch, capsys):
    from fope_jax.train import loop

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    assert main(["train", "--config", config, "--workdir", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "x.py", "--workdir", "run", "--step", "3"],
        ["train", "--config", "x.py", "--workdir", "run", "--config.train.steps"],
        ["report", "run", "-o", "out", "--config.train.steps=3"],
        ["train", "--config", "x.py", "--workdir", "s3://bucket/run"],
        ["evaluate", "--run", "gs://"],
        ["report", "run", "-o", "gs://bucket/report"],
        ["extend", "--from", "run", "--method", "yarn", "--length", "32"],
        ["extend", "--from", "a", "--method", "pi", "--length", "8", "--workdir", "b", "--x"],
        ["evaluate"],
        ["fly"],
        ["data"],
    ],
)
def test_unknown_or_missing_arguments_are_refused_by_the_parser(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fope" in capsys.readouterr().err


def test_another_scheme_is_refused_with_what_is_accepted(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "x.py", "--workdir", "s3://bucket/run"])
    said = capsys.readouterr().err
    assert "'s3://bucket/run'; accepted: a path of this machine, or gs://BUCKET/PATH" in said


def test_a_bucket_without_its_package_names_the_pip_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", "x.py", "--workdir", "gs://bucket/run"])
    assert caught.value.code == 2
    assert "pip install '.[buckets]'" in capsys.readouterr().err


VERBS = [
    ["data", "build"],
    ["train"],
    ["extend"],
    ["evaluate"],
    ["plan"],
    ["import"],
    ["export"],
    ["report"],
    ["methods"],
    ["gallery"],
    [],
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--help"])
    assert caught.value.code == 0
    assert f"usage: {' '.join(['fope', *verb])}" in capsys.readouterr().out


def test_methods_are_listed_and_written_into_a_file(tmp_path, capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert "alibi: Attention with linear biases" in listed and "Press et al. 2022" in listed
    assert main(["methods", "fope", "yarn"]) == 0
    described = capsys.readouterr().out
    assert described.startswith("fope, a method: training_length, theta=10000")
    assert "yarn, a scaling: factor, original_length" in described
    assert "Knobs:" in described and "Hua et al. 2025" in described and "alibi" not in described
    assert main(["methods", "--markdown"]) == 0
    markdown = capsys.readouterr().out
    assert "| `alibi` | bias | `slopes=None` | no |" in markdown
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- methods: begin -->\n<!-- methods: end -->\nb\n")
    for state in ("is up to date now", "was up to date"):
        assert main(["methods", "--write", str(page)]) == 0
        assert capsys.readouterr().out == f"{page} {state}\n"
    between = page.read_text().removeprefix("a\n<!-- methods: begin -->\n")
    assert between == f"{markdown}<!-- methods: end -->\nb\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "roap"], "unknown method or scaling 'roap'; did you mean 'rope'? Known: nope"),
        (["methods", "rope", "--markdown"], "--markdown and --write take the tables of all"),
        (
            ["methods", "--write", "nowhere.md"],
            "nowhere.md is no file; the tables are written into one between",
        ),
        (["methods", "--write", "README"], "README: the tables of methods go between one line"),
        (["gallery", "-o", "out", "--methods", "roap"], "'roap'; did you mean 'rope'? Known: nope"),
        (
            ["gallery", "-o", "out", "--methods", "nope,roap"],
            "'roap'; did you mean 'rope'? Known: n",
        ),
        (["gallery", "-o", "README/out", "--methods", "nope"], "cannot write the gallery to"),
    ],
)
def test_errors_about_methods_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("README").write_text("no markers")
    assert main(arguments) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if line != "nope"]
    assert len(shown) == 1 and shown[0].startswith("fope: ") and message in shown[0]


@pytest.mark.slow  # tests/gallery draws them without the command
def test_a_gallery_of_the_methods_named(tmp_path, capsys):
    out = tmp_path / "gallery"
    assert main(["gallery", "-o", str(out), "--methods", "alibi", "nope"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"gallery in {out}/index.html\n" and shown.err == "alibi\nnope\n"
    assert "<h2>alibi</h2>" in (out / "index.html").read_text()
    assert sorted(path.name for path in out.glob("*.png")) == [
        "alibi.png",
        "nope.png",
        "overview.png",
    ]


def test_help_and_a_report_need_no_jax():
    program = (
        "import sys; from fope_jax.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "main(['report', '/nowhere', '-o', '/nowhere/out'])\n"
        "assert not {'jax', 'flax', 'tensorflow'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_that_has_had_enough_is_no_error():
    """As in ``fope methods | head``."""
    command = [sys.executable, "-m", "fope_jax.main", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
