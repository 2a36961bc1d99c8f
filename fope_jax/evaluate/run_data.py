"""The text and tokenizer of a run: the token cache it was trained on, wherever that lies now.

run.json keeps the cache's fingerprint and directory, and how the tokenizer that lies in the workdir
is read. Runs of older versions have neither: theirs is the tokenizer of their cache.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from fope_jax.data.cache import open_cache
from fope_jax.data.cache_directories import find_cache
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.config import DataConfig, with_tokenizer_beside
from fope_jax.data.manifest import BUILD, CacheError, MissingCacheError
from fope_jax.data.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    Tokenizer,
    describe_tokenizer,
    load_tokenizer,
)
from fope_jax.storage.files import read_json, read_json_or_empty, write_json
from fope_jax.storage.paths import absolute_path, as_path
from fope_jax.storage.run_paths import CONFIG, LINEAGE, RUN

log = logging.getLogger(__name__)

DATA, CACHE_DIR, TOKENIZER = "data", "cache_dir", "tokenizer"  # keys of run.json


@dataclasses.dataclass(frozen=True)
class RunData:
    """The token cache of a run.

    Attributes:
      config: with the ``cache_dir`` in which the cache was found.
      fingerprint: of the cache that the run was trained on; None before training and for imported
        weights, which read the cache that was built last.
      searched: every ``cache_dir`` that was looked into, if the cache was not found.
      workdir: of the run, for messages.
    """

    config: DataConfig
    fingerprint: str | None = None
    searched: tuple[str, ...] = ()
    workdir: str = ""

    @property
    def is_extension(self) -> bool:
        """Whether the run continues another, from which it has its lengths of evaluation."""
        return bool(self.workdir) and (as_path(self.workdir) / LINEAGE).is_file()

    def open(self, split: str) -> TokenCache:
        """Opens one split, see ``open_cache``; a MissingCacheError says where it was looked for."""
        try:
            return open_cache(self.config, split, self.fingerprint)
        except MissingCacheError as error:
            if self.fingerprint is None and not self.workdir:
                raise
            if self.fingerprint is None:
                command = f"fope data build --config {self.workdir}/{CONFIG}"
                raise MissingCacheError(str(error).replace(BUILD, command)) from error
            raise CacheError(_describe_lost(self)) from error


def find_run_data(workdir: str | Path, data: DataConfig) -> RunData:
    """Finds the token cache that a run was trained on; ``RunData.open`` raises if it is lost.

    It is looked for in ``data.cache_dir``, as seen from the working directory, and in the directory
    that training recorded. Where ``data.cache_dir`` is another than in config.json, somebody said
    where it is: then in that one alone. For a tokenizer file that is gone see
    `with_tokenizer_beside`.
    """
    data = with_tokenizer_beside(data, workdir)
    info, stored = _read(workdir, RUN), _read(workdir, CONFIG).get("data", {})
    fingerprint, places = info.get(DATA, {}).get("fingerprint"), [data.cache_dir]
    if data.cache_dir == stored.get("cache_dir", data.cache_dir):
        places.append(info.get(CACHE_DIR, data.cache_dir))
    if absolute_path(places[0]) == absolute_path(places[-1]):
        places = places[:1]
    for place in places:
        config = dataclasses.replace(data, cache_dir=place)
        if data.corpus == "none" or _has_cache(config, fingerprint):
            return RunData(config, fingerprint, (), str(workdir))
    config = dataclasses.replace(data, cache_dir=places[0])
    return RunData(config, fingerprint, tuple(places), str(workdir))


def describe_data(cache: TokenCache, config: DataConfig) -> dict[str, Any]:
    """What run.json keeps of the data: the cache, and how the workdir's tokenizer is read."""
    return {
        DATA: {"fingerprint": cache.fingerprint, "tokens": cache.num_tokens},
        CACHE_DIR: str(absolute_path(config.cache_dir)),
        TOKENIZER: describe_tokenizer(cache.tokenizer),
    }


def record_cache_dir(workdir: Path, data: RunData) -> None:
    """Keeps in run.json where the token cache of a run was found, for those who read it later."""
    path = workdir / RUN
    if path.is_file():
        place = str(absolute_path(data.config.cache_dir))
        write_json(path, read_json(path) | {CACHE_DIR: place})


def load_run_tokenizer(workdir: str | Path, data: DataConfig) -> Tokenizer:
    """The tokenizer of a run: its own; where it keeps none, that of its token cache, or the one
    that its configuration names.

    Args:
      data: the ``data`` section of the run.

    Raises:
      TokenizerError: the file in the workdir is damaged.
      CacheError: the run keeps no tokenizer, its cache is lost, and so is what ``data`` names.
    """
    description = _read(workdir, RUN).get(TOKENIZER)
    if description is not None:
        return load_tokenizer(as_path(workdir), description)
    try:
        return find_run_data(workdir, data).open("train").tokenizer
    except CacheError:
        if data.tokenizer == BytesTokenizer.kind:
            return BytesTokenizer()
        if data.tokenizer.endswith(".json") and as_path(data.tokenizer).is_file():
            return JsonTokenizer.load(as_path(data.tokenizer))
        raise


def warn_of_another_tokenizer(workdir: str | Path, data: DataConfig) -> None:
    """Warns where ``data.tokenizer`` is a file that now holds another tokenizer than the run's."""
    if has_tokenizer_of_run(workdir, data.tokenizer) is False:
        log.warning(
            "data.tokenizer = %r has changed since %s was trained; the run's own is used, %s",
            data.tokenizer,
            workdir,
            as_path(workdir) / JsonTokenizer.filename,
        )


def has_tokenizer_of_run(workdir: str | Path, tokenizer: str) -> bool | None:
    """Whether the file ``tokenizer`` holds that of a run; None without such a file or run."""
    description = _read(workdir, RUN).get(TOKENIZER)
    if description is None or not tokenizer.endswith(".json"):
        return None
    try:
        content = as_path(tokenizer).read_bytes().decode("utf-8-sig")
        eos = str(description.get("eos"))
        return description["fingerprint"] in (
            JsonTokenizer(content, eos, description.get("control", ())).fingerprint,
            JsonTokenizer.fingerprint_of(content, eos),
        )
    except OSError:  # the run needs the file no longer
        return None
    except Exception:  # the library's; an unreadable file is another one
        return False


def _read(workdir: str | Path, name: str) -> dict[str, Any]:
    return read_json_or_empty(as_path(workdir) / name)


def _has_cache(config: DataConfig, fingerprint: str | None) -> bool:
    try:
        return find_cache(config, fingerprint)[1] is not None
    except (CacheError, OSError):  # damaged or unreachable: opening it says how
        return True


def _describe_lost(data: RunData) -> str:
    places = " nor in ".join(str(absolute_path(place)) for place in data.searched)
    others = [_fingerprint(dataclasses.replace(data.config, cache_dir=p)) for p in data.searched]
    other = ", ".join(fingerprint for fingerprint in others if fingerprint)
    changed = (
        f"; the one there has {other}: its corpus or tokenizer has changed, and its tokens mean "
        "something else to the model"
    )
    return (
        f"{data.workdir} was trained on a token cache with fingerprint {data.fingerprint}, which "
        f"is not in {places}{changed if other else ''}. Where it was moved to: "
        "--config.data.cache_dir=DIR. The same text gives it again: fope data build --config "
        f"{data.workdir}/{CONFIG}"
    )


def _fingerprint(config: DataConfig) -> str:
    """Of the cache that was built last, "" where there is none."""
    try:
        manifest = find_cache(config)[1]
    except (CacheError, OSError):
        return ""
    return manifest.fields["fingerprint"] if manifest else ""
