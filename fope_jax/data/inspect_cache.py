"""Describes token caches: `fope data inspect`."""

from __future__ import annotations

import heapq

import numpy as np

from fope_jax.data.cache import open_cache
from fope_jax.data.cache_directories import list_caches
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.sources import source_warnings
from fope_jax.storage.paths import as_path, is_in_bucket


def inspect(config: DataConfig, samples: int = 3) -> str:
    """Describes a cache: sizes, documents by length, and ``samples`` of 64 tokens of each split."""
    if config.corpus == "none":
        return f"no text; tasks of the training batches: {', '.join(config.tasks)}"
    lines = []
    for split in SPLITS:
        cache = open_cache(config, split)
        cache.verify()
        if not lines:
            tokenizer = cache.tokenizer
            lines = [
                f"token cache  {cache.location}",
                f"fingerprint  {cache.fingerprint}",
                f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size:,} tokens,"
                f" {tokenizer.fingerprint[:16]}...",
            ]
        lines += ["", *_describe_split(cache, samples)]
    return "\n".join([*lines, *_describe_caches(config)])


def _describe_caches(config: DataConfig) -> list[str]:
    """The caches in ``cache_dir``, of this configuration and of others."""
    directory = as_path(config.cache_dir)
    if is_in_bucket(directory):
        return []
    lines = ["", f"caches in {directory}, * of which training reads (the last of its text)"]
    for entry in list_caches(directory):
        mark = "*" if entry.is_current else " "
        lines.append(
            f"{mark} {entry.directory.name:<60} {entry.size / 1e6:>10,.1f} MB {entry.tokens:>15,}"
            f" tokens  {entry.fingerprint[:12]}"
        )
    return [
        *lines,
        "  A run names the fingerprint that it was trained on (run.json). To delete a cache that no"
        " run needs: rm -r DIRECTORY",
    ]


def _describe_split(cache: TokenCache, samples: int) -> list[str]:
    summary, lengths, longest = cache.summary, np.zeros((64, 2), np.int64), []
    for number in range(cache.num_shards):  # one at a time: all of them may not fit into memory
        table = cache.shard_documents(number)
        lengths += _count_lengths(table["length"])
        rows = zip(table["length"].tolist(), (-table["start"]).tolist(), table["name"], strict=True)
        longest = heapq.nlargest(5, [*longest, *rows])
    text_tokens = cache.num_tokens - cache.num_documents
    lines = [
        f"{cache.split}: {cache.num_tokens:,} tokens, {cache.num_documents:,} documents,"
        f" {summary['bytes']:,} bytes, {summary['bytes'] / text_tokens:.3f} bytes a token",
        f"  without text: {summary['empty_documents']:,} documents;"
        f" changed by the tokenizer: {summary['changed_documents']:,};"
        f" left out as unreadable: {summary.get('bad_documents', 0):,}",
        *(f"    {reason}" for reason in summary.get("first_bad", [])),
        *(f"    changed: {name}" for name in summary.get("first_changed", [])),
        *(f"  {line}" for line in source_warnings(cache.sources, cache.split)),
        "  tokens a document      documents        tokens",
        *_histogram(lengths),
        *(f"  {length:>10,} tokens  {name}" for length, _, name in longest),
    ]
    for start in np.linspace(0, max(0, cache.num_tokens - 64), samples).astype(int):
        ids = cache.tokens(start, min(start + 64, cache.num_tokens))
        lines.append(f"  at {start:,}: {cache.tokenizer.decode(ids)!r}")
    return lines


def _count_lengths(lengths: np.ndarray) -> np.ndarray:
    """``[64, 2]``, documents and tokens of documents of ``2**i`` tokens or more, up to twice that.

    >>> _count_lengths(np.array([3, 2, 9]))[:4].tolist()
    [[0, 0], [2, 5], [0, 0], [1, 9]]
    """
    power = np.frexp(lengths.astype(np.float64))[1] - 1
    counts = np.zeros((64, 2), np.int64)
    np.add.at(counts, power, np.stack([np.ones_like(lengths), lengths], axis=-1))
    return counts


def _histogram(counts: np.ndarray) -> list[str]:
    """Lines of `_count_lengths`.

    >>> print("\\n".join(_histogram(_count_lengths(np.array([3, 2, 9])))))
      2 to 3                         2             5
      8 to 15                        1             9
    """
    lines = []
    for exponent in np.flatnonzero(counts[:, 0]).tolist():
        documents, tokens = counts[exponent]
        label = f"{2**exponent:,} to {2 ** (exponent + 1) - 1:,}"
        lines.append(f"  {label:<20} {documents:>11,} {tokens:>13,}")
    return lines
