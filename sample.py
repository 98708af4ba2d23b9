"""Draw or infill text; the same as ``sedd sample``."""

from sedd.__main__ import run_command

if __name__ == "__main__":
    run_command("sample")
