"""The house rules that a reader relies on: who may import whom, and what stays light."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fope_jax"
ROOT = PACKAGE.parent

# One direction only: a room may import what stands on a later line, and itself.
DIRECTIONS = (
    {"main"},
    {"command_line"},
    {"api"},
    {"sweep"},
    {"extend"},
    {"interop", "tpu"},
    {"spectrum", "train", "doctor", "run"},
    {"evaluate"},
    {"gallery", "config"},
    {"model", "report", "data"},
    {"position", "storage"},
    {"processes", "testing"},
    {"typing", "extras", "spelling", "logs"},
)
LEVEL = {room: level for level, rooms in enumerate(DIRECTIONS) for room in rooms}
JAX_ALONE = {"position": "*.py", "model": "losses.py"}


@functools.cache
def imports(path):
    """Dotted names of everything the file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_a_level():
    assert {room(path) for path in SOURCES} == set(LEVEL)


def test_imports_go_one_way():
    for path in SOURCES:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("fope_jax.")}
        own = room(path)
        wrong = {name for name in ours - {own} if LEVEL[name] <= LEVEL[own]}
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("folder", JAX_ALONE)
def test_position_and_losses_need_jax_alone(folder):
    for path in (PACKAGE / folder).glob(JAX_ALONE[folder]):
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert foreign <= {"jax", "numpy", "fope_jax"}, path


def test_tensorflow_is_imported_in_one_module():
    users = {
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if {name.split(".")[0] for name in imports(path)}
        & {"tensorflow", "tensorflow_datasets", "seqio"}
    }
    assert users <= {"data/tf_libraries.py"}


@pytest.mark.parametrize("folder", ["report", "data"])
def test_no_jax(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        assert "jax" not in {name.split(".")[0] for name in imports(path)}, path


def test_a_missing_extra_names_the_pip_line():
    """Where flax, optax and the rest are absent, each verb says what to install."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'flax', 'optax', 'orbax', 'ml_collections', 'grain',\n"
        "                                  'seqio', 'tensorflow', 'matplotlib', 'tqdm'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import fope_jax.position\n"
        "from fope_jax.main import main\n"
        "sys.exit(main(['train', '--config', 'configs/quickstart.py', '--workdir', 'x']))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode != 0
    assert "pip install '.[train]'" in run.stderr
    assert "Traceback" not in run.stderr
