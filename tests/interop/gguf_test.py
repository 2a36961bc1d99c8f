"""GGUF files become the model and the tokenizer that llama.cpp would run."""

import shutil

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="pip install '.[gguf]'")

from fope_jax.interop.gguf import import_gguf_config, import_gguf_weights, open_gguf  # noqa: E402
from fope_jax.interop.weights import tensor_views  # noqa: E402
from fope_jax.position import ByLayer, Llama3, NoPE, PositionInterpolation, RoPE, YaRN  # noqa: E402
from tests.interop.tiny_gguf import (  # noqa: E402
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    TYPES,
    VOCAB,
    WIDTH,
    quantised,
    random_tensors,
    write,
)
from tests.interop.weights_runs import logits_of_parts  # noqa: E402

# Every matrix of the file in another type.
KINDS = {
    "token_embd.weight": TYPES.Q8_0,
    "blk.0.attn_q.weight": TYPES.Q4_1,
    "blk.0.attn_k.weight": TYPES.Q6_K,
    "blk.0.attn_v.weight": TYPES.F16,
    "blk.0.attn_output.weight": TYPES.BF16,
    "blk.0.ffn_gate.weight": TYPES.Q4_K,
    "blk.0.ffn_up.weight": TYPES.Q5_1,
    "blk.0.ffn_down.weight": TYPES.Q4_0,
    "blk.1.attn_q.weight": TYPES.Q4_K,
}
PLAIN = RoPE(theta=50_000.0)


def weights_by_name(imported):
    """Tensors as Hugging Face names them."""
    return tensor_views(imported.config, imported.params)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "mixed.gguf", random_tensors(), kinds=KINDS)


def halves_first(rows, heads):
    """Row i of a head from row 2 i, row i + H/2 from row 2 i + 1; written out row by row."""
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(HEAD_DIM // 2):
            out[head * HEAD_DIM + i] = rows[head * HEAD_DIM + 2 * i]
            out[head * HEAD_DIM + HEAD_DIM // 2 + i] = rows[head * HEAD_DIM + 2 * i + 1]
    return out


# ---------------------------------------------------------------------------- weights


def test_every_type_is_dequantised_as_the_library_does_bit_for_bit(mixed):
    imported = import_gguf_weights(open_gguf(mixed))
    ours = weights_by_name(imported)
    theirs = {
        "token_embd": "model.embed_tokens",
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
        "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
        "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "output_norm": "model.norm",
    }
    for name, array in random_tensors().items():
        if (key := name.removesuffix(".weight")) not in theirs:
            continue
        kind = KINDS.get(name, TYPES.F32)
        expected = gguf.quants.dequantize(quantised(array, kind), kind).reshape(array.shape)
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            expected = halves_first(expected, heads) if key.endswith(part) else expected
        assert np.abs(expected).max() > 1e-3 and np.unique(expected).size > 10
        np.testing.assert_array_equal(ours[f"{theirs[key]}.weight"], expected, err_msg=name)
    assert imported.config.tie_embeddings and imported.config.norm_eps == 1e-5
    assert imported.extra_keys["eos_token_id"] == 2


def test_two_types_by_their_definition_in_ggml():
    """Q8_0 and Q4_1 from their bytes, without the library's arithmetic."""
    array = random_tensors()["blk.0.ffn_up.weight"][:1, :32]
    raw = quantised(array, TYPES.Q8_0)[0].tobytes()
    scale = np.frombuffer(raw[:2], np.float16)[0].astype(np.float32)
    expected = scale * np.frombuffer(raw[2:], np.int8).astype(np.float32)
    np.testing.assert_array_equal(
        gguf.quants.dequantize(quantised(array, TYPES.Q8_0), TYPES.Q8_0)[0], expected
    )
    raw = quantised(array, TYPES.Q4_1)[0].tobytes()
    scale, least = np.frombuffer(raw[:4], np.float16).astype(np.float32)
    low = [byte & 15 for byte in raw[4:]]
    high = [byte >> 4 for byte in raw[4:]]
    expected = scale * np.array(low + high, np.float32) + least
    np.testing.assert_array_equal(
        gguf.quants.dequantize(quantised(array, TYPES.Q4_1), TYPES.Q4_1)[0], expected
    )


def test_q_and_k_are_rotated_as_llama_cpp_rotates_pairs_side_by_side(mixed):
    """The rows as they lie in the file, rotated in pairs (2 i, 2 i + 1), give the same logits."""
    file = open_gguf(mixed)
    imported = import_gguf_weights(file)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, 40), np.int32)
    ours = logits_of_parts(imported, tokens)
    for name, view in weights_by_name(imported).items():
        for part in ("q", "k"):
            if f"{part}_proj" in name:
                tensor = file.tensors[f"blk.{name.split('.')[2]}.attn_{part}.weight"]
                raw = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                assert (view != raw).any()
                view[...] = raw
    interleaved = imported._replace(position=RoPE(theta=50_000.0, interleaved=True))
    theirs = logits_of_parts(interleaved, tokens)
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "smollm3", "qwen2", "qwen3", "olmo2"])
def test_each_architecture_has_its_norms_and_its_order_of_rows(tmp_path, architecture):
    tensors = random_tensors(architecture, tied=False)
    imported = import_gguf_weights(open_gguf(write(tmp_path / "x.gguf", tensors, architecture)))
    ours, config = weights_by_name(imported), imported.config
    q = tensors["blk.1.attn_q.weight"]
    is_permuted = architecture in ("llama", "smollm3")
    np.testing.assert_array_equal(
        ours["model.layers.1.self_attn.q_proj.weight"], halves_first(q, HEADS) if is_permuted else q
    )
    np.testing.assert_array_equal(ours["lm_head.weight"], tensors["output.weight"])
    norms = {"qwen3": ("pre", "head"), "olmo2": ("post", "width")}.get(
        architecture, ("pre", "none")
    )
    assert (config.norm, config.qk_norm, config.tie_embeddings) == (*norms, False)
    mlp_norm = "post_ffw_norm" if architecture == "olmo2" else "ffn_norm"
    np.testing.assert_array_equal(
        imported.params["layers"]["mlp_norm"][0], tensors[f"blk.0.{mlp_norm}.weight"]
    )
    assert config.qkv_bias == (architecture == "qwen2")
    if config.qkv_bias:
        bias = tensors["blk.1.attn_k.bias"]
        np.testing.assert_array_equal(ours["model.layers.1.self_attn.k_proj.bias"], bias)
    assert imported.position == PLAIN  # two layers: none of SmolLM 3 is a fourth one


def test_the_size_of_a_head_is_that_of_its_rotation_where_no_key_says_it(tmp_path):
    without = {"attention.key_length": None, "attention.value_length": None}
    file = open_gguf(write(tmp_path / "x.gguf", random_tensors(), values=without))
    assert import_gguf_config(file).config.head_dim == HEAD_DIM


def test_smollm3_has_no_position_in_each_fourth_layer(tmp_path):
    tensors = {name: x for name, x in random_tensors().items() if "blk" not in name}
    file = open_gguf(write(tmp_path / "x.gguf", tensors, "smollm3", values={"block_count": 8}))
    assert import_gguf_config(file).position == ByLayer((PLAIN, PLAIN, PLAIN, NoPE()))


# ---------------------------------------------------------------------------- positions


def llama3_divisors(factor=32.0, length=8192, theta=50_000.0):
    """As the converter of llama.cpp computes them, frequency by frequency."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / HEAD_DIM)
        smooth = (length / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if smooth > 1 else factor if smooth < 0 else between)
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({}, ()),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, ()),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0}, ()),
        ({"rope.scaling.factor": 2.5}, (PositionInterpolation(2.5),)),
        ({"rope.scale_linear": 4.0}, (PositionInterpolation(4.0),)),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            (PositionInterpolation(8.0),),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.finetuned": True,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            (YaRN(factor=4.0, original_length=32, beta_fast=16.0),),
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
            (YaRN(factor=2.0, original_length=128),),
        ),
    ],
)
def test_scalings_of_the_metadata(tmp_path, values, scaling):
    file = open_gguf(write(tmp_path / "x.gguf", random_tensors(), values=values))
    config = import_gguf_config(file)
    assert config.position == RoPE(theta=50_000.0, scaling=scaling)
    assert config.training_length == 128


def test_llama3s_divisors_are_recognised(tmp_path):
    tensors = random_tensors() | {"rope_freqs.weight": llama3_divisors()}
    imported = import_gguf_weights(open_gguf(write(tmp_path / "x.gguf", tensors)))
    scaling = Llama3(factor=32.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert imported.position == RoPE(theta=50_000.0, scaling=(scaling,))
    plain, scaled = PLAIN.frequencies(HEAD_DIM), imported.position.frequencies(HEAD_DIM)
    np.testing.assert_allclose(plain / scaled, llama3_divisors(), rtol=2e-6)
    assert 3 < ((llama3_divisors() > 1) & (llama3_divisors() < 32)).sum() < 12
    tensors["rope_freqs.weight"] = np.ones(HEAD_DIM // 2, np.float32)
    assert import_gguf_config(open_gguf(write(tmp_path / "y.gguf", tensors))).position == PLAIN


@pytest.mark.parametrize(
    ("values", "divisors", "message"),
    [
        ({"rope.scaling.type": "longrope"}, None, "rope.scaling.type='longrope': expected 'none'"),
        ({"rope.scaling.factor": 2.0}, llama3_divisors(), "one of them is expected"),
        ({}, np.linspace(1, 9, 32, dtype=np.float32), "by 1 to 9: not as Llama 3's scaling"),
        ({"rope.scaling.attn_factor": 0.5}, None, "rope.scaling.attn_factor=0.5.*1.0 only"),
        ({"rope.dimension_count": 32}, None, "rope.dimension_count=32: expected .* a head, 64"),
        ({"attention.sliding_window": 64}, None, "llama.attention.sliding_window=64: not a key"),
        ({"expert_count": 8}, None, "llama.expert_count=8: .* 0 only"),
        ({"block_count": None, "context_length": None}, None, "context_length is missing\n.*block"),
        ({"attention.head_count_kv": [2, 1]}, None, "'num_key_value_heads' is .2, 1."),
        ({"attention.head_count": 3}, None, "num_kv_heads=2: expected a divisor of num_heads=3"),
    ],
)
def test_what_has_no_form_is_refused_by_name(tmp_path, values, divisors, message):
    tensors = random_tensors() | ({} if divisors is None else {"rope_freqs.weight": divisors})
    file = open_gguf(write(tmp_path / "x.gguf", tensors, values=values))
    with pytest.raises(ValueError, match=f"(?s)x.gguf: .*{message}"):
        import_gguf_config(file)


def test_another_architecture_is_refused_by_name(tmp_path):
    file = open_gguf(write(tmp_path / "x.gguf", random_tensors(), "gemma3"))
    with pytest.raises(ValueError, match="general.architecture='gemma3': expected one of 'llama'"):
        import_gguf_config(file)


# ---------------------------------------------------------------------------- bad files


def test_a_file_that_is_cut_off_anywhere_is_named(mixed, tmp_path):
    content = mixed.read_bytes()
    end = len(content) - open_gguf(mixed).tensors["output_norm.weight"].n_bytes
    places = [*range(4, 64, 3), *range(64, 9000, 611), end // 2, end, len(content) - 1]
    for size in places:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut.gguf is cut off: .* [\d,]+ bytes and"):
            open_gguf(cut)


def test_a_damaged_count_ends_at_once(mixed, tmp_path):
    """2^60 values are not read one by one until the file ends."""
    content = bytearray(mixed.read_bytes())
    at = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    content[at : at + 8] = (2**60).to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.gguf is cut off: it .* announces 4,611,686,018,"):
        open_gguf(tmp_path / "x.gguf")


def change_type(path, name, kind):
    """Writes another number for the type of a tensor."""
    content = bytearray(path.read_bytes())
    at = content.index(name.encode()) + len(name)
    dims = int.from_bytes(content[at : at + 4], "little")
    at += 4 + 8 * dims
    content[at : at + 4] = kind.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (99, "blk.0.ffn_up.weight has the quantisation 99; accepted: F32, F16, Q4_0, Q4_1, .*BF16"),
        (TYPES.Q8_K.value, "blk.0.ffn_up.weight has the quantisation Q8_K; accepted: F32, F16"),
        (TYPES.I8.value, "blk.0.ffn_up.weight has the quantisation I8; accepted: F32, F16"),
    ],
)
def test_an_unknown_quantisation_is_named(tmp_path, kind, message):
    path = write(tmp_path / "x.gguf", random_tensors())
    change_type(path, "blk.0.ffn_up.weight", kind)
    with pytest.raises(ValueError, match=f"x.gguf.*{message}"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "does not begin with 'GGUF'"),
        (b"GGML\3\0\0\0", "does not begin with 'GGUF'"),
        (b"<!DOCTYPE html><html>", "it is an HTML page; fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "Git LFS pointer"),
        (b"GGUF\x01\0\0\0" + bytes(16), "appears to be version 1"),
    ],
)
def test_what_is_no_gguf_is_told_for_what_it_is(tmp_path, head, message):
    (tmp_path / "x.gguf").write_bytes(head)
    with pytest.raises(ValueError, match=f"x.gguf.*{message}"):
        open_gguf(tmp_path / "x.gguf")


def test_a_missing_file_and_a_directory_are_named(mixed, tmp_path):
    with pytest.raises(FileNotFoundError, match="a.gguf is no GGUF file: there is no such file"):
        open_gguf(tmp_path / "a.gguf")
    (tmp_path / "d.gguf").mkdir()
    shutil.copy(mixed, tmp_path / "d.gguf" / "inside.gguf")
    with pytest.raises(FileNotFoundError, match=r"it is a directory; name a file .*inside.gguf\)"):
        open_gguf(tmp_path / "d.gguf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.type": "adapter"}, "general.type='adapter': expected 'model'"),
        ({"split.count": 3}, "x.gguf is one of 3 parts"),
    ],
)
def test_a_part_or_an_adapter_is_refused(tmp_path, values, message):
    path = write(tmp_path / "x.gguf", random_tensors(), values=values)
    with pytest.raises(ValueError, match=message):
        open_gguf(path)


def test_another_byte_order_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf", random_tensors(), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="x.gguf has the byte order of another machine"):
        open_gguf(path)


def test_tensors_that_do_not_fit_are_named_with_their_shapes(tmp_path):
    tensors = random_tensors()
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(WIDTH, np.float32)
    tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_q.weight"]
    file = open_gguf(write(tmp_path / "x.gguf", tensors))
    with pytest.raises(ValueError) as error:
        import_gguf_weights(file)
    for line in (
        "1 missing: blk.1.ffn_up.weight [256, 256]",
        "1 unexpected: blk.0.attn_q.bias [256]",
        "1 of another shape: blk.0.attn_k.weight [256, 256], expected [128, 256]",
    ):
        assert line in str(error.value)


def test_numbers_that_are_not_finite_are_named(tmp_path):
    tensors = random_tensors()
    tensors["blk.1.ffn_up.weight"][3, 5] = np.nan
    file = open_gguf(write(tmp_path / "x.gguf", tensors))
    with pytest.raises(ValueError, match="NaN or infinite: .*blk.1.ffn_up.weight"):
        import_gguf_weights(file)
