"""What all tests share: how programs are compiled, and where they are kept.

Most of the suite's time would be compilation. XLA's optimizations and fusions are off, and its code
is neither split for several threads nor made for wide vectors, which changes no promise that a test
states. Every program is kept in `.pytest_cache/programs`: for the other workers, for the modules
that come later, and for the next run. `make clean` removes it.
"""

import gc
import os
import shutil
import signal
from importlib import metadata
from pathlib import Path

PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
LARGEST_CACHE = 4e9  # bytes
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
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402
import pytest  # noqa: E402

from fope_jax.processes.signals import SIGNALS  # noqa: E402


def pytest_configure(config):
    gc.freeze()  # what is imported so far stays; traced programs leave few cycles
    gc.set_threshold(200_000, 20, 100)
    if not hasattr(config, "workerinput") and PROGRAMS.exists():  # before workers start
        size = sum(path.stat().st_size for path in PROGRAMS.iterdir())
        if size > LARGEST_CACHE:
            shutil.rmtree(PROGRAMS)


pytest_plugins = ("tests.train.fixtures",)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Each compiled program holds memory maps (some 25 on a CPU), and Linux gives a process 65,530:
    a worker that keeps those of the whole suite is killed in the middle of a compilation."""
    yield
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
