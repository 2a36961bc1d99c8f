"""Whatever a file holds, its reader returns or raises an error of ours that has a message.

One line of ``READERS`` is one reader: what it is given, and the errors that it may raise. Any other
exception, a KeyError or a RecursionError, is a defect.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fope_jax.config import ConfigError, build_experiment
from fope_jax.config import experiment as configs
from fope_jax.config import files as config_files
from fope_jax.data import DataConfig, corpora
from fope_jax.data.corpora import CorpusError
from fope_jax.data.manifest import CacheError, read_manifest
from fope_jax.data.tokenizers import (
    BytesTokenizer,
    TokenizerError,
    describe_tokenizer,
    load_tokenizer,
)
from fope_jax.doctor import as_json, as_text, examine
from fope_jax.evaluate.metrics import read_rows
from fope_jax.interop import weights
from fope_jax.interop.huggingface import from_config
from fope_jax.interop.rope_parameters import from_rope_parameters
from fope_jax.interop.serving import fope_from_rope_parameters
from fope_jax.model.sharding import MeshConfig
from fope_jax.position import from_spec
from fope_jax.report import rows as report
from fope_jax.report.rows import ReportError
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.paths import path_within
from fope_jax.tpu.topology import TopologyError, parse_topology
from tests.fuzz.damage import changed, damaged

EXPERIMENT = {
    "name": "fope",
    "seed": 1,
    "model": {"vocab_size": 300, "d_model": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 16},
    "position": {
        "method": "by_layer",
        "methods": [
            {"method": "fope", "training_length": 16},
            {
                "method": "rope",
                "scaling": [{"scaling": "yarn", "factor": 4.0, "original_length": 16}],
            },
        ],
    },
    "data": {
        "corpus": "text",
        "train_files": ["a/*.txt"],
        "validation_files": ["b/*.txt"],
        "tokenizer": "bytes",
        "cache_dir": "cache",
    },
    "train": {"steps": 12, "batch_size": 2, "length": 16, "first_lengths": ["8=4"]},
    "evaluate": {"lengths": [1, 2], "passkey_depths": [0.5]},
    "mesh": {"data": 1, "fsdp": -1},
}
TABLE = {"file": "train-00000.documents.npz", "count": 2, "sha256": "b" * 64}
SHARD = {
    "file": "train-00000.tokens",
    "tokens": 40,
    "sha256": "a" * 64,
    "index": {"file": "train-00000.index", "sha256": "c" * 64},
    "documents": TABLE,
}
COUNTS = {
    "documents": 2,
    "bytes": 38,
    "empty_documents": 0,
    "changed_documents": 0,
    "bad_documents": 0,
    "first_bad": [],
}
HELD_OUT = {
    "file": "validation-00000.tokens",
    "tokens": 40,
    "sha256": "a" * 64,
    "index": {"file": "validation-00000.index", "sha256": "c" * 64},
    "documents": TABLE | {"file": "validation-00000.documents.npz"},
}
MANIFEST = {
    "fingerprint": "f" * 64,
    "content": "c" * 64,
    "config": {},
    "dtype": "<u2",
    "tokenizer": describe_tokenizer(BytesTokenizer()),
    "block_tokens": 16,
    "shard_tokens": 64,
    "splits": {
        "train": COUNTS | {"shards": [SHARD]},
        "validation": COUNTS | {"shards": [HELD_OUT]},
    },
    "sources": [
        {
            "path": "a.txt",
            "size": 3,
            "mtime_ns": 1,
            "corpus": "text",
            "split": "train",
            "sha256": "d" * 64,
        }
    ],
}
IDS = {"variant": "rope", "seed": 0, "step": 10, "training_length": 16}
METRICS = [
    {"kind": "train", "step": 10, "tokens_seen": 320, "loss": 2.5},
    {
        "kind": "perplexity",
        "protocol": "same_tokens",
        "split": "validation",
        "context": 16,
        "scored_per_window": 8,
        "windows": 2,
        "document": None,
        "nats": 40.0,
        "tokens": 16,
        "bytes": 30,
        "correct": 3,
    }
    | IDS,
    {
        "kind": "passkey",
        "template": "compact",
        "context": 16,
        "depth": 0.5,
        "correct": 0,
        "total": 2,
        "nats": 3.0,
        "tokens": 4,
    }
    | IDS,
]
LLAMA = {
    "model_type": "smollm3",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "no_rope_layers": [1, 0],
    "layer_types": ["full_attention"] * 2,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
    },
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "head_dim": 8,
}
YARN = {"scaling": "yarn", "factor": 4.0, "original_length": 32}
EXPORTED = LLAMA | {
    "fope_jax": {
        "fingerprint": "0" * 16,
        "position": {
            "method": "by_layer",
            "methods": [{"method": "rope", "scaling": [YARN]}, {"method": "nope"}],
        },
    }
}
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 32,
}
FOPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "num_inv_freq": 2,
    "fope_sep_head": True,
    "fope_init_factor": 0.1,
}
INDEX = {"metadata": {"total_size": 4}, "weight_map": {"a": "model-1.safetensors"}}


class Reader(NamedTuple):
    """One reader.

    Attributes:
      given: what it is given.
      read: directory and what is given -> anything.
      errors: what it may raise.
    """

    given: Any
    read: Callable[[Path, Any], Any]
    errors: tuple[type[Exception], ...]


def file(name, read):
    """A reader of bytes, given in a file."""

    def of_file(directory, content):
        path = directory / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read(path)

    return of_file


def json_of(good):
    """A JSON file's content, changed as a value or as bytes."""
    return changed(good) | damaged(json.dumps(good).encode())


def run_file(name):
    """A run's directory with one file from elsewhere."""

    def read(path):
        good = {"config.json": EXPERIMENT, "run.json": {}}
        for other in good.keys() - {name}:
            (path.parent / other).write_text(json.dumps(good[other]))
        lines = path.parent / "metrics.jsonl"
        if name != lines.name:
            lines.write_text("".join(json.dumps(row) + "\n" for row in METRICS))
        return report.read_run(path.parent)

    return file(name, read)


LINES = "".join(json.dumps(row) + "\n" for row in METRICS).encode()
metrics = damaged(LINES) | st.lists(
    st.sampled_from(METRICS).flatmap(lambda row: changed(row)), max_size=3
).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())
keys = st.sampled_from(
    [
        f"{section}.{field}"
        for section, cls in configs.SECTIONS.items()
        for field in configs.field_types(cls)
    ]
    + ["name", "seed", "position.method", "position.scaling", "position.theta", "position", "x"]
)
texts = st.text(max_size=12) | st.sampled_from(
    [
        "[{'scaling': 'yarn'}]",
        "{[]: 1}",
        "(" * 300,
        "[" * 5000,
        "1" * 5000,
        "none",
        "true",
        "nan",
        "[[[]]]",
        "{'method': {}}",
        "[None]",
        "-1",
        "1e999",
        "()",
    ]
)
overrides = st.builds("{}={}".format, keys, texts) | st.text(max_size=12)
sizes = st.sampled_from(["1", "-1", "0", "2", "16", "9" * 20, "\u0663", "1.5", "", "x"])
axes = st.lists(
    st.builds("{}={}".format, st.sampled_from(["data", "fsdp", "dcn_data", "date"]), sizes),
    max_size=4,
).map(",".join) | st.text(max_size=12)
slices = st.builds(
    "{}:{}".format,
    st.sampled_from(["v5e", "2xv5p", "0xv6e", "v4", "v9", ""]),
    st.lists(sizes, max_size=3).map("x".join),
) | st.text(max_size=12)


def override(_, text):
    config = configs.ConfigDict(EXPERIMENT | {"position": {"method": "rope", "theta": 1e4}})
    return config_files.apply_overrides(config, [text])


FILES = {
    "files": {
        "metadata.json": {"sha256": hashlib.sha256(b'{"metadata": {}}').hexdigest(), "bytes": 16}
    }
}


def checkpoint(directory, content):
    """The metadata of a checkpoint with a manifest from elsewhere."""
    step = directory / "1"
    step.mkdir(exist_ok=True)
    (step / "metadata.json").write_text('{"metadata": {}}')
    file("manifest.json", lambda _: None)(step, content)
    store = CheckpointStore(directory)
    try:
        return store.metadata(1)
    finally:
        store.close()


def doctored(name):
    """A run with one file from elsewhere, which the doctor must survive."""

    def read(path):
        config = path.parent / "config.json"
        if name != config.name and not config.exists():
            config.write_text(json.dumps(EXPERIMENT))
        checks = examine(path.parent)
        assert len(checks) == 6
        json.dumps(as_json(path.parent, checks))
        return as_text(path.parent, checks)

    return file(name, read)


def documents(path):
    return list(corpora.read_file(path)), list(corpora.read_file(path, skip_bad=True))


READERS = {
    "configuration": Reader(changed(EXPERIMENT), lambda _, x: build_experiment(x), (ConfigError,)),
    "config.json": Reader(
        json_of(EXPERIMENT),
        file("c.json", lambda p: config_files.load_config(str(p))),
        (ConfigError,),
    ),
    "override": Reader(overrides, override, (ConfigError,)),
    "position specification": Reader(
        changed(EXPERIMENT["position"]),
        lambda _, x: build_experiment(EXPERIMENT | {"position": x}),
        (ConfigError,),
    ),
    "metrics.jsonl": Reader(metrics, file("m.jsonl", read_rows), (ValueError,)),
    "metrics.jsonl in the report": Reader(metrics, run_file("metrics.jsonl"), (ReportError,)),
    "config.json in the report": Reader(
        json_of(EXPERIMENT), run_file("config.json"), (ReportError,)
    ),
    "run.json in the report": Reader(json_of({"a": 1}), run_file("run.json"), (ReportError,)),
    "cache manifest": Reader(
        json_of(MANIFEST), file("manifest.json", lambda p: read_manifest(p.parent)), (CacheError,)
    ),
    "cache tokenizer": Reader(
        damaged(b"\x0a\x07<model>"),
        file(
            "tokenizer.model",
            lambda p: load_tokenizer(p.parent, {"kind": "sentencepiece", "fingerprint": "0"}),
        ),
        (TokenizerError,),
    ),
    "tokenizer.json": Reader(
        json_of({"added_tokens": [{"content": "</s>"}], "model": {"type": "BPE"}}),
        file(
            "tokenizer.json",
            lambda p: load_tokenizer(p.parent, {"kind": "json", "fingerprint": "0"}),
        ),
        (TokenizerError,),
    ),
    "data section": Reader(
        changed(EXPERIMENT["data"]),
        lambda _, x: configs.build_experiment(EXPERIMENT | {"data": x}).data.components,
        (ConfigError,),
    ),
    "lines of text": Reader(
        damaged(b'{"text": "one"}\n\n{"text": "two\\u00e9"}\n'),
        file("a.jsonl", documents),
        (CorpusError,),
    ),
    "compressed text": Reader(
        damaged(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03K\xccI,\x02\x00"),
        file("a.txt.gz", documents),
        (CorpusError,),
    ),
    "rope_parameters": Reader(
        changed(ROPE), lambda _, x: from_rope_parameters(x, head_dim=4), (ValueError,)
    ),
    "rope_parameters of FoPE": Reader(
        changed(FOPE),
        lambda _, x: fope_from_rope_parameters(x, head_dim=8, training_length=None),
        (ValueError,),
    ),
    "Hugging Face config.json": Reader(changed(LLAMA), lambda _, x: from_config(x), (ValueError,)),
    "config.json of our export": Reader(
        changed(EXPORTED), lambda _, x: from_config(x), (ValueError,)
    ),
    "safetensors index": Reader(
        json_of(INDEX),
        file(weights.INDEX, lambda p: weights._weight_files(p.parent)),
        (ValueError, FileNotFoundError),
    ),
    "mesh": Reader(axes, lambda _, x: MeshConfig.parse(x), (ValueError,)),
    "topology": Reader(slices, lambda _, x: parse_topology(x), (TopologyError,)),
    "checkpoint manifest": Reader(json_of(FILES), checkpoint, (CheckpointError,)),
    "metrics.jsonl under the doctor": Reader(metrics, doctored("metrics.jsonl"), ()),
    "config.json under the doctor": Reader(json_of(EXPERIMENT), doctored("config.json"), ()),
    "lineage.json under the doctor": Reader(
        json_of({"parent": {"run": "runs/parent"}}), doctored("lineage.json"), ()
    ),
    "run.lock under the doctor": Reader(
        json_of({"host": "box", "pid": 12}), doctored("run.lock"), ()
    ),
    "file name": Reader(st.text(), lambda directory, x: path_within(directory, x), (ValueError,)),
}


def attack(name, directory, examples):
    """Gives a reader ``examples`` inputs, the same ones on every run."""
    reader = READERS[name]

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.given)
    def one(content):
        try:
            reader.read(directory, content)
        except reader.errors as error:
            assert len(str(error)) > 10, error

    one()


@pytest.mark.parametrize("name", READERS)
def test_a_reader_raises_errors_of_ours_alone(name, tmp_path):
    attack(name, tmp_path, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_raises_errors_of_ours_alone_at_length(name, tmp_path):
    attack(name, tmp_path, 2_000)


@pytest.mark.parametrize("name", READERS)
def test_the_good_input_is_read(name, tmp_path):
    """What the changes begin from is valid, or the fuzzing above would test its first check."""
    good = {
        "configuration": EXPERIMENT,
        "config.json": EXPERIMENT,
        "override": "train.steps=30",
        "position specification": EXPERIMENT["position"],
        "metrics.jsonl": LINES,
        "metrics.jsonl in the report": LINES,
        "config.json in the report": EXPERIMENT,
        "run.json in the report": {},
        "cache manifest": MANIFEST,
        "data section": EXPERIMENT["data"],
        "lines of text": b'{"text": "one"}\n',
        "rope_parameters": ROPE,
        "mesh": "data=2,fsdp=-1",
        "rope_parameters of FoPE": FOPE,
        "Hugging Face config.json": LLAMA,
        "config.json of our export": EXPORTED,
        "topology": "v5e:4x4",
        "file name": "a/b",
        "checkpoint manifest": FILES,
    }
    if name in good:
        READERS[name].read(tmp_path, good[name])
    assert isinstance(DataConfig(), DataConfig)
    assert from_spec(EXPERIMENT["position"]["methods"][1]).scaling[0].factor == 4.0
