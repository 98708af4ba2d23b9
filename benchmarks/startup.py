"""How long ``sample.py --num 1`` takes at its first start and at the second, from processes.

    python benchmarks/startup.py runs/quickstart

The first start compiles; the second reads the programs that the first kept. Each checkpoint has a
new cache folder.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time


def start(checkpoint: str, cache: str) -> tuple[float, float]:
    """Seconds on the clock and of CPU time that one start of the command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "sedd", "sample", "--checkpoint", checkpoint, "--num", "1"],
        env={**os.environ, "SEDD_CACHE": cache},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, cpu


def main() -> None:
    """Print a row of a Markdown table for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", help="directories of runs")
    parser.add_argument("--repeats", type=int, default=3, help="starts after the first; the median")
    settings = parser.parse_args()
    print("| checkpoint | first: s | CPU s | second: s | CPU s | ratio of CPU |")
    print("|---|--:|--:|--:|--:|--:|")
    for checkpoint in settings.checkpoints:
        with tempfile.TemporaryDirectory() as cache:
            wall, cpu = start(checkpoint, cache)
            again = sorted(start(checkpoint, cache) for _ in range(settings.repeats))
        wall2, cpu2 = again[len(again) // 2]
        row = f"{wall:.1f} | {cpu:.1f} | {wall2:.1f} | {cpu2:.1f} | {cpu2 / cpu:.2f}"
        print(f"| {checkpoint} | {row} |")


if __name__ == "__main__":
    main()
