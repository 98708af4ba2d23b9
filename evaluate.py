"""Bound the perplexity of a model; the same as ``sedd evaluate``."""

from sedd.__main__ import run_command

if __name__ == "__main__":
    run_command("evaluate")
