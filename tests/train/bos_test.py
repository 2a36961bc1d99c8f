"""A checkpoint of Hugging Face that was trained with BOS, from its files to its scores."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from fope_jax.config import ConfigError
from fope_jax.data.build import build
from fope_jax.data.cache import open_cache
from fope_jax.evaluate import harness
from fope_jax.evaluate.harness import load_text_model
from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.restore import NonFiniteError, load_run, read_experiment
from fope_jax.evaluate.run import evaluate
from fope_jax.extend.parent import open_parent
from fope_jax.extend.run import extend
from fope_jax.interop.run_import import import_run
from fope_jax.interop.weights import export_weights
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.position import RoPE

LENGTH = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model whose tokens are </s>, <s> and bytes, and whose texts begin with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("models") / "tiny"
    config = TransformerConfig(
        vocab_size=260, d_model=16, num_layers=1, num_heads=2, mlp_dim=16, init_std=0.5
    )
    model = Transformer(config, RoPE(), rngs=nnx.Rngs(3))
    export_weights(directory, config, model.position, *split(model)[1:], length=LENGTH)
    names = ["</s>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    stated = {"add_bos_token": True, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(stated))
    return directory


SMALL = [
    "evaluate.lengths=1",
    "evaluate.num_windows=2",
    "evaluate.scored_tokens=4",
    "evaluate.training_windows=2",
    "model.attention=reference",
]


@pytest.fixture(scope="module")
def overrides(runs):
    data = [f"data.{key}={value}" for key, value in runs.data.items() if key != "tokenizer"]
    return [*data, *SMALL]


@pytest.fixture(scope="module")
def run(checkpoint, overrides, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    import_run(checkpoint, workdir, overrides)
    build(read_experiment(workdir).data)
    return workdir


@pytest.fixture(scope="module")
def nats_after(run):
    """``[T]``: of each token after those before it, with the model called by itself."""
    model = load_run(run).model

    def nats(tokens):
        tokens = np.asarray([tokens], np.int32)
        positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
        logits = np.asarray(model(tokens, positions, np.ones_like(positions)), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -log_p[np.arange(tokens.shape[1] - 1), tokens[0, 1:]]

    return nats


def test_the_run_says_what_the_checkpoint_says(run, checkpoint, overrides, tmp_path, caplog):
    settings = read_experiment(run).evaluate
    assert (settings.bos_token, settings.add_bos_token) == ("<s>", True)
    with caplog.at_level("INFO"):
        open_parent(f"hf:{checkpoint}")
        import_run(checkpoint, tmp_path / "a", [*overrides, "evaluate.add_bos_token=false"])
    assert "BOS token: <s> is added to evaluated texts (add_bos_token = True in" in caplog.text
    assert "BOS token: <s> is not added to evaluated texts (as the configuration" in caplog.text
    settings = read_experiment(tmp_path / "a").evaluate
    assert (settings.bos_token, settings.add_bos_token) == ("<s>", False)
    import_run(checkpoint, tmp_path / "b", [*overrides, "data.tokenizer=bytes"])
    assert read_experiment(tmp_path / "b").evaluate.bos_token is None
    with pytest.raises(ConfigError, match="add_bos_token = True; accepted: False where bos_token"):
        import_run(checkpoint, tmp_path / "c", [*overrides, "evaluate.bos_token=none"])
    assert not (tmp_path / "c").exists()


def test_its_windows_begin_with_the_token(run, nats_after):
    rows = evaluate(run, protocols=["same-tokens"], say=lambda line: None)
    scored = [row for row in rows if row["kind"] == "perplexity"]
    cache = open_cache(read_experiment(run).data, "validation")
    from fope_jax.evaluate.windows import place_windows

    stops = place_windows(cache.documents, longest=LENGTH, scored=4, total=2).stop
    expected = [nats_after([1, *cache.tokens(s - LENGTH, s)])[-4:].sum() for s in stops]
    assert sum(row["nats"] for row in scored) == pytest.approx(sum(expected), rel=1e-5)
    assert {row["bos_token"] for row in rows} == {"<s>"}


@pytest.mark.slow
def test_the_harness_follows_it(run, nats_after):
    text = load_text_model(run)
    a, b, c = (2 + sorted_byte for sorted_byte in map(_place, "abc"))
    found = text.loglikelihood([("ab", "c"), ("", "ab"), ("<s>ab", "c")])
    expected = [-nats_after([1, a, b, c])[2], -nats_after([1, a, b]).sum()]
    np.testing.assert_allclose([x for x, _ in found], [*expected, expected[0]], rtol=1e-5)
    assert text.loglikelihood_rolling(["ab"]) == pytest.approx([expected[1]], rel=1e-5)
    plain = load_text_model(run, add_bos_token=False).loglikelihood([("ab", "c"), ("", "ab")])
    expected = [-nats_after([a, b, c])[1], expected[1]]
    np.testing.assert_allclose([x for x, _ in plain], expected, rtol=1e-5)


def _place(character):
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(character)


@pytest.mark.slow
def test_a_model_that_goes_on_keeps_it(run, checkpoint, overrides, tmp_path, caplog):
    assert open_parent(f"hf:{checkpoint}").experiment.evaluate.add_bos_token
    given = ["train.steps=1", "train.batch_size=2", "train.evaluate_every=1"]
    with caplog.at_level("INFO"):
        extend(run, "yarn", 2 * LENGTH, tmp_path / "run", overrides=given)
    assert "training text has none, its documents are joined by their end-of-doc" in caplog.text
    assert read_experiment(tmp_path / "run").evaluate.bos_token == "<s>"
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    measured = [row for row in rows if row["kind"] == "validation"]
    assert len(measured) == 2 and {row["bos_token"] for row in measured} == {"<s>"}


def test_weights_that_are_not_finite_are_refused_by_name(run, monkeypatch):
    loaded = load_run(run)
    graphdef, params, constants = split(loaded.model)
    params["layers"]["up"] = params["layers"]["up"].at[0, 0, 0].set(np.nan)
    broken = loaded._replace(model=merge(graphdef, jax.tree.map(lambda x: x, params), constants))
    monkeypatch.setattr(harness, "load_run", lambda *arguments: broken)
    with pytest.raises(NonFiniteError, match=r"step 0: weights .* not finite: layers.up \(1 value"):
        load_text_model(run)


def test_own_runs_have_none(runs):
    settings = runs.experiment().evaluate
    assert (settings.bos_token, settings.add_bos_token) == (None, False)
