"""Checksums of the shards of arrays, which can be verified on any other layout.

The checksum of a shard is Σ h(b(i) xor w(i)) modulo 2^32, over its elements: b(i) are the bits of
an element as an unsigned integer, w(i) is a fixed, pseudo-random number, which depends on the index
of the element in the whole array, and h scrambles 32 bits one to one. Two properties matter:

- Sums are additive. If other devices hold other parts of the array when it is read, each process
  sums what it holds of a shard that was written, and these sums are added. No array is gathered.
- If a single element changes, the sum always changes, because h is one to one. Other damage goes
  unnoticed with a probability of about 2^-32, like that of a CRC-32.

Each process writes the checksums of the shards that it writes, into a file of its own, while the
shards themselves are written.
"""

import functools
import json
import math
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sedd.training.named_arrays import Kinds, json_checksum

BLOCK = 2**16  # elements that are summed at a time
GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio; it separates the axes


@dataclass(frozen=True, kw_only=True)
class Part:
    """A box of an array, and the checksum that was written for it."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    sum: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(stop - start for start, stop in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True, kw_only=True)
class HostShard:
    """A part of an array in the host's memory, and the index of its first element."""

    start: tuple[int, ...]
    data: np.ndarray

    @property
    def stop(self) -> tuple[int, ...]:
        """The index after its last element."""
        return tuple(s + n for s, n in zip(self.start, self.data.shape, strict=True))


def host_shards(arrays: Iterable[jax.Array | np.ndarray]) -> list[list[HostShard]]:
    """Copy the shards that this process holds to the host, each shard once, whatever its replicas.

    Of the replicas of a shard only the first one counts, also among processes. All copies are under
    way before the first is waited for. JAX keeps them with the arrays, so that the checkpoint
    library does not copy again. On a CPU they are views of the arrays' memory, and JAX does not
    reuse that memory before the views are gone.
    """
    local = [
        [shard for shard in array.addressable_shards if shard.replica_id == 0]
        if isinstance(array, jax.Array)
        else []
        for array in arrays
    ]
    for shard in (shard for shards in local for shard in shards):
        shard.data.copy_to_host_async()
    return [
        [
            HostShard(
                start=tuple(index.start or 0 for index in shard.index), data=np.asarray(shard.data)
            )
            for shard in shards
        ]
        if isinstance(array, jax.Array)
        else [HostShard(start=(0,) * array.ndim, data=array)]
        for array, shards in zip(arrays, local, strict=True)
    ]


class ShardSums:
    """The checksums of a checkpoint, as an object that Orbax saves beside the arrays.

    The shards are copied to the host at once; their checksums are computed and written in the
    background, by each process into ``process_<number>.json``.

    Args:
        arrays: the arrays of the checkpoint by name.
    """

    def __init__(self, arrays: dict[str, jax.Array]):
        self._shards = dict(zip(arrays, host_shards(list(arrays.values())), strict=True))

    async def save(self, directory) -> Any:
        """Return the coroutine that computes and writes; Orbax awaits it in the background."""
        return self._write(directory)

    async def load(self, directory) -> Any:
        """Not used: ``read_sums`` reads the files of all processes."""
        raise NotImplementedError

    async def _write(self, directory) -> None:
        sums = self._sums()  # Orbax runs this coroutine in a thread of its own
        self._shards = {}  # frees the copies
        text = json.dumps({"sums": sums, "crc32": json_checksum(sums)})
        path = Path(await directory.await_creation()) / f"process_{jax.process_index()}.json"
        path.write_text(text)

    def _sums(self) -> dict[str, list]:
        shards = [(name, shard) for name, found in self._shards.items() for shard in found]
        sums: dict[str, list] = {}
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda each: box_sum(each[1].data, each[1].start), shards)
            for (name, shard), value in zip(shards, found, strict=True):
                sums.setdefault(name, []).append([shard.start, shard.stop, value])
        return sums


def read_sums(directory: Path, kinds: Kinds) -> dict[str, list[Part]]:
    """Read the checksums that all processes have written.

    Args:
        directory: the directory of the files.
        kinds: the arrays whose checksums are wanted.

    Raises:
        ValueError: a file is damaged, or an array is not covered by the shards of all files.
    """
    parts: dict[str, list[Part]] = {name: [] for name in kinds}
    for path in sorted(directory.glob("process_*.json")):
        content = json.loads(path.read_text())
        if json_checksum(content["sums"]) != content["crc32"]:
            raise ValueError(f"{path.name} has changed since it was written")
        for name, boxes in content["sums"].items():
            if name in parts:
                parts[name] += [
                    Part(start=tuple(start), stop=tuple(stop), sum=value)
                    for start, stop, value in boxes
                ]
    for name, (_, shape) in kinds.items():
        if sum(part.size for part in parts[name]) != math.prod(shape):
            raise ValueError(f"a part of {name} has no checksum")
    return parts


def changed_part(
    arrays: dict[str, jax.Array | np.ndarray], written: dict[str, list[Part]]
) -> str | None:
    """Return the name of the first part of an array that differs from what was written, or None.

    If several processes hold parts of the arrays, all must call this function together.

    Args:
        arrays: the arrays as they were read, by name.
        written: the parts of each array with their checksums.
    """
    shards = host_shards([arrays[name] for name in written])
    pairs = [
        (part, held)
        for (_, parts), held in zip(written.items(), shards, strict=True)
        for part in parts
    ]
    with ThreadPoolExecutor() as pool:
        sums = np.array(list(pool.map(lambda pair: _sum_within(*pair), pairs)), np.uint32)
    if jax.process_count() > 1:
        # What a process holds alone is complete, and is not added to that of the others.
        alone = [
            getattr(arrays[name], "is_fully_addressable", True)  # a numpy array is whole
            for name, parts in written.items()
            for _ in parts
        ]
        everywhere = np.asarray(multihost_utils.process_allgather(sums))
        sums = np.where(alone, sums, np.add.reduce(everywhere, axis=0, dtype=np.uint32))
    names = [name for name, parts in written.items() for _ in parts]
    for name, (part, _), found in zip(names, pairs, sums, strict=True):
        if found != part.sum:
            return _spelt(name, part, arrays[name].shape)
    return None


def _sum_within(part: Part, shards: list[HostShard]) -> int:
    """The sum over the elements of a part that are in ``shards``."""
    total = 0
    for shard in shards:
        low = tuple(map(max, part.start, shard.start))
        high = tuple(map(min, part.stop, shard.stop))
        if all(first < last for first, last in zip(low, high, strict=True)):
            inside = tuple(
                slice(first - start, last - start)
                for first, last, start in zip(low, high, shard.start, strict=True)
            )
            total += box_sum(shard.data[inside], low)
    return total % 2**32


def _spelt(name: str, part: Part, shape: tuple[int, ...]) -> str:
    """The name of a part: ``params/embed[:, 0:256]``."""
    if part.stop == tuple(shape) and not any(part.start):
        return name
    ranges = (
        ":" if (start, stop) == (0, length) else f"{start}:{stop}"
        for start, stop, length in zip(part.start, part.stop, shape, strict=True)
    )
    return f"{name}[{', '.join(ranges)}]"


def box_sum(x: np.ndarray, start: tuple[int, ...]) -> int:
    """Return the checksum of a box of an array, as the module's description defines it.

    Args:
        x: the elements of the box, of any type.
        start: the index of its first element in the whole array.
    """
    if x.ndim == 0:
        x, start = x[None], (0,)
    if x.dtype.itemsize == 8:  # as pairs, along the last axis
        x = np.ascontiguousarray(x).view(np.uint32)
        start = (*start[:-1], 2 * start[-1])
    bits = x.view(f"uint{8 * x.dtype.itemsize}")
    axes = [
        _mixed(np.arange(first, first + length, dtype=np.uint32) + np.uint32(GOLDEN * k % 2**32))
        for k, (first, length) in enumerate(zip(start, x.shape, strict=True), start=1)
    ]
    rows, columns = functools.reduce(_outer, axes[:-1], np.zeros(1, np.uint32)), axes[-1]
    table = bits.reshape(-1, len(columns))
    step = max(1, BLOCK // len(columns))
    total = 0
    for row in range(0, len(rows), step):
        block = rows[row : row + step, None] ^ columns
        block ^= table[row : row + step]
        total += int(_mixed(block).sum(dtype=np.uint32))
    return total % 2**32


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.bitwise_xor.outer(a, b).reshape(-1)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Scramble uint32 numbers one to one, in place (the finalizer of MurmurHash3)."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def crc32(x: np.ndarray) -> int:
    """Return the CRC-32 of a whole array, the checksum of checkpoints of version 0.1."""
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
