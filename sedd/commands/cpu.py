"""The process-wide settings with which commands run on a CPU: threads, and memory for reuse."""

import contextlib
import ctypes
import os
import platform

import jax

# Parameters of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def prepare_cpu() -> None:
    """Set up the process for XLA's CPU backend; call it before the first array is made.

    Does nothing where JAX may choose another backend. Safe to call several times.
    """
    if jax.config.jax_platforms != "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        return
    keep_freed_memory()
    if simulates_devices():
        # A collective occupies one thread per device. With as many threads as cores, the
        # collectives of several devices can deadlock.
        os.environ.setdefault("NPROC", "16")


def simulates_devices() -> bool:
    """Whether the CPU backend is set to show more than one device."""
    flags = os.environ.get("XLA_FLAGS", "")
    forced = "--xla_force_host_platform_device_count" in flags
    return forced or jax.config.jax_num_cpu_devices > 1  # pyright: ignore


def keep_freed_memory() -> None:
    """Make glibc's allocator keep large freed blocks for later allocations of this process.

    XLA allocates the scratch arrays of a program at each call and frees them after it. By default
    glibc maps a large block from the kernel and unmaps it when it is freed, so that each call pays
    a page fault for every 4 KiB of scratch. With this setting the process's memory stays at its
    peak. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    with contextlib.suppress(OSError, AttributeError):  # no such library or function: keep defaults
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap, too
        mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap is never returned to the kernel
