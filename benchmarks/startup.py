"""The time of ``sample.py --num 1`` at its first start and at later starts, in new processes.

Each checkpoint has a new cache folder. The first start compiles the programs and writes them to
that folder; later starts read them. The columns are wall-clock seconds and CPU seconds of the first
start, both of the median later start, and the quotient of its CPU seconds and those of the first.

    python benchmarks/startup.py runs/quickstart
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time


def start(checkpoint: str, cache: str) -> tuple[float, float]:
    """Run ``sample --num 1`` once; returns its wall-clock seconds and its CPU seconds.

    Args:
        checkpoint: the directory of the run.
        cache: the cache folder of compiled programs.
    """
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
    parser.add_argument("--repeats", type=int, default=3, help="later starts; the median counts")
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
