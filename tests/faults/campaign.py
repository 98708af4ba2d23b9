"""The number of accidents: few by default, ``SEDD_FAULTS`` kills in the nightly tests."""

import os
import random

KILLS = int(os.environ.get("SEDD_FAULTS", "2"))
SIGNALS = max(1, KILLS // 2)
CORRUPTIONS = 6 * KILLS


def chance(name: str) -> random.Random:
    """The same draws every time."""
    return random.Random(f"faults of {name}")
