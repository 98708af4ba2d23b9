"""Train a discrete diffusion language model; the same as ``sedd train``."""

from sedd.__main__ import run_command

if __name__ == "__main__":
    run_command("train")
