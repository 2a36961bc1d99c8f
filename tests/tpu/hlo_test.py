import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fope_jax.tpu.hlo import measure_traffic, parse_program

LOOP = """HloModule step

%body (p: (s32[], f32[64,8], f32[6,64,8])) -> (s32[], f32[64,8], f32[6,64,8]) {
  %p = (s32[], f32[64,8]{1,0}, f32[6,64,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[6,64,8]{2,1,0} get-tuple-element(%p), index=2
  %gathered = f32[256,8]{1,0} all-gather(%x), replica_groups=[4,4]<=[16], dimensions={0}
  %slice = f32[1,64,8]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%one_of
  ROOT %t = (s32[], f32[64,8]{1,0}, f32[6,64,8]{2,1,0}) tuple(%i, %x, %w)
}

%one_of (a: f32[6,64,8], b: s32[]) -> f32[1,64,8] {
  %a = f32[6,64,8]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %d = f32[1,64,8]{2,1,0} dynamic-slice(%a, %b, %b, %b), dynamic_slice_sizes={1,64,8}
}

%condition (q: (s32[], f32[64,8], f32[6,64,8])) -> pred[] {
  %q = (s32[], f32[64,8]{1,0}, f32[6,64,8]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (s: (s32[], f32[64,8], f32[6,64,8])) -> (s32[], f32[64,8], f32[6,64,8]) {
  %s = (s32[], f32[64,8]{1,0}, f32[6,64,8]{2,1,0}) parameter(0)
  %y = bf16[32]{0:T(256)S(1)} custom-call(), custom_call_target="near"
  %sum = f32[64,8]{1,0} all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %own = f32[16,8]{1,0} reduce-scatter(%sum), replica_groups=mesh['a'=2,'b'=4] {'b'}
  ROOT %loop = (s32[], f32[64,8], f32[6,64,8]) while(%s), condition=%condition, body=%body
}
"""


def test_a_program_written_by_hand():
    found = measure_traffic(LOOP, lambda names: 100)
    assert found.collectives == {
        "all-gather": 6 * 256 * 8 * 4 * 3 / 4,
        "all-reduce": 2 * 64 * 8 * 4 * 3 / 4,
        "reduce-scatter": 16 * 8 * 4 * 3,
    }
    block, row = 64 * 8 * 4, 16 * 8 * 4
    # In the loop: a block read, four written, one sliced out of six and written, and an index.
    # Outside: %y stays on the chip, a sum is written, and read for its quarter.
    assert found.hbm == 6 * (block + 4 * block + 2 * block + 4) + block + block + row


def test_a_loop_without_a_stated_end_runs_as_often_as_told():
    text = LOOP.replace("constant(6)", "add(%j, %j)")
    found = measure_traffic(text, lambda names: 100)
    assert found.collectives["all-gather"] == 100 * 256 * 8 * 4 * 3 / 4


STARTED = """HloModule step

ENTRY %main (s: f32[64,128]) -> f32[64,128] {
  %s = f32[64,128]{1,0:T(8,128)} parameter(0)
  %up = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%s)
  %near = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%up)
  %down = (f32[64,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%near)
  %part = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%s)
  %all = (f32[64,128]{1,0}, f32[256,128]{1,0}) all-gather-start(%s), replica_groups=[4,4]<=[16]
  ROOT %far = f32[64,128]{1,0:T(8,128)} copy-done(%down)
}
"""


def test_what_goes_beside_other_work_moves_its_bytes_once():
    """To the chip, back, a quarter to the chip, and a gathered array of four such."""
    array = 64 * 128 * 4
    found = measure_traffic(STARTED, lambda names: 1)
    assert found.hbm == array + array + array / 4 + (array + 4 * array)
    assert found.collectives == {"all-gather": 3 * array}


def test_tiles_that_an_array_does_not_fill_are_moved_whole():
    """64 of 128 lanes, or 5 of 8 rows, are whole tiles; where 64 is not fastest, it fits."""
    text = STARTED[: STARTED.index("  %up")] + (
        "  %half = bf16[512,64]{1,0:T(8,128)(2,1)} copy(%s)\n"
        "  %other = bf16[512,64]{0,1:T(8,128)(2,1)} copy(%s)\n"
        "  ROOT %rows = f32[5,128]{1,0:T(8,128)} copy(%s)\n}\n"
    )
    written = 512 * 128 * 2 + 512 * 64 * 2 + 8 * 128 * 4
    assert measure_traffic(text, lambda names: 1).hbm == 3 * 64 * 128 * 4 + written


FUSED = """HloModule step

%begin (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %g = f32[16,8]{1,0} all-gather(%a), channel_id=3, replica_groups={{0,1,2,3}}
}

%go_on (w: f32[6,16,8], p: f32[16,8], q: f32[4,8]) -> (f32[6,16,8], f32[16,8], f32[16,8]) {
  %w = f32[6,16,8]{2,1,0} parameter(0)
  %p = f32[16,8]{1,0} parameter(1)
  %q = f32[4,8]{1,0} parameter(2)
  %h = f32[16,8]{1,0} all-gather(%q), channel_id=3, replica_groups={{0,1,2,3}}
  %new = f32[1,16,8]{2,1,0} bitcast(%p)
  %u = f32[6,16,8]{2,1,0} dynamic-update-slice(%w, %new)
  ROOT %t = (f32[6,16,8]{2,1,0}, f32[16,8]{1,0}, f32[16,8]{1,0}) tuple(%u, %p, %h)
}

ENTRY %main (s: f32[4,8]) -> f32[16,8] {
  %s = f32[4,8]{1,0} parameter(0)
  %all = f32[6,16,8]{2,1,0} parameter(1)
  %began = f32[16,8]{1,0} fusion(%s), kind=kCustom, calls=%begin, backend_config={"notes":"{
"of": "a kernel"
}}, metadata={}
  ROOT %f = (f32[6,16,8], f32[16,8], f32[16,8]) fusion(%all, %began, %s), calls=%go_on
}
"""


def test_a_collective_over_several_fusions_counts_once_and_updates_in_place_are_their_size():
    found = measure_traffic(FUSED, lambda names: 1)
    own, block = 4 * 8 * 4, 16 * 8 * 4
    assert found.collectives == {"all-gather": block * 3 / 4}
    # Begun: a part read, a block written. Going on: a block and a part read, a block written into
    # the six, which are neither read nor written as a whole, and a block handed on costs nothing.
    assert found.hbm == own + block + (block + own) + (block + block)


def between_slices(kind, target):
    return f"""HloModule step

ENTRY %main (a: f32[64,8]) -> f32[64,8] {{
  %a = f32[64,8]{{1,0}} parameter(0)
  %begun = token[] after-all(), frontend_attributes={{MegascaleRendezvousKeyName="x_0"}}
  %send = (f32[64,8]{{1,0}}, u32[], token[]) send(%a, %begun), channel_id=3, \
is_host_transfer=true, frontend_attributes={{\
_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target={target},\
_xla_megascale_transfer_type="{kind}"}}
  %sent = token[] send-done(%send), channel_id=3, is_host_transfer=true
  %recv = (f32[64,8]{{1,0}}, u32[], token[]) recv(%begun), channel_id=2, is_host_transfer=true
  %done = (f32[64,8]{{1,0}}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  ROOT %x = f32[64,8]{{1,0}} get-tuple-element(%done), index=0
}}
"""


@pytest.mark.parametrize(
    ("kind", "target", "sent"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:15}"', 2 * 1 / 2),
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', 2 * 3 / 4),
        ("ALL_REDUCE", '"{1:4}x{0:3}"', 2 * 3 / 4),
        ("ALL_REDUCE", "{{100000,200000},{100001,200001},{300000,400000},{300001,400001}}", 1),
        ("REDUCE_SCATTER", '"{1,2}x{0:15}"', 1 / 2),
        ("ALL_GATHER", '"{1,2,3}x{0:15}"', 2),
        ("ALL_GATHER", "{{100000,200000,300000},{400000,500000,600000}}", 2),
        ("ALL_TO_ALL", '"{1,2,3}x{0:15}"', 2 / 3),
        ("ONE_TO_ONE", '"{1,2}x{0:15}"', 1),
        ("ONE_TO_ONE", "{{100000->200004},{200000->100004}}", 1),
    ],
)
def test_transfers_between_slices_are_apart(kind, target, sent):
    size = 64 * 8 * 4
    found = measure_traffic(between_slices(kind, target), lambda names: 1)
    assert found.between_slices == size * sent and found.collectives == {}
    assert found.hbm == 2 * (size + 4), "read by the host, written by it, and flags"


def test_a_transfer_that_is_not_known_is_named():
    for kind, target in (("BROADCAST", '"{1,2}x{0:15}"'), ("ALL_REDUCE", '""')):
        with pytest.raises(ValueError, match=f"'{kind}': expected one of ALL_REDUCE, .* a target"):
            measure_traffic(between_slices(kind, target), lambda names: 1)


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_program("HloModule nothing\n")


def test_the_compilers_text_is_read():
    """A scan of products: each of its passes reads a matrix and the state, and writes the state."""
    weights = jax.ShapeDtypeStruct((12, 256, 256), jnp.float32)
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = jax.jit(run).lower(x, weights).compile().as_text()
    matrix = 256 * 256 * 4
    assert 12 * 3 * matrix <= measure_traffic(text, lambda names: 1e9).hbm <= 12 * 8 * matrix


def test_collectives_of_a_sharded_program():
    """On 4 simulated devices: a product whose contracted axis is cut is summed over them."""
    code = (
        "import jax, jax.numpy as jnp\n"
        "from jax.sharding import NamedSharding, PartitionSpec as P\n"
        "from fope_jax.tpu.hlo import measure_traffic\n"
        "mesh = jax.make_mesh((4,), ('a',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "at = lambda *spec: NamedSharding(mesh, P(*spec))\n"
        "x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=at(None, 'a'))\n"
        "w = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=at('a', None))\n"
        "run = jax.jit(jnp.matmul, out_shardings=at())\n"
        "print(measure_traffic(run.lower(x, w).compile().as_text(), lambda _: 1).collectives)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={
            "PATH": "",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
    )
    assert done.stdout.strip() == str({"all-reduce": 2 * 64 * 32 * 4 * 3 / 4})
