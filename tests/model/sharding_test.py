"""Meshes: sizes that fit the devices, one rule for each axis, and errors before any array."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fope_jax.config import TrainConfig
from fope_jax.gallery.examples import examples
from fope_jax.model import sharding
from fope_jax.model.config import TransformerConfig
from fope_jax.model.sharding import (
    AXIS_RULES,
    LAYER_PARAMETER_AXES,
    MESH_AXES,
    PARAMETER_AXES,
    MeshConfig,
    active_mesh,
    axis_size,
    constrain,
    make_mesh,
    partition_spec,
    tree_shardings,
)
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import ALiBi, ByLayer, ByShare, LogitScaling, NoPE
from fope_jax.position.base import PositionEmbedding, PositionVariables
from fope_jax.train.optim import make_optimizer
from fope_jax.train.step import TrainState, state_shardings


@pytest.mark.parametrize(
    ("config", "devices", "expected"),
    [
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(data=2, context=2), 8, (2, 2, 2, 1)),
        (MeshConfig(data=-1, fsdp=1, tensor=4), 8, (2, 1, 1, 4)),
        (MeshConfig(fsdp=1), 1, (1, 1, 1, 1)),
    ],
)
def test_one_axis_takes_the_devices_that_are_left(config, devices, expected):
    assert config.axis_sizes(devices) == dict(zip(MESH_AXES, expected, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 0}, "mesh.data=0: expected 1 or more, or -1 for all devices that are left"),
        ({"tensor": -2}, "mesh.tensor=-2"),
        ({"data": -1}, "mesh.data=-1 and mesh.fsdp=-1: only one axis may be -1"),
        (
            {"dcn_data": 0},
            "mesh.dcn_data=0: expected 1 or more, or -1 for all slices that are left",
        ),
        ({"dcn_fsdp": -1}, "mesh.dcn_data=-1 and mesh.dcn_fsdp=-1: only one axis may be -1"),
    ],
)
def test_sizes_that_no_mesh_has(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshConfig(**values)


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(tensor=3), 8, "need a multiple of 3 devices, there are 8"),
        (MeshConfig(fsdp=1, context=16), 8, "context=16, tensor=1: needs 16 devices, there are 8"),
        (MeshConfig(fsdp=2), 8, "needs 2 devices, there are 8"),
    ],
)
def test_more_or_fewer_devices_than_there_are(config, devices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config.axis_sizes(devices)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("contxt=2", "contxt"),
        ("tensor=two", "tensor"),
        ("data=2,data=2", "d"),
        ("", ""),
        ("fsdp", "f"),
        ("dcn_data=two", "dcn_data"),
    ],
)
def test_a_mesh_that_cannot_be_read(text, bad):
    with pytest.raises(ValueError, match=re.escape(f"mesh {text!r}: cannot read '{bad}")):
        MeshConfig.parse(text)


@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_tokens_and_heads_are_not_split_over_slices(axis):
    with pytest.raises(ValueError, match=f"dcn_{axis}: .* it takes dcn_data and dcn_fsdp"):
        MeshConfig.parse(f"dcn_{axis}=2")


# ---------------------------------------------------------------------------- several slices


@dataclass(frozen=True)
class SimulatedDevice:
    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def simulated_slices(count, size):
    """Devices in an order that mixes the slices, as nothing promises another."""
    return [SimulatedDevice(id, id % count) for id in range(count * size)]


@pytest.mark.parametrize(
    ("config", "slices", "shape", "of_slices"),
    [
        (MeshConfig(tensor=2), 2, (2, 4, 1, 2), (2, 1, 1, 1)),
        (MeshConfig(data=2, context=2), 4, (8, 2, 2, 1), (4, 1, 1, 1)),
        (MeshConfig(data=2, dcn_data=1, dcn_fsdp=2), 2, (2, 8, 1, 1), (1, 2, 1, 1)),
        (MeshConfig(context=4, dcn_fsdp=2), 4, (2, 4, 4, 1), (2, 2, 1, 1)),
    ],
    ids=str,
)
def test_slices_are_the_outer_part_of_an_axis(config, slices, shape, of_slices):
    """A block of the mesh is one slice whole: what lies inside never leaves it."""
    devices = simulated_slices(slices, 8)
    mesh = make_mesh(config, devices)
    assert tuple(config.axis_sizes(8 * slices, slices).values()) == shape
    assert mesh.devices.shape == shape and set(mesh.devices.flat) == set(devices)
    block = [size // count for size, count in zip(shape, of_slices, strict=True)]
    order = iter(range(slices))
    for corner in np.ndindex(of_slices):
        inside = tuple(slice(c * n, (c + 1) * n) for c, n in zip(corner, block, strict=True))
        assert {device.slice_index for device in mesh.devices[inside].flat} == {next(order)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(dcn_data=3), "dcn_data=3, dcn_fsdp=1: needs 3 slices, there are 2"),
        (MeshConfig(dcn_fsdp=4), "need a multiple of 4 slices, there are 2"),
        (MeshConfig(fsdp=16), "tensor=1: needs 16 devices, there are 8 in each of 2 slices"),
        (MeshConfig(tensor=3), "a multiple of 3 devices, there are 8 in each of 2 slices"),
    ],
    ids=str,
)
def test_slices_that_a_mesh_does_not_fit(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(config, simulated_slices(2, 8))


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="slice 0 has 4, slice 1 has 3 devices; all slices need"):
        make_mesh(MeshConfig(), simulated_slices(2, 4)[:-1])


def test_one_slice_is_not_several():
    with pytest.raises(ValueError, match="needs 2 slices, there are 1"):
        make_mesh(MeshConfig(dcn_data=2))


# ---------------------------------------------------------------------------- rules


@pytest.mark.fast("head")
@pytest.mark.parametrize("qk_norm", ["head", "width"])
def test_every_axis_of_every_parameter_has_a_rule(qk_norm):
    config = TransformerConfig(
        vocab_size=8, d_model=32, num_layers=12, num_heads=4, mlp_dim=8, qk_norm=qk_norm
    )
    for label, method in examples(16, 8).items():
        model = jax.eval_shape(
            lambda method=method: split(Transformer(config, method, rngs=_rngs()))[1:]
        )
        mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), MESH_AXES)
        for tree in model:
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                axes = sharding.parameter_axes(tuple(entry.key for entry in path), method)
                assert len(axes) <= len(leaf.shape), (label, path)
                assert set(axes) <= {None, *AXIS_RULES}, (label, path)
                for size, axis in zip(leaf.shape, axes, strict=False):
                    assert axis is None or size % axis_size(mesh, axis) == 0, (label, path)


def _rngs():
    from flax import nnx

    return nnx.Rngs(0)


def test_a_parameter_that_cannot_be_cut_is_named():
    mesh = jax.sharding.AbstractMesh((1, 4, 1, 1), MESH_AXES)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "embedding (6, 10): its axis 'embed' of 10 is not a multiple of mesh fsdp * context = 4"
        ),
    ):
        tree_shardings({"embedding": jnp.ones((6, 10))}, NoPE(), mesh)


def test_every_large_parameter_is_cut_over_both_kinds_of_axes():
    for name, axes in (PARAMETER_AXES | LAYER_PARAMETER_AXES).items():
        if len(axes) > 1 and not name.endswith("_bias"):
            cut = {name for axis in axes if axis for name in AXIS_RULES[axis]}
            assert cut == {"fsdp", "context", "tensor"}


def test_without_a_mesh_nothing_is_laid_out():
    x = jnp.ones((2, 4, 8))
    assert active_mesh() is None
    assert constrain(x, ("batch", "length", None)) is x


def test_a_mesh_with_other_axes_is_refused():
    mesh = jax.sharding.AbstractMesh((2, 4), ("batch", "model"))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match="axes .*'model'.*: expected .*'tensor'"),
    ):
        active_mesh()


def test_a_row_that_all_share_is_not_cut():
    assert partition_spec((None, "length")) == P(None, "context")


def test_a_composition_cuts_the_variables_of_its_methods():
    assert NoPE().variable_axes("anything") == ()
    assert ByLayer((NoPE(), ALiBi())).variable_axes("1.slopes") == ("heads",)
    assert LogitScaling(ALiBi(), form="log_n", training_length=8).variable_axes("slopes") == (
        "heads",
    )


@dataclass(frozen=True)
class NamedAsWeights(PositionEmbedding):
    """Variables of every name that a weight has; those of the layers count heads, last."""

    def init(self, key, shape):
        layers = {
            name: jnp.ones((shape.num_layers, 3, shape.num_heads)) for name in LAYER_PARAMETER_AXES
        }
        half = len(LAYER_PARAMETER_AXES) // 2
        return PositionVariables(
            model_params={name: jnp.ones((5, 7)) for name in PARAMETER_AXES},
            layer_params=dict(list(layers.items())[:half]),
            layer_constants=dict(list(layers.items())[half:]),
        )

    def variable_axes(self, name):
        return (None, "heads") if name in LAYER_PARAMETER_AXES else ()


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        (NamedAsWeights(), 4),
        (LogitScaling(NamedAsWeights(), form="log_n", training_length=8), 4),
        (ByLayer((NamedAsWeights(), NoPE())), 2),
        (ByLayer((NoPE(), LogitScaling(NamedAsWeights(), form="log_n", training_length=8))), 2),
        (ByShare((NamedAsWeights(), NoPE()), (0.5, 0.5)), 4),
    ],
    ids=["alone", "logit_scaling", "by_layer", "by_layer of logit_scaling", "by_share"],
)
def test_variables_named_as_weights_are_cut_as_their_method_says(method, layers):
    config = TransformerConfig(
        vocab_size=8, d_model=32, num_layers=4, num_heads=4, mlp_dim=8, qk_norm="head"
    )
    graphdef, params, constants = jax.eval_shape(
        lambda: split(Transformer(config, method, rngs=_rngs()))
    )
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 2), MESH_AXES)
    optimizer = make_optimizer(TrainConfig(steps=9, batch_size=1, length=8))
    state = TrainState(params, jax.eval_shape(optimizer.init, params))
    cut = state_shardings(optimizer, state, method, mesh)
    fixed = tree_shardings(constants, method, mesh)
    moments = next(part for part in cut.optimizer if hasattr(part, "mu"))
    for tree in (cut.params, moments.mu, moments.nu):
        of_layers = tree["position_layers"] | fixed["position_layers"]
        own = {name: s.spec for name, s in of_layers.items() if name.split(".")[-1] != "slopes"}
        assert len(own) == len(LAYER_PARAMETER_AXES)
        heads = P(None, None, "tensor")
        assert {name: spec for name, spec in own.items() if spec != heads} == {}
        model = {name: s.spec for name, s in tree["position_model"].items()}
        assert len(model) == len(PARAMETER_AXES)
        assert all(axis is None for spec in model.values() for axis in spec)
        assert tree["layers"]["gate"].spec == P(None, ("fsdp", "context"), "tensor")
        assert tree["embedding"].spec == P("tensor", ("fsdp", "context"))
