"""What a run reads, in lines for its start, and whether its text has changed since it was built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError, match_files
from fope_jax.data.sources import Source, examples_line
from fope_jax.storage.files import file_sha256, size_and_mtime
from fope_jax.storage.paths import is_in_bucket

_HASHED = 2**26  # bytes of files with a new time that are read to see if their text is new


def data_lines(config: DataConfig, cache: TokenCache) -> list[str]:
    """Corpus, tokenizer and token cache of a run, a line each."""
    tokenizer = cache.tokenizer
    named = config.tokenizer if config.tokenizer.endswith(".json") else tokenizer.kind
    lines = [
        f"corpus: {_describe_corpus(config, cache)}",
        f"tokenizer: {named}, {tokenizer.vocab_size:,} tokens",
    ]
    if config.corpus != "none":
        lines.append(
            f"token cache: {cache.location}, {cache.num_tokens:,} training tokens of"
            f" {cache.summary['documents']:,} documents"
        )
    return lines


def _describe_corpus(config: DataConfig, cache: TokenCache) -> str:
    tasks = f"; tasks {', '.join(config.tasks)}" if config.tasks else ""
    names = ", ".join(config.mixture) if config.corpus == "mixture" else config.corpus
    counts = []
    for split in SPLITS:
        files = [source for source in cache.sources if source.get("split") == split]
        patterns = getattr(config, f"{split}_files")
        if patterns:
            counts.append(f"{split} {', '.join(patterns)} ({len(files):,} files)")
    return f"{names}{': ' if counts else ''}{'; '.join(counts)}{tasks}"


def changed_text(config: DataConfig, sources: Sequence[Source]) -> list[str]:
    """Files whose text is not the one that a cache was built of; none where the text is not here.

    Files in buckets are not looked at. Of a large file with the same size and another time of
    change nobody knows without reading it: it counts as changed.
    """
    texts = [source for source in sources if source["corpus"] in ("text", "c4")]
    known = {source["path"]: source for source in texts if "sha256" in source}
    known = {path: source for path, source in known.items() if not is_in_bucket(path)}
    here = {path for path in known if Path(path).is_file()}
    if not here:
        return []
    changed = [path for path in here if _is_changed(known[path])]
    matched = _matched_files(config)
    added = matched - known.keys()
    removed = known.keys() - here if matched else set()
    return sorted({*changed, *added, *removed})


def changed_text_line(names: Sequence[str]) -> str:
    """A warning of files of ``changed_text``."""
    return (
        f"the text has changed since this token cache was built ({examples_line(names)}): the run"
        " reads the older text; `fope data build` with the same configuration builds the new one"
        " beside it, for runs that begin afterwards"
    )


def _matched_files(config: DataConfig) -> set[str]:
    if not config.train_files:
        return set()
    names: set[str] = set()
    for split in SPLITS:
        try:
            paths: Iterable[Path] = match_files(config, split)
        except (CorpusError, OSError):
            return set()
        names |= {str(path) for path in paths if not is_in_bucket(path)}
    return names


def _is_changed(source: Source) -> bool:
    path = Path(source["path"])
    size, changed = size_and_mtime(path)
    if size != source["size"]:
        return True
    return changed != source["mtime_ns"] and (
        size > _HASHED or file_sha256(path) != source["sha256"]
    )
