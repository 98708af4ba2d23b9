"""Simulated devices for every test; both settings must precede the first use of JAX."""

import os

# XLA's CPU collectives wait for each other for ever with four devices on two cores.
os.environ.setdefault("NPROC", "16")

import jax

jax.config.update("jax_num_cpu_devices", 4)
