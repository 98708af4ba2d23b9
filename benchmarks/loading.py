"""The memory of the host while a published model is loaded from safetensors shards.

A model of LLaDA's kind with random bfloat16 parameters is written to a temporary directory, in
shards. A new process loads it, and reads its own memory from ``/proc`` every millisecond. The
default has 299 million parameters. Without an accelerator the host's memory holds the parameters
too. The aim then is the bytes of all parameters and those of the largest stacked one.

    python benchmarks/loading.py
"""

import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from sedd.interop.layouts.base import Description, Layout, layouts
from sedd.interop.published import load_published, save_published
from sedd.networks.decoder import Decoder

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the model."""

    hidden_dim: int = 1024
    num_layers: int = 17
    num_heads: int = 16
    mlp_dim: int = 3072
    vocabulary: int = 32768
    shard_mib: int = 128
    """The most MiB of tensors in a file."""
    load: Path | None = None
    """Only load the model in this directory, and print the memory as JSON."""


def write(settings: Settings, directory: Path) -> Layout:
    """Write a model with random parameters; returns its layout."""
    network = Decoder(
        num_states=settings.vocabulary,
        time_conditioned=False,
        hidden_dim=settings.hidden_dim,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        mlp_dim=settings.mlp_dim,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    description = Description(
        process="absorbing",
        parameterization="conditional",
        schedule={"name": "log_linear"},
        num_tokens=settings.vocabulary - 1,
        length=1024,
        corpus=None,
    )
    llada = layouts()["LLaDA"]
    layout = Layout(
        name="LLaDA",
        network=network,
        description=description,
        tensors=llada.tensors(network),
        config=llada.write(network, description),
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: rng.random(leaf.shape, np.float32).astype(jnp.bfloat16), shapes
    )
    shard_bytes = settings.shard_mib * MIB
    save_published(directory, layout, params, beside={}, shard_bytes=shard_bytes)
    return layout


class Watch:
    """The largest memory of this process, without pages of files, while the block runs."""

    def __enter__(self) -> "Watch":
        self.before = self.peak = _resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *error) -> None:
        self._over.set()
        self._thread.join()


def _resident() -> int:
    """Bytes of this process's own memory in RAM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux")


def measure(directory: Path) -> dict[str, int]:
    """Load the model in ``directory``; returns bytes: of parameters, and of the peak."""
    jnp.zeros(1).block_until_ready()  # the backend starts before the memory is read
    with Watch() as watch:
        published = load_published(directory)
    leaves = jax.tree.leaves(published.params)
    return {
        "numbers": sum(leaf.size for leaf in leaves),
        "parameters": sum(leaf.nbytes for leaf in leaves),
        "largest": max(leaf.nbytes for leaf in leaves),
        "peak": watch.peak - watch.before,
    }


def main(settings: Settings) -> None:
    """Print a row of a Markdown table, and the same as JSON."""
    if settings.load is not None:
        print(json.dumps(measure(settings.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write(settings, directory)
        files = len(list(directory.glob("*.safetensors")))
        # A new process: this one has used memory to make the model.
        command = [sys.executable, __file__, "--load", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1]) | {"files": files}
    mib = {name: f"{found[name] / MIB:.0f}" for name in ("parameters", "largest", "peak")}
    print("| parameters | files | MiB | largest stacked | peak of the host | peak / parameters |")
    print("|--:|--:|--:|--:|--:|--:|")
    print(
        f"| {found['numbers']:,} | {files} | {mib['parameters']} | {mib['largest']} | "
        f"{mib['peak']} | {found['peak'] / found['parameters']:.2f} |"
    )
    print(json.dumps(found | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
