"""Checkpoints that transformers wrote, with what it computes of them; see goldens/README.md."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from fope_jax.interop.families import FAMILIES
from fope_jax.interop.weights import export_weights, import_weights, tensor_views
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, position_variables, split
from fope_jax.position import (
    AdjustedBase,
    ALiBi,
    ByLayer,
    DynamicNTK,
    FoPE,
    Llama3,
    LogitScaling,
    NoPE,
    RoPE,
    SlidingWindow,
    T5Bias,
    YaRN,
    fingerprint,
    from_spec,
)
from tests.interop.weights_runs import logits_of_parts

GOLDENS = Path(__file__).parents[1] / "goldens" / "weights"
EMBEDDING = "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 123\n"
WINDOWED = ("mistral", "ministral", "qwen2", "qwen3_windows", "olmo3", "smollm3_windows")
MODELS = ("llama", "smollm", "qwen3", "olmo2", "smollm3", *WINDOWED)
WINDOW = 7  # tokens, of those that have one
LENGTHS = (12, 40)
ROPE_TYPES = json.loads((GOLDENS / "rope_types.json").read_text())
SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 24,
    "init_std": 0.3,
}
SERVED = FoPE(40, theta=100.0, share_layers=True, outputs="surviving")


@pytest.fixture(scope="module")
def logits():
    return dict(np.load(GOLDENS / "logits.npz"))


@pytest.mark.fast("qwen3", "olmo3")
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(logits, name):
    imported = import_weights(GOLDENS / name)
    # Causal: the longer text has each length below, at and above a window.
    for length in LENGTHS[name in WINDOWED :]:
        ours = logits_of_parts(imported, logits[f"tokens/{length}"])
        np.testing.assert_allclose(ours, logits[f"{name}/default/{length}"], rtol=1e-4, atol=1e-4)
    assert isinstance(imported.position, ByLayer) == name.startswith(("smollm3", "olmo3"))


@pytest.mark.parametrize(
    ("name", "other"),
    [("mistral", "ministral"), ("qwen3_windows", "qwen3"), ("smollm3_windows", "smollm3")],
)
def test_the_windows_of_the_goldens_matter(logits, name, other):
    """The same weights with another window: equal within it, and far from equal beyond."""
    difference = np.abs(logits[f"{name}/default/40"] - logits[f"{other}/default/40"]).max((0, 2))
    assert difference[:WINDOW].max() < 1e-4 < 0.05 < difference[WINDOW:].min()


def with_config(directory, source="llama", **changes):
    """A copy of a golden directory with keys of its config.json changed; None removes one."""
    shutil.copytree(GOLDENS / source, directory, dirs_exist_ok=True)
    values = json.loads((directory / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.fast("longrope")
@pytest.mark.parametrize("rope", [name for name in ROPE_TYPES if name != "default"])
def test_every_rope_type_within_the_trained_length_and_beyond(logits, tmp_path, rope):
    imported = import_weights(with_config(tmp_path, **ROPE_TYPES[rope]))
    for length in LENGTHS:
        expected = logits[f"llama/{rope}/{length}"]
        ours = logits_of_parts(imported, logits[f"tokens/{length}"])
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    # What the type changes is far larger than what is allowed above.
    assert np.abs(expected - logits["llama/default/40"]).max() > 0.1


# ---------------------------------------------------------------------------- there and back


def export(directory, imported, **options):
    export_weights(
        directory, *imported[:4], **{"length": 16, "extra_keys": imported.extra_keys} | options
    )
    return directory


def tensors(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same(imported, other):
    assert imported[:2] == other[:2]
    for index in (2, 3):
        jax.tree.map(np.testing.assert_array_equal, imported[index], other[index])


@pytest.mark.fast("smollm", "olmo3", "smollm3_windows")
@pytest.mark.parametrize("name", MODELS)
def test_export_gives_back_every_bit_and_every_key(tmp_path, name):
    imported = import_weights(GOLDENS / name)
    out = export(tmp_path / "out", imported, shard_bytes=12_000)
    original, written = tensors(GOLDENS / name), tensors(out)
    assert original.keys() == written.keys()
    for key, value in original.items():
        assert value.dtype == written[key].dtype and value.tobytes() == written[key].tobytes(), key
    again = import_weights(out)
    assert_same(again, imported)
    before, after = (json.loads((d / "config.json").read_text()) for d in (GOLDENS / name, out))
    assert {key: after[key] for key in before if key != "no_rope_layer_interval"} == {
        key: value for key, value in before.items() if key != "no_rope_layer_interval"
    }
    windows = {"windows"} if imported.config.windows else set()
    assert after["fope_jax"].keys() == {"position", "fingerprint"} | windows
    assert again.extra_keys == {
        **imported.extra_keys,
        **{k: v for k, v in again.extra_keys.items() if v is None},
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == original.keys()
    files = sorted(out.glob("*.safetensors"))
    assert len(set(index["weight_map"].values())) == len(files) > 1
    for file in files:
        sizes = [x.nbytes for x in load_file(file).values()]
        assert sum(sizes) <= 12_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in original.values())


def test_the_dtype_of_the_tensors_can_be_chosen(tmp_path):
    imported = import_weights(GOLDENS / "smollm")
    assert {str(x.dtype) for x in tensors(GOLDENS / "smollm").values()} == {"bfloat16"}
    assert {x.dtype for x in jax.tree.leaves(imported.params)} == {np.dtype("float32")}
    for dtype in ("float32", "float16"):
        out = export(tmp_path / dtype, imported, dtype=dtype)
        assert {str(x.dtype) for x in tensors(out).values()} == {dtype}
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        assert_same(import_weights(out), imported)
    imported.params["final_norm"][0] = 1e6
    with pytest.raises(ValueError, match="dtype='float16': model.norm.weight has numbers beyond"):
        export(tmp_path / "narrow", imported, dtype="float16")
    both = imported._replace(
        extra_keys=imported.extra_keys | {"dtype": "float16", "torch_dtype": "float16"}
    )
    said = json.loads(
        (export(tmp_path / "both", both, dtype="bfloat16") / "config.json").read_text()
    )
    assert said["dtype"] == said["torch_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype='int8': expected one of float32, bfloat16, float1"):
        export(tmp_path / "unknown", imported, dtype="int8")


def fingerprint_of(parts):
    config, position, _, constants = parts
    return fingerprint(position, config.shape, position_variables({}, constants)).hash


def own_model(position, **changes):
    """Parts of a model of ours, in the order of ``ImportedModel``."""
    config = TransformerConfig(**(SIZES | changes))
    _, params, constants = split(Transformer(config, position, rngs=nnx.Rngs(2)))
    return config, position, params, constants


OWN = {
    "llama": (RoPE(theta=100.0), {}),
    "qwen3": (RoPE(scaling=(YaRN(2.0, 32),)), {"qk_norm": "head", "tie_embeddings": True}),
    "olmo2": (
        RoPE(scaling=(DynamicNTK(2.0, 8),)),
        {"norm": "post", "qk_norm": "width", "head_dim": 6},
    ),
    "smollm3": (ByLayer((RoPE(), NoPE())), {"num_layers": 4}),
    "smollm3 without any": (NoPE(), {}),
    "mistral": (RoPE(theta=100.0), {"windows": (8,)}),
    "ministral": (RoPE(), {"windows": (8, None), "tie_embeddings": True}),
    "qwen2": (RoPE(), {"qkv_bias": True}),
    "qwen2 with a window": (SlidingWindow(RoPE(), 8), {"qkv_bias": True}),
    "olmo3": (
        ByLayer((SlidingWindow(RoPE(), 8), RoPE(scaling=(YaRN(2.0, 32),)))),
        {"norm": "post", "qk_norm": "width"},
    ),
    "llama, base adjusted": (RoPE(scaling=(AdjustedBase(5e5), Llama3(4.0, 8))), {}),
    "qwen3 with FoPE": (SERVED, {"qk_norm": "head"}),
    "llama with FoPE": (dataclasses.replace(SERVED, heads="shared", sigma=2.0), {}),
    "llama with FoPE, one matrix": (dataclasses.replace(SERVED, separate_sine=False), {}),
    "llama with trained FoPE": (
        FoPE(40, theta=100.0, outputs="surviving", learnable=True),
        {"num_layers": 1},
    ),
}


@pytest.mark.fast(
    "smollm3", "olmo3", "qwen2 with a window", "llama with trained FoPE", "qwen3 with FoPE"
)
@pytest.mark.parametrize("name", OWN)
def test_models_of_our_own_go_out_as_their_family_and_come_back_the_same(tmp_path, name):
    position, changes = OWN[name]
    parts = own_model(position, **changes)
    export_weights(tmp_path, *parts, length=24)
    values = json.loads((tmp_path / "config.json").read_text())
    family = name.split()[0].strip(",")
    assert values["model_type"] == family
    assert values["architectures"] == [FAMILIES[family].architecture]
    imported = import_weights(tmp_path)
    assert imported.position == position
    same = {field: getattr(parts[0], field) for field in ("init_std", "head_dim")}
    assert dataclasses.replace(imported.config, **same) == parts[0]
    for ours, back in zip(parts[2:], imported[2:4], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, back)
    # The fingerprint is that of checkpoints and covers FoPE's coefficients.
    assert values["fope_jax"]["fingerprint"] == fingerprint_of(parts)
    assert from_spec(values["fope_jax"]["position"]) == position


def test_the_length_is_the_models_but_for_the_scaling_that_reads_it(tmp_path):
    for name, (scaling, expected) in {
        "dynamic": (DynamicNTK(2.0, 8), 8),
        "yarn": (YaRN(4.0, 8), 24),
    }.items():
        export_weights(tmp_path / name, *own_model(RoPE(scaling=(scaling,))), length=24)
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert values["max_position_embeddings"] == expected, name


def test_fope_goes_out_as_serving_engines_read_it(tmp_path):
    export_weights(tmp_path, *own_model(SERVED), length=200, dtype="bfloat16")
    values = json.loads((tmp_path / "config.json").read_text())
    count = len(SERVED.frequencies(4))
    assert values["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 100.0,
        "use_fope": True,
        "num_inv_freq": count,
        "fope_sep_head": True,
        "fope_init_factor": 0.3,
    }
    written = tensors(tmp_path)
    for name in ("model.rotary_emb.cos_coef", "model.rotary_emb.sin_coef"):
        assert (written[name].shape, str(written[name].dtype)) == ((2, count, count), "float32")
    assert str(written["lm_head.weight"].dtype) == "bfloat16"

    # A directory of an engine has no key of ours: the shortest training length is taken.
    del values["fope_jax"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    foreign = import_weights(tmp_path).position
    assert isinstance(foreign, FoPE) and foreign.training_length < SERVED.training_length
    np.testing.assert_array_equal(foreign.frequencies(4), SERVED.frequencies(4))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path)


def test_changed_coefficients_are_refused_with_both_fingerprints(tmp_path):
    parts = own_model(SERVED)
    export_weights(tmp_path, *parts, length=40)
    change_tensors(tmp_path, lambda t: t["model.rotary_emb.cos_coef"].__setitem__((0, 0, 0), 1.5))
    own = fingerprint_of(parts)
    with pytest.raises(ValueError, match=f"exported with fingerprint {own}, but .* [0-9a-f]{{16}}"):
        import_weights(tmp_path)


def test_changed_rope_parameters_are_refused(tmp_path):
    export_weights(tmp_path, *own_model(RoPE(theta=100.0)), length=40)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"]["rope_theta"] = 200.0
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"'rope_theta': 200.0\}.*, but fope_jax.position.* 100.0"):
        import_weights(tmp_path)
    del values["fope_jax"]
    path.write_text(json.dumps(values))
    assert import_weights(tmp_path).position == RoPE(theta=200.0)
    path.write_text(json.dumps(values | {"fope_jax": 3}))
    with pytest.raises(ValueError, match="fope_jax=3: expected 'position' and 'fingerprint'"):
        import_weights(tmp_path)


# ---------------------------------------------------------------------------- files


def test_tensors_that_do_not_fit_are_named_with_their_shapes(tmp_path):
    with_config(tmp_path)

    def change(stored):
        del stored["model.layers.1.self_attn.q_proj.weight"]
        stored["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        stored["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 32), np.float32)
        stored["model.norm.weight"] = np.zeros(24, np.int8)
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    change_tensors(tmp_path, change)
    with pytest.raises(ValueError) as caught:
        import_weights(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        "  1 missing: model.layers.1.self_attn.q_proj.weight [32, 24]",
        "  1 unexpected: model.layers.0.self_attn.q_proj.bias [32]",
        "  1 of another shape: model.layers.0.mlp.up_proj.weight [24, 32], expected [32, 24]",
        "  1 of another dtype: model.norm.weight I8, expected one of F32, BF16, F16",
    ]


def test_a_long_list_of_tensors_is_cut_and_counted(tmp_path):
    with_config(tmp_path, "olmo2", model_type="llama", head_dim=6)
    with pytest.raises(ValueError, match="2 missing: .*\n  6 unexpected: ([^;]*; ){5}[^;]*$"):
        import_weights(tmp_path)
    change_tensors(tmp_path, lambda stored: stored.clear() or stored.update(x=np.zeros(1)))
    with pytest.raises(ValueError, match=r"21 missing: ([^;]*; ){6}\.\.\.\n  1 unexpected: x \[1"):
        import_weights(tmp_path)


def test_embeddings_said_to_be_tied_must_be(tmp_path):
    with_config(tmp_path, "smollm")
    embedding = tensors(tmp_path)["model.embed_tokens.weight"]
    change_tensors(tmp_path, lambda stored: stored.update({"lm_head.weight": embedding}))
    assert_same(import_weights(tmp_path), import_weights(GOLDENS / "smollm"))
    change_tensors(tmp_path, lambda stored: stored.update({"lm_head.weight": -embedding}))
    with pytest.raises(ValueError, match="tie_word_embeddings=True, but lm_head.weight differs"):
        import_weights(tmp_path)


def test_files_that_are_not_there_or_damaged_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of Hugging Face: no config.json"):
        import_weights(tmp_path)
    with_config(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    (tmp_path / "again.safetensors").write_bytes(content)
    assert import_weights(tmp_path).config.mlp_dim == 32  # model.safetensors is the one
    weights.rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is in .*/again.safetensors and in .*/other.safetensors"):
        import_weights(tmp_path)
    (tmp_path / "again.safetensors").write_bytes(content[:-10])
    (tmp_path / "other.safetensors").unlink()
    with pytest.raises(ValueError, match="again.safetensors is damaged or no safetensors file"):
        import_weights(tmp_path)
    (tmp_path / "again.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no .*; pytorch_model.bin: save it as safetensors"):
        import_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON: Expecting property name"):
        import_weights(tmp_path)
    with_config(tmp_path, "qwen3")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names model-00002-of-00003.safetensors: there is"):
        import_weights(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_clone_without_git_lfs_is_named(tmp_path, name):
    with_config(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, .*`git lfs pull`"):
        import_weights(tmp_path)


def test_a_bucket_makes_no_directory_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imported = import_weights(GOLDENS / "llama")
    for act in (import_weights, lambda directory: export(directory, imported)):
        with pytest.raises(ValueError, match="'gs://bucket/model'; accepted: a path of this mach"):
            act("gs://bucket/model")
    assert not list(tmp_path.iterdir())


def test_what_is_no_directory_of_a_checkpoint_is_told_for_what_it_is(tmp_path):
    with_config(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"config.json is no .*: it is a file, no directory"
    ):
        import_weights(tmp_path / "config.json")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        FileNotFoundError, match="no directory; `fope import .*x.gguf --workdir RUN`"
    ):
        import_weights(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError, match="there is no such directory; hf:ORG/NAME"):
        import_weights("hf:organisation/model")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="has no .*safetensors"):
        import_weights(tmp_path)


def marked(directory, name, value, source="qwen3"):
    """A file with all tensors of a golden directory, each of them full of ``value``."""
    save_file(
        {k: np.full_like(x, value) for k, x in tensors(GOLDENS / source).items()}, directory / name
    )


def embedding_of(directory):
    return np.unique(import_weights(directory).params["embedding"]).tolist()


def test_the_files_are_those_that_transformers_reads(tmp_path, caplog):
    """Its order: model.safetensors, then the index; nothing else is mixed in, and it is said."""
    old = np.unique(tensors(GOLDENS / "qwen3")["model.embed_tokens.weight"]).tolist()
    with_config(tmp_path, "qwen3")
    for name in ("consolidated.safetensors", "model-00004-of-00004.safetensors"):
        marked(tmp_path, name, 5)
    assert embedding_of(tmp_path) == old  # what the index does not name is not read
    assert "model-00004-of-00004.safetensors ignored" in caplog.text
    assert "consolidated" not in caplog.text
    caplog.clear()
    marked(tmp_path, "model.safetensors", 7)
    assert embedding_of(tmp_path) == [7.0]
    assert "read from model.safetensors" in caplog.text
    assert "model.safetensors.index.json, model-00001-of-00003.safetensors" in caplog.text
    for path in tmp_path.glob("model-*.safetensors"):
        path.unlink()
    assert embedding_of(tmp_path) == [7.0]  # the index names shards that are gone
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"older, as transformers has it")
    assert embedding_of(tmp_path) == [7.0]
    # Without a name that transformers knows, it would read the .bin instead.
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match="no model.safetensors; pytorch_model.bin: save it"):
        import_weights(tmp_path)


def test_a_tensor_in_two_shards_of_an_index_is_named(tmp_path):
    with_config(tmp_path, "qwen3")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    first, second = map(load_file, shards[:2])
    save_file(second | dict(list(first.items())[:1]), shards[1])
    with pytest.raises(
        ValueError, match="is in .*-00001-of-00003.*and in .*00002-of-00003.*: remo"
    ):
        import_weights(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_not_passed_over(tmp_path, name):
    with_config(tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"has {name}: an adapter, which changes the model; merge"):
        import_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "consolidated.00.pth", "tf_model.h5", "x.msgpack"])
def test_weights_of_another_format_are_named(tmp_path, name):
    with_config(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"has no .*; {name}: save it as safetensors first"):
        import_weights(tmp_path)


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("source", ["llama", "smollm", "qwen3"])  # float32, bfloat16 tied, shards
def test_tensors_that_are_not_finite_are_named_as_in_the_file(tmp_path, source):
    with_config(tmp_path, source)
    bad = {"model.norm.weight": np.nan, "model.layers.1.mlp.up_proj.weight": np.inf}
    for path in tmp_path.glob("*.safetensors"):
        stored = load_file(path)
        for name in bad.keys() & stored.keys():
            stored[name].flat[:2] = bad[name]
        save_file(stored, path)
    with pytest.raises(ValueError) as caught:
        import_weights(tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path}: NaN or infinite: model.layers.1.mlp.up_proj.weight (2 values), "
        "model.norm.weight (2 values); "
    )


def test_what_is_not_finite_is_not_exported(tmp_path):
    """Nor what a narrower dtype makes infinite; all tensors are named, nothing is written."""
    config, position, params, constants = own_model(SERVED, qk_norm="head")
    out = tmp_path / "out"

    def message(dtype="float32"):
        with pytest.raises(ValueError) as caught:
            export_weights(out, config, position, params, constants, length=40, dtype=dtype)
        assert not out.exists()
        return str(caught.value)

    params["layers"]["key_norm"] = params["layers"]["key_norm"].at[1, 0].set(7e4)
    params["final_norm"] = params["final_norm"].at[0].set(1e6)
    assert message("float16") == (
        "dtype='float16': model.layers.1.self_attn.k_norm.weight has numbers beyond its range; in "
        "all: model.layers.1.self_attn.k_norm.weight (1 value), model.norm.weight (1 value)"
    )
    params["final_norm"] = params["final_norm"].at[0].set(3.4e38)  # finite in float32 alone
    assert "dtype='bfloat16': model.norm.weight has numbers beyond its range" in message("bfloat16")
    params["final_norm"] = params["final_norm"].at[:2].set(jnp.nan)
    cos_coef = constants["position_layers"]["cos_coef"]
    constants["position_layers"]["cos_coef"] = cos_coef.at[:, 0, 0, 0].set(jnp.inf)
    assert (
        message()
        == message("bfloat16")
        == (
            "NaN or infinite, not exported: model.norm.weight (2 values), "
            "model.rotary_emb.cos_coef (1 value)"
        )
    )


def test_a_coefficient_of_fope_that_is_not_finite_is_named(tmp_path):
    export_weights(tmp_path, *own_model(SERVED), length=40)
    change_tensors(
        tmp_path, lambda t: t["model.rotary_emb.sin_coef"].__setitem__((0, 0, 0), np.nan)
    )
    with pytest.raises(ValueError, match="NaN or infinite: model.rotary_emb.sin_coef .1 value"):
        import_weights(tmp_path)


def test_tied_weights_are_read_under_either_name(tmp_path):
    """As transformers: the one that is there, both where they agree; never a guess."""
    with_config(tmp_path, "smollm")
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop(EMBEDDING)}))
    assert_same(import_weights(tmp_path), import_weights(GOLDENS / "smollm"))
    change_tensors(tmp_path, lambda t: t["lm_head.weight"].__setitem__((1, 2), np.nan))
    with pytest.raises(ValueError, match="NaN or infinite: lm_head.weight .1 value"):
        import_weights(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1]}))
    with pytest.raises(
        ValueError, match=r"1 of another shape: model.embed_tokens.weight \[39, 24\]"
    ):
        import_weights(tmp_path)
    shutil.copy(GOLDENS / "smollm" / "model.safetensors", tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBEDDING][:-1]}))
    with pytest.raises(
        ValueError, match=r"1 of another shape: lm_head.weight \[39, 24\], exp.* \[40"
    ):
        import_weights(tmp_path)
    change_tensors(tmp_path, lambda t: [t.pop(EMBEDDING), t.pop("lm_head.weight")])
    with pytest.raises(ValueError, match="1 missing: model.embed_tokens.weight"):
        import_weights(tmp_path)


def test_untied_weights_need_both(tmp_path):
    """Transformers draws the one that is missing at random."""
    for absent in (EMBEDDING, "lm_head.weight"):
        with_config(tmp_path)
        change_tensors(tmp_path, lambda t, name=absent: t.pop(name))
        with pytest.raises(ValueError, match=f"1 missing: {absent}"):
            import_weights(tmp_path)


# ---------------------------------------------------------------------------- what stays here


@pytest.mark.parametrize(
    ("position", "changes", "message"),
    [
        (ALiBi(), {}, "position.method='alibi': models of Hugging Face have no form of it"),
        (T5Bias(), {}, "position.method='t5': models of Hugging Face"),
        (LogitScaling(RoPE(), training_length=16), {}, "position.method='logit_scaling'"),
        (RoPE(interleaved=True), {}, "interleaved=True: rope_parameters cannot say it"),
        (RoPE(learnable=True), {}, "learnable=True: rope_parameters cannot say it"),
        (RoPE(partial_rotary_factor=0.5), {}, "partial_rotary_factor=0.5: these models rotate the"),
        (ByLayer((RoPE(), RoPE(5e5))), {}, "position.methods=.* knows layers with one RoPE, with"),
        (ByLayer((SERVED, NoPE())), {}, "position.method='fope'"),
        (FoPE(40), {}, "share_layers=False with 2 layers"),
        (RoPE(), {"norm": "post"}, "norm='post', qk_norm='none' with position.method='rope': no"),
        (RoPE(), {"qk_norm": "width"}, "norm='pre', qk_norm='width' .* no family"),
        (NoPE(), {"qk_norm": "head"}, "'nope', layers without position: no family of Hugging"),
        (RoPE(), {"num_heads": 3, "num_kv_heads": 3, "head_dim": 8}, "d_model=16: Llama needs a"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_form_there_is_named(tmp_path, position, changes, message):
    with pytest.raises(ValueError, match=message):
        export_weights(tmp_path / "out", *own_model(position, **changes), length=16)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: export into a new directory"):
        export_weights(tmp_path, *own_model(RoPE()), length=16)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_every_parameter_is_in_one_tensor():
    config, _, params, _ = own_model(RoPE(), norm="post", qk_norm="width", qkv_bias=True)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    for view in tensor_views(config, params).values():
        view += 1
    assert all((x == 1).all() for x in jax.tree.leaves(params))
