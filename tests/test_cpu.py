"""Commands set up the process for a CPU: threads for simulated devices, memory for reuse."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sedd.commands import cpu


@pytest.mark.parametrize(
    ("platforms", "devices", "flags", "before", "after"),
    [
        ("cpu", -1, "", None, None),
        ("cpu", 1, "--xla_cpu_use_fusion_emitters=false", None, None),
        ("cpu", 4, "", None, "16"),
        ("cpu", -1, "--xla_force_host_platform_device_count=2", None, "16"),
        ("cpu", 4, "", "8", "8"),  # the user's
        (None, 4, "", None, None),  # there may be a GPU
    ],
)
def test_only_simulated_devices_get_more_threads(
    monkeypatch, platforms, devices, flags, before, after
):
    config = SimpleNamespace(jax_platforms=platforms, jax_num_cpu_devices=devices)
    monkeypatch.setattr(cpu, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NPROC", before or "")
    if before is None:
        monkeypatch.delenv("NPROC")
    cpu.prepare_cpu()
    assert os.environ.get("NPROC") == after


PAGES_OF_A_SECOND_BLOCK = """
import ctypes, resource
from sedd.commands.cpu import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults(size=2**28):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
default = faults()
keep_freed_memory()
faults()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets parameters of glibc")
def test_a_large_block_is_used_again_without_page_faults():
    command = [sys.executable, "-c", PAGES_OF_A_SECOND_BLOCK]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    default, kept = map(int, ran.stdout.split())
    assert kept < 16 < default / 2  # a control: importing the module has changed nothing


def test_other_c_libraries_keep_their_defaults(monkeypatch):
    opened = []
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(cpu.ctypes, "CDLL", opened.append)
    cpu.keep_freed_memory()
    assert opened == []
