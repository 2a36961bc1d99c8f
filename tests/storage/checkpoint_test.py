"""Checkpoints: bit-equal, verified, of the right model, and never half there."""

import json
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.storage import directories
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_items(seed: int = 0):
    a, b = jax.random.split(jax.random.key(seed))
    # A denormal, signed zero, NaN and infinity: what a lossy path would change first.
    odd = jnp.array([1e-42, -0.0, jnp.nan, -jnp.inf, 1 / 3], jnp.float32)
    params = {
        "layers": {"query": jax.random.normal(a, (2, 3, 4)), "odd": odd},
        "norm": jax.random.normal(b, (7,)).astype(jnp.bfloat16),
    }
    moments = (Moments(jnp.int32(17), jax.tree.map(lambda x: x * 2, params)), ())
    return {"params": params, "constants": {"position": {}}, "optimizer": moments}


def abstract(items):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), items)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def store(tmp_path):
    with_steps = CheckpointStore(tmp_path / "checkpoints", keep=2)
    yield with_steps
    with_steps.close()


def saved_twice(store):
    """Steps 10 and 20, seen as by another process, which has verified nothing yet."""
    for step in (10, 20):
        store.save(step, make_items(step), {"seed": step})
    return CheckpointStore(store.directory)


def payload(store, step):
    """The largest file under the items of a step: where the arrays are."""
    files = [p for p in (store.directory / str(step)).glob("*/**/*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_restores_the_same_bits_types_and_tree(store):
    other = saved_twice(store)
    assert_same_bits(other.restore(20, abstract(make_items(20))), make_items(20))
    assert_same_bits(other.restore(10, abstract(make_items(10))), make_items(10))
    assert other.metadata(10) == {"seed": 10}
    assert other.latest_valid_step() == 20


def test_restores_a_subset_of_the_items(store):
    items = make_items()
    store.save(1, items, {})
    restored = store.restore(1, {"params": abstract(items["params"])})
    assert list(restored) == ["params"]
    assert_same_bits(restored["params"], items["params"])
    assert store.restore(1, {"constants": {"position": {}}}) == {"constants": {"position": {}}}


def test_refuses_another_model_before_reading(store, monkeypatch):
    items = make_items()
    store.save(5, items, {})
    monkeypatch.setattr(store._handler, "restore", lambda *a, **k: pytest.fail("arrays were read"))
    params = abstract(items["params"])
    params["layers"]["query"] = jax.ShapeDtypeStruct((2, 3, 8), jnp.float32)
    params["norm"] = jax.ShapeDtypeStruct((7,), jnp.float32)
    with pytest.raises(CheckpointError) as caught:
        store.restore(5, {"params": params, "constants": {"position": {"a": jnp.ones(3)}}})
    assert str(caught.value).splitlines() == [
        f"{store.directory / '5'} is a checkpoint of another model; 3 of 4 arrays differ:",
        "  params/layers/query: checkpoint float32[2, 3, 4], this model float32[2, 3, 8]",
        "  params/norm: checkpoint bfloat16[7], this model float32[7]",
        "  constants/position/a: checkpoint nothing, this model float32[3]",
    ]


@pytest.mark.slow
def test_the_error_stays_short_however_many_arrays_differ(store):
    store.save(5, {"params": {f"w{i}": jnp.ones(i + 1) for i in range(50)}}, {})
    wanted = {f"w{i}": jnp.ones(i + 2) for i in range(50)}
    with pytest.raises(CheckpointError, match="50 of 50 arrays") as caught:
        store.restore(5, {"params": wanted})
    assert len(str(caught.value).splitlines()) == 5


def test_an_unknown_item_and_an_unknown_step_name_what_there_is(store):
    other = saved_twice(store)
    with pytest.raises(CheckpointError, match="no item 'ema'; it has params, constants, optimizer"):
        other.restore(20, {"ema": jnp.ones(3)})
    with pytest.raises(CheckpointError, match=r"30 does not exist; there are: 10, 20"):
        other.restore(30, {})


def flip(store):
    path = payload(store, 20)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(store):
    path = payload(store, 20)
    path.write_bytes(path.read_bytes()[:-1])


def edit_metadata(store):
    path = store.directory / "20" / "metadata.json"
    content = json.loads(path.read_text())
    content["metadata"]["seed"] = 21
    path.write_text(json.dumps(content))


def garble_manifest(store):
    (store.directory / "20" / "manifest.json").write_text('{"files": ')


def cut_off(store):
    (store.directory / "20" / "manifest.json").unlink()


def empty(store):
    shutil.rmtree(store.directory / "20")
    (store.directory / "20").mkdir()


@pytest.mark.fast(
    "flip-has changed", "<lambda>-is missing", "garble_manifest-manifest.json cannot be read"
)
@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (flip, "has changed"),
        (truncate, "has changed"),
        (lambda store: payload(store, 20).unlink(), "is missing"),
        (lambda store: (store.directory / "20" / "stray").touch(), "stray was added"),
        (edit_metadata, "metadata.json has changed"),
        (garble_manifest, "manifest.json cannot be read"),
        (cut_off, "no manifest"),
        (empty, "it is empty"),
    ],
)
def test_a_damaged_step_is_named_skipped_and_can_be_written_again(store, harm, says):
    other = saved_twice(store)
    harm(store)
    with pytest.warns(UserWarning, match=f"20 is damaged: .*{says}"):
        assert other.latest_valid_step() == 10
    with pytest.raises(CheckpointError, match=f"20 is damaged: .*{says}"):
        other.restore(20, abstract(make_items()))
    assert_same_bits(other.restore(10, abstract(make_items(10))), make_items(10))
    other.save(20, make_items(3), {})
    assert CheckpointStore(store.directory).latest_valid_step() == 20


def test_the_writer_moves_damaged_steps_aside_and_deletes_none(store):
    for seed in (1, 2):
        saved_twice(store)
        flip(store)
        harmed = payload(store, 20).read_bytes()
        other = CheckpointStore(store.directory)
        target = store.directory / "quarantine" / ("20" if seed == 1 else "20.2")
        with pytest.warns(UserWarning, match=f"has changed .sha256.; moved to {target}$"):
            assert other.latest_valid_step(quarantine=True) == 10
        assert harmed in [p.read_bytes() for p in target.rglob("*") if p.is_file()]
        assert other.latest_valid_step(quarantine=True) == 10, "and there is nothing to warn of"


def test_a_step_that_is_written_over_is_moved_aside(store, caplog):
    other = saved_twice(store)
    cut_off(store)
    other.save(20, make_items(3), {})
    assert f"20 was there before: moved to {store.directory}/quarantine/20" in caplog.text
    assert (store.directory / "quarantine/20/metadata.json").is_file()


def test_a_later_step_of_another_run_does_not_cost_one_of_this(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    (tmp_path / "99").mkdir()
    store.save(4, {"params": {"w": jnp.ones(2)}}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "99"]


def test_strangers_in_the_directory_are_no_checkpoints(store):
    other = saved_twice(store)
    (store.directory / "100.orbax-checkpoint-tmp").mkdir()
    (store.directory / "notes").mkdir()
    (store.directory / "200").write_text("")
    assert other.latest_valid_step() == 20
    other.save(30, make_items(), {})
    assert not (store.directory / "100.orbax-checkpoint-tmp").exists()
    assert other.latest_valid_step() == 30


def test_an_empty_or_missing_directory_has_no_step(tmp_path):
    assert CheckpointStore(tmp_path / "nowhere").latest_valid_step() is None


def test_milestones_stay_beside_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, keep_period=4)
    for step in (2, 4, 6, 8, 10, 11):
        store.save(step, {"params": {"w": jnp.ones(2)}}, {})
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 10, 11]


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep=keep)
    for step in (2, 4, 6, 10):
        store.save(step, {"params": {"w": jnp.ones(2)}}, {})
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4, 6, 10][-keep:]


def test_a_failed_save_is_an_error_and_leaves_the_step_before(store, monkeypatch):
    store.save(10, make_items(), {})

    async def full(path, **_):
        (path / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._handler, "async_save", full)
    with pytest.raises(CheckpointError, match=r"cannot save checkpoint .*20: .*No space left"):
        store.save(20, make_items(), {})
    assert [p.name for p in store.directory.iterdir()] == ["10"]
    assert CheckpointStore(store.directory).latest_valid_step() == 10


def test_a_file_that_was_cut_off_after_its_checksum_is_no_part_of_a_step(store, monkeypatch):
    finalize = store._handler.finalize

    def finalize_and_cut(path):
        finalize(path)
        file = next(Path(path, "ocdbt.process_0/d").iterdir())
        file.write_bytes(file.read_bytes()[:-1])

    monkeypatch.setattr(store._handler, "finalize", finalize_and_cut)
    with pytest.raises(CheckpointError, match="is not as a process of the run has written it"):
        store.save(10, make_items(), {})
    assert CheckpointStore(store.directory).latest_valid_step() is None


# ---------------------------------------------------------------------------- in the background


@pytest.fixture
def held(store, monkeypatch):
    """A store that finishes no save before this event is set."""
    may_go_on, finalize = threading.Event(), store._handler.finalize

    def wait_and_finalize(path):
        assert may_go_on.wait(30), "nothing waits for a save"
        finalize(path)

    monkeypatch.setattr(store._handler, "finalize", wait_and_finalize)
    return may_go_on


def test_arrays_may_change_once_a_save_has_begun(store, held):
    """The device's memory is used again, as by a training step that its state is donated to."""
    trees, double = make_items()["params"], jax.jit(lambda x: x * 2, donate_argnums=0)
    expected = jax.tree.map(np.array, trees)
    save = store.start_save(10, {"params": trees}, {})
    for _ in range(3):
        trees = jax.block_until_ready(jax.tree.map(double, trees))
    assert not save.is_done
    held.set()
    store.wait()
    assert_same_bits(store.restore(10, {"params": abstract(trees)})["params"], expected)
    assert save.seconds > 0 and save.size > sum(x.nbytes for x in jax.tree.leaves(expected))


def test_a_save_under_way_is_no_step_and_nobody_is_warned(store, held, recwarn):
    held.set()
    store.save(10, make_items(), {})
    held.clear()
    store.start_save(20, make_items(), {})
    reader = CheckpointStore(store.directory)
    assert reader.latest_valid_step() == 10 and reader.newest_step() == 10
    with pytest.raises(CheckpointError, match="20 is not whole: its save is under way, or was cut"):
        reader.metadata(20)
    assert not recwarn.list
    held.set()
    store.wait()
    assert reader.latest_valid_step() == 20


def test_what_fails_in_the_background_is_told_with_its_step_by_the_next_call(store, monkeypatch):
    store.save(10, make_items(), {})

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store._handler, "finalize", full)
        save = store.start_save(20, make_items(), {})
        save.join()
    with pytest.raises(CheckpointError, match=r"cannot save checkpoint .*/20: .*No space left"):
        store.start_save(30, make_items(), {})
    assert [p.name for p in store.directory.iterdir()] == ["10"]
    store.save(30, make_items(), {})
    assert CheckpointStore(store.directory).latest_valid_step() == 30


def test_saves_that_were_killed_are_removed_and_steps_that_were_whole_stay(store):
    other = saved_twice(store)
    killed = store.directory / "30"
    shutil.copytree(store.directory / "20", killed)
    (killed / "manifest.json").unlink()
    for path in (killed, store.directory / "20"):  # 20: killed before its last line
        (path / "unfinished").touch()
    assert other.latest_valid_step(quarantine=True) == 20
    other.save(40, make_items(), {})
    assert sorted(p.name for p in store.directory.iterdir()) == ["20", "40"]
    assert not (store.directory / "20/unfinished").exists()


def test_a_process_reads_back_only_what_it_wrote(tmp_path, monkeypatch):
    for name in ("mine", "other"):
        (tmp_path / name).write_text(name)
    known = {"other": {"sha256": "0" * 64, "bytes": 5}}
    read, real = [], directories.file_sha256
    monkeypatch.setattr(directories, "file_sha256", lambda p: read.append(p.name) or real(p))
    found = directories.tree_sha256(tmp_path, ("skipped",), known)
    assert read == ["mine"] and found["other"] == known["other"] and found["mine"]["bytes"] == 4


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match="cannot save checkpoint"):
        store.save(1, {"params": {"w": jnp.ones(2)}}, {})


def test_starting_over_is_refused_where_every_finished_step_is_damaged(store):
    saved_twice(store)
    for step in (10, 20):
        (store.directory / str(step) / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)no valid checkpoint is left.*/20: .*/10: "):
        CheckpointStore(store.directory).latest_valid_step(quarantine=True)
    assert sorted(p.name for p in store.directory.iterdir()) == ["10", "20"], "all stay in place"


def test_saves_that_were_cut_off_are_no_reason_to_refuse(store):
    saved_twice(store)
    for step in (10, 20):
        (store.directory / str(step) / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="no manifest"):
        assert CheckpointStore(store.directory).latest_valid_step() is None
