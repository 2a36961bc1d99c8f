"""Scores one batch of windows, and answers, on one device and on meshes of 8 simulated devices.

A program by itself, because the number of simulated devices is fixed when jax starts. Prints, for
each mesh, the largest difference in nats and how many hits or written tokens differ. Only the first
case with ``first``:

    python -m tests.evaluate.mesh_scores [first]
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from flax import nnx

from fope_jax.data.random_positions import PositionDraw
from fope_jax.evaluate.generation import model_answerer
from fope_jax.evaluate.packed import packed_positions
from fope_jax.evaluate.restore import NonFiniteError, check_weights
from fope_jax.evaluate.scoring import model_scorer
from fope_jax.evaluate.text_model import row_programs
from fope_jax.gallery.examples import examples
from fope_jax.model.config import TransformerConfig
from fope_jax.model.losses import loss_sums
from fope_jax.model.masks import TokenIndex
from fope_jax.model.sharding import MeshConfig, make_mesh, tree_shardings
from fope_jax.model.transformer import Transformer, merge, split

ROWS, LENGTH = 3, 41  # nothing divides
# Method, mesh, targets scored, whether positions begin anew at each document.
CASES = (
    ("fope", {"tensor": 2, "context": 2, "data": 2, "fsdp": 1}, 41, True),
    ("cope", {"context": 4, "fsdp": 2}, 5, False),
    ("t5", {"tensor": 2, "context": 2, "data": 2, "fsdp": 1}, 5, True),
)
DOCUMENTS = np.array([0, 17, 36])  # where they begin


def main(only_first: bool) -> None:
    config = TransformerConfig(
        vocab_size=96,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=48,
        init_std=0.3,
    )
    tokens = np.random.default_rng(0).integers(0, 96, (ROWS, LENGTH + 1)).astype(np.int32)
    found = []
    for method, sizes, scored, reset in CASES[:1] if only_first else CASES:
        model = Transformer(config, examples(32, 8)[method], rngs=nnx.Rngs(0))
        graphdef, *parts = split(model)
        mesh = make_mesh(MeshConfig(**sizes))
        placed = [
            jax.device_put(part, tree_shardings(part, model.position, mesh)) for part in parts
        ]
        window = tokens[:, :-1], tokens[:, -scored:]
        if reset:
            own = [packed_positions(DOCUMENTS, begin, LENGTH) for begin in range(ROWS)]
            window = *window, TokenIndex(*map(np.stack, zip(*own, strict=True)))
        on_mesh = model_scorer(merge(graphdef, *placed), mesh)(*window)
        nats, hits = (np.asarray(x) for x in on_mesh)
        expected, right = (np.asarray(x) for x in model_scorer(model)(*window))
        found.append(
            {
                "case": f"{method} {sizes} {scored} {reset}",
                "shape": nats.shape,
                "difference": float(np.abs(nats - expected).max()),
                "hits_differ": int((hits != right).sum()),
                "spread": float(expected.std()),
            }
        )
    others = {} if only_first else {"answers": answers(config), "broken": broken(config)}
    print(json.dumps({"windows": found} | others))


def answers(config) -> dict:
    """What a model writes and ranks, on one device and on a mesh that cuts all it can."""
    model = Transformer(config, examples(32, 8)["fope"], rngs=nnx.Rngs(0))
    graphdef, *parts = split(model)
    mesh = make_mesh(MeshConfig(tensor=2, context=2, data=2, fsdp=1))
    placed = [jax.device_put(part, tree_shardings(part, model.position, mesh)) for part in parts]
    rng = np.random.default_rng(1)
    asked = [rng.integers(0, 96, shape).astype(np.int32) for shape in ((ROWS, 17), (ROWS, 2, 4))]
    positions = PositionDraw(40, "float", seed=2).positions(np.ones((ROWS, 20), int), [0])
    expected, on_mesh = (
        [np.asarray(x) for x in answerer(*asked, None, positions)]
        for answerer in (model_answerer(model), model_answerer(merge(graphdef, *placed), mesh))
    )
    prompts, segments = asked[0], np.ones_like(asked[0])
    segments[1, :5] = 0
    texts, texts_on_mesh = (
        np.asarray(programs.write(prompts, segments, count=4, not_first=(0, 7)))
        for programs in (row_programs(model), row_programs(merge(graphdef, *placed), mesh))
    )
    return {
        "shape": on_mesh[0].shape,
        "texts": [texts_on_mesh.shape, int((texts_on_mesh != texts).sum())],
        "differ": int((on_mesh[0] != expected[0]).sum()),
        "difference": float(np.abs(on_mesh[1] - expected[1]).max()),
    }


def broken(config) -> dict:
    """Hits and tokens of a model in which one token, on the second part of the vocabulary, is NaN.

    Its gradient of the loss, of a batch in which one target is none and has no weight, is compared
    with the one on a single device.
    """
    model = Transformer(config, examples(32, 8)["rope"], rngs=nnx.Rngs(0))
    graphdef, params, constants = split(model)
    mesh = make_mesh(MeshConfig(tensor=2, context=2, data=2, fsdp=1))
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((4, 8, 32)).astype(np.float32)
    targets = rng.integers(0, 96, (4, 8)).astype(np.int32)
    targets[0, :3] = -100, 96, -1
    weights = np.ones((4, 8), np.float32)
    weights[0, :3] = 0

    def gradients(unembedding):
        return jax.jit(
            jax.grad(
                lambda *x: loss_sums(x[0], x[1], targets, x[2], time_chunk=3).nats,
                argnums=(0, 1, 2),
            )
        )(hidden, unembedding, weights)

    expected = gradients(params["unembedding"])
    with jax.set_mesh(mesh):
        on_mesh = gradients(params["unembedding"])
    difference = max(np.abs(a - b).max() for a, b in zip(on_mesh, expected, strict=True))
    params["unembedding"] = params["unembedding"].at[3, 90].set(np.nan)
    placed = [
        jax.device_put(part, tree_shardings(part, model.position, mesh))
        for part in (params, constants)
    ]
    model = merge(graphdef, *placed)
    tokens = rng.integers(0, 96, (ROWS, 17)).astype(np.int32)
    answers = rng.integers(0, 96, (ROWS, 2, 4)).astype(np.int32)
    nats, hits = model_scorer(model, mesh)(tokens[:, :-1], tokens[:, 1:])
    written, answer_nats = model_answerer(model, mesh)(tokens, answers)
    try:
        check_weights(model, "here")
    except NonFiniteError as error:
        message = str(error)
    return {
        "gradient": float(difference),
        "finite": int(np.isfinite(nats).sum() + np.isfinite(answer_nats).sum()),
        "hits": int(np.sum(hits)),
        "written": np.unique(written).tolist(),
        "message": message,
    }


if __name__ == "__main__":
    main(sys.argv[1:] == ["first"])
