"""One checkpoint under several position embeddings: `fope evaluate RUN --as METHOD`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fope_jax.config import Experiment
from fope_jax.evaluate.restore import evaluation_graphdef
from fope_jax.model.sharding import device_put_sharded, tree_shardings
from fope_jax.model.transformer import Transformer, merge, position_variables, split
from fope_jax.position import PositionEmbedding, PositionVariables
from fope_jax.position.base import Variables
from fope_jax.processes.collectives import gather_to_host

AS = "as"  # the field of rows that names the variant; rows of the run itself lack it


class Variant(NamedTuple):
    """Another position embedding for a checkpoint.

    Attributes:
      label: such as "yarn:factor=4"; "" is the run as it is.
      position: the position embedding.
      carry: the checkpoint's position arrays, on the host, to those of ``position``.
      text: what changes in the frequencies, in words.
    """

    label: str
    position: PositionEmbedding
    carry: Callable[[PositionVariables], PositionVariables] = lambda trained: trained
    text: str = ""


def variant_experiment(experiment: Experiment, variant: Variant) -> Experiment:
    """The experiment of a run under a variant, named "RUN as METHOD"."""
    if not variant.label:
        return experiment
    name = f"{experiment.name} {AS} {variant.label}"
    return dataclasses.replace(experiment, name=name, position=variant.position)


def variant_model(
    model: Transformer, experiment: Experiment, variant: Variant, mesh: Mesh | None
) -> Transformer:
    """``model`` under a variant; all but the position arrays is shared with it.

    ``experiment`` is that of ``variant_experiment``. New arrays lie where the mesh has them.
    """
    if not variant.label:
        return model
    _, params, constants = split(model)
    trained = jax.tree.map(gather_to_host, position_variables(params, constants))
    carried = variant.carry(trained)

    def replace(tree: dict[str, Any], of_model: Variables, of_layers: Variables) -> dict[str, Any]:
        groups = {"position_model": of_model, "position_layers": of_layers}
        rest = {name: leaves for name, leaves in tree.items() if name not in groups}
        new = {name: arrays for name, arrays in groups.items() if arrays}
        if mesh is None:
            return rest | jax.tree.map(jnp.asarray, new)
        return rest | jax.tree.map(
            device_put_sharded, new, tree_shardings(new, variant.position, mesh)
        )

    return merge(
        evaluation_graphdef(experiment),
        replace(params, carried.model_params, carried.layer_params),
        replace(constants, carried.model_constants, carried.layer_constants),
    )
