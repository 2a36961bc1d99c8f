"""The benchmarks of data, evaluation and training print what they measured."""

import json

import pytest

from benchmarks import data, evaluation, training, windows

CONFIG = """
from ml_collections import ConfigDict
def get_config(arg=""):
    return ConfigDict({{
        "name": "tiny", "seed": 0,
        "model": {{"vocab_size": 320, "d_model": 16, "num_layers": 1, "num_heads": 2,
                  "mlp_dim": 16}},
        "position": {{"method": "rope"}},
        "data": {{"corpus": "text", "train_files": ["{0}/train.txt"],
                 "validation_files": ["{0}/validation.txt"], "tokenizer": "bytes",
                 "cache_dir": "{0}/cache"}},
        "train": {{"steps": 9, "batch_size": 2, "length": 32, "warmup_steps": 1}},
    }})
"""


@pytest.mark.slow
def test_data_is_built_read_and_consumed(tmp_path, capsys):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text(f"a few words to {name} with " * 200)
    (tmp_path / "config.py").write_text(CONFIG.format(tmp_path))
    file = tmp_path / "out.json"
    arguments = ["--config", str(tmp_path / "config.py"), "--batches", "20", "--steps", "3"]
    assert data.main([*arguments, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert len(found["step"]) == 3
    assert min(found["build"], found["read"], *found["step"]) > 0
    assert "| batches read |" in capsys.readouterr().out


def test_rates_are_told_as_multiples_of_the_step():
    text = data.render({"build": 3e5, "read": 6e5, "step": [1e5, 2e5, 1.5e5]})
    assert "| batches read | 600,000 | 4.0 |" in text
    assert "| training step | 150,000 | 1.0 |" in text


@pytest.mark.slow
def test_evaluation_of_one_window():
    row = evaluation.score_once("tiny", "fope", 512, rounds=1)
    assert len(row["seconds"]) == 1 and row["seconds"][0] > 0
    assert 5e7 < row["peak_bytes"] < 1e11


def test_memory_is_told_as_growth_with_length():
    rows = [
        {"method": "rope", "length": length, "seconds": [1.0, 3.0, 2.0], "peak_bytes": peak}
        for length, peak in ((1_000, 1e9), (3_000, 1.5e9))
    ]
    text = evaluation.render(rows)
    assert "| rope | 1,000 | 2.00 | 2000 | 1.00 |  |" in text
    assert "| rope | 3,000 | 2.00 | 667 | 1.50 | 250.0 |" in text


def test_training_is_told_beside_huggingface():
    work = training.Work("60m", 512, 2)
    seconds = {"fope_jax": [2.0, 2.0], "huggingface": [3.0, 3.0]}
    rates = {"fope_jax": 2e11, "huggingface": 2.5e11}
    text = training.render({"work": work._asdict(), "seconds": seconds, "rates": rates})
    share = training.products(work) / 2.0 / 2.5e11
    assert f"| fope_jax | 2.00 | 512 | 1.50 (1.50 to 1.50) | {share:.0%} |" in text


@pytest.mark.slow  # starts PyTorch's side
def test_a_side_that_does_not_start_says_what_to_install(monkeypatch):
    side = training.Side("huggingface", training.Work("no such size", 1, 1))
    with pytest.raises(SystemExit, match="pip install torch"):
        side.ask("step")
    side.stop()


@pytest.mark.slow
def test_a_window_is_told_beside_full_attention(capsys):
    arguments = ["--heads", "1", "--window", "64", "--lengths"]
    assert windows.main(["memory", *arguments, "300", "600"]) == 0
    assert windows.main(["time", "--rounds", "1", *arguments, "600"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| full", "| window 64"]
    assert all(float(cell) > 0 for line in lines[2:4] for cell in line.strip("|").split("|")[1:3])
    times = [line.strip("| ").split(" | ") for line in lines[6:]]
    assert [row[1] for row in times] == ["forward", "step"]
    assert all(0 < float(row[4]) < 10 for row in times)
