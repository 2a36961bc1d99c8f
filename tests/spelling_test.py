"""Hints of unknown names: close ones are named, names with a meaning of their own never."""

import pytest

from fope_jax.config.fields import nearest
from fope_jax.interop.rope_parameters import ROPE_TYPES
from fope_jax.position import METHODS
from fope_jax.spelling import likely

ROPE_KEYS = sorted(
    {key for each in ROPE_TYPES.values() for key in each.required + each.optional}
    | {"rope_theta", "rope_type"}
)


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("beta_fats", ROPE_KEYS, "beta_fast"),
        ("original_max_position_embedding", ROPE_KEYS, "original_max_position_embeddings"),
        ("low_freq_facter", ROPE_KEYS, "low_freq_factor"),
        ("yearn", ROPE_TYPES, "yarn"),
        ("longrop", ROPE_TYPES, "longrope"),
        ("Linear", ROPE_TYPES, "linear"),
        ("roap", METHODS, "rope"),
        ("alibbi", METHODS, "alibi"),
        ("train.stps", ["train.steps", "train.length"], "train.steps"),
        # Each of these is a name that people use for something else.
        ("attn_factor", ROPE_KEYS, None),
        ("short_mscale", ROPE_KEYS, None),
        ("scaling_factor", ROPE_KEYS, None),
        ("low_factor", ROPE_KEYS, None),
        ("rope_base", ROPE_KEYS, None),
        ("alpha", ROPE_KEYS, None),
        ("su", ROPE_TYPES, None),
        ("mrope", ROPE_TYPES, None),
        ("llama2", ROPE_TYPES, None),
        ("ntk", ROPE_TYPES, None),
        *((name, METHODS, None) for name in ("hope", "mrope", "rope++")),
        ("beta", ["theta", "scaling"], None),
        ("seed_1", ["seed_0", "seed_2"], None),
        ("length-1028", ["length-1024"], None),
        ("", ROPE_KEYS, None),
        ("anything", [], None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_slips_of_the_hand_are_hinted_at(name, known, meant):
    assert likely(name, known) == meant


def test_the_name_of_a_key_in_another_section_is_a_hint_where_there_is_one():
    known = ["train.steps", "train.length", "data.seed", "train.seed"]
    assert nearest("model.steps", known) == " (nearest: train.steps)"
    assert nearest("model.seed", known) == ""
    assert nearest("model.frobnicate", known) == ""
