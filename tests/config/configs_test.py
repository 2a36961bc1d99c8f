"""Every shipped configuration builds, and the paper's has the paper's numbers."""

import itertools
from pathlib import Path

import jax
import pytest
from flax import nnx

from fope_jax.config import ConfigError, build_experiment, load_config
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import METHODS, FoPE, RoPE, YaRN

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = f"{CONFIGS / 'paper' / 'c4_books.py'}"
SIZES = {"60m": (512, 8), "180m": (1024, 8), "1200m": (2048, 16)}  # d_model, layers


def build(spec, *overrides):
    return build_experiment(load_config(spec, overrides))


def parameters(experiment) -> int:
    """Of the model the experiment trains, without making one."""

    def make():
        model = Transformer(experiment.model, experiment.position, rngs=nnx.Rngs(0))
        return split(model)[1]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make)))


@pytest.mark.fast("60m-512-c4", "180m-1024-books", "1200m-1024-c4")
@pytest.mark.parametrize(
    ("size", "length", "data"), list(itertools.product(SIZES, [512, 1024], ["c4", "books"]))
)
def test_each_of_the_papers_runs_builds_with_every_method(size, length, data):
    """Compositions take their methods from the command line, see config_test."""
    for method in [name for name, cls in METHODS.items() if cls.kind != "composition"]:
        experiment = build(f"{PAPER}:size={size},length={length},data={data},position={method}")
        train = experiment.train
        assert experiment.name == f"{method}_{size}_{length}_{data}"
        assert train.batch_size * train.length == 524_288
        assert train.steps == {"c4": 19_073, "books": 10_025}[data]
        assert (train.learning_rate, train.warmup_steps, train.weight_decay) == (6e-4, 10_000, 0.1)
        assert max(experiment.evaluate.lengths) * length == 8192
        assert experiment.evaluate.passkey_trials * len(experiment.evaluate.passkey_depths) == 1000
        if method == "fope":
            sigma = {"60m": 0.3, "180m": 0.4, "1200m": 0.6}[size]
            assert experiment.position == FoPE(training_length=length, sigma=sigma)
            d, layers = SIZES[size]
            # Embeddings; per layer 4 projections, a SwiGLU of width 4 d and 2 norms; a last norm.
            expected = 2 * 50_304 * d + layers * (4 * d**2 + 3 * 4 * d**2 + 2 * d) + d
            assert parameters(experiment) == expected


@pytest.mark.parametrize("data", ["c4", "c4-files", "dolma"])
def test_the_papers_c4_ends_after_10_billion_tokens_whichever_copy(data):
    experiment = build(f"{PAPER}:data={data}")
    assert experiment.data.max_tokens == 10**10
    # Its last update is the last whole batch of them.
    assert experiment.train.steps == 10**10 // 524_288
    assert (experiment.data.max_repeats, experiment.data.repeat_tokens) == (32, 13)
    assert build(f"{PAPER}:data={data},repeats=0").data.max_repeats is None
    assert ("dolma" in experiment.data.tokenizer) == (data == "dolma")
    assert bool(experiment.data.tfds_data_dir) == (data == "c4")


def test_the_batch_of_the_text_can_be_asked_for():
    train = build(f"{PAPER}:length=1024,batch=paper").train
    assert (train.batch_size, train.steps) == (1024, 9_536)


def test_the_equations_can_be_asked_for():
    position = build(PAPER, "position.preset=equations").position
    assert position == FoPE.equations(training_length=512, sigma=0.3)


@pytest.mark.parametrize("arg", ["size=70m", "length=256", "data=pile", "batch=mine"])
def test_an_argument_out_of_range_is_named(arg):
    with pytest.raises(ConfigError, match=f"argument {arg.partition('=')[0]} = .*; accepted"):
        build(f"{PAPER}:{arg}")


@pytest.mark.parametrize("method", ["rope", "alibi", "nope", "fope"])
def test_the_quickstart_builds(method):
    full = build(f"{CONFIGS / 'quickstart.py'}:position={method}")
    smoke = build(f"{CONFIGS / 'quickstart.py'}:position={method},seed=5,smoke")
    assert full.name == smoke.name == method
    assert (full.seed, smoke.seed) == (0, 5)
    assert full.model == smoke.model and full.train.length == smoke.train.length
    assert smoke.train.steps < full.train.steps
    assert full.model.vocab_size == full.data.vocab_size
    assert full.evaluate.lengths == (1, 2, 4, 8, 16)


def test_recall_builds_without_text():
    full = build(f"{CONFIGS / 'recall.py'}:position=alibi")
    assert full.data.task_shares == (("recall", 0.25), ("copy", 0.75))
    assert parameters(full) < 1_000_000
    assert max(full.evaluate.passkey_lengths) == 16
    assert full.evaluate.retrieval_tasks == ("recall", "copy")
    assert build(f"{CONFIGS / 'recall.py'}:smoke").train.steps < full.train.steps


def test_every_config_has_a_card():
    for path in CONFIGS.rglob("*.py"):
        card = path.read_text().split('"""')[1]
        for heading in ("Question", "Paper", "Command", "Hardware"):
            assert f"\n{heading} " in card, f"{path}: no {heading} in its docstring"


EXTRAPOLATION, SMOLLM = f"{CONFIGS}/paper/extrapolation.py", f"{CONFIGS}/paper/smollm_4096.py"


@pytest.mark.parametrize("size", SIZES)
def test_the_papers_extrapolation_is_a_billion_tokens_at_twice_the_length(size):
    sigma = {"60m": 0.3, "180m": 0.4, "1200m": 0.6}[size]
    yarn = YaRN(16.0, 512, attention_factor=1.0)
    for parent, method, expected in (
        ("rope", "yarn", RoPE(scaling=(yarn,))),
        ("rope", "fope", FoPE(1024, sigma=sigma)),
        ("fope", "yarn", FoPE(1024, sigma=sigma, scaling=(yarn,), scaling_order="after_clip")),
        ("fope", "fope", FoPE(1024, sigma=sigma)),
    ):
        child = build(f"{EXTRAPOLATION}:size={size},parent={parent},method={method}")
        assert child.position == expected
        assert child.model == build(f"{PAPER}:size={size},position={parent}").model
        train = child.train
        assert (train.steps, train.batch_size, train.length) == (1_907, 512, 1024)
        assert (train.learning_rate, train.warmup_steps, train.data_start) == (6e-4, 10_000, 19_073)
        assert child.evaluate.lengths == (1, 2, 4, 8), "to 8,192 tokens, as the parent"
    with pytest.raises(ConfigError, match="argument parent = 'alibi'; accepted: rope, fope"):
        build(f"{EXTRAPOLATION}:parent=alibi")


def test_the_papers_smollm_goes_on_at_4096_tokens():
    child = build(SMOLLM)
    assert child.position == FoPE(4096)
    assert parameters(child) == 1_711_376_384, "what Hugging Face counts"
    assert (child.train.length, child.train.steps, child.train.learning_rate) == (4096, 2734, 3e-4)
    assert build(f"{SMOLLM}:method=yarn").position == RoPE(scaling=(YaRN(2.0, 2048),))
    assert child.data.tokenizer == "models/SmolLM-1.7B/tokenizer.json"


@pytest.mark.parametrize("name", ["quickstart", "configs/quickstart.py", "paper/c4_books"])
def test_a_shipped_configuration_is_found_by_name_from_any_directory(
    name, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", "fope_jax"):
        assert build(f"{name}:position=alibi").name.startswith("alibi")
    assert f"{CONFIGS}" in caplog.text and "comes with fope_jax" in caplog.text


def test_a_file_of_the_user_goes_first_and_nothing_outside_is_taken(tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="'quickstart' is no file"):
        load_config("quickstart")
    for name in ("../setup", "../tests/conftest"):
        with pytest.raises(ConfigError, match="does not exist"):
            load_config(name)


def test_a_run_in_place_of_a_configuration_names_its_own(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"that of this run is {tmp_path}/config.json"):
        load_config(str(tmp_path))
