"""The benchmarks run, and what they compute from measurements is right."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cost, memory, phases
from benchmarks.position import main
from fope_jax.gallery.examples import EXAMPLES
from fope_jax.position import ALiBi, ModelShape, NoPE, RoPE

SHAPE = ModelShape(d_model=64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16)


def test_ratios_are_paired_within_a_round():
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    slower = [1.1 * s for s in drifting]
    found = cost.ratio(slower, drifting, "nope")
    assert found == cost.Ratio("nope", *[pytest.approx(1.1)] * 3)
    low, middle, high = cost.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, "nope")[1:]
    assert (low, middle, high) == (2.0, 3.0, 4.0)
    assert cost.ratio([3.0], [2.0], "rope") == ("rope", 1.5, 1.5, 1.5)


def test_each_method_meets_its_base():
    seconds = {"nope": [1.0, 1.0], "rope": [2.0, 2.0], "fope": [3.0, 3.0], "alibi": [4.0, 4.0]}
    found = {c.label: c.ratio for c in cost.costs([seconds], EXAMPLES)}
    assert found["nope"] is None
    assert (found["rope"].base, found["rope"].median) == ("nope", 2.0)
    assert (found["fope"].base, found["fope"].median) == ("rope", 1.5)
    assert (found["alibi"].base, found["alibi"].median) == ("nope", 4.0)
    assert cost.costs([{"fope": [1.0]}], EXAMPLES)[0].ratio is None
    other = {"nope": [1.0], "rope": [2.0], "fope": [6.0], "alibi": [4.0]}
    table = cost.cost_table(cost.costs([seconds, other], EXAMPLES))
    assert "| fope | 3.000 | 1.500 x rope | 1.500 to 2.250 | 3 | 1.500, 3.000 |" in table


def test_orders_rotate():
    orders = cost.interleave(4, 8)
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert [order[0] for order in orders[::2]] == [0, 1, 2, 3]
    assert all(back == order[::-1] for order, back in zip(orders[::2], orders[1::2], strict=True))


def test_packed_batches_hold_documents_and_plain_ones_share_positions():
    plain = cost.make_batch(50, 3, 40, packed=False)
    assert plain.tokens.shape == (3, 40) and plain.positions.shape == (1, 40)
    np.testing.assert_array_equal(plain.tokens[:, 1:], plain.targets[:, :-1])
    packed = cost.make_batch(50, 3, 40, packed=True)
    assert packed.positions.shape == packed.segments.shape == (3, 40)
    starts = packed.positions == 0
    np.testing.assert_array_equal(np.cumsum(starts, axis=1), packed.segments)
    follows = packed.positions[:, 1:] == packed.positions[:, :-1] + 1
    assert (follows | starts[:, 1:]).all()
    assert 3 < packed.segments.max() < 20


@pytest.mark.slow
def test_methods_share_weights_and_keep_what_is_their_own():
    config = cost.make_config("tiny", 1, 32)
    batch = cost.make_batch(32, 2, 16, packed=False)
    methods = {name: EXAMPLES[name] for name in ("nope", "kerple")}
    (nope, kerple), shared = cost.contestants(methods, config, batch)
    assert not nope.own and shared
    assert sum("r1" in name for name in kerple.own) == 3  # the parameter and its two moments
    assert not set(kerple.own) & set(shared)
    weights = next(name for name in shared if "'embedding'" in name and "params" in name)
    before = np.array(shared[weights])
    after, own = nope.step(shared, nope.own)
    assert own == {} and after.keys() == shared.keys()
    assert np.abs(np.asarray(after[weights]) - before).max() > 0
    again, own = kerple.step(after, kerple.own)
    assert own.keys() == kerple.own.keys()
    assert np.isfinite(np.asarray(again[weights])).all()


@pytest.mark.slow
def test_memory_grows_linearly_and_the_exponent_says_so():
    found = memory.growth("alibi", ALiBi(), SHAPE, [1024, 4096])
    assert list(found.sizes) == [1024, 4096]
    assert found.exponent < 1.2
    assert found.sizes[4096] < 4 * SHAPE.num_heads * 4096**2 / 4
    assert memory.exponent({1: 1, 4: 16}) == 2.0
    assert math.isnan(memory.exponent({4: 16}))
    table = memory.memory_table([found], SHAPE)
    assert "| one [N, T, T] | 8.4 | 134.2 | 2.00 |" in table


def test_errors_of_phases_are_found_where_they_are():
    ours = phases.phase_errors("rope", RoPE(), SHAPE).worst
    frequencies = RoPE().frequencies(16)
    plain, rounded = phases.plain_errors(frequencies), phases.bfloat16_errors(frequencies)
    assert max(ours) < 1e-4
    assert plain.worst[-1] > 1e-2 and rounded.worst[0] > 0.1
    # the factor of a scaling and a decay are no errors, and a limit is not an error either
    assert max(phases.phase_errors("yarn", EXAMPLES["rope+yarn"], SHAPE).worst) < 1e-4
    for wrapped in ("logit_scaling", "by_layer", "by_share", "fope-equations"):
        shape = SHAPE._replace(num_layers=2)
        assert max(phases.phase_errors(wrapped, EXAMPLES[wrapped], shape).worst) < 1e-4, wrapped
    xpos = phases.phase_errors("xpos", EXAMPLES["xpos"], SHAPE).worst
    assert max(xpos[:2]) < 1e-4 and np.isnan(xpos[2:]).all()
    shown = phases.errors_table([phases.Errors("xpos", [1e-5, 2e-5, math.nan, math.nan])])
    assert "| xpos | 1.0e-05 | 2.0e-05 | beyond its limit | beyond its limit |" in shown


@pytest.mark.slow
def test_errors_of_biases():
    class Drifting(ALiBi):
        """Computed from float32 positions: wrong far out."""

        def bias(self, variables, q_positions, k_positions):
            q = jnp.asarray(q_positions, jnp.float32) * np.float32(0.1)
            k = jnp.asarray(k_positions, jnp.float32) * np.float32(0.1)
            return -variables["slopes"] * (q - k)

    assert phases.bias_errors("alibi", ALiBi(), SHAPE).worst == [0.0] * 4
    drifting = phases.bias_errors("drifting", Drifting(), SHAPE).worst
    assert drifting[0] < 1e-6 and drifting[-1] > 1e-5
    assert phases.bias_errors("fire", EXAMPLES["fire"], SHAPE) is None


@pytest.mark.slow
def test_fresh_processes_are_pooled(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    file = tmp_path / "cost.json"
    arguments = ["--size", "tiny", "--layers", "1", "--vocab", "32", "--lengths", "16", "--batch"]
    arguments += ["2", "--rounds", "2", "--methods", "nope", "alibi", "--processes", "2"]
    assert main(["cost", *arguments, "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert [len(process["alibi"]) for process in result["seconds"]] == [2, 2]


@pytest.mark.slow
def test_the_commands_print_tables_and_write_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    file = tmp_path / "cost.json"
    arguments = ["--size", "tiny", "--layers", "1", "--vocab", "32", "--lengths", "16", "--batch"]
    arguments += ["2", "--rounds", "2", "--methods", "nope", "alibi", "--packed"]
    assert main(["cost", *arguments, "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert "### T = 16: tiny, 1 layers, vocabulary 32, B = 2, 32 tokens a step" in shown.out
    assert "x nope" in shown.out and "round 2 of 2" in shown.err
    (result,) = json.loads(file.read_text())["results"]
    (process,) = result["seconds"]
    assert {name: len(own) for name, own in process.items()} == {"nope": 2, "alibi": 2}

    small = ["--size", "tiny", "--lengths", "16", "--tokens", "32", "--rounds", "2"]
    assert main(["rotation", *small, "--json", str(file)]) == 0
    assert "more than rope" in capsys.readouterr().out
    (result,) = json.loads(file.read_text())["results"]
    assert [row["label"] for row in result["rotations"]] == ["rope", "fope", "xpos"]
    assert result["rotations"][0]["more"] == 0 < result["rotations"][1]["low"]

    assert main(["memory", "--lengths", "256", "512", "--methods", "alibi"]) == 0
    assert "| alibi |" in capsys.readouterr().out
    assert main(["phases", "--methods", "rope", "alibi", "fire", "nope"]) == 0
    shown = capsys.readouterr().out
    assert "| plain float32 product |" in shown and "by design: fire" in shown
    assert f"jax {jax.__version__}" in shown


def test_a_users_error_is_one_line(capsys):
    assert main(["phases", "--methods", "roap"]) == 2
    assert "unknown method 'roap'; did you mean 'rope'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cost", "--rounds", "0"])
    assert "'0': expected an integer of 1 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_no_embedding_has_no_bias_to_measure():
    with_bias = memory.temporary_bytes(ALiBi(), SHAPE, 512)
    without = memory.temporary_bytes(NoPE(), SHAPE, 512)
    assert 0 < without < 2 * with_bias
