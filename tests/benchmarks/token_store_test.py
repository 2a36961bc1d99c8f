"""The benchmark of token stores reads real stores."""

import numpy as np

from benchmarks import token_store
from fope_jax.data.cache import make_cache
from fope_jax.data.manifest import read_manifest


def test_a_simulated_store_is_one_that_a_cache_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 2**16)
    monkeypatch.setattr(token_store, "_ROWS", {})
    token_store.simulate(tmp_path, 400)
    cache = make_cache(tmp_path, read_manifest(tmp_path), "train")
    assert cache.num_documents == 400 and cache.num_shards > 2
    number, starts = cache.document_starts(0, cache.num_tokens)
    assert number == 0 and len(starts) == 400 and (np.diff(starts) >= 100).all()
    assert not cache.tokens(60_000, 140_000).any()
    assert token_store.main(["--read", str(tmp_path)]) == 0
    assert '"documents": 400' in capsys.readouterr().out
