import dataclasses
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from fope_jax.config import build_experiment, load_config
from fope_jax.train.compiler_options import TPU_SHARDED_WEIGHTS, compile_step, step_compiler_options


@pytest.fixture(scope="module")
def experiment():
    return build_experiment(load_config("configs/paper/c4_books.py", []))


def make_plan(experiment, given, *, platform="tpu", fsdp=16):
    """What the functions here read of a StatePlan."""
    train = dataclasses.replace(experiment.train, compiler_options=given)
    device = SimpleNamespace(platform=platform)
    mesh = SimpleNamespace(devices=SimpleNamespace(flat=[device]), shape={"fsdp": fsdp})
    return SimpleNamespace(experiment=dataclasses.replace(experiment, train=train), mesh=mesh)


@pytest.mark.parametrize(
    ("given", "where", "expected"),
    [
        (None, {}, TPU_SHARDED_WEIGHTS),
        (None, {"fsdp": 1}, ()),
        (None, {"platform": "gpu"}, ()),
        ((), {}, ()),
        (("xla_a=1",), {}, ("xla_a=1",)),
        (("xla_a=1",), {"platform": "cpu", "fsdp": 1}, ("xla_a=1",)),
    ],
)
def test_the_configuration_comes_before_the_tuned_options(experiment, given, where, expected):
    assert step_compiler_options(make_plan(experiment, given, **where)) == expected


def test_an_option_of_the_environment_is_left_to_it(experiment, monkeypatch):
    first, second = TPU_SHARDED_WEIGHTS
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{first.replace('false', 'true')} --xla_other=1")
    assert step_compiler_options(make_plan(experiment, None)) == (second,)


def traced():
    return jax.jit(lambda x: jnp.sin(x) @ x).trace(jnp.eye(4))


def test_a_step_is_compiled_with_its_options(experiment):
    plan = make_plan(experiment, ("xla_cpu_enable_fast_math=true",), platform="cpu")
    compiled, used = compile_step(plan, traced())
    assert used == ("xla_cpu_enable_fast_math=true",)
    assert compiled(jnp.eye(4))[0, 0] == pytest.approx(0.8415, abs=1e-4)


@pytest.mark.parametrize("option", ["xla_no_such_option=1", "xla_cpu_enable_fast_math=perhaps"])
def test_an_option_that_the_compiler_refuses_is_named(experiment, option):
    with pytest.raises(ValueError, match=f"train.compiler_options = .*{option}"):
        compile_step(make_plan(experiment, (option,), platform="cpu"), traced())


def test_a_compiler_without_the_tuned_options_goes_without(experiment, caplog):
    """On CPU no option of a TPU is known."""
    with caplog.at_level(logging.WARNING):
        compiled, used = compile_step(make_plan(experiment, None), traced())
    assert used == () and compiled(jnp.eye(4)).shape == (4, 4)
    assert TPU_SHARDED_WEIGHTS[0] in caplog.text


@pytest.mark.parametrize(
    "option", ["fast_math=true", "xla_a", "xla_a=", "xla_a=1 xla_b=2", "--xla_a=1"]
)
def test_a_malformed_option_is_refused_with_the_configuration(experiment, option):
    with pytest.raises(ValueError, match="compiler_options = .*begins with xla_"):
        dataclasses.replace(experiment.train, compiler_options=(option,))
