"""Draw or infill text; the same as ``sedd sample``."""

from sedd.commands.cli import run
from sedd.commands.sample import main

if __name__ == "__main__":
    run(main)
