"""Bound the perplexity of a model; the same as ``sedd evaluate``."""

from sedd.commands.cli import run
from sedd.commands.evaluate import main

if __name__ == "__main__":
    run(main)
