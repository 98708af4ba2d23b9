"""Train a discrete diffusion language model; the same as ``sedd train``."""

from sedd.commands.cli import run
from sedd.commands.train import main

if __name__ == "__main__":
    run(main)
