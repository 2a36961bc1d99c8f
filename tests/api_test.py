"""The Python API on a tiny run: what it computes, and that it is silent, light and stoppable."""

import json
import os
import signal
import subprocess
import sys
import threading
import tomllib
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import fope_jax as fj
from fope_jax import api
from fope_jax.config import ConfigError, build_experiment, experiment_to_dict
from fope_jax.config.from_python import config_of, overrides_of
from fope_jax.data.manifest import MissingCacheError
from fope_jax.extend.initial_loss import UNSEEN_STEP
from fope_jax.interop.run_export import export_run
from fope_jax.main import main
from fope_jax.model.transformer import split
from fope_jax.position import RoPE, YaRN
from fope_jax.report.rows import read_run
from fope_jax.report.summary import summarize
from fope_jax.storage.checkpoint import CheckpointError
from fope_jax.train import loop

ROOT = Path(__file__).parents[1]
CONFIG = {
    "name": "rope",
    "seed": 1,
    "model": {
        "vocab_size": 259,
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_dim": 16,
        "attention": "reference",
        "init_std": 0.3,
    },
    "position": {"method": "rope"},
    "data": {"corpus": "none", "tasks": ["recall=1.0"], "tokenizer": "bytes"},
    "train": {"steps": 3, "batch_size": 2, "length": 32, "warmup_steps": 1, "save_every": 2},
    "evaluate": {
        "num_windows": 0,
        "position_windows": 0,
        "passkey_templates": [],
        "passkey_trials": 1,
        "passkey_depths": [0.0, 1.0],
        "passkey_lengths": [1],
        "retrieval_tasks": ["recall"],
    },
}
CONFIG["data"]["packing"] = "windows"


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(compile_once):
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fj.train(CONFIG, tmp_path_factory.mktemp("api") / "rope")


# ---------------------------------------------------------------------------- the package


def test_the_import_is_light():
    code = (
        "import sys, fope_jax\n"
        "heavy = {'jax', 'flax', 'numpy', 'ml_collections', 'matplotlib', 'pandas', 'orbax'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "dir(fope_jax), fope_jax.__version__, fope_jax.train, fope_jax.report\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import fope_jax.report.sums\n"
        "assert callable(fope_jax.report) and fope_jax.report.sums is sys.modules[\n"
        "    'fope_jax.report.sums']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_version_is_that_of_this_copy(monkeypatch, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fj.__version__ == project["version"]
    monkeypatch.setattr(fj, "__file__", str(tmp_path / "fope_jax/__init__.py"))
    assert fj.__version__ == metadata.version("fope-jax")

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert fj.__version__ == "0+unknown"


def test_folders_are_functions_too():
    assert fj.train.loop is loop and "train_steps=500" in fj.train.__doc__
    assert {*fj.__all__, "position"} <= set(dir(fj))
    assert fj.position.RoPE is RoPE
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = fj.tarin


# ---------------------------------------------------------------------------- the story


@pytest.mark.slow  # trains, extends, scores; tests/notebooks_test.py has the like
def test_the_story_of_a_notebook(run, tmp_path, capfd):
    again = fj.train(CONFIG, run.workdir)  # finished: returned at once
    loaded = fj.load(run.workdir)
    assert (again.step, loaded.step, loaded.length, loaded.method) == (3, 3, 32, "rope")
    assert f"step=3, parameters={run.num_parameters:,}, length=32" in repr(loaded)
    table = fj.evaluate(run, contexts=[1, 2])
    assert table["context"].tolist() == [32, 64] and table["trials"].tolist() == [2, 2]
    little = {"train_steps": 1, "train_batch_size": 1, "evaluate_passkey_lengths": (1,)}
    yarn = tmp_path / "yarn"
    longer = fj.extend(run, method="yarn", length=64, workdir=yarn, evaluate=True, **little)
    assert set(longer.rows("retrieval")["context"]) == {64}
    assert (longer.length, longer.step, longer.method) == (64, 1, "rope")
    assert longer.experiment.position.scaling[0] == YaRN(2.0, 32)
    both = fj.evaluate([run, longer.workdir], contexts=[1])
    assert both["run"].tolist() == ["rope", longer.name] and both["context"].tolist() == [32, 64]
    page = fj.report([run, longer], tmp_path / "page")
    assert page.is_file() and page.suffix == ".html"
    assert len(run.rows("train")) == 2 and {"kind", "step"} <= set(run.rows())
    assert capfd.readouterr() == ("", "")


def test_a_table_has_the_numbers_of_the_report(run):
    table = fj.evaluate(run, contexts=[1, 2], num_windows=0)
    records = summarize(read_run(run.workdir).rows)
    for name in ("loss", "perplexity", "accuracy", "tokens", "multiple"):
        assert table[name].tolist() == [record[name] for record in records]
    assert set(table["protocol"]) == {"retrieval"} and set(table["data"]) == {"recall"}
    assert "bucket" not in table
    assert set(table["workdir"]) == {str(run.workdir)}  # tells runs of one name and seed apart


def test_verbose_says_what_is_done(run, capfd):
    fj.evaluate(run, contexts=[1], verbose=True)
    fj.evaluate(run, contexts=[1])
    out, err = capfd.readouterr()
    assert out == "" and err.count("retrieval (recall): scored") == 1


# ---------------------------------------------------------------------------- what a run computes


@pytest.mark.slow
def test_logits_and_loss_are_those_of_the_model(run):
    tokens = np.random.default_rng(0).integers(0, 259, (2, 9))
    positions = np.arange(9)[None]
    expected = run.model(jnp.asarray(tokens), positions, np.ones_like(positions))
    np.testing.assert_allclose(run.logits(tokens), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run.logits(tokens.tolist()[1])[0], expected[1], rtol=1e-5, atol=1e-5)
    text = "Call me"
    np.testing.assert_array_equal(run.logits(text), run.logits(run.tokenizer.encode(text)))
    scores = jax.nn.log_softmax(expected)[:, :-1]
    nats = -np.take_along_axis(np.asarray(scores), tokens[:, 1:, None], axis=-1)
    assert run.loss(tokens) == pytest.approx(nats.mean(), rel=1e-5)


@pytest.mark.slow  # tests/model/decode_test.py has it
def test_greedy_is_the_argmax_of_full_forward_passes(run, monkeypatch):
    prompt = [5, 200, 17]
    written = run.generate(prompt, max_new_tokens=6)
    read = [*prompt, *written, *[0] * (6 - len(written))]
    choices = np.argmax(run.logits(read)[0], axis=-1)[2:].tolist()
    assert written == choices[: len(written)] and len(written) == 6
    assert run.generate(prompt, 4) == written[:4]

    class Ending:
        eos_id, decode = written[-1], staticmethod(run.tokenizer.decode)

    monkeypatch.setitem(run.__dict__, "tokenizer", Ending)
    assert run.generate(prompt, 6) == written[: written.index(Ending.eos_id)]


def test_a_text_is_continued_by_a_text(run):
    ids = run.generate(run.encode("It was"), 8, temperature=1.0, seed=2)
    assert run.generate("It was", 8, temperature=1.0, seed=2) == run.tokenizer.decode(ids)
    assert ids != run.generate(run.encode("It was"), 8, temperature=1.0, seed=3)
    assert isinstance(run.generate("", 2), str)


@pytest.mark.parametrize(
    ("attempt", "told"),
    [
        (lambda run: run.logits([[1], [2, 3]]), "rows of different lengths"),
        (lambda run: run.logits([1.5]), "tokens of type float64; accepted: a text, or integers"),
        (lambda run: run.logits([]), r"tokens of shape \[0\]"),
        (lambda run: run.logits([259]), "vocab_size=259 accepts 0 to 258"),
        (lambda run: run.loss([1]), "1 token has no loss"),
        (lambda run: run.generate([[1], [2]]), "a prompt of 2 rows"),
        (lambda run: run.generate("a", 0), "0 new tokens"),
        (lambda run: run.generate("a", 1.5), "1.5 new tokens; accepted: a whole number, 1 or more"),
        (lambda run: run.generate("a", temperature=-1), "temperature = -1; accepted: a number, 0"),
        (lambda run: run.generate("a", temperature="x"), "temperature = 'x'; accepted: a number"),
        (lambda run: run.generate("a", seed=-1), "seed = -1; accepted: 0 to 4294967295"),
        (lambda run: run.generate("a", seed=2**32), "seed = 4294967296; accepted: 0 to 429"),
        (lambda run: run.rows("x"), "has rows of: .*train"),
        (lambda run: fj.evaluate(run, num_windos=3), r"no field 'num_windos' \(nearest: num_win"),
        (lambda run: fj.train(CONFIG, "x", position=fj.position.RoPE), "position = <class .*RoPE"),
        (lambda run: fj.extend(run, fj.position.RoPE(), 128, "x"), r"method = RoPE\(.*; accepted:"),
        (lambda run: fj.extend(run, "yarn", "128", "x"), "length = '128'; accepted: a whole"),
        (lambda run: fj.evaluate(run, context=[1]), r"no field 'context' \(nearest: contexts"),
        (lambda run: fj.evaluate(run, positions="yran:factor=2"), "--as yran:factor=2: unknown"),
        (lambda run: fj.evaluate(run, positions=[fj.position.RoPE()]), r"holds RoPE\(.*; accepted"),
        (lambda run: fj.evaluate(run, evaluate_num_windows=0.5), "num_windows = 0.5"),
        (
            lambda run: fj.evaluate(run, num_windows=2, evaluate_num_windows=3),
            "num_windows is given twice: 2 and 3",
        ),
        (
            lambda run: fj.evaluate(run, contexts=[1], lengths=[2]),
            r"lengths is given twice: \[2\] and \[1\]",
        ),
        (
            lambda run: fj.train(CONFIG, run.workdir, {"train.steps": 3}, train_steps=4),
            "train.steps is given twice: 4 and 3",
        ),
        (lambda run: fj.train(CONFIG, run.workdir, steps=3), r"'steps'.*\(nearest: train_steps\)"),
        (lambda run: fj.train(CONFIG, run.workdir, train_stepz=3), "nearest: train.steps"),
        (lambda run: fj.train(CONFIG, run.workdir, seed=2), "seed: 1, now 2"),
        (lambda run: fj.load("rows.jsonl"), "rows.jsonl is a results file"),
        (lambda run: fj.load(run.workdir / "2", step=3), "leave one out"),
        (lambda run: fj.load(run.workdir, workdir="x"), "only Hugging Face weights are imported"),
        (
            lambda run: fj.load(run),
            r"source = Run\('rope', .*: it is open already; use it as it is",
        ),
        (lambda run: fj.load(None), "source = None; accepted: a path or name, such as 'runs/f"),
        (lambda run: fj.load(run.workdir, step="2"), "step = '2'; accepted: a whole number, or"),
        (
            lambda run: fj.train(run, "x"),
            r"config = Run\(.*; accepted: .*, such as a run's: run.experiment",
        ),
        (lambda run: fj.train(3, "x"), "config = 3; accepted: a file's name, a dict"),
        (lambda run: fj.train(CONFIG, "x", position={"theta": 5.0}), "a dict with 'method'"),
        (lambda run: fj.train(CONFIG, "x", tracker="a:b"), "tracker = 'a:b'; accepted: a callable"),
        (lambda run: fj.evaluate([]), "no runs; name one or more runs or their directories"),
        (lambda run: fj.evaluate([run, 3]), "run = 3; accepted: a path or name"),
        (
            lambda run: fj.evaluate(run, run),
            r"protocols holds Run\(.*; accepted: texts such as 'sam",
        ),
        (lambda run: fj.evaluate(run, positions=RoPE()), r"positions holds RoPE\(.*; accepted: t"),
        (
            lambda run: fj.evaluate(run, train_steps=3),
            "no field 'train_steps'; accepted: a field o",
        ),
        (
            lambda run: fj.extend(run, "yarn", 64, "x", factor=2),
            "'factor' .*, and position_KNOB fo",
        ),
        (lambda run: fj.extend(None, "yarn", 64, "x"), "run = None; accepted: a path or name"),
        (lambda run: fj.report([run, None], "x"), "run = None; accepted: a path or name"),
        (lambda run: fj.spectrum(3), "run = 3; accepted: a path or name"),
    ],
)
def test_mistakes_are_named(run, attempt, told):
    with pytest.raises(ValueError, match=told):
        attempt(run)


def test_an_option_in_a_message_is_given_as_an_argument(run, tmp_path):
    with pytest.raises(ValueError, match="--allow-shorter") as raised:
        fj.extend(run, method="yarn", length=1, workdir=tmp_path)
    assert raised.value.__notes__ == ["--an-option is an_option=... in Python"]
    with pytest.raises(ValueError, match="--as yarn: it needs a factor") as raised:
        fj.evaluate(run, positions="yarn")
    assert raised.value.__notes__ == ["--as METHOD is positions=[METHOD] in Python"]
    with pytest.raises(FileNotFoundError, match="make one with `fope train --config") as raised:
        fj.evaluate(tmp_path / "nowhere")
    assert not hasattr(raised.value, "__notes__")


def test_a_step_that_does_not_exist_is_said_before_it_is_read(run):
    assert fj.load(run.workdir / "2").step == 2
    with pytest.raises(CheckpointError, match="there are: 2, 3"):
        fj.load(run.workdir, step=7)
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        fj.load(run.workdir / "nowhere")


# ---------------------------------------------------------------------------- configurations


def experiment_of(config, position=None, **values):
    return build_experiment(config_of(config, position, overrides_of(None, values)))


def test_a_configuration_in_any_form_is_the_same(tmp_path):
    experiment = build_experiment(CONFIG)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(experiment_to_dict(experiment)))
    shared = ConfigDict(CONFIG)
    for config in (CONFIG, shared, experiment, path, str(path)):
        assert experiment_of(config) == experiment
        changed = experiment_of(config, train_steps=9, data_tasks=["recall=0.5", "copy=0.5"])
        assert changed.train.steps == 9 and len(changed.data.tasks) == 2
    assert shared.to_dict() == ConfigDict(CONFIG).to_dict()  # the caller's is not changed


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"train_gradient_clip": None}, lambda e: e.train.gradient_clip is None),
        ({"model_scan_layers": False}, lambda e: e.model.scan_layers is False),
        ({"evaluate_passkey_depths": (0.5,)}, lambda e: e.evaluate.passkey_depths == (0.5,)),
        ({"evaluate_lengths": range(1, 4)}, lambda e: e.evaluate.lengths == (1, 2, 3)),
        ({"evaluate_lengths": 2 ** np.arange(3)}, lambda e: e.evaluate.lengths == (1, 2, 4)),
        ({"evaluate_texts": ()}, lambda e: e.evaluate.texts == ()),
        ({"train_learning_rate": np.float32(0.5)}, lambda e: e.train.learning_rate == 0.5),
        ({"name": "other"}, lambda e: e.name == "other"),
        ({"position_theta": 5.0}, lambda e: e.position == RoPE(theta=5.0)),
        (
            {"position_scaling": [{"scaling": "yarn", "factor": 2.0, "original_length": 32}]},
            lambda e: e.position.scaling == (YaRN(2.0, 32),),
        ),
    ],
)
def test_values_keep_their_types(values, found):
    assert found(experiment_of(CONFIG, **values))


def test_another_position_embedding_renames_a_run_that_was_named_after_its_method():
    assert experiment_of(CONFIG, "nope").name == "nope"
    given = experiment_of(CONFIG, RoPE(theta=7.0), position_interleaved=True)
    assert given.position == RoPE(theta=7.0, interleaved=True)
    knobs = {"method": "fope", "sigma": 0.1}
    assert experiment_of(CONFIG, knobs, name="mine").name == "mine"
    assert experiment_of(CONFIG | {"name": "baseline"}, knobs).name == "baseline"
    with pytest.raises(ConfigError, match="values without a comma"):
        experiment_of(CONFIG, evaluate_texts=["a=b,c.txt"])


# ---------------------------------------------------------------------------- training


def test_ctrl_c_leaves_a_run_that_goes_on_in_a_thread(run, tmp_path, monkeypatch, as_in_a_terminal):
    workdir, check = tmp_path / "stopped", loop.check_tokens

    def interrupt(batch, step, vocab_size):
        check(batch, step, vocab_size)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 1"):
        patch.setattr(loop, "check_tokens", interrupt)
        fj.train(CONFIG, workdir)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finished = []
    thread = threading.Thread(target=lambda: finished.append(fj.train(CONFIG, workdir)))
    thread.start()
    thread.join()
    jax.tree.map(
        np.testing.assert_array_equal, *(split(one.model)[1] for one in (finished[0], run))
    )


def test_a_missing_token_cache_is_built(monkeypatch):
    calls = []

    def run():
        calls.append("run")
        if "build" not in calls:
            raise MissingCacheError("there is no token cache")

    monkeypatch.setattr(api, "build", lambda data: calls.append("build"))
    api._with_token_cache(run, lambda: build_experiment(CONFIG))
    assert calls == ["run", "build", "run"]


def test_a_missing_cache_is_built_where_the_call_says_that_it_was_moved(run, monkeypatch):
    built = []

    def evaluate(*_, **__):
        if not built:
            raise MissingCacheError("there is no token cache")
        return []

    monkeypatch.setattr(api.evaluation, "evaluate", evaluate)
    monkeypatch.setattr(api, "build", lambda data: built.append(data.cache_dir))
    fj.evaluate(run, data_cache_dir="moved")
    assert built == ["moved"]


@pytest.mark.slow  # trains twice
def test_an_extension_without_text_is_compared_on_tasks_that_were_not_trained(run, tmp_path):
    assert 2 * run.experiment.train.steps < UNSEEN_STEP
    longer = fj.extend(run, "same", 32, tmp_path / "same", train_steps=1)
    lineage = json.loads((longer.workdir / "lineage.json").read_text())
    assert lineage["start"]["ratio"] == 1.0 and lineage["start"]["tokens"] == 4 * 64


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize("named", [True, False], ids=["model_type", "architectures alone"])
def test_what_a_hugging_face_directory_lacks_is_said_in_terms_of_the_call(tmp_path, named):
    keys = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    keys |= {"num_attention_heads": 1, "max_position_embeddings": 8, "architectures": ["X"]}
    (tmp_path / "config.json").write_text(
        json.dumps(keys | ({"model_type": "llama"} if named else {}))
    )
    if not named:
        with pytest.raises(ValueError, match="model_type=None: expected one of llama"):
            fj.load(tmp_path)
        return
    with pytest.raises(ConfigError, match="has no tokenizer.json") as raised:
        fj.load(tmp_path)
    assert "is SECTION_KEY=VALUE in Python" in raised.value.__notes__[0]


@pytest.mark.slow
def test_a_hugging_face_directory_is_a_run_too(run, tmp_path, capfd):
    directory, tokens = tmp_path / "weights", [3, 1, 4, 1, 5]
    export_run(run.workdir, directory)
    for name in (directory, f"hf:{directory}"):
        held = fj.load(name, data_tokenizer="bytes")
        np.testing.assert_allclose(held.logits(tokens), run.logits(tokens), rtol=1e-4, atol=1e-5)
        assert held.workdir is None and "in memory" in repr(held)
    with pytest.raises(ValueError, match=r"load\(SOURCE, workdir=DIR\) makes a run of them"):
        fj.evaluate(held)
    with pytest.raises(ValueError, match="without steps"):
        fj.load(directory, step=3)
    values = {"workdir": tmp_path / "run", "data_tokenizer": "bytes", "train_length": 16}
    for _ in range(2):  # the second call opens it
        imported = fj.load(directory, **values)
        np.testing.assert_array_equal(imported.logits(tokens), held.logits(tokens))
        assert (imported.workdir, imported.step, imported.length) == (tmp_path / "run", 0, 16)
    with pytest.raises(ConfigError, match="holds weights imported from"):
        fj.load(directory, **values | {"train_length": 8})
    assert capfd.readouterr().out == ""


# ---------------------------------------------------------------------------- fope generate


@pytest.mark.slow
def test_the_command_writes_what_the_function_does(run, capsys):
    assert main(["generate", str(run.workdir), "It was", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"It was{run.generate('It was', 8)}\n"
    command = ["generate", f"{run.workdir}/2", "5,200 17", "--tokens", "--max-new-tokens", "4"]
    assert main([*command, "--temperature", "1", "--seed", "2"]) == 0
    ids = fj.load(run.workdir / "2").generate([5, 200, 17], 4, temperature=1.0, seed=2)
    assert capsys.readouterr().out == f"{' '.join(map(str, ids))}\n"
    assert main(["generate", str(run.workdir), "5,x", "--tokens"]) == 2
    assert "'x' is no token id" in capsys.readouterr().err
