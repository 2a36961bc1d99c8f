"""The whole path on text of its own: build, train, evaluate, report."""

import re

import numpy as np
import pytest

from fope_jax.config import build_experiment
from fope_jax.evaluate.progress import no_progress
from fope_jax.evaluate.restore import load_run
from fope_jax.evaluate.run import evaluate
from fope_jax.report.page import write_report
from fope_jax.report.rows import read_runs
from fope_jax.report.tables import text_tables


def experiment(directory, method):
    return build_experiment(
        {
            "name": method,
            "seed": 0,
            "model": dict(vocab_size=260, d_model=16, num_layers=2, num_heads=2, mlp_dim=32),
            "position": {"method": method},
            "data": dict(
                corpus="text",
                tokenizer="bytes",
                cache_dir=str(directory / "cache"),
                train_files=[f"{directory}/train*.txt"],
                validation_files=[f"{directory}/held-out*.txt"],
            ),
            "train": dict(steps=4, batch_size=2, length=32, warmup_steps=1, save_every=2),
            "evaluate": dict(
                lengths=(1, 4),
                num_windows=8,
                position_windows=2,
                passkey_trials=2,
                passkey_lengths=(4,),
                passkey_templates=("compact",),
            ),
        }
    )


@pytest.mark.slow
def test_from_text_to_a_report(tmp_path):
    from fope_jax.data.build import build
    from fope_jax.train.loop import train

    words = ["the", "river", "runs", "past", "a", "green", "hill", "under", "one", "old", "bridge"]
    rng = np.random.default_rng(0)
    for name, count in (("train-0", 2_000), ("held-out-0", 600), ("held-out-1", 20)):
        (tmp_path / f"{name}.txt").write_text(" ".join(rng.choice(words, count)))
    runs = [tmp_path / "runs" / method for method in ("rope", "fope")]
    for run in runs:
        build(experiment(tmp_path, run.name).data)
        train(experiment(tmp_path, run.name), run)
        loaded = load_run(run)
        assert loaded.step == 4
        assert loaded.run_info["seed"] == 0
        assert len({loaded.run_info["position"]["hash"]}) == 1
        rows = evaluate(run, progress=no_progress)
        assert {row["kind"] for row in rows} == {"perplexity", "position", "passkey", "protocol"}
    page = write_report(runs, tmp_path / "report").read_text()
    text = text_tables(read_runs(runs))
    for value in re.findall(r"\d+\.\d\d\b", text):
        assert value in page
    assert page.count("<figure>") == 5  # none of passkeys, which neither finds
    assert "held-out-1.txt" in page  # too short for the longest window, and named
