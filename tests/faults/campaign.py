"""How many accidents: few in every run of the tests, and as many as ``SEDD_FAULTS`` says."""

import os
import random

KILLS = int(os.environ.get("SEDD_FAULTS", "4"))
SIGNALS = max(2, KILLS // 2)
CORRUPTIONS = 3 * KILLS


def chance(name: str) -> random.Random:
    """The same draws every time."""
    return random.Random(f"faults of {name}")
