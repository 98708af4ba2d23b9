"""Checksums of shards: additive over any division of an array, and changed by any bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sedd.networks.mesh import device_mesh
from sedd.training.named_arrays import json_checksum
from sedd.training.sums import Part, box_sum, changed_part, host_shards, read_sums

TYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool", "float64", "int64")
SHAPES = ((), (7,), (6, 5), (4, 3, 8), (2, 3, 4, 5))


def some(shape, dtype="float32", seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * 9).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_parts_of_an_array_add_up(dtype):
    dtype = jnp.dtype(dtype)
    for shape in SHAPES:
        x = some(shape, dtype)
        whole = box_sum(x, (0,) * x.ndim)
        for axis in range(x.ndim):
            cut = x.shape[axis] // 2
            low, high = np.split(x, [cut], axis=axis)
            start = tuple(cut if k == axis else 0 for k in range(x.ndim))
            total = box_sum(low, (0,) * x.ndim) + box_sum(high, start)
            assert total % 2**32 == whole


def test_many_blocks_are_one_sum(monkeypatch):
    x = some((31, 17))
    whole = box_sum(x, (2, 3))
    monkeypatch.setattr("sedd.training.sums.BLOCK", 40)
    assert box_sum(x, (2, 3)) == whole


@pytest.mark.parametrize("dtype", TYPES)
def test_every_bit_of_every_element_counts(dtype):
    x = some((3, 4), jnp.dtype(dtype))
    whole = box_sum(x, (0, 0))
    content = x.view(np.uint8)
    for place in range(content.size):
        for bit in range(1 if x.dtype == bool else 8):
            content.reshape(-1)[place] ^= 1 << bit
            assert box_sum(x, (0, 0)) != whole
            content.reshape(-1)[place] ^= 1 << bit
    assert box_sum(x, (0, 0)) == whole


def test_changes_of_many_elements_are_noticed():
    """Also those that cancel in a linear sum: other signs, a constant added to each."""
    x = some((64, 64))
    bits = x.view(np.uint32)
    changed = [-x, x * 2, (bits ^ 2**31).view(np.float32), (bits + 2**30).view(np.float32), x * 0]
    two = x.copy()
    two[3, 5], two[9, 1] = -two[3, 5], -two[9, 1]
    sums = {box_sum(y, (0, 0)) for y in (x, two, *changed)}
    assert len(sums) == 6  # -x is the third


def test_elements_that_change_places_are_noticed():
    x = some((4, 6))
    sums = {box_sum(y, (0, 0)) for y in (x, x[::-1], x[:, ::-1], np.roll(x, 1, 0), np.roll(x, 1))}
    sums |= {box_sum(x, start) for start in ((4, 0), (0, 6), (1, 1))}
    assert len(sums) == 8


def written_by(x):
    """The parts and the checksums of a sharded array."""
    return [
        Part(start=shard.start, stop=shard.stop, sum=box_sum(shard.data, shard.start))
        for shard in host_shards([x])[0]
    ]


def test_a_changed_part_is_named_on_any_other_layout():
    x = some((8, 12))
    mesh = device_mesh(jax.devices()[:4], fsdp=2)
    layouts = [
        NamedSharding(mesh, PartitionSpec(*spec))
        for spec in ((), ("fsdp",), (None, "fsdp"), (("data", "fsdp"),), ("data", "fsdp"))
    ]
    placed = [jax.device_put(x, layout) for layout in layouts]
    bad = x.copy()
    bad[5, 7] = -bad[5, 7]
    for writer in placed:
        parts = {"w": written_by(writer)}
        assert sum(part.size for part in parts["w"]) == x.size  # each replica once
        for reader in [*placed, x]:
            assert changed_part({"w": reader}, parts) is None
    names = ["w", "w[4:8, :]", "w[:, 6:12]", "w[4:6, :]", "w[4:8, 6:12]"]
    for writer, name in zip(placed, names, strict=True):
        for layout in layouts:
            reader = jax.device_put(bad, layout)
            assert changed_part({"w": reader}, {"w": written_by(writer)}) == name


def write(path, sums):
    path.write_text(json.dumps({"sums": sums, "crc32": json_checksum(sums)}))


def test_the_files_of_all_processes_must_cover_every_array(tmp_path):
    kinds = {"w": ("float32", [4, 2]), "step": ("int32", [])}
    write(tmp_path / "process_0.json", {"w": [[[0, 0], [2, 2], 5]], "step": [[[], [], 7]]})
    with pytest.raises(ValueError, match="a part of w has no checksum"):
        read_sums(tmp_path, kinds)
    assert read_sums(tmp_path, {"step": kinds["step"]})["step"][0].sum == 7
    write(tmp_path / "process_1.json", {"w": [[[2, 0], [4, 2], 6]]})
    assert [part.sum for part in read_sums(tmp_path, kinds)["w"]] == [5, 6]
    text = (tmp_path / "process_1.json").read_text()
    (tmp_path / "process_1.json").write_text(text.replace("6]", "4]"))
    with pytest.raises(ValueError, match=r"process_1.json has changed since it was written"):
        read_sums(tmp_path, kinds)
