"""The examples cover the tables; the catalogue reads them off the code."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from fope_jax.gallery.catalogue import (
    about,
    knobs,
    learnable,
    method_entries,
    scaling_entries,
    source,
)
from fope_jax.gallery.examples import EXAMPLES, SHAPE, choose, examples
from fope_jax.position.alibi import ALiBi
from fope_jax.position.base import NoPE
from fope_jax.position.registry import METHODS, SCALINGS
from fope_jax.position.relative_bias import Kerple
from fope_jax.position.rope import RoPE

KINDS = {"none", "rotation", "bias", "absolute", "contextual", "composition"}


def test_every_method_and_every_scaling_has_an_example():
    assert {type(method) for method in EXAMPLES.values()} == set(METHODS.values())
    for name, cls in METHODS.items():
        assert type(EXAMPLES[name]) is cls
    for name, cls in SCALINGS.items():
        assert [type(step) for step in EXAMPLES[f"rope+{name}"].scaling] == [cls]


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_examples_serve_the_models_they_are_made_for(head_dim):
    shape = SHAPE._replace(head_dim=head_dim, d_model=4 * head_dim)
    for length in (512, 4096):
        for method in examples(length, head_dim).values():
            method.check(shape)


def test_choosing_examples():
    assert list(choose(["rope", "nope"])) == ["rope", "nope"]
    assert choose(None) == EXAMPLES
    with pytest.raises(ValueError, match="unknown method 'roap'; did you mean 'rope'\\? Known: n"):
        choose(["nope", "roap"])


def test_methods_of_others_are_drawn_and_listed(monkeypatch):
    @dataclass(frozen=True)
    class Theirs(ALiBi):
        """Slopes of their own.

        Reference: Someone 2026.
        """

    @dataclass(frozen=True)
    class Needs(NoPE):
        """Needs a width."""

        width: int

    for cls in (Theirs, Needs):
        monkeypatch.setitem(METHODS, cls.__name__.lower(), cls)
    assert choose(["theirs"]) == {"theirs": Theirs()}
    assert list(choose(None)) == [*EXAMPLES, "theirs"]
    theirs, needs = method_entries()[-2:]
    assert (theirs.about, theirs.learnable) == ("Slopes of their own", "no")
    assert (needs.knobs, needs.learnable) == (["width"], "")


def test_the_catalogue_follows_the_tables():
    methods = {entry.name: entry for entry in method_entries()}
    assert list(methods) == list(METHODS)
    assert [entry.name for entry in scaling_entries()] == list(SCALINGS)
    assert {entry.kind for entry in methods.values()} == KINDS
    assert methods["learned"].knobs == ["table_length", "init_std=0.02"]
    for entry in (*methods.values(), *scaling_entries()):
        assert any(character.isdigit() for character in entry.source), entry
        assert len(entry.about) > 10 and not entry.about.endswith("."), entry


def test_what_trains_is_read_off_init():
    shown = {entry.name: entry.learnable for entry in method_entries()}
    assert shown["alibi"] == shown["nope"] == shown["sinusoidal"] == "no"
    assert shown["t5"] == shown["kerple"] == shown["fire"] == shown["cope"] == "always"
    assert shown["rope"] == shown["fope"] == "with learnable=True"
    assert shown["by_layer"] == shown["by_share"] == shown["logit_scaling"] == "as its methods"
    assert learnable(replace(RoPE(), learnable=True)) == "always"
    assert learnable(Kerple(form="power")) == "always"


def test_sources_come_from_the_nearest_docstring():
    assert source(NoPE).startswith("Kazemnejad et al. 2023")
    assert source(ALiBi).startswith("Press et al. 2022")

    class Undocumented:
        pass

    assert source(Undocumented) == ""


def test_knobs_of_every_type():
    @dataclass(frozen=True)
    class Many:
        """Many knobs.
        They wrap.

        More.
        """

        label: ClassVar[str] = "no knob"
        needed: int
        name: str = "a"
        small: float = 1e-6
        none: None = None
        steps: tuple = ()

    assert knobs(Many) == ["needed", "name='a'", "small=1e-06", "none=None", "steps=()"]
    assert about(Many) == "Many knobs. They wrap"
