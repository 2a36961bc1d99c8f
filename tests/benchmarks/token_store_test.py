"""The benchmark of token stores reads real stores, of both forms."""

import json
import re

import numpy as np

from benchmarks import token_store
from fope_jax.data.array_record_cache import ArrayRecordCache
from fope_jax.data.cache import make_cache
from fope_jax.data.manifest import read_manifest


def test_simulated_stores_are_read_as_real_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 2**16)
    monkeypatch.setattr(token_store, "_ROWS", {})
    caches = []
    for name, write in (("now", token_store.simulate), ("before", token_store.simulate_before)):
        directory = tmp_path / name
        directory.mkdir()
        write(directory, 400)
        caches.append(make_cache(directory, read_manifest(directory), "train"))
    now, before = caches
    assert isinstance(before, ArrayRecordCache) and not isinstance(now, ArrayRecordCache)
    assert now.num_documents == before.num_documents == 400 and now.num_shards > 2
    number, starts = now.document_starts(0, now.num_tokens)
    assert number == 0 and len(starts) == 400 and (np.diff(starts) >= 100).all()
    np.testing.assert_array_equal(before.document_starts(0, before.num_tokens)[1], starts)
    for cache in caches:
        assert not cache.tokens(60_000, 140_000).any()
    assert token_store.main(["read", str(tmp_path / "now")]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 400


def test_processes_read_their_share(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_SIZE", 16)
    options = ["--documents", "2e3", "--processes", "1", "4", "--scratch", str(tmp_path)]
    token_store.main(["processes", *options])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[3].strip() for row in rows] == ["yes", "yes"]
    one, four = (float(row[2]) for row in rows)
    assert one / 6 < four < one / 2
    assert not list(tmp_path.iterdir())


def test_a_build_is_compared_with_the_tokenizer_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # which it sets
    text = tmp_path / "text"
    options = ["--documents", "80", "--workers", "1", "2", "--text", str(text)]
    token_store.main(["build", *options, "--scratch", str(tmp_path)])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row and row[0].strip() == "80"]
    assert [int(row[2]) for row in rows] == [1, 2] and rows[0][1] == rows[1][1]
    for row in rows:
        shares = [re.fullmatch(r" (\d+)% of (?:\d x )?([\d,]+) ", row[i]) for i in (4, 5, 7)]
        assert all(share and int(share[1]) > 0 for share in shares), row
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    written = (text / "80" / "train-0.jsonl").stat()
    token_store.main(["build", "--documents", "80", "--workers", "1", "--text", str(text)])
    assert (text / "80" / "train-0.jsonl").stat() == written


def test_the_share_of_the_tokenizer_is_a_part_of_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # which it sets
    token_store.main(["share", "--documents", "160", "--scratch", str(tmp_path)])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row and row[0].strip() == "160"]
    assert [row[1].strip() for row in rows] == ["a build in one process", "a worker"]
    for row in rows:
        assert 0 < float(row[3].split()[0]) <= float(row[2])
    assert not list(tmp_path.iterdir())
