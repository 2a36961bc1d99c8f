import dataclasses
import json
import re

import pytest

from fope_jax.config import build_experiment, load_config
from fope_jax.main import main
from fope_jax.model.sharding import MeshConfig
from fope_jax.tpu import plan as planning
from fope_jax.tpu import table, topology
from fope_jax.tpu.plan import make_cases, plan
from fope_jax.tpu.topology import TopologyError, parse_topology

CONFIG = "configs/paper/c4_books.py"


@pytest.fixture(scope="module")
def experiment():
    return build_experiment(load_config(CONFIG, []))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "unknown TPU version 'v9'; such as v4:4x4x4, v5e:4x4, v5p:4x4x4"),
        ("v5e:4x4x4", "a slice of v5e has 2 axes of chips, such as v5e:4x4"),
        ("v5p:0x4x4", "a slice of v5p has 3 axes"),
        ("v6e", "a slice of v6e has 2 axes"),
        ("0xv6e:4x4", "unknown TPU version '0xv6e'; such as v4:4x4x4"),
        ("2x:4x4", "such as v4:4x4x4, v5e:4x4, v5p:4x4x4, v6e:4x4, tpu7x:4x4x4; 2xv5e:4x4 is two"),
    ],
)
def test_an_unknown_slice_is_named_with_those_that_are_known(name, message):
    with pytest.raises(TopologyError, match=re.escape(message)):
        parse_topology(name)


def test_cases_are_all_combinations(experiment):
    cases = make_cases(
        experiment,
        topologies=["v5e:4x4", "v5p:4x4x4"],
        methods=["rope", "fope"],
        lengths=[512, 32768],
        sizes=["60m", "1200m"],
    )
    assert len(cases) == 16
    tokens = experiment.train.batch_size * experiment.train.length
    for case in cases:
        train = case.experiment.train
        assert train.batch_size * train.length == tokens
        assert case.experiment.model.d_model == {"60m": 512, "1200m": 2048}[case.size]
        if case.method == "fope":
            assert case.experiment.position.training_length == train.length
    # 16 rows of 32,768 tokens cannot feed 64 devices: four share the tokens of a row.
    assert cases[-1].experiment.mesh == MeshConfig(fsdp=-1, context=4)
    assert cases[0].experiment.mesh == experiment.mesh


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sizes": ["70m"]}, "size '70m'; accepted: 60m, 180m"),
        ({"methods": ["ropee"]}, "ropee"),
        ({"lengths": [1000]}, "length 1000: a step of the config has 1024 x 512 = 524288 tokens"),
        ({"topologies": ["v7:2x2"]}, "unknown TPU version 'v7'"),
    ],
)
def test_bad_questions_are_refused_before_any_work(experiment, asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_cases(experiment, **({"topologies": ["v5e:2x2"]} | asked))


def test_without_the_compiler_the_pip_line_is_named(capsys, monkeypatch):
    def absent(name):
        raise topology.TopologyError(f"not installed: {topology.INSTALL_COMMAND}")

    monkeypatch.setattr(planning, "libtpu_version", lambda: absent("libtpu"))
    assert main(["plan", "--config", CONFIG, "--topology", "v5e:2x2"]) == 2
    assert "pip install '.[tpu-compiler]'" in capsys.readouterr().err


ROW = {
    "devices": 16,
    "attention": "splash",
    "mesh": {"data": 1, "fsdp": 16, "context": 1, "tensor": 1},
    "flops": 2.2e12,
    "model_flops": 2.0e12,
    "scan_layers": False,
    "fits": True,
    "compiler_options": ["xla_a=false"],
    "needed_bytes": 13_000_000_000,
    "hbm_bytes": 4e9,
    "collective_bytes": {"all-gather": 1e9, "all-reduce": 5e8},
    "bound": "compute",
    "seconds": {"compute": 0.011, "hbm": 0.005, "ici": 0.0075},
    "mfu_bound": 0.91,
    "compile_seconds": 60.0,
}


def test_the_cheapest_change_that_fits_is_found_and_answers_are_kept(
    experiment, tmp_path, monkeypatch
):
    """With a compiler that needs 20 GB, and 10 where everything is computed again."""
    asked = []

    def compile_one(command, *, input, **_):
        from types import SimpleNamespace

        setup = build_experiment(json.loads(input)[0])
        asked.append((setup.model.remat, setup.model.scan_layers))
        fits = setup.model.remat == "full"
        memory = {"fits": fits, "needed_bytes": 10e9 if fits else 20e9, "limit_bytes": 16e9}
        return SimpleNamespace(returncode=0, stdout=json.dumps(ROW | memory).encode())

    monkeypatch.setattr(planning, "libtpu_version", lambda: "1")
    monkeypatch.setattr(planning.subprocess, "run", compile_one)
    scanned = dataclasses.replace(experiment.model, scan_layers=True)
    experiment = dataclasses.replace(experiment, model=scanned)
    cases = make_cases(experiment, topologies=["v5e:4x4"], methods=["rope"])
    (row,) = plan(cases, cache=tmp_path, jobs=1)
    assert asked == [("none", True), ("none", False), ("dots", True), ("full", True)]
    assert row["advice"] == "model.remat=full fits" and not row["cached"]
    assert "DOES NOT FIT, 4.0 too much. model.remat=full fits" in table.to_markdown([row])
    (again,) = plan(cases, cache=tmp_path, jobs=1)
    assert len(asked) == 4 and again["cached"]
    # Another program is compiled anew.
    longer = dataclasses.replace(experiment.train, b1=0.8)
    other = cases[0]._replace(experiment=dataclasses.replace(experiment, train=longer))
    plan([other], cache=tmp_path, jobs=1, advise=False)
    assert len(asked) == 5
    # So is the same one with other options of the compiler.
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_some_option=true")
    plan([other], cache=tmp_path, jobs=1, advise=False)
    assert len(asked) == 6


def test_a_plan_of_nothing_possible_fails(capsys, monkeypatch):
    """After its table; a case that is possible beside one that is not is an answer."""
    answers = [{"error": "heads"}, {"error": "rows"}, ROW, {"error": "rows"}]
    monkeypatch.setattr(planning, "libtpu_version", lambda: "1")
    monkeypatch.setattr(planning, "compile_cached", lambda *_: answers.pop(0))
    command = ["plan", "--config", CONFIG, "--topology", "v5e:2x2", "--method", "rope,fope"]
    assert main([*command, "--jobs", "1"]) == 2
    captured = capsys.readouterr()
    assert "not possible: rows" in captured.out
    assert "none of these steps is possible: heads" in captured.err
    assert main([*command, "--jobs", "1"]) == 0


def test_a_plan_says_what_compiler_options_change(experiment):
    cases = make_cases(
        experiment, topologies=["v5e:4x4"], methods=["rope", "fope"], compare_options=True
    )
    given = [case.experiment.train.compiler_options for case in cases]
    assert given == [None, (), None, ()]
    labels = {"topology": "v5e:4x4", "size": "60m", "length": 512, "batch": 1024, "versions": {}}
    rows = [
        ROW | labels | {"method": case.method, "compiler_options": ["xla_a=false"] * (used is None)}
        for case, used in zip(cases, given, strict=True)
    ]
    rows[0] |= {"hbm_bytes": 3e9}
    rows[2] |= {"hbm_bytes": 3.3e9}
    text = table.to_markdown(rows)
    assert (
        "60m T = 512 rope, row: xla_a=false +0.00% flops, -25.00% bytes of HBM, +0.00% memory"
        in text
    )
    assert "60m T = 512: fope beside rope +0.00% flops, +10.00% bytes of HBM, +0.00% memory" in text
    assert "Compiler options: none; or xla_a=false." in text


def test_copies_of_the_model_are_advised_against_first(experiment, monkeypatch):
    mesh = MeshConfig(data=-1, fsdp=1)
    (case,) = make_cases(experiment, topologies=["v5e:4x4"], mesh=mesh)
    tried = [(text, setup.mesh) for text, setup in planning._changes(case.experiment)]
    assert tried[0] == ("mesh.data=1 with mesh.fsdp=-1", MeshConfig(data=1, fsdp=-1))
    assert all(own == mesh for _, own in tried[1:]) and len(tried) > 3


def test_a_compilation_that_dies_says_why(experiment, monkeypatch):
    from types import SimpleNamespace

    failed = SimpleNamespace(returncode=1, stderr=b"a\nb\nc\nthe compiler is out of order\n")
    monkeypatch.setattr(planning, "libtpu_version", lambda: "1")
    monkeypatch.setattr(planning.subprocess, "run", lambda *_, **__: failed)
    cases = make_cases(experiment, topologies=["v5e:4x4"])
    with pytest.raises(planning.PlanError, match="out of order"):
        plan(cases, cache=None, jobs=1)


def test_what_goes_between_slices_stands_apart():
    names = {"topology": "2xv5e:4x4", "size": "60m", "method": "rope", "length": 512, "batch": 64}
    row = names | ROW | {"dcn_bytes": 2.5e7, "versions": {"jax": "1"}}
    known = row | {"seconds": ROW["seconds"] | {"dcn": 0.008}}
    assert "| 4.0 | 11.0, 5.0, 7.5, DCN 8.0 | 91% |" in table.to_markdown([known])
    assert "7.5, DCN unknown |" in table.to_markdown([row])


def test_tables_say_how_much_more_fope_takes(tmp_path):
    names = {"topology": "v5e:4x4", "size": "60m", "length": 512, "batch": 1024}
    rope = names | ROW | {"method": "rope", "versions": {"jax": "1"}}
    fope = rope | {"method": "fope", "flops": 2.244e12}
    bad = names | {"method": "alibi", "error": "heads", "versions": {"jax": "1"}}
    text = table.to_markdown([rope, fope, bad])
    assert "fope beside rope +2.00% flops, +0.00% bytes of HBM" in text
    assert "| splash row +1 | 13.00 | 2.20 (91%) | 4.0 | 11.0, 5.0, 7.5 | 91% |" in text
    assert "not possible: heads" in text
    assert "DCN" not in text.replace(table.NOTE, "")
    table.write_page([rope, fope, bad], tmp_path / "plan.html")
    assert "+2.00% flops" in (tmp_path / "plan.html").read_text()
