"""Simulated devices and checked array types for every test, set up before JAX is used."""

import os

# XLA's CPU collectives wait for each other for ever with four devices on two cores.
os.environ.setdefault("NPROC", "16")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)

# The annotated shapes and types of the mathematics are checked in tests only: users pay nothing.
CHECKED = ("schedules", "processes", "networks", "parameterizations", "denoiser", "objectives")
CHECKED += ("samplers", "evaluation")
install_import_hook([f"sedd.{name}" for name in CHECKED], "beartype.beartype").__enter__()
