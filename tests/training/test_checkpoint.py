"""Checkpoints: what comes back is what was saved, or an older one and a word about it."""

import asyncio
import gc
import json
import os
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from training_toy import ADAMW, Toy, ToyBatches, setup, to_host

from sedd.errors import UserError
from sedd.training.checkpoint import Checkpoints, find_checkpoints
from sedd.training.named_arrays import json_checksum, kind_of, named_leaves, trees_of
from sedd.training.storage import quiet_orbax
from sedd.training.sums import crc32


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    quiet_orbax()  # as the commands do


DATA, PENDING = {"next_step": 3}, {"window": {"loss": 0.1 + 0.2}, "held": None}


@pytest.fixture(scope="module")
def state():
    """A state with moments, after two steps."""
    state, parallel = setup(ADAMW, devices=2)
    state, batches = parallel.place(state), ToyBatches()
    for _ in range(2):
        state, _ = parallel(state, next(batches))
    return to_host(state)


@pytest.fixture(scope="module")
def abstract():
    return jax.eval_shape(lambda: setup(ADAMW)[0])


def at(state, step):
    """The state with another step, recognisable by its parameters."""
    return replace(
        state,
        step=np.asarray(step, np.int32),
        ema_params=jax.tree.map(lambda x: x + np.float32(step), state.ema_params),
    )


def save(directory, state, steps, metrics=None, **kwargs):
    checkpoints = Checkpoints(directory, **kwargs)
    for step in steps:
        checkpoints.save(
            at(state, step), data=DATA, pending=PENDING, metric=(metrics or {}).get(step)
        )
    checkpoints.close()
    return checkpoints


def array_files(step_directory, tree="ema_params"):
    """Largest first: the arrays are in these."""
    files = [path for path in (step_directory / tree).rglob("d/*") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, to_host(a), to_host(b))


def test_a_state_comes_back_bit_for_bit(tmp_path, state, abstract):
    save(tmp_path, state, [2])
    restored = Checkpoints(tmp_path).restore_latest(abstract)
    assert restored.step == 2
    assert (restored.data, restored.pending) == (DATA, PENDING)
    assert jax.tree.structure(restored.state) == jax.tree.structure(abstract)
    assert restored.state.key.dtype == abstract.key.dtype
    assert_equal(restored.state, at(state, 2))


@pytest.mark.parametrize("name", ["x\udcff", "\udc80/run", "国\udcfe"])
def test_a_directory_whose_name_is_no_utf_8_is_refused(tmp_path, name):
    """Python's escape of such bytes, which the library that writes arrays does not know."""
    with pytest.raises(UserError, match="its name is no UTF-8; rename the directory"):
        Checkpoints(tmp_path / name)
    assert Checkpoints(tmp_path / "国 é").steps() == []


def test_an_empty_directory_is_no_checkpoint(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore_latest(abstract) is None
    assert checkpoints.latest_good() is None
    assert checkpoints.best() is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path / 'none'}"):
        checkpoints.restore_params()
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}"):
        find_checkpoints(tmp_path)


def test_the_newest_few_and_the_best_stay(tmp_path, state):
    checkpoints = save(tmp_path, state, range(1, 7), {1: 3.0, 2: 1.0, 4: 2.0, 5: 1.5}, keep=2)
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best() == 2
    assert checkpoints.latest_good() == 6
    # A run that goes on still knows which one was the best.
    checkpoints = save(tmp_path, state, [7, 8, 9], {8: 4.0}, keep=2)
    assert checkpoints.steps() == [2, 8, 9]


def damage_array(step_directory):
    flip(array_files(step_directory)[0])


def truncate_array(step_directory):
    path = array_files(step_directory)[0]
    os.truncate(path, path.stat().st_size // 2)


def remove_arrays(step_directory):
    for path in array_files(step_directory):
        path.unlink()


def change_description(step_directory):
    path = step_directory / "_CHECKPOINT_METADATA"
    text = path.read_text()
    assert "0.30000000000000004" in text
    path.write_text(text.replace("0.30000000000000004", "0.30000000000000014"))


def truncate_description(step_directory):
    os.truncate(step_directory / "_CHECKPOINT_METADATA", 100)


@pytest.mark.parametrize(
    "damage",
    [damage_array, truncate_array, remove_arrays, change_description, truncate_description],
)
def test_damage_is_noticed_and_an_older_checkpoint_used(tmp_path, capfd, state, abstract, damage):
    checkpoints = save(tmp_path, state, [3, 4])
    damage(tmp_path / "4")
    assert checkpoints.latest_good() == 3

    if damage is not change_description:
        assert_params(checkpoints.restore_params(), at(state, 3).ema_params)
    with pytest.raises(UserError, match=re.escape(f"checkpoint {tmp_path / '4'} is bad: ")):
        checkpoints.restore_params(4)
    assert (tmp_path / "4").exists()  # reading moves nothing

    capfd.readouterr()
    restored = checkpoints.restore_latest(abstract)
    assert restored.step == 3
    assert_equal(restored.state, at(state, 3))
    said = capfd.readouterr().err
    assert said.startswith(f"warning: checkpoint {tmp_path / '4'} is bad: ")
    assert said.count("\n") == 1
    assert (tmp_path / "4.bad").is_dir()
    # Training goes on, past the step that was bad.
    assert save(tmp_path, state, [4, 5]).steps() == [3, 4, 5]


def assert_params(loaded, expected):
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_any_flipped_byte_of_an_array_is_noticed(tmp_path, state, abstract):
    """One byte in each file that holds arrays: none may change what is restored unnoticed."""
    checkpoints = save(tmp_path, state, [1])
    for path in array_files(tmp_path / "1", "."):
        whole = path.read_bytes()
        flip(path)
        if checkpoints.latest_good() is not None:  # a byte that nothing depends on
            assert_equal(checkpoints.restore_latest(abstract).state, at(state, 1))
        path.write_bytes(whole)
    assert checkpoints.latest_good() == 1


def test_an_empty_directory_is_not_the_newest(tmp_path, capfd, state, abstract):
    checkpoints = save(tmp_path, state, [3])
    (tmp_path / "99999").mkdir()
    restored = checkpoints.restore_latest(abstract)
    assert restored.step == 3
    assert f"checkpoint {tmp_path / '99999'} is bad: its description" in capfd.readouterr().err
    assert save(tmp_path, state, [4], keep=1).steps() == [4]
    assert (tmp_path / "99999.bad").is_dir()


def test_nothing_but_bad_checkpoints_is_an_error(tmp_path, state, abstract):
    checkpoints = save(tmp_path, state, [3])
    damage_array(tmp_path / "3")
    with pytest.raises(UserError, match="are damaged"):
        checkpoints.restore_params()
    for _ in range(2):  # the second start finds none at all, and must not begin from nothing
        with pytest.raises(UserError, match=r"all checkpoints in .* are damaged \(renamed to"):
            checkpoints.restore_latest(abstract)
    assert checkpoints.steps() == []


def test_another_configuration_is_an_error_that_names_the_parameter(tmp_path, state):
    checkpoints = save(tmp_path, state, [3])
    wider = jax.eval_shape(lambda: setup(ADAMW, network=Toy(width=32))[0])
    expected = r"configuration: params/embed is float32\[7, 16\] in it, and float32\[7, 32\] in"
    with pytest.raises(UserError, match=expected):
        checkpoints.restore_latest(wider)
    assert checkpoints.steps() == [3]  # it is not bad, and stays

    abstract = jax.eval_shape(lambda: setup(ADAMW)[0])
    more = replace(abstract, params={**abstract.params, "extra": jnp.zeros(3)})
    with pytest.raises(UserError, match=r"params/extra is absent in it, and float32\[3\] in the"):
        checkpoints.restore_latest(more)


def test_parameters_of_another_run_start_a_new_one(tmp_path, state, abstract):
    save(tmp_path / "checkpoints", state, [3, 4])
    params = find_checkpoints(tmp_path).restore_params(abstract_params=abstract.params)
    assert_params(params, at(state, 4).ema_params)
    assert_params(
        find_checkpoints(tmp_path / "checkpoints").restore_params(3, ema=False), state.params
    )
    other = jax.eval_shape(Toy(width=32).init, jax.random.key(0))
    with pytest.raises(UserError, match="another configuration: ema_params/embed"):
        find_checkpoints(tmp_path).restore_params(abstract_params=other)
    with pytest.raises(UserError, match=r"no checkpoint of step 9 .* there are \[3, 4\]"):
        find_checkpoints(tmp_path).restore_params(9)


def test_a_checkpoint_of_an_older_version_is_read_and_verified(tmp_path, state, abstract):
    """It has numpy arrays, and the CRC-32 of each whole array in the description."""
    trees = trees_of(state)
    arrays = {name: [*kind_of(array), crc32(array)] for name, array in named_leaves(trees).items()}
    description = {"data": DATA, "pending": PENDING, "metric": None, "arrays": arrays}

    def write(step, description):
        checksum = json_checksum(description)
        with ocp.training.Checkpointer(str(tmp_path)) as writer:
            metadata = {"sedd": description, "crc32": checksum}
            writer.save_checkpointables(step, trees, custom_metadata=metadata)

    write(2, description)
    arrays["params/mix"][2] ^= 1
    write(3, description)
    assert Checkpoints(tmp_path).latest_good() == 2
    parallel = setup(ADAMW, devices=4, fsdp=2)[1]
    restored = Checkpoints(tmp_path).restore_latest(abstract, parallel.shardings)
    assert (restored.step, restored.data) == (2, DATA)
    assert_equal(restored.state, state)
    assert (tmp_path / "3.bad").is_dir()


def test_the_description_is_plain_json(tmp_path, state):
    save(tmp_path, state, [3], {3: 1.5})
    metadata = json.loads((tmp_path / "3" / "_CHECKPOINT_METADATA").read_text())
    description = metadata["custom_metadata"]["sedd"]
    assert description["metric"] == 1.5
    assert description["arrays"]["params/embed"][:2] == ["float32", [7, 16]]


@pytest.mark.parametrize(
    ("says", "lines"),
    [
        ('OUT_OF_RANGE: Error writing "a/c/0" in OCDBT database at …: File too large', 0),
        ('NOT_FOUND: Error opening "zarr3" driver: …', 0),
        ("of another kind", 1),
    ],
)
def test_arrays_that_fail_beside_the_first_are_not_reported_too(says, lines, caplog):
    async def fail():
        raise ValueError(says)

    async def leave():
        asyncio.ensure_future(fail())  # noqa: RUF006
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(leave())
    assert len([r for r in caplog.records if "never retrieved" in r.getMessage()]) == lines
