"""The arrays of a child: what is carried over, to the bit, and what begins anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fope_jax.config import build_experiment
from fope_jax.extend.arrays import carry_position, carry_train_state
from fope_jax.extend.child import child_experiment
from fope_jax.extend.coefficients import carry_variables
from fope_jax.extend.parent import Parent, open_parent
from fope_jax.extend.variants import make_variant
from fope_jax.model.transformer import merge, position_variables
from fope_jax.position import FoPE, Learned, PositionInterpolation, PositionVariables, RoPE
from fope_jax.train.state import init_position_arrays, plan_state


def carried(run, method, length, **arguments):
    """Experiments and models, float32, of a parent and of its child before any update."""
    parent = open_parent(str(run))
    child = child_experiment(parent.experiment, parent.step, method, length, **arguments)
    before, after = plan_state(parent.experiment), plan_state(child)
    arrays = parent.load(before, True).items
    trained = position_variables(arrays["params"], arrays["constants"])
    moved = carry_variables(
        parent.experiment.position,
        trained,
        child.position,
        init_position_arrays(child),
        child.model.shape.head_dim,
        from_length=parent.experiment.train.length,
    )
    optimizer = arguments.get("optimizer", "reset-moments")
    state, constants = carry_train_state(arrays, moved, after, optimizer)
    models = (
        merge(before.graphdef, arrays["params"], arrays["constants"]),
        merge(after.graphdef, state.params, constants),
    )
    return models, arrays["optimizer"], state.optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "method", "expected"),
    [
        ("rope", "pi", RoPE(scaling=(PositionInterpolation(1.0),))),
        ("rope", "same", RoPE()),
        ("fope", "fope", FoPE(16, theta=100.0, learnable=True)),
    ],
)
def test_the_first_forward_pass_of_a_change_that_is_none_has_the_same_bits(
    run, method, expected, request
):
    models, *_ = carried(request.getfixturevalue(run), method, 16)
    assert models[1].position == expected
    tokens = jnp.arange(48).reshape(2, 24) % 17
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
    before, after = (
        np.asarray(model(tokens, positions, jnp.ones_like(tokens))) for model in models
    )
    assert np.isfinite(before).all() and before.tobytes() == after.tobytes()


def test_moments_are_kept_for_what_is_carried_and_begin_anew_for_what_is_not(fope):
    """FoPE from 16 to 32 tokens: one frequency more, so its coefficients are other arrays."""
    _, old, kept = carried(fope, "fope", 32, optimizer="keep")
    _, _, reset = carried(fope, "fope", 32)
    adam, trained = kept[1], old[1]
    assert isinstance(adam, optax.ScaleByAdamState)
    assert (int(adam.count), int(kept[3].count)) == (1, 0)
    query = adam.mu["layers"]["query"]
    assert np.asarray(query).tobytes() == np.asarray(trained.mu["layers"]["query"]).tobytes()
    coefficients = adam.nu["position_layers"]["cos_coef"]
    assert coefficients.shape != trained.nu["position_layers"]["cos_coef"].shape
    assert not coefficients.any() and query.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(reset))
    _, _, same = carried(fope, "fope", 16, optimizer="keep")
    assert (
        same[1].nu["position_layers"]["cos_coef"] == trained.nu["position_layers"]["cos_coef"]
    ).all()


def table_of_64(runs, made_for=None, **changes):
    """A parent whose table has 64 rows, and the table, row p at p."""
    values = runs.values(method={"method": "learned", "table_length": 64}, **changes)
    parent = Parent("runs/x", build_experiment(values), 12, False, {}, None, made_for)
    table = np.repeat(np.arange(64, dtype=np.float32)[:, None], 16, axis=1)
    return parent, {"params": {"position_model": {"table": table}}, "constants": {}}


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 16),
        ({"position_range": 64}, 64),
        ({"made_for": 64}, 64),
        ({"position_range": 64, "made_for": 32}, 64),  # its table was kept as it is
    ],
)
def test_every_trained_row_of_a_learned_table_goes_on(runs, changes, rows):
    """At random positions all rows of the range are trained, whatever the length."""
    parent, arrays = table_of_64(runs, **changes)
    overrides = ["train.batch_size=1", "train.position_range=none"]
    child = child_experiment(
        parent.experiment,
        *(12, "learned", 32),
        overrides=[*overrides, "position.table_length=127"],
        made_for=parent.made_for,
    )
    carried = carry_position(parent, parent.experiment, arrays, child, "frequency")
    expected = np.arange(127) * (rows - 1) / 126
    new = np.asarray(carried.variables.model_params["table"])[:, 0]
    np.testing.assert_allclose(new, expected, rtol=1e-6)
    assert carried.text == f"table of {rows} trained positions stretched to 127"
    variant = make_variant(parent, "learned:table_length=127")
    trained = PositionVariables(model_params=arrays["params"]["position_model"])
    again = np.asarray(variant.carry(trained).model_params["table"])[:, 0]
    assert again.tobytes() == new.tobytes()
    kept = child_experiment(
        parent.experiment, 12, "learned", 32, overrides=overrides[:1], made_for=parent.made_for
    )
    assert kept.position == Learned(64 if rows == 64 else 32)
