"""The loss before the start scores the same targets whatever the length."""

import jax.numpy as jnp
import pytest

from fope_jax.data.cache import open_cache
from fope_jax.extend import initial_loss
from fope_jax.extend.initial_loss import stream_loss
from fope_jax.train.state import plan_state


@pytest.mark.fast("48-documents-3160", "32-windows-288")
@pytest.mark.parametrize("tokens", [288, 3160])
@pytest.mark.parametrize("packing", ["documents", "windows"])
@pytest.mark.parametrize("length", [16, 32, 48])
def test_the_loss_before_the_start_scores_the_same_targets_at_every_length(
    runs, length, packing, tokens, monkeypatch
):
    """A model whose loss is its target sums the first targets of the split, whatever the windows.

    3,160 tokens are all that there are, no multiple of a window, and the last has no target.
    """

    def loss(params, graphdef, constants, batch):
        scored = jnp.sum(batch.weights)
        return jnp.sum(batch.weights * batch.targets), scored

    monkeypatch.setattr(initial_loss, "batch_loss", loss)
    data = runs.data | {"packing": packing}
    experiment = runs.experiment(data, method="rope", length=length, batch_size=96 // length)
    cache = open_cache(experiment.data, "validation")
    loss = stream_loss(plan_state(experiment), {}, {}, cache, tokens)
    scored = cache.tokens(1, min(tokens + 1, cache.num_tokens))
    assert loss == pytest.approx(scored.mean(), rel=1e-6)
