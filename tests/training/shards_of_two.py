"""One of two processes with two devices each, that read and write checkpoints by shard.

``shards_of_two.py ID PORT PLACE``. What PLACE holds is made by ``test_shards.py``, and what the
processes write there is read by it. Prints a line for each thing that went well.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from training_toy import ADAMW, Toy, setup

from sedd.errors import UserError
from sedd.networks import mesh
from sedd.training.checkpoint import Checkpoints
from sedd.training.distributed import connect
from sedd.training.named_arrays import named_leaves
from sedd.training.storage import quiet_orbax
from sedd.training.sums import host_shards

mesh.LEAST_SPLIT = 16
PARTS = {"pmap": {}, "fsdp": {"fsdp": 4}}


def check(state, reference):
    """Compare the shards of this process with the whole arrays."""
    arrays = named_leaves(state)
    arrays["key"] = jax.random.key_data(arrays["key"])
    assert arrays.keys() == set(reference)
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), reference[name][shard.index])


def largest_share(state):
    """The largest share of a split parameter that this process copies to the host."""
    arrays = [x for x in jax.tree.leaves(state.params) if not x.is_fully_replicated]
    assert arrays
    held = host_shards(arrays)
    return max(
        sum(shard.data.size for shard in shards) / array.size
        for array, shards in zip(arrays, held, strict=True)
    )


def main(place: Path) -> None:
    """Read all that is there with both layouts, then write with both."""
    reference = dict(np.load(place / "reference.npz"))
    me = jax.process_index()
    gathered = []
    usual = multihost_utils.process_allgather
    multihost_utils.process_allgather = lambda x, **rest: (
        gathered.append(np.size(x)) or usual(x, **rest)
    )
    states, shardings = {}, {}
    for layout, parts in PARTS.items():
        state, parallel = setup(ADAMW, devices=4, network=Toy(width=64), **parts)
        abstract = jax.eval_shape(lambda state=state: state)
        for source in ("one", "four", "parts"):
            checkpoints = Checkpoints(place / source)
            restored = checkpoints.restore_latest(abstract, parallel.shardings)
            check(restored.state, reference)
            assert checkpoints.latest_good(parallel.shardings) == restored.step == 2
            print(f"{layout} reads {source}", flush=True)
        states[layout], shardings[layout] = restored.state, parallel.shardings
        directory = Checkpoints(place / f"two {layout}")
        directory.save(restored.state, data={}, pending={})
        directory.close()
        print(f"{layout} writes", flush=True)
    for source in PARTS:
        for layout in PARTS:
            written = Checkpoints(place / f"two {source}")
            check(written.restore_latest(abstract, shardings[layout]).state, reference)
            print(f"{layout} reads two {source}", flush=True)
    assert largest_share(states["fsdp"]) == 0.5
    restored = Checkpoints(place / "flipped").restore_latest(abstract, parallel.shardings)
    print(f"flipped: {restored.step}", flush=True)
    restored = Checkpoints(place / f"lost {me}").restore_latest(abstract, parallel.shardings)
    print(f"lost: {restored.step}", flush=True)
    other = [Checkpoints(place / "one"), Checkpoints(place / "flipped")][me]
    try:
        other.restore_latest(abstract, parallel.shardings)
    except UserError as error:
        print(f"other: {error}", flush=True)
    assert max(gathered) < 2000  # messages and checksums only: no array


if __name__ == "__main__":
    process_id, port, place = sys.argv[1:]
    quiet_orbax()
    connect(f"localhost:{port}", 2, int(process_id), seconds=60)
    main(Path(place))
