"""Simulated devices and checked array types for every test, set up before JAX is used."""

import gc
import os
from pathlib import Path

# XLA's CPU collectives wait for each other for ever with four devices on two cores.
os.environ.setdefault("NPROC", "16")
# Half the time to compile; what it makes slower runs for milliseconds. For child processes too.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
ROOT = Path(__file__).parents[1]

# The annotated shapes and types of the mathematics are checked in tests only: users pay nothing.
CHECKED = ("schedules", "processes", "networks", "parameterizations", "denoiser", "objectives")
CHECKED += ("samplers", "evaluation")
install_import_hook([f"sedd.{name}" for name in CHECKED], "beartype.beartype").__enter__()


@pytest.fixture(autouse=True, scope="session")
def _compile_quickly():
    """Toy programs take longer to compile than to run: they are kept, between runs as well."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def _collected():
    """Reads that orbax could not complete complain when they are collected: here, not in a test.

    The complaint parses source code, which breaks a parse under way (CPython's issue 106905).
    Programs go too: a process may map only so many pieces of code (Linux's max_map_count).
    """
    yield
    gc.collect()
    jax.clear_caches()
