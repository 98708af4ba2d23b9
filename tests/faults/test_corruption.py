"""Checkpoints that something has damaged: never loaded, always named, an older one used."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from faults.campaign import CORRUPTIONS, chance
from training.training_toy import ADAMW, setup, to_host

from sedd.training.checkpoint import Checkpoints

DATA, PENDING = {"next_step": 3}, {"window": {"loss": 0.1 + 0.2}, "held": None}


def flip_a_bit(draw, place: Path):
    path = any_file(draw, place)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def flip_a_bit_of_the_arrays(draw, place):
    largest = sorted(files(place), key=lambda path: path.stat().st_size)[-6:]
    flip_a_bit(draw, draw.choice(largest))


def zero_a_block(draw, place):
    path = any_file(draw, place)
    content = bytearray(path.read_bytes())
    first = draw.randrange(len(content))
    block = content[first : first + 512]
    content[first : first + 512] = bytes(len(block))
    path.write_bytes(content)


def truncate(draw, place):
    path = any_file(draw, place)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def lose_a_file(draw, place):
    any_file(draw, place).unlink()


def lose_a_folder(draw, place):
    shutil.rmtree(draw.choice([path for path in sorted(place.rglob("*")) if path.is_dir()]))


def lose_everything_but_the_directory(draw, place):
    shutil.rmtree(place)
    place.mkdir()


DAMAGES = [
    flip_a_bit,
    flip_a_bit_of_the_arrays,
    zero_a_block,
    truncate,
    lose_a_file,
    lose_a_folder,
    lose_everything_but_the_directory,
]


def files(place):
    """Those with content; ``place`` itself, if it is one."""
    return [p for p in sorted(place.rglob("*")) if p.is_file() and p.stat().st_size] or [place]


def any_file(draw, place):
    """By size: most bytes are of arrays, and of what says where they are."""
    paths = files(place)
    return draw.choices(paths, [path.stat().st_size for path in paths])[0]


@pytest.fixture(scope="module")
def abstract():
    return jax.eval_shape(lambda: setup(ADAMW)[0])


@pytest.fixture(scope="module")
def state():
    return to_host(setup(ADAMW)[0])


def at(state, step):
    """The state with another step, every array recognisable."""
    shifted = jax.tree.map(
        lambda x: np.asarray(x + np.asarray(step, x.dtype)),  # of no axes too
        (state.params, state.opt_state, state.ema_params),
    )
    params, opt_state, ema_params = shifted
    return replace(
        state,
        step=np.asarray(step, np.int32),
        params=params,
        opt_state=opt_state,
        ema_params=ema_params,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory)
    for step in (2, 3, 4):
        checkpoints.save(at(state, step), data=DATA, pending=PENDING, metric=1.0 / step)
    checkpoints.close()
    return directory


def assert_whole(restored, state):
    jax.tree.map(np.testing.assert_array_equal, to_host(restored.state), at(state, restored.step))
    assert (restored.data, restored.pending) == (DATA, PENDING)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(CORRUPTIONS))
def test_damage_is_named_and_an_older_checkpoint_used(
    tmp_path, capfd, saved, state, abstract, number
):
    draw = chance(f"corruption {number}")
    damage, victim = DAMAGES[number % len(DAMAGES)], draw.choice([4, 4, 4, 3])
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    damage(draw, directory / str(victim))
    checkpoints = Checkpoints(directory)
    capfd.readouterr()
    restored = checkpoints.restore_latest(abstract)
    said = capfd.readouterr().err
    assert_whole(restored, state)
    if restored.step == 4:  # nothing that was changed is read
        assert said == ""
        assert victim == 3 or damage not in DAMAGES[-1:]
    else:
        assert (victim, restored.step) == (4, 3)
        assert said.startswith(f"warning: checkpoint {directory / '4'} is bad: ")
        assert said.endswith("; set aside as 4.bad\n")
        assert said.count("\n") == 1
    # The run goes on, and its next checkpoints are good.
    for step in (5, 6):
        checkpoints.save(at(state, step), data=DATA, pending=PENDING, metric=1.0 / step)
    checkpoints.close()
    restored = Checkpoints(directory).restore_latest(abstract)
    assert restored.step == 6
    assert_whole(restored, state)
    print(f"{damage.__name__} of {victim}: {said.strip() or 'nothing that is read'}")
