"""What all tests share: how programs are compiled, and where they are kept.

Most of the suite's time would be compilation. XLA's optimizations and fusions are off, and its code
is neither split for several threads nor made for wide vectors, which changes no promise that a test
states. What took long to compile is kept in `.pytest_cache/programs`: for the other workers, for
programs that tests start, and for the next run. `make clean` removes it.
"""

import gc
import os
import shutil
import signal
from importlib import metadata
from pathlib import Path

PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
LARGEST_CACHE = 4e9  # bytes
# They wait for processes of their own, or have the most to compile: no worker shall begin with one
# when the others are done.
LONGEST = ("mesh_test.py", "processes_test.py", "faults_test.py", "buckets_test.py")
MOST_MAPS = 20_000
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_prefer_vector_width=128"
)
if metadata.version("jaxlib").startswith("0.10."):  # others end the process: it is unknown to them
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": FLAGS,
    "JAX_COMPILATION_CACHE_DIR": str(PROGRAMS),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",  # a program names no lines: a tenth of its lowering
}.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402
import pytest  # noqa: E402

from fope_jax.processes.signals import SIGNALS  # noqa: E402


def share_mlir_context():
    """All programs are lowered in one MLIR context: to make one takes longer than most programs."""
    from jax._src.interpreters import mlir

    context = mlir.make_ir_context()
    mlir.make_ir_context = lambda: context


def pytest_configure(config):
    share_mlir_context()
    gc.freeze()  # what is imported so far stays; traced programs leave few cycles
    gc.set_threshold(200_000, 20, 100)
    if not hasattr(config, "workerinput") and PROGRAMS.exists():  # before workers start
        size = sum(path.stat().st_size for path in PROGRAMS.iterdir())
        if size > LARGEST_CACHE:
            shutil.rmtree(PROGRAMS)


def pytest_collection_modifyitems(config, items):
    """``@pytest.mark.fast(ID, ...)``: all other parameters of that test are slow."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    unseen = {}
    for item in items:
        if (mark := item.get_closest_marker("fast")) is not None:
            test = item.nodeid.partition("[")[0]
            unseen.setdefault(test, set(mark.args)).discard(item.callspec.id)
            if item.callspec.id not in mark.args:
                item.add_marker(pytest.mark.slow)
    unknown = [f"{test}: no parameter is called {ids}" for test, ids in unseen.items() if ids]
    if unknown and not any("::" in argument for argument in config.args):
        raise pytest.UsageError("\n".join(unknown))


pytest_plugins = ("tests.train.fixtures",)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Each compiled program holds memory maps (some 25 on a CPU), and Linux gives a process 65,530:
    a worker that keeps those of the whole suite is killed in the middle of a compilation."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def as_in_a_terminal():
    """Where the tests themselves run in the background or under nohup, SIGINT or SIGHUP is
    ignored, and would be in what they test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
