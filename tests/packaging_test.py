"""What `pip wheel .` makes works where there is no checkout; the other files of packaging parse."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def pinned():
    """Names of the packages in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.partition("==")[0].lower().replace("_", "-") for line in lines}


@pytest.mark.parametrize("extra", ["train", "data", "buckets", "docs", "dev"])
def test_what_an_extra_brings_is_pinned(extra):
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = requirement.partition(">")[0].partition("=")[0].partition("[")[0]
        assert name == "fope-jax" or name.lower().replace("_", "-") in pinned(), requirement


def test_the_workflows_call_the_makefile():
    """The same commands here and there: each `make` target that a workflow names exists."""
    makefile, called = (ROOT / "Makefile").read_text(), set()
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            called |= {
                word
                for line in commands.splitlines()
                for word in line.split()[1:2]
                if line.startswith("make ")
            }
    assert {"lint", "test", "docs"} <= called
    for target in called:
        assert f"\n{target}:" in makefile


def test_the_citation_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["doi"] == "10.48550/arXiv.2412.17739"


@pytest.mark.slow
def test_a_wheel_works_without_the_repository(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = tmp_path / "source"
    for name in ("fope_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    for name in (
        "py.typed",
        "report/page.html",
        "configs/quickstart.py",
        "configs/paper/c4_books.py",
    ):
        assert (installed / "fope_jax" / name).is_file(), name

    def run(code):
        first = f"import sys; sys.path.insert(0, {str(installed)!r})\n"  # before an editable one
        command = [sys.executable, "-c", first + code]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert str(installed) in run("import fope_jax; print(fope_jax.__file__)").stdout
    methods = run("from fope_jax.main import main; main(['methods'])")
    assert methods.stdout.startswith("Methods")
    loaded = run(
        "import json; from fope_jax.config import load_config\n"
        "print(json.dumps(load_config('quickstart:position=rope', ['train.steps=3']).to_dict()))"
    )
    config = json.loads(loaded.stdout)
    assert (config["position"], config["train"]["steps"]) == ({"method": "rope"}, 3)
