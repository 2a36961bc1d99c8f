"""`python -m benchmarks.gpu`: it keeps to its time, goes on after failures, and sees errors."""

import json

import numpy as np
import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import correctness
from benchmarks.gpu.correctness import Check, array_error, run_checks
from benchmarks.gpu.tables import render
from benchmarks.gpu.units import OURS, TORCH, Unit, all_units
from fope_jax.gallery.examples import EXAMPLES
from fope_jax.position.base import Layer


class FakeSide:
    """Takes the estimated seconds of each unit; some sizes crash, hang or do not fit."""

    started = []

    def __init__(self, name, clock):
        self.name, self.clock = name, clock
        self.started.append(name)

    def ask(self, *task, seconds):
        unit = Unit(*task)
        if unit.size == "hang":
            self.clock[0] += seconds
            raise TimeoutError("no answer")
        self.clock[0] += unit.seconds
        if unit.size == "crash":
            raise SystemExit("stopped")
        return {"error": "out of memory"} if unit.size == "large" else {"result": {"x": 1.0}}

    def stop(self):
        pass


def run(units, minutes, missing=()):
    clock, written = [0.0], []
    FakeSide.started = []
    result = program.measure(
        units,
        lambda name: FakeSide(name, clock),
        minutes,
        lambda result: written.append(json.dumps(result)),
        dict(missing),
        lambda: clock[0],
    )
    assert written[-1] == json.dumps(result)
    return result, written


def test_what_does_not_fit_is_named_and_nothing_stops_the_rest():
    units = [Unit(OURS, "training", size, seconds=30) for size in ("a", "large", "crash", "b")]
    units += [Unit(TORCH, "training", "a"), Unit(OURS, "training", "late", seconds=50)]
    units += [Unit(OURS, "training", "short", seconds=5)]
    result, written = run(units, 2.5, {TORCH: "torch is not installed"})
    assert [row.get("error") for row in result["rows"]] == [
        *(None, "out of memory", "stopped", None, None)
    ]
    assert [(row["unit"][:17], row["reason"]) for row in result["not_run"]] == [
        ("training of a (to", "torch is not installed"),
        ("training of late ", "it takes about 50 s, and 30 s are left"),
    ]
    assert result["rows"][-1]["size"] == "short" and result["seconds"] == 125
    assert FakeSide.started == [OURS, OURS]  # a new one after the crash alone
    assert len(written) == 6  # after each unit, and at the end


def test_a_side_that_hangs_is_ended_and_the_time_is_kept():
    units = [Unit(OURS, "training", size, seconds=10) for size in ("hang", "a", "hang", "b")]
    result, _ = run(units, 3)
    assert [row.get("error") for row in result["rows"]] == ["no answer", None, "no answer"]
    assert [row["unit_seconds"] for row in result["rows"]] == [100, 10, 70]  # what is left
    assert [row["unit"] for row in result["not_run"]] == ["training of b (fope_jax)"]
    assert result["seconds"] == 180


def test_all_that_is_asked_for_is_planned():
    units = all_units()
    steps = {(u.side, u.size, u.length) for u in units if u.kind == "training"}
    sizes, lengths = ("60m", "180m", "1200m"), (512, 4096, 32_768)
    assert steps == {(s, n, t) for s in (OURS, TORCH) for n in sizes for t in lengths}
    groups = [u.group for u in units if u.kind == "methods"]
    labels = [label for g in groups for label in list(EXAMPLES)[g :: len(groups)]]
    assert sorted(labels) == sorted(EXAMPLES)
    assert {"fope", "alibi"} <= {m for u in units if u.kind == "cost" for m in u.methods}
    assert len({unit.name for unit in units}) == len(units)


def test_an_error_is_seen_in_any_array():
    x = np.ones((2, 3), np.float32)

    def wrong(x):
        return {"a": x, "b": x * 1.01}

    def no_number(x):
        return {"a": x / 0, "b": x}

    def broken(x):
        raise ValueError("no kernel\nfor this")

    programs = [lambda x: {"a": x, "b": x}, wrong, no_number, broken]
    rows = run_checks([Check({}, programs[0], f, (x,), (x,), 1e-3, array_error) for f in programs])
    assert [row["ok"] for row in rows] == [True, False, False, False]
    assert rows[1]["worst"] == pytest.approx(0.01, rel=1e-3) and rows[1]["worst_array"] == "b"
    assert rows[2]["worst"] is None and rows[2]["worst_array"] == "a"
    assert rows[3]["error"] == "ValueError: no kernel for this"


def test_rates_are_shares_of_the_peak_and_stand_beside_torch():
    unit = {"size": "60m", "length": 512, "batch": 4}
    machine = {"count": 1, "device": "NVIDIA H200", "jax": "0.12", "python": "3.12"}
    machine |= {"product_rate": 7e14, "peak": 1e15}
    ours = {"seconds": 0.5, "flops": 2e14, "bytes": 5e9, "attention": "cudnn"}
    checks = [
        {"case": "packed", "backend": "cudnn", "dtype": "bfloat16", "ok": True, "worst": 0.01},
        {"case": "odd", "backend": "cudnn", "dtype": "bfloat16", "ok": False, "worst": 0.9},
        {"case": "sinks", "backend": "cudnn", "dtype": "bfloat16", "cannot_run": "it takes none"},
    ]
    checks = [check | {"limit": 0.03, "worst_array": "d_q"} for check in checks]
    methods = {"fope": {"seconds": 0.5, "bytes": 1e9, "attention": "cudnn"}}
    methods["fope"]["beside_rope"] = [1.0, 1.02, 1.04]
    rows = [
        {"kind": "machine", "side": OURS, "result": machine},
        {"kind": "paths", "side": OURS, "result": checks},
        {"kind": "training", "side": OURS, "result": ours, **unit},
        {"kind": "training", "side": TORCH, "result": {"seconds": 0.75, "bytes": 7e9}, **unit},
        {"kind": "cost", "side": OURS, "result": {"methods": methods, "failed": {}}, **unit},
        {"kind": "training", "side": OURS, "unit": "1200m", "error": "out of memory", **unit},
    ]
    not_run = [{"unit": "attention", "reason": "no time"}]
    text = render({"rows": rows, "not_run": not_run, "seconds": 9.0, "minutes": 8, "peak": None})
    assert "700.0 TFLOP/s, 70% of its peak" in text
    assert "| cudnn | bfloat16 | 1 of 2 | 9.0e-01 | 3e-02 | 1 |" in text
    assert "- wrong: odd, cudnn, bfloat16: d_q 0.9" in text
    shown = "| 60m | 512 | 4 | 4,096 | 40.0% | 5.00 | 2,731 | 26.7% | 7.00 | 1.50 | cudnn |"
    assert shown in text
    assert "| 60m | 512 | fope | 0.5000 | 1.020 (1.000 to 1.040) | 1.00 | cudnn |" in text
    assert "- 1200m: out of memory" in text and "- attention: no time" in text


@pytest.mark.slow
def test_the_process_of_a_side_answers_without_tensorflow(tmp_path, capsys):
    """All modules of our side are imported for a unit."""
    file = tmp_path / "out" / "gpu.json"
    assert program.main(["--small", "--only", "machine", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["result"]["imports_tensorflow"] is False
    assert row["result"]["product_rate"] > 1e6
    assert "1 x cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_a_window_of_one_token_more_is_seen(monkeypatch):
    rows = correctness.path_rows(2, 66, 1)
    assert [row.get("ok") for row in rows] == [None, True, True], rows
    right = correctness.sharded_attention

    def wider(*arrays, position, backend, **rest):
        if backend == "chunked":
            position = Layer(position.method, window=position.window + 1)
        return right(*arrays, position=position, backend=backend, **rest)

    monkeypatch.setattr(correctness, "sharded_attention", wider)
    rows = correctness.path_rows(2, 66, 1)
    assert [row.get("ok") for row in rows] == [None, False, False], rows


@pytest.mark.slow  # a minute of a core
def test_each_kind_runs_in_small(tmp_path):
    file = tmp_path / "gpu.json"
    assert program.main(["--small", "--json", str(file), "--minutes", "30"]) == 0
    result = json.loads(file.read_text())
    assert not [row for row in result["rows"] if "error" in row]
    kinds = {row["kind"]: row["result"] for row in result["rows"]}
    assert kinds.keys() == {"machine", "paths", "methods", "training", "cost", "attention"}
    assert all(check.get("ok", True) for kind in ("paths", "methods") for check in kinds[kind])
    assert kinds["training"]["losses"][-1] < kinds["training"]["losses"][0]
    assert kinds["cost"]["methods"]["fope"]["bytes"] > 1e5
    assert set(kinds["attention"]["seconds"]) == {"chunked", "causal"}
