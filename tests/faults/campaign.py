"""The number of accidents: one kill by default, ``SEDD_FAULTS`` of them in the nightly tests."""

import os
import random

KILLS = int(os.environ.get("SEDD_FAULTS", "1"))
SIGNALS = KILLS // 2
CORRUPTIONS = 6 * KILLS


def chance(name: str) -> random.Random:
    """The same draws every time."""
    return random.Random(f"faults of {name}")
