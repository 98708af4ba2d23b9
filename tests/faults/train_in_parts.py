"""``train.py`` with small parameters split over the devices too: checkpoints then have shards."""

from sedd.__main__ import run_command
from sedd.networks import mesh

if __name__ == "__main__":
    mesh.LEAST_SPLIT = 64
    run_command("train")
