"""Compiled programs are kept on this machine unless the environment says otherwise."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fope_jax.storage import program_cache

# Prints which programs JAX found in its cache, and which it had to compile.
PROGRAM = """
from fope_jax.storage.program_cache import keep_programs
keep_programs()
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: x * 2.5 + 1.25)(3.0).block_until_ready()
kinds = ("cache_hits", "cache_misses")
print({kind: sum(name.endswith("compilation_cache/" + kind) for name in events) for kind in kinds})
"""


def variables(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return kept | {"JAX_PLATFORMS": "cpu"} | environment


def run(**environment):
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(
        command, env=variables(**environment), capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_second_process_compiles_nothing(tmp_path):
    cache = {"FOPE_CACHE": str(tmp_path)}
    assert run(**cache) == "{'cache_hits': 0, 'cache_misses': 1}"
    assert run(**cache) == "{'cache_hits': 1, 'cache_misses': 0}"
    (machine,) = (tmp_path / "programs").iterdir()
    assert list(machine.glob("*-cache"))


@pytest.fixture
def before_jax(monkeypatch, tmp_path):
    """As in a process that has not imported JAX."""
    monkeypatch.setattr(
        program_cache, "sys", types.SimpleNamespace(modules={}, platform=sys.platform)
    )
    monkeypatch.setattr(os, "environ", variables(FOPE_CACHE=str(tmp_path / "cache")))
    return os.environ


def test_what_is_set_stays(before_jax, tmp_path):
    before_jax |= {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    program_cache.keep_programs()
    assert before_jax["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in before_jax
    del before_jax["JAX_COMPILATION_CACHE_DIR"]
    before_jax |= {"JAX_COMPILATION_CACHE_MAX_SIZE": "7"}
    program_cache.keep_programs()
    assert Path(before_jax["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path / "cache" / "programs"
    assert before_jax["JAX_COMPILATION_CACHE_MAX_SIZE"] == "7"


def test_nothing_is_kept_where_nothing_can_be_written(before_jax, tmp_path):
    (tmp_path / "cache").write_text("a file")
    program_cache.keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in before_jax
