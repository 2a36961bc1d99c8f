"""The registry of methods, those of others, fingerprints, and the weight of an import."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from fope_jax.position import (
    METHODS,
    ALiBi,
    ByLayer,
    ClipFloor,
    FoPE,
    Learned,
    LogitScaling,
    LongRoPE,
    ModelShape,
    NoPE,
    PRoPE,
    Proportional,
    RoPE,
    Sinusoidal,
    T5Bias,
    XPos,
    YaRN,
    alibi_slopes,
    angles,
    clip_floor,
    fingerprint,
    fourier_tables,
    from_spec,
    import_modules,
    make,
    name_of,
    register,
    to_spec,
)
from fope_jax.position.base import PositionEmbedding, has_hook

SHAPE = ModelShape(d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


REQUIRED = {
    "fope": {"training_length": 64},
    "drope": {"training_length": 64},
    "learned": {"table_length": 64},
    "by_layer": {"methods": [{"method": "rope"}, {"method": "nope"}]},
    "by_share": {"methods": [{"method": "rope"}, {"method": "nope"}], "shares": [0.5, 0.5]},
    "logit_scaling": {"inner": {"method": "rope"}, "training_length": 64},
    "sliding_window": {"inner": {"method": "rope"}, "window": 8},
    "local_chunks": {"inner": {"method": "rope"}, "chunk": 8},
    "self_extend": {"inner": {"method": "rope"}, "window": 8, "group": 4},
    "rerope": {"inner": {"method": "rope"}, "window": 8},
}


@dataclasses.dataclass(frozen=True)
class Halved(PositionEmbedding):
    rate: float = 1.0
    half: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self):
        object.__setattr__(self, "half", self.rate / 2)


@pytest.mark.parametrize(
    "method",
    [
        ALiBi(slopes=alibi_slopes(4)[::-1]),
        FoPE(np.int64(64), sigma=np.float32(0.25)),
        RoPE(interleaved=np.bool_(True)),
        Halved(3.0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_specifications_are_json_also_of_numpy_values_and_of_fields_that_follow(method):
    assert from_spec(json.loads(json.dumps(to_spec(method)))) == method


def test_a_knob_is_not_called_as_a_word_of_specifications():
    cls = dataclasses.make_dataclass("Own", [("method", str)], bases=(NoPE,), frozen=True)
    with pytest.raises(TypeError, match="Own has a knob 'method', which is a specification's own"):
        register("own")(cls)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_frozen_documented_and_made_by_name(name):
    method = make(name, **REQUIRED.get(name, {}))
    assert type(method) is METHODS[name] and name_of(method) == name
    assert "Reference:" in type(method).__doc__
    for knob in dataclasses.fields(method):
        assert f"{knob.name}:" in type(method).__doc__, f"{name} does not document {knob.name}"
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.theta = 1.0


def test_presets():
    assert make("fope", preset="official", training_length=64) == FoPE(64)
    text = make("fope", preset="equations", training_length=64, sigma=0.6)
    assert (text.sigma, text.sigma_convention, text.zero_sine) == (0.6, "normal", 0.0)


def test_a_class_of_the_users_own_is_named_after_itself():
    class Mine(PositionEmbedding):
        pass

    assert name_of(Mine()).startswith(f"{__name__}:") and name_of(Mine()).endswith(".Mine")


def print_of(method, seed=0):
    return fingerprint(method, SHAPE, method.init(jax.random.key(seed), SHAPE))


def test_fingerprint_tells_effective_numbers_apart():
    methods = [
        RoPE(),
        RoPE(theta=10_001.0),
        RoPE(interleaved=True),
        ALiBi(),
        ALiBi(slopes=(0.1, 0.2, 0.3, 0.4)),
        FoPE(64),
        FoPE(65),
        FoPE(64, zero_sine=0.0),
        Learned(64),
    ]
    hashes = {print_of(method).hash for method in methods} | {print_of(FoPE(64), seed=1).hash}
    assert len(hashes) == len(methods) + 1
    assert print_of(FoPE(64)) == print_of(FoPE(np.int64(64)))
    assert "constants" in print_of(FoPE(64)).summary


def moved(value):
    """A value of the same type that is another one; None where that takes knowledge of the knob."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if value >= 1 else value * 1.5
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return (*value[:-1], value[-1] * 1.5)
    return None


WRAPPED = RoPE(scaling=(LongRoPE((1.0,) * 8, (2.0,) * 8, 64, 4.0), ClipFloor(64)))


@pytest.mark.parametrize(
    "method",
    [
        RoPE(scaling=(YaRN(4.0, 64),)),
        WRAPPED,
        FoPE(64),
        XPos(),
        LogitScaling(WRAPPED, training_length=64, within=True),
        ByLayer((NoPE(), WRAPPED)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_fingerprint_covers_every_knob_down_to_the_scalings(method):
    """Change any number or switch anywhere inside, and the hash is another."""

    def variants(value):
        for field in dataclasses.fields(value):
            old = getattr(value, field.name)
            parts = old if isinstance(old, tuple) else (old,)
            for index, part in enumerate(parts):
                if dataclasses.is_dataclass(part):
                    for new in variants(part):
                        changed = (*parts[:index], new, *parts[index + 1 :])
                        new_value = changed if isinstance(old, tuple) else new
                        yield dataclasses.replace(value, **{field.name: new_value})
            if moved(old) is not None:
                try:
                    yield dataclasses.replace(value, **{field.name: moved(old)})
                except ValueError:  # switches that exclude each other
                    continue

    changed = list(variants(method))
    assert len(changed) >= 4
    hashes = {fingerprint(variant).hash for variant in changed}
    assert len(hashes) == len(changed) and fingerprint(method).hash not in hashes


# Hashes in checkpoints of the code that knew no outputs="official".
STORED = {
    "a43b2d659b9cb93c": FoPE(64),
    "a189d8f0c380efbf": FoPE(64, drop_zero=False),
    "5d2ab350f1207df8": FoPE(64, clip=False, drop_zero=False),
    "9894e16696305496": FoPE(64, clip=False, outputs="quarter"),
    "08845cc059b12bd2": FoPE.equations(64),
    "53c1cc0560d310f0": ByLayer((FoPE(64), NoPE())),
    "ddb1e6c30d1c60f9": Sinusoidal(amplitude=1.0),
}


@pytest.mark.parametrize("stored", STORED)
def test_fingerprints_of_stored_checkpoints(stored):
    assert fingerprint(STORED[stored]).hash == stored


def test_another_number_of_pairs_has_another_fingerprint():
    assert fingerprint(FoPE(64, clip=False)).hash not in STORED


def test_fingerprint_counts_equal_numbers_as_equal():
    assert fingerprint(RoPE(theta=10_000)) == fingerprint(RoPE(theta=np.float64(10_000.0)))
    assert fingerprint(ALiBi(slopes=[1, 2])).hash == fingerprint(ALiBi(slopes=(1.0, 2.0))).hash
    p_rope, proportional = (RoPE(scaling=(step,)) for step in (PRoPE(0.5), Proportional(0.5)))
    assert fingerprint(p_rope).hash != fingerprint(proportional).hash  # other names, said so


def test_specifications_go_both_ways():
    mixed = LogitScaling(ByLayer((WRAPPED, FoPE(64))), training_length=64, within=True)
    for method in (WRAPPED, mixed):
        spec = to_spec(method)
        assert from_spec(json.loads(json.dumps(spec))) == method

    @dataclasses.dataclass(frozen=True)
    class Own(PositionEmbedding):
        knob: float = 1.0

    assert to_spec(Own())["knob"] == 1.0
    assert "Own(knob=1)" in fingerprint(Own()).summary


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "7", "JAX_ENABLE_X64": "1"},
        pytest.param(
            {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"JAX_DISABLE_JIT": "1"}, marks=pytest.mark.slow),
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_fingerprint_is_stable_over_processes(environment):
    code = (
        "import jax; from fope_jax.position import *;"
        f"s = ModelShape(*{tuple(SHAPE)}); m = FoPE.equations(64);"
        "print(fingerprint(m, s, m.init(jax.random.key(0), s)).hash)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    assert run.stdout.strip() == print_of(FoPE.equations(64)).hash


def test_lists_do_as_well_as_arrays():
    np.testing.assert_array_equal(angles([[3]], [0.5, 0.25]), [[[1.5, 0.75]]])
    np.testing.assert_array_equal(clip_floor([1.0, 0.01], 64), [1.0, 0.0])
    assert hash(ALiBi(slopes=[0.5, 0.25])) == hash(ALiBi(slopes=(0.5, 0.25)))
    cos, _ = fourier_tables(range(5), [0.5], [[1.0]], [[1.0]], head_dim=4)
    np.testing.assert_allclose(cos[:, 0, 0], np.cos(0.5 * np.arange(5)), atol=1e-6)


def test_importing_position_is_light():
    """jax and numpy only, and under a second beyond jax itself."""
    code = (
        "import sys, time, jax, numpy; before = set(sys.modules); start = time.perf_counter();"
        "import fope_jax.position; seconds = time.perf_counter() - start;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "heavy = new & {'flax', 'optax', 'orbax', 'tensorflow', 'seqio', 'chex', 'ml_collections'};"
        "assert not heavy, heavy; assert seconds < 1, seconds"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_without_a_bias_has_none():
    for hook in ("bias", "contextual_bias", "embed", "rotate", "tables"):
        assert not has_hook(NoPE(), hook)
    assert has_hook(ALiBi(), "bias") and not has_hook(ALiBi(), "rotate")


def test_a_knob_that_came_later_leaves_the_fingerprint_as_it_was():
    """At its default, and inside other methods too; the hash is that of the code without it."""
    assert fingerprint(T5Bias()).hash == "4d3624eca1ec365e"
    mixed = LogitScaling(ByLayer((T5Bias(), RoPE())), training_length=8)
    assert fingerprint(mixed).hash == "97ce96d5e8e46fd9"
    assert fingerprint(T5Bias(bidirectional=True)).hash != fingerprint(T5Bias()).hash
    assert from_spec(to_spec(T5Bias(bidirectional=True))) == T5Bias(bidirectional=True)
    old = {k: v for k, v in to_spec(T5Bias()).items() if k != "bidirectional"}
    assert from_spec(old) == T5Bias()


STRANGER = """
from dataclasses import dataclass

from fope_jax.position import PositionEmbedding, Scaling, register


@register("damped")
@dataclass(frozen=True)
class Damped(PositionEmbedding):
    rate: float = 0.5

    def bias(self, variables, q_positions, k_positions):
        return -self.rate * abs(q_positions - k_positions)


@dataclass(frozen=True)
class Halved(Scaling):
    def __call__(self, frequencies, length=None):
        return frequencies._replace(inv_freq=frequencies.inv_freq / 2)


class Loose(PositionEmbedding):
    pass


number = 3
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module of someone else, importable and not imported; its names are forgotten afterwards."""
    (tmp_path / "stranger.py").write_text(STRANGER)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "raises.py").write_text("import dataclasses\n\nx = 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "stranger"
    sys.modules.pop("stranger", None)
    METHODS.pop("damped", None)


def test_a_method_of_others_is_imported_only_where_that_is_allowed(stranger):
    spec = {"method": "stranger:Damped", "rate": 2}
    nested = {"method": "by_layer", "methods": [spec, {"method": "nope"}]}
    for value in (spec, nested):
        for allow in ((), ("stranger2", "strange")):
            with pytest.raises(ValueError, match="allow it with --allow-module stranger if you tr"):
                from_spec(value, allow)
    assert stranger not in sys.modules and "damped" not in METHODS
    assert from_spec(nested, ["stranger"]).methods[0].rate == 2
    assert from_spec(spec).rate == 2, "what has been imported needs no leave"


def test_what_a_specification_names_can_be_imported_beforehand(stranger):
    spec = {"method": "logit_scaling", "training_length": 8, "inner": {"method": "stranger:Damped"}}
    import_modules(spec)
    assert name_of(from_spec(spec).inner) == "damped"


def test_methods_and_scalings_of_others_go_both_ways(stranger):
    method = from_spec({"method": "stranger:Damped"}, None)
    assert name_of(method) == "damped" and make("damped") == method
    # A run holds the module: the short name is known only where it has been imported.
    assert to_spec(method) == {"method": "stranger:Damped", "rate": 0.5}
    assert from_spec(to_spec(method)) == method
    changed = dataclasses.replace(method, rate=2.0)
    assert fingerprint(method) != fingerprint(changed)
    assert "stranger:Damped(rate=2)" in fingerprint(changed).summary
    rope = from_spec({"method": "rope", "scaling": [{"scaling": "stranger:Halved"}]})
    assert rope.frequencies(4)[0] == 0.5 and from_spec(to_spec(rope)) == rope


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"method": "no_such_module:X"}, "'no_such_module' cannot be imported: ModuleNotFoundEr"),
        ({"method": "broken:X"}, "'broken' cannot be imported: ModuleNotFoundError: No module.*PY"),
        ({"method": "raises:X"}, r"'raises' .* ZeroDivisionError: .* \(.*raises.py, line 3\)$"),
        ({"method": "stranger:Dampd"}, "module 'stranger' has no 'Dampd'"),
        ({"method": "stranger:number"}, "3 is no class of PositionEmbedding"),
        ({"method": "stranger:Halved"}, "Halved.* is no class of PositionEmbedding"),
        ({"scaling": "stranger:Damped"}, "Damped.* is no class of Scaling"),
        ({"method": "stranger:Loose"}, r"Loose is no @dataclass\(frozen=True\)"),
        ({"method": "stranger:Damped", "rat": 1}, "unknown knob 'rat' of stranger:Damped; did you"),
        ({"method": "os:system"}, "is no class of PositionEmbedding"),
    ],
)
def test_what_others_may_get_wrong(stranger, spec, message):
    with pytest.raises(ValueError, match=message):
        from_spec(spec, None)


@pytest.mark.parametrize("word", ["method", "preset", "name", "allow"])
def test_a_knob_is_not_called_as_what_stands_beside_it(word):
    """``make(name, preset=, allow=, **knobs)`` and a specification would mix them up."""
    cls = dataclasses.make_dataclass(
        "Mine", [(word, str, "x")], bases=(PositionEmbedding,), frozen=True
    )
    with pytest.raises(TypeError, match=f"Mine has a knob '{word}', which is a specification's"):
        register("mine")(cls)


def test_a_name_is_registered_once():
    @dataclasses.dataclass(frozen=True)
    class Mine(PositionEmbedding):
        pass

    for name, message in (("rope", "taken by rope"), ("a:b", "letters, digits and underscores")):
        with pytest.raises(ValueError, match=message):
            register(name)(Mine)
    with pytest.raises(TypeError, match="no class of PositionEmbedding"):
        register("mine")(int)


def test_a_numpy_switch_has_the_fingerprint_of_a_plain_one():
    assert fingerprint(RoPE(interleaved=np.True_)) == fingerprint(RoPE(interleaved=True))
