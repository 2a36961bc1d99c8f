"""Measuring runs: their rows, before and after training, and what is refused."""

import json

import numpy as np
import pytest
from flax import nnx

from fope_jax.config import build_experiment, experiment_to_dict
from fope_jax.data.corpora import CorpusError
from fope_jax.data.tokenizers import BytesTokenizer, describe_tokenizer
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.restore import NonFiniteError
from fope_jax.evaluate.run_data import RunData
from fope_jax.model.transformer import Transformer, split
from fope_jax.report.correlation import spectrum_points
from fope_jax.report.rows import read_runs
from fope_jax.spectrum import run as run_module
from fope_jax.spectrum.run import measure_run
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.lock import LockError

LENGTH = 64


class Tokenizer:
    vocab_size = 40

    def token_id(self, name):
        return {"<s>": 39}.get(name)


class Cache:
    split, tokenizer = "validation", Tokenizer()

    def __init__(self):
        self.stream = np.random.default_rng(0).integers(0, 40, 700).astype(np.int32)
        self.documents = np.zeros(2, [("name", object), ("start", "i8"), ("length", "i8")])
        self.documents["name"] = ["Emma", "a note"]
        self.documents["start"], self.documents["length"] = [0, 600], [600, 100]

    def tokens(self, start, stop):
        return self.stream[start:stop]


@pytest.fixture(scope="module", autouse=True)
def cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunData, "open", lambda self, split: Cache())
        yield


def save(
    workdir, method, seed=3, drawn_from=None, steps=(5,), change=lambda layers: {}, vocab_size=40
):
    """A run whose checkpoint holds a new model drawn from the seed ``drawn_from``."""
    workdir.mkdir(parents=True, exist_ok=True)
    experiment = build_experiment(
        {
            "name": method if isinstance(method, str) else method["method"],
            "seed": seed,
            "model": dict(
                vocab_size=vocab_size,
                d_model=16,
                num_layers=2,
                num_heads=2,
                mlp_dim=16,
                init_std=0.2,
            ),
            "position": {"method": method} if isinstance(method, str) else method,
            "data": dict(
                corpus="text", tokenizer="bytes", train_files=["a"], validation_files=["b"]
            ),
            "train": dict(steps=5, batch_size=1, length=LENGTH),
            "evaluate": {},
        }
    )
    (workdir / "config.json").write_text(json.dumps(experiment_to_dict(experiment)))
    row = {"kind": "train", "step": 5, "tokens_seen": 9, "loss": 5.5}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    rngs = nnx.Rngs(seed if drawn_from is None else drawn_from)
    model = Transformer(experiment.model, experiment.position, rngs=rngs)
    _, params, constants = split(model)
    params["layers"] |= change(params["layers"])
    found = checkpoint_fingerprint(experiment.position, experiment.model.shape, constants)[1]
    store = CheckpointStore(workdir / "checkpoints")
    for step in steps:
        items = {"params": params, "constants": constants, "optimizer": {}}
        store.save(step, items, {"position": found["position"], "data": "x"})
    store.close()
    return workdir


def quiet(workdir, *arguments, multiples=(1, 2), windows=3, **more):
    return measure_run(
        workdir, *arguments, multiples=multiples, windows=windows, say=lambda line: None, **more
    )


@pytest.fixture(scope="module")
def rope(tmp_path_factory):
    """RoPE's run, whose checkpoint is another seed's model, measured after and before."""
    workdir = save(tmp_path_factory.mktemp("runs") / "rope", "rope", drawn_from=4)
    after = quiet(workdir)
    return workdir, after, quiet(workdir, untrained=True)


def numbers(measured):
    return [{k: v for k, v in row.items() if k != "step"} for row in measured["rows"]]


def test_rows_of_each_length_and_layer_are_written_and_read(rope):
    workdir, after, before = rope
    rows = read_rows(workdir / "metrics.jsonl")
    assert rows[0] == {"kind": "train", "step": 5, "tokens_seen": 9, "loss": 5.5}
    assert rows[1:] == after["rows"] + before["rows"]
    seen = [(row["step"], row["context"], row["layer"], row["windows"]) for row in rows[1:]]
    assert seen == [(s, c, layer, 3) for s in (5, 0) for c in (64, 128) for layer in (0, 1)]
    (run,) = read_runs([workdir])  # checked by the report, the untrained ones kept
    assert len(run.of("spectrum")) == 8
    (point,) = spectrum_points([run])
    assert point.trained_at == 5 and point.gap is None
    assert 0 < point.numbers["undertrained energy"] < 1
    assert point.before["undertrained energy"] != point.numbers["undertrained energy"]


def test_measuring_again_replaces_the_rows_of_that_step_alone(rope):
    workdir, after, before = rope
    text = (workdir / "metrics.jsonl").read_text()
    assert quiet(workdir, 0)["rows"] == before["rows"]  # step 0 is the untrained model
    rows = read_rows(workdir / "metrics.jsonl")
    assert sorted(map(str, rows)) == sorted(map(str, map(json.loads, text.splitlines())))


def test_before_and_after_differ_through_the_parameters_alone(rope, tmp_path):
    """A checkpoint of the very parameters of the seed gives the untrained numbers."""
    workdir, after, before = rope
    same = quiet(save(tmp_path / "same", "rope"))
    assert numbers(same) == numbers(before)
    assert numbers(after) != numbers(before)
    for one, other in zip(after["rows"], before["rows"], strict=True):
        for null in ("leakage_null", "floor_null", "pair_null", "hidden_null", "undertrained_null"):
            assert one[null] == other[null]


def test_numbers_are_shares_and_nulls_are_those_of_the_bases(rope):
    _, after, _ = rope
    for row in after["rows"]:
        for name in ("leakage", "floor_energy", "undertrained_energy", "profile_share"):
            assert len(row[name]) == 2 and all(0 <= share <= 1 for share in row[name])
        assert 0 < row["q_leakage"] < 1 and 0 < row["hidden_leakage"] < 1
    assert after["rows"][0]["floor_null"] == pytest.approx(1 / 63, rel=1e-5)
    assert after["rows"][2]["floor_null"] == pytest.approx(3 / 127, rel=1e-5)
    # Four pairs of frequencies 1, 0.1, 0.01, 0.001; 2 pi / 64 is 0.098.
    assert [pair["undertrained"] for pair in after["pairs"]] == [False, False, True, True]
    assert after["rows"][0]["undertrained_null"] == 0.5
    assert after["rows"][0]["pair_null"] == pytest.approx(1 - 2 / 64)
    assert len(after["curves"][0]["logits_power"]) == 33
    assert sum(after["curves"][0]["q_power"]) == pytest.approx(1, abs=1e-4)


def test_the_first_layer_of_one_token_is_a_pure_tone(tmp_path, monkeypatch):
    """The same token everywhere: q and k are constants, and rotated they are own tones alone."""
    cache = Cache()
    cache.stream[:] = 7
    monkeypatch.setattr(RunData, "open", lambda self, split: cache)
    rows = quiet(save(tmp_path / "run", "rope"), multiples=(2,))["rows"]
    for row in rows:
        assert max(row["leakage"]) < 1e-5
        assert max(row["q_leakage"], row["k_leakage"]) < 1e-5
        assert min(row["profile_share"]) > 1 - 1e-3


@pytest.mark.parametrize(
    ("method", "known"), [("alibi", False), ({"method": "fope", "training_length": 64}, True)]
)
def test_methods_with_and_without_frequencies(method, known, tmp_path):
    measured = quiet(save(tmp_path / "run", method), multiples=(2,))
    for row, curve in zip(measured["rows"], measured["curves"], strict=True):
        for name in ("leakage", "q_leakage", "hidden_leakage", "undertrained_energy"):
            assert (row[name] is not None) == known
        assert (curve["own"] is not None) == known
        assert len(row["floor_energy"]) == len(row["entropy"]) == 2
        assert min(row["distance"]) > 0
        if known:  # what could be undertrained was clipped
            assert row["undertrained_energy"] == [0.0, 0.0]
    assert bool(measured["pairs"]) == known


def test_step_0_of_imported_weights_is_their_checkpoint(tmp_path):
    workdir = save(tmp_path / "imported", "rope", drawn_from=4, steps=(0,))
    (workdir / "run.json").write_text('{"imported": {}}')
    measured = quiet(workdir, 0, multiples=(1,))
    assert numbers(measured) == numbers(quiet(workdir, multiples=(1,)))
    with pytest.raises(ValueError, match="has imported weights and did not begin untrained: mea"):
        quiet(workdir, untrained=True)


def test_a_run_without_training_of_its_own_has_step_0(tmp_path):
    """As `fope extend --no-train` makes it: a checkpoint of weights that were trained before."""
    workdir = save(tmp_path / "changed", "rope", drawn_from=4, steps=(0,))
    (workdir / "lineage.json").write_text("{}")
    measured = quiet(workdir, 0, multiples=(1,))
    assert numbers(measured) == numbers(quiet(workdir, multiples=(1,)))


def test_a_run_that_another_process_writes_is_not_measured(rope, monkeypatch):
    """Its rows would go into the file of before."""

    def locked(directory, verb):
        raise LockError(f"{directory}: {verb}")

    monkeypatch.setattr(run_module, "lock_run", locked)
    with pytest.raises(LockError, match="spectrum"):
        quiet(rope[0])


def test_a_text_takes_the_place_of_the_token_cache(tmp_path, monkeypatch):
    """As for imported weights, which have none."""
    monkeypatch.setattr(RunData, "open", lambda self, split: pytest.fail("a cache is opened"))
    workdir = save(tmp_path / "bytes", "rope", vocab_size=259)
    info = {"tokenizer": describe_tokenizer(BytesTokenizer())}
    (workdir / "run.json").write_text(json.dumps(info))
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 40)
    source = f"mine={tmp_path}/book.txt"
    measured = quiet(workdir, text=source)
    assert [(row["split"], row["context"]) for row in measured["rows"][::2]] == [
        ("mine", 64),
        ("mine", 128),
    ]
    with pytest.raises(ValueError, match="text 'book.txt'; accepted: web, news, or NAME=GLOB"):
        quiet(workdir, text="book.txt")
    with pytest.raises(CorpusError, match="nowhere.txt"):
        quiet(workdir, text=f"mine={tmp_path}/nowhere.txt")


def test_what_cannot_be_measured_is_refused(rope, tmp_path):
    workdir, *_ = rope
    untrained = save(tmp_path / "untrained", "rope", steps=())
    with pytest.raises(FileNotFoundError, match="untrained has no valid checkpoint; train it"):
        quiet(untrained)
    with pytest.raises(ValueError, match=r"lengths \[0\]: accepted are training lengths, 1 or"):
        quiet(workdir, multiples=(0,))
    with pytest.raises(ValueError, match="no document is long enough for a window of 1024 tokens"):
        quiet(workdir, multiples=(1, 16))
    learned = save(tmp_path / "learned", {"method": "learned", "table_length": 64})
    with pytest.raises(ValueError, match="reach 128 tokens, but Learned is defined for at most 64"):
        quiet(learned)
    (untrained / "lineage.json").write_text("{}")
    with pytest.raises(ValueError, match="goes on from another run and did not begin untrained"):
        quiet(untrained, untrained=True)
    crowded = {
        "method": "fope",
        "preset": "equations",
        "training_length": 64,
        "num_frequencies": 40,
    }
    with pytest.raises(ValueError, match="40 frequencies in a window of 64 tokens: at its resol"):
        quiet(save(tmp_path / "crowded", crowded), multiples=(1,))


def test_windows_begin_with_the_bos_token_of_the_run(tmp_path, monkeypatch):
    workdir, seen = save(tmp_path / "run", "rope"), []
    config = json.loads((workdir / "config.json").read_text())
    config["evaluate"] |= {"bos_token": "<s>", "add_bos_token": True}
    (workdir / "config.json").write_text(json.dumps(config))

    def observer(model):
        look = run_module_observer(model)
        return lambda tokens: (seen.append(tokens), look(tokens))[1]

    run_module_observer = run_module.observer
    monkeypatch.setattr(run_module, "observer", observer)
    rows = quiet(workdir)["rows"]
    assert {row["bos_token"] for row in rows} == {"<s>"}
    assert {len(window) for window in seen} == {LENGTH, 2 * LENGTH}
    assert {int(window[0]) for window in seen} == {39}
    short, long = seen[0], seen[3]  # in all else the same text
    np.testing.assert_array_equal(short[1:], long[1 - LENGTH :])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda layers: {"key": layers["key"].at[1, 0].set(np.nan)},
            r"run, step 5: weights that are not finite: layers.key \(16 values\)",
        ),
        (
            lambda layers: {"query": 1e25 * layers["query"], "key": 1e25 * layers["key"]},
            "activations are not finite at 64 tokens of document 'Emma', though all weights are: "
            ".*profile",
        ),
    ],
    ids=["weights", "overflow"],
)
def test_what_is_not_finite_is_named_and_no_row_is_written(tmp_path, change, told):
    workdir = save(tmp_path / "run", "nope", change=change)
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(NonFiniteError, match=told):
        quiet(workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before
