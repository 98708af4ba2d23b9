"""One of two processes with two devices each, that train the toy together.

``one_of_two.py ID PORT WORKDIR STEPS FSDP``, FSDP 0 for a replica on each device. Of 300 steps.
"""

import sys

import jax
from training_toy import SGD, ToyBatches, run

from sedd.errors import UserError
from sedd.networks import mesh
from sedd.training.distributed import connect
from sedd.training.loop import Cadence

mesh.LEAST_SPLIT = 16


class Mine(ToyBatches):
    """The rows of this process."""

    def __next__(self):
        batch = super().__next__()
        rows = slice(jax.process_index() * 4, jax.process_index() * 4 + 4)
        return {k: v if k == "step" else v[rows] for k, v in batch.items()}


if __name__ == "__main__":
    process_id, port, workdir, steps, fsdp = sys.argv[1:]
    try:
        connect(f"localhost:{port}", 2, int(process_id), seconds=60)
        print("ready", flush=True)
        run(
            workdir,
            int(steps),
            SGD,
            of_steps=300,
            devices=4,
            fsdp=int(fsdp) or None,
            batches=Mine(),
            cadence=Cadence(log_every=1, eval_every=None, checkpoint_every=25),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
