"""Every verb with the wrong thing in every place: one line that names it, and nothing left behind.

In a directory of its own, from whose names the tables choose.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from fope_jax.interop.weights import export_weights
from fope_jax.main import main
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import RoPE
from tests.main_test import CONFIG, WORDS

SMALL = ("--config.train.steps=2", "--config.train.warmup_steps=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with one of everything that a command line can name."""
    root = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name, count in (("train", 400), ("validation", 100)):
        (root / f"{name}.txt").write_text(" ".join(rng.choice(WORDS, count)))
    config = root / "config.py"
    config.write_text(CONFIG.format(root))
    assert main(["data", "build", "--config", str(config)]) == 0
    train = ["train", "--config", f"{config}:rope", "--workdir", str(root / "run")]
    assert main([*train, *SMALL]) == 0
    model = Transformer(
        TransformerConfig(vocab_size=300, d_model=16, num_layers=1, num_heads=2, mlp_dim=32),
        RoPE(theta=100.0),
        rngs=nnx.Rngs(0),
    )
    _, params, constants = split(model)
    export_weights(root / "hf", model.config, model.position, params, constants, length=16)
    (root / "file.txt").write_text("hello\n")
    (root / "empty.txt").write_text("")
    (root / "bytes.bin").write_bytes(bytes(range(128, 256)))
    (root / "rows.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (root / "emptydir").mkdir()
    (root / "loop").symlink_to("loop")
    for name, content in {
        "cut": b'{"name": "x", ',
        "list": b"[1]",
        "object": b"{}",
        "utf16": b"\xff\xfe{",
    }.items():
        (root / name).mkdir()
        (root / name / "config.json").write_bytes(content)
    for name, text in {
        "raises": "def get_config(arg):\n    return 1 / 0\nget_sweep = get_config\n",
        "syntax": "def (:\n",
        "nothing": "x = 1\n",
        "exits": "raise SystemExit(0)\n",
        "imports": "import nowhere_at_all\n",
        "no_arg": "def get_config(): pass\n",
        "wrong": "def get_config(arg): return 7\ndef get_sweep(arg): return [7]\n",
    }.items():
        (root / f"{name}.py").write_text(text)
    return root


@pytest.fixture
def refused(place, monkeypatch, capfd, tmp_path):
    """Runs a command line that must be refused; returns what it says."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path / "~"))  # which is what ~ stands for
    before = sorted(place.rglob("*"))

    def run(line: list[str]) -> str:
        capfd.readouterr()
        began = time.monotonic()
        try:
            code = main(line)
        except SystemExit as stopped:
            code = stopped.code
        shown = capfd.readouterr()
        assert code in (1, 2), shown
        assert "Traceback" not in shown.err + shown.out
        said = [text for text in shown.err.splitlines() if not text.startswith("usage:")]
        assert said or code == 1
        assert time.monotonic() - began < 20
        after = sorted(place.rglob("*"))
        assert after == before, "nothing is written before all that can be checked has been"
        return shown.err + shown.out

    return run


CACHE = "cache/text-bytes-*"
MISSING, DIRECTORIES = ["nowhere", "file.txt/x", "loop/x", "~"], ["emptydir", ".", "/", CACHE, "hf"]
FILES = ["file.txt", "empty.txt", "bytes.bin", "rows.jsonl", "/dev/null", "loop"]
STRANGE = ["", " ", "a" * 300, os.fsdecode(b"na\xffme")]
SCHEMES = ["s3://bucket/x", "gs://", "http://host/x", "hf:nowhere"]
DAMAGED = ["cut", "list", "object", "utf16"]
PROGRAMS = [f"{name}.py" for name in ("raises", "syntax", "nothing", "exits", "imports", "no_arg")]
PARTS = ["run/checkpoints", "run/checkpoints/2", "run/2", "run/99", "run/config.json", "run/-1"]
STEP = ["run/2", "run/checkpoints/2"]
ANY = [*MISSING, *FILES, *STRANGE]

CONFIGS = [
    *ANY,
    *DIRECTORIES,
    *SCHEMES,
    *PROGRAMS,
    "wrong.py",
    "run",
    "run/checkpoints",
    "hf/config.json",
    "rows.jsonl",
    *(f"{name}/config.json" for name in DAMAGED),
]
RUNS = [*ANY, *DIRECTORIES, *SCHEMES, *DAMAGED, *PARTS, "raises.py", "config.py"]
OUTPUTS = ["file.txt", "file.txt/x", "loop/x", "/dev/null", "/proc/x", "", "a" * 300]
# What stands in the place "@": whatever of these is right there is left out.
PLACES = {
    "data build --config @": (CONFIGS, ()),
    "data inspect --config @": (CONFIGS, ()),
    "train --config @ --workdir new": (CONFIGS, ()),
    "train --continue-for 5 --workdir @": (RUNS, ()),
    "config --config @": (CONFIGS, ()),
    "plan --config @ --topology v5e:2x2": (CONFIGS, ()),
    "extend --from run --method same --length 32 --workdir new --config @": (
        # It says "not stated" in a shell: without --config the values follow from the parent.
        CONFIGS,
        [""],
    ),
    "extend --from @ --method same --length 32 --workdir new": (RUNS, STEP),
    "evaluate --run @": (RUNS, STEP),
    "spectrum @ -o new": (RUNS, STEP),
    "export --run @ -o new": (RUNS, STEP),
    "report @ -o new": ([name for name in RUNS if name not in ("hf",)], ()),
    "doctor @": (RUNS, STEP),
    "import --from @ --workdir new --config.data.tokenizer=bytes": (
        [*ANY, *DIRECTORIES, *SCHEMES, *DAMAGED, *PARTS, "run"],
        ["hf"],
    ),
    "sweep @ --workdir new": ([*CONFIGS, "run/config.json"], ()),
    "train --config config.py --workdir @": (
        [*OUTPUTS, "hf", CACHE, "run/2", "run/checkpoints/9", *DAMAGED, *SCHEMES[:3], STRANGE[3]],
        (),
    ),
    "extend --from run --method same --length 32 --workdir @": (
        [*OUTPUTS, "hf", CACHE, "run", "run/2", "run/checkpoints/9", *DAMAGED, STRANGE[3]],
        (),
    ),
    "import --from hf --config.data.tokenizer=bytes --workdir @": (
        [*OUTPUTS, "hf", CACHE, "run", "run/2", *DAMAGED, STRANGE[3]],
        (),
    ),
    "export --run run -o @": ([*OUTPUTS, "run", "hf", "cut", *SCHEMES[:3]], ()),
    "evaluate --run run --report @": ([*OUTPUTS, *SCHEMES[:3]], ()),
    "report run -o @": ([*OUTPUTS, *SCHEMES[:3]], ()),
    "spectrum run -o @": ([*OUTPUTS, *SCHEMES[:3]], ()),
    "spectrum --demo -o @": ([*OUTPUTS, *SCHEMES[:3]], ()),
    "plan --config config.py --topology v5e:2x2 -o @": ([*OUTPUTS, *SCHEMES[:3]], ()),
    "gallery --methods nope -o @": ([*OUTPUTS, *SCHEMES[:3]], ()),
    "methods --write @": ([*ANY, *DIRECTORIES, *SCHEMES], ()),
}


# Each line is tried with every sixth value, beginning elsewhere; the others are slow.
EVERY_SIXTH = pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=pytest.mark.slow) for start in range(1, 6))]
)


def share(table, line, start):
    """The values ``start``, ``start + 6``, ... of the line, counted on from line to line."""
    names = table[line][0] if isinstance(table[line], tuple) else table[line]
    return names[(start + list(table).index(line)) % 6 :: 6] if len(names) > 5 else names[start::6]


@EVERY_SIXTH
@pytest.mark.parametrize("line", PLACES)
def test_the_wrong_thing_in_a_place(line, start, refused, place):
    for name in share(PLACES, line, start):
        if name in PLACES[line][1]:
            continue
        if name == CACHE:
            name = str(next(place.glob(f"{CACHE}/manifest.json")).parent)
        said = refused([name if word == "@" else word for word in line.split()])
        shown = name.encode("utf-8", "backslashreplace").decode()
        # As pathlib or repr writes it; of FILE:ARG and hf:DIR the part that is a path.
        forms = [shown, *shown.split(":", 1)]
        assert any(Path(form).name[:200] in said for form in forms if form.strip()) or (
            repr(name) in said
        ), (name, said)


WORDS_OF_NUMBERS = ["x", "", "-1", "0", "nan", "inf", "1.5", "1,5", "9" * 30]
FRACTIONS = ["x", "", "-1", "nan", "inf"]
VALUES = {
    "extend --from run --method same --workdir new --length": WORDS_OF_NUMBERS,
    "extend --from run --length 32 --workdir new --method": ["x", "", "same,same", "ntk:2", "roap"],
    "extend --from run --method same --length 32 --workdir new --optimizer": ["x", ""],
    "extend --from run --method same --length 32 --workdir new --warn-above": [
        "x",
        "",
        "1,5",
        "nan",
        "-1",
        "0",
    ],
    "extend --from run --method same --length 32 --workdir new --config.train.batch_size": (
        WORDS_OF_NUMBERS
    ),
    "evaluate --run run --step": WORDS_OF_NUMBERS,
    "evaluate --run run --protocols": ["x", "", "chunks,x", "all,x"],
    "evaluate --run run --mesh": ["x", "x=2", "data=0", "data=x", "data=7", "data=" + "9" * 30],
    "evaluate --run run --config.evaluate.lengths": ["x", "0", "-1", "nan", "1.3"],
    "evaluate --run run --config.train.steps": ["5"],
    "spectrum run -o new --step": ["x", "", "nan", "1.5", "1", "7"],
    "spectrum run -o new --lengths": ["x", "", "-1", "0", "nan", "1.5", "1,,2"],
    "spectrum run -o new --windows": ["x", "", "nan", "1.5", "0", "-1"],
    "sweep experiments.py --workdir new --jobs": ["x", "", "1.5"],
    "export --run run -o new --step": WORDS_OF_NUMBERS,
    "export --run run -o new --dtype": ["x", "", "int8"],
    "report run -o new --styles": ["nowhere.txt", "."],
    "report run -o new --buckets": ["x", "0", "-1", "4q", "4k,2k", "nan"],
    "plan --config config.py --topology": [
        "x",
        "",
        "v5e",
        "v5e:",
        "v5e:0x0",
        "v5e:-1x2",
        "v5e:2x",
        "v99:2x2",
        ":",
        "v5e:2x2x2",
    ],
    "plan --config config.py --topology v5e:2x2 --method": ["x", "roap"],
    "plan --config config.py --topology v5e:2x2 --length": ["x", "0", "-1", "nan", "1.5"],
    "plan --config config.py --topology v5e:2x2 --size": ["x", "7t"],
    "plan --config config.py --topology v5e:2x2 --mesh": ["x", "data=0", "x=1"],
    "plan --config config.py --topology v5e:2x2 --jobs": ["x", "", "0", "-1", "1.5"],
    "train --workdir run --continue-for": [word for word in WORDS_OF_NUMBERS if word != "9" * 30],
    "train --config config.py --workdir new --config.train.evaluate_every": ["x", "0", "-1", "nan"],
    "train --config config.py --workdir new --config.train.tracker": ["x", "nowhere:x", ":", ""],
    "config --keys": ["x", "position.x", "train.stpes"],
    "train --config config.py --workdir new --distributed-timeout": ["x", "", "0", "-1", "nan"],
    "train --config config.py --workdir new --num-processes": WORDS_OF_NUMBERS,
    "train --config config.py --workdir new --process-id": WORDS_OF_NUMBERS,
    "train --config config.py --workdir new --coordinator": ["x", "host:99999", "host:x", ":"],
    "gallery -o new --methods": ["x", "roap", ""],
    **{
        f"train --config config.py --workdir new --config.train.{name}": WORDS_OF_NUMBERS[:5]
        for name in ("steps", "batch_size", "length", "accumulate", "log_every", "keep")
    },
    **{
        f"train --config config.py --workdir new --config.train.{name}": FRACTIONS
        for name in ("learning_rate", "eps", "weight_decay", "b1", "final_learning_rate_fraction")
    },
    "train --config config.py --workdir new --config.train.batch_size": ["9" * 30],
    "train --config config.py --workdir new --config.train.steps": ["9" * 30],
    "train --config config.py --workdir new --config.seed": ["x", "", "1.5", "nan"],
    "train --config config.py --workdir new --config.position.theta": ["x", "", "-1", "nan"],
    "train --config config.py --workdir new --config.model.d_model": ["x", "0", "-1", "1.5", "7"],
    "train --config config.py --workdir new --config.mesh.data": ["x", "0", "7", "9" * 30],
    "train --config config.py --workdir new --config.data.corpus": ["x", ""],
    "train --config config.py --workdir new --config.nosuch": ["1"],
    "data build --config config.py --config.data.cache_dir=new --config.data.train_files": [
        "nowhere",
        "emptydir",
    ],
    "data build --config config.py --config.data.cache_dir=new --config.data.tokenizer": [
        "nowhere.json",
        "file.json",
        "",
    ],
    "train --config config.py --workdir new --config.train": ["1"],
}


@EVERY_SIXTH
@pytest.mark.parametrize("line", VALUES)
def test_a_value_that_cannot_be(line, start, refused):
    *words, option = line.split()
    for value in share(VALUES, line, start):
        # With "=": a value that begins with a dash would be taken for an option.
        said = refused([*words, f"{option}={value}"])
        assert (
            option.removeprefix("--config.").lstrip("-").rpartition(".")[2].split("-")[0]
            in (said.replace("_", "-").replace("-", "_") + said)
            or value in said
            or any(repr(part) in said for part in value.split(","))
        ), (value, said)


def test_a_step_beyond_the_end_names_the_steps(refused):
    line = ["--method", "same", "--length", "32", "--workdir", "new"]
    for step in (1, 99):
        assert "there are: 2" in refused(["extend", "--from", f"run/{step}", *line])


def test_a_file_of_the_user_that_fails_is_told_with_its_line(refused):
    said = refused(["train", "--config", "raises.py", "--workdir", "new"])
    assert "configuration file 'raises.py': line 2: ZeroDivisionError: division by zero" in said
    said = refused(["sweep", "exits.py", "--workdir", "new"])
    assert "sweep file 'exits.py': line 1: SystemExit: 0" in said
    assert "the sweep has 7; accepted: Train and Extend" in refused(
        ["sweep", "wrong.py", "--workdir", "new"]
    )


def test_a_run_of_another_kind_is_told_for_what_it_is(refused, place):
    cache = str(next(place.glob(f"{CACHE}/manifest.json")).parent)
    for name, what in {
        "hf": "is no run but a checkpoint of Hugging Face; `fope import hf --workdir RUN`",
        cache: "it is a token cache",
        "run/99": "checkpoint",
        "run/checkpoints": "it is inside run; name that directory if it is the run",
        "rows.jsonl": "it is a file; name the directory of the run",
        "nowhere": "there is no such directory",
        "object": "object/config.json: config.name is missing",
    }.items():
        assert what in refused(["evaluate", "--run", name])
    what = "run/config.json: this is a run of fope_jax, no checkpoint of Hugging Face"
    assert what in refused(["import", "--from", "run", "--workdir", "new"])
    line = ["--method", "same", "--length", "32", "--workdir", "new"]
    assert what in refused(["extend", "--from", "hf:run", *line])


# ---------------------------------------------------------------------------- buckets


@pytest.fixture
def no_service(monkeypatch):
    """A bucket's service at a port where nobody answers."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
    import fsspec

    fsspec.config.conf["gcs"] = {"token": "anon", "use_listings_cache": False}
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    yield
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(
            "data inspect --config config.py --config.data.cache_dir=gs://bucket/cache",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "data build --config config.py --config.data.cache_dir=gs://bucket/cache",
            marks=pytest.mark.slow,
        ),
        "data build --config config.py --config.data.train_files=gs://bucket/*.txt "
        "--config.data.cache_dir=other",
        "train --config config.py --workdir gs://bucket/run",
        "evaluate --run gs://bucket/run",
        pytest.param("doctor gs://bucket/run", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("no_service")
def test_a_bucket_out_of_reach_is_one_line_within_seconds(line, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    began = time.monotonic()
    assert main(line.split()) == 2
    assert time.monotonic() - began < 15
    said = capfd.readouterr().err
    assert "Traceback" not in said and "gs://bucket" in said
    assert "no connection to 127.0.0.1:9" in said
