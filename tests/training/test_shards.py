"""Checkpoints by shard: written on one layout, read on another, and verified on each."""

import re
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import serialization
from test_checkpoint import at, flip
from test_multiprocess import finish, start_two
from tiers import nightly
from training_toy import ADAMW, Toy, ToyBatches, setup, to_host

from sedd.errors import UserError
from sedd.networks import mesh
from sedd.training.checkpoint import Checkpoints
from sedd.training.named_arrays import named_leaves
from sedd.training.state import from_host
from sedd.training.storage import quiet_orbax
from sedd.training.sums import ShardSums

SCRIPT = Path(__file__).with_name("shards_of_two.py")
LAYOUTS = {
    "one": {"devices": 1},
    "four": {"devices": 4},
    "parts": {"devices": 4, "fsdp": 2},
    "more parts": {"devices": 4, "fsdp": 4},
}


@pytest.fixture(autouse=True, scope="module")
def _small_parts():
    quiet_orbax()  # as the commands do
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "LEAST_SPLIT", 16)
        yield


@pytest.fixture(scope="module")
def runners():
    """The step on each layout."""
    return {name: setup(ADAMW, network=Toy(width=64), **some)[1] for name, some in LAYOUTS.items()}


@pytest.fixture(scope="module")
def abstract():
    return jax.eval_shape(lambda: setup(ADAMW, network=Toy(width=64))[0])


@pytest.fixture(scope="module")
def state(runners):
    """A state with moments, in numpy."""
    parallel, batches = runners["one"], ToyBatches()
    state = parallel.place(setup(ADAMW, network=Toy(width=64))[0])
    for _ in range(2):
        state, _ = parallel(state, next(batches))
    return to_host(state)


def write(directory, parallel, state, steps=()):
    """Save a state from the devices, at its own step or at others."""
    checkpoints = Checkpoints(directory)
    for each in [at(state, step) for step in steps] or [state]:
        checkpoints.save(parallel.place(from_host(each)), data={}, pending={})
    checkpoints.close()
    return checkpoints


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, to_host(a), to_host(b))


@pytest.fixture(scope="module")
def written(tmp_path_factory, runners, state):
    place = tmp_path_factory.mktemp("written")
    for name, parallel in runners.items():
        write(place / name, parallel, state)
    return place


@pytest.mark.nightly
def test_every_layout_reads_what_every_other_has_written(written, runners, abstract, state):
    for source in LAYOUTS:
        checkpoints = Checkpoints(written / source)
        for parallel in runners.values():
            restored = checkpoints.restore_latest(abstract, parallel.shardings)
            assert_same(restored.state, state)
            expected = parallel.init(lambda: setup(ADAMW, network=Toy(width=64))[0])
            where = jax.tree.map(lambda x: x.sharding, expected)
            assert jax.tree.map(lambda x: x.sharding, restored.state) == where
        assert_same(checkpoints.restore_latest(abstract).state, state)  # in numpy
        shardings = runners["parts"].shardings.ema_params
        _, params = checkpoints.restore_step(shardings=shardings, abstract_params=abstract.params)
        assert params["mix"].sharding == shardings["mix"]
        jax.tree.map(np.testing.assert_array_equal, params, state.ema_params)


@pytest.mark.parametrize("layout", [nightly("four"), "parts"])
def test_steps_do_not_change_a_save_in_the_background(
    tmp_path, monkeypatch, runners, abstract, state, layout
):
    """The steps donate the state that is being written, before any of it is on the disk."""
    stepped, held = threading.Event(), []
    usual, usual_sums = serialization.async_serialize_from_host, ShardSums._sums

    async def late(*arguments, **options):
        held.append(stepped.wait(60))
        return await usual(*arguments, **options)

    def late_sums(self):
        held.append(stepped.wait(60))
        return usual_sums(self)

    monkeypatch.setattr(serialization, "async_serialize_from_host", late)
    monkeypatch.setattr(ShardSums, "_sums", late_sums)
    parallel, batches = runners[layout], ToyBatches()
    current = parallel.place(from_host(state))
    before = to_host(current)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(current, data={}, pending={})
    for _ in range(3):
        current, _ = parallel(current, next(batches))
    jax.block_until_ready(current)
    assert not np.array_equal(to_host(current).params["mix"], before.params["mix"])
    stepped.set()
    checkpoints.close()
    assert held
    assert all(held)
    assert_same(checkpoints.restore_latest(abstract, parallel.shardings).state, before)
    # Nor does a step change what was restored, which several devices may share.
    restored = checkpoints.restore_latest(abstract, parallel.shardings).state
    again = checkpoints.restore_latest(abstract, parallel.shardings).state
    for _ in range(2):
        restored, _ = parallel(restored, next(batches))
    assert_same(again, before)


@pytest.mark.nightly
def test_a_flipped_byte_in_any_shard_is_named_and_an_older_step_used(
    tmp_path, capfd, runners, abstract, state
):
    """In each file that holds shards, bytes that lie closer together than a shard is long."""
    write(tmp_path, runners["more parts"], state, steps=(3, 4))
    spoilt, named = tmp_path / "4", set()
    files = [path for path in spoilt.rglob("ocdbt.process_*/d/*") if path.stat().st_size > 4000]
    for path in files:
        content = path.read_bytes()
        for place in range(500, len(content), 2000):
            changed = bytearray(content)
            changed[place] ^= 8
            path.write_bytes(changed)
            reader = runners["parts" if place % 4000 == 500 else "one"]
            restored = Checkpoints(tmp_path).restore_latest(abstract, reader.shardings)
            said = capfd.readouterr().err
            if restored.step == 4:  # a byte that nothing depends on
                assert said == ""
                assert_same(restored.state, at(state, 4))
                continue
            assert_same(restored.state, at(state, 3))
            assert said.count("\n") == 1
            named |= set(re.findall(r"bad: (\S+\[.*\]) has changed since it was written", said))
            (tmp_path / "4.bad").rename(spoilt)
        path.write_bytes(content)
    for tree in ("params", "ema_params"):
        assert {f"{tree}/mix[{i}:{i + 16}, :]" for i in (0, 16, 32, 48)} <= named


@pytest.mark.nightly
def test_two_processes_read_and_write_every_layout(tmp_path, runners, abstract, written, state):
    """And they agree on damage that only one of them can see."""
    for name in ("one", "four", "parts"):
        shutil.copytree(written / name, tmp_path / name)
    arrays = {name: np.asarray(x) for name, x in named_leaves(state).items()}
    np.savez(tmp_path / "reference.npz", **arrays)
    write(tmp_path / "flipped", runners["parts"], state, steps=(3, 4))
    for process in (0, 1):
        shutil.copytree(tmp_path / "flipped", tmp_path / f"lost {process}")
    for path in (tmp_path / "flipped" / "4").rglob("ocdbt.process_*/d/*"):
        flip(path)
    for path in (tmp_path / "lost 1" / "4" / "ema_params").rglob("ocdbt.process_*/d/*"):
        path.unlink()
    outputs = finish(processes := start_two(SCRIPT, tmp_path))
    assert [process.returncode for process in processes] == [0, 0], outputs
    sources = ("one", "four", "parts", "two pmap", "two fsdp")
    reads = [f"{to} reads {source}" for to in ("pmap", "fsdp") for source in sources]
    for number, (out, err) in enumerate(outputs):
        lines = out.splitlines()
        assert set(reads) <= set(lines)
        assert "flipped: 3" in lines
        assert "lost: 3" in lines
        assert f"process {number} sees the checkpoints" in lines[-1]
        warnings = [line for line in err.splitlines() if line.startswith("warning: checkpoint")]
        assert len(warnings) == (2 if number == 0 else 0)
    first, second = [line for line in outputs[0][1].splitlines() if line.startswith("warning: ")]
    assert re.search(r"flipped/4 is bad: \S+", first)
    assert re.search(
        r"lost 0/4 is bad: its arrays are unreadable .*, in process 1; set aside", second
    )
    for layout in ("pmap", "fsdp"):
        directory = tmp_path / f"two {layout}"
        for parallel in runners.values():
            restored = Checkpoints(directory).restore_latest(abstract, parallel.shardings)
            assert_same(restored.state, state)
        files = sorted(directory.glob("2/checksums/process_*.json"))
        assert len(files) == 2


def test_a_checkpoint_of_other_shapes_is_one_line(written, runners):
    wider = jax.eval_shape(lambda: setup(ADAMW, network=Toy(width=32))[0])
    with pytest.raises(UserError, match=r"params/embed is float32\[7, 64\] in it, and float32\[7"):
        Checkpoints(written / "parts").restore_latest(wider, runners["one"].shardings)
    abstract = jax.eval_shape(Toy(width=32).init, jax.random.key(0))
    with pytest.raises(UserError, match="another configuration: ema_params/embed"):
        Checkpoints(written / "parts").restore_step(
            abstract_params=abstract, shardings=runners["one"].shardings
        )
