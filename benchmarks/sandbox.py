"""Run generated Python code in a process of its own, with limits. Linux only.

This is no defence against code that is written to do harm or to forge its verdict. It contains what
a language model writes by accident: endless loops, full memory, overwritten files.

What always holds:

- The program starts in an empty folder, without environment variables and without input. Its output
  is discarded.
- Memory, CPU time and open files are limited, and nothing can be written into a file. Unless the
  user is root, no process or thread can be started.
- The process is killed after a time, together with all processes of its session.

What holds where the kernel allows it, which ``Verdict.guards`` says:

- ``network``: no network, by a network namespace. Unix sockets in the file system stay within
  reach.
- ``files``: no file can be created, changed, removed or executed, by Landlock. Without this guard,
  files can be emptied and removed.

What is not prevented: reading all files that the user can read, changing the permissions of the
user's files, and signals to the user's other processes.
"""

import contextlib
import ctypes
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MEMORY = 2**30  # bytes of address space
OPEN_FILES = 16
PASSED = b"passed"
# Constants of Linux: <sched.h>, <sys/prctl.h>, and <linux/landlock.h> with its system calls.
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF, LANDLOCK_VERSION = 444, 446, 1
# Rights to execute (0), write (1), remove (4, 5) and create (6 to 12); then by the version of the
# interface to link or rename across folders (13) and to truncate (14).
CHANGES = [0, 1, *range(4, 13)]
CHANGES_SINCE = {2: 13, 3: 14}
Outcome = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a program."""

    outcome: Outcome
    """``passed`` if the program ran to its end without an exception."""
    guards: frozenset[str]
    """Which of ``network`` and ``files`` the kernel protected."""


def run_code(program: str, *, seconds: float) -> Verdict:
    """Run a program, and wait for its end.

    Args:
        program: Python source.
        seconds: time after which it is killed, the start of Python included; also its CPU time.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(program, encoding="utf-8", errors="replace")
        child = subprocess.Popen(
            [sys.executable, "-I", __file__, str(path), str(math.ceil(seconds))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        assert child.stdout is not None
        late = False
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        with child.stdout as pipe:  # a process that left the session may still hold the other end
            os.set_blocking(pipe.fileno(), False)
            said = pipe.read(4096) or b""
    guards, _, verdict = said.partition(b"\n")
    late |= child.returncode == -signal.SIGXCPU
    return Verdict(
        outcome="timed out" if late else "passed" if verdict == PASSED else "failed",
        guards=frozenset(guards.decode(errors="replace").split()),
    )


def described(guards: frozenset[str], seconds: float) -> str:
    """What the sandbox guarantees with these guards, and what it does not, in sentences."""
    processes = "they may start processes, as you are root" if os.geteuid() == 0 else "no processes"
    network = "no network" if "network" in guards else "THE NETWORK IS NOT BLOCKED here"
    files = (
        "files can be read, but not written or removed"
        if "files" in guards
        else "files can be read, emptied and REMOVED here, but not written"
    )
    return (
        "generated programs run in a process of their own, without environment, input and output: "
        f"{seconds:g} s, {MEMORY >> 20} MiB of memory, {OPEN_FILES} open files; {processes}; "
        f"{network}; {files}. This is no defence against code that is written to do harm or to "
        "forge its verdict"
    )


def _block_network() -> bool:
    """Move this process into a network namespace without devices; whether that is permitted."""
    libc = ctypes.CDLL(None)
    return any(libc.unshare(flags) == 0 for flags in (CLONE_NEWUSER | CLONE_NEWNET, CLONE_NEWNET))


def _block_changes() -> bool:
    """Deny this process every change of a file by Landlock; whether the kernel supports it."""
    libc = ctypes.CDLL(None)
    libc.syscall.restype = ctypes.c_long

    def call(*arguments: int) -> int:
        return libc.syscall(*map(ctypes.c_long, arguments))

    version = call(LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_VERSION)
    if version < 1:
        return False
    rights = CHANGES + [right for since, right in CHANGES_SINCE.items() if version >= since]
    handled = ctypes.c_uint64(sum(1 << right for right in rights))
    rules = call(LANDLOCK_CREATE_RULESET, ctypes.addressof(handled), ctypes.sizeof(handled), 0)
    libc.prctl(*map(ctypes.c_ulong, (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    return rules >= 0 and call(LANDLOCK_RESTRICT_SELF, rules, 0) == 0


def _limit(seconds: int) -> None:
    """Limit the resources of this process; a limit that is lower already stays as it is."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # The signal of the CPU limit is sent at the soft limit if the hard one is higher.
        above = kind == resource.RLIMIT_CPU and value != hard
        resource.setrlimit(kind, (value, value + above))


def _main(path: str, seconds: int) -> None:
    """Run the program of a file in this process, which must be new, and end it.

    The first line on standard output names the guards; the second one says whether it passed.
    """
    source = Path(path).read_text(encoding="utf-8")
    verdict, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    guards = {"network": _block_network, "files": _block_changes}
    held = [name for name, block in guards.items() if block()]
    _limit(seconds)
    os.write(verdict, " ".join(held).encode() + b"\n")
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
    except BaseException:  # the program may raise SystemExit to end without its tests
        os._exit(1)
    os.write(verdict, PASSED)
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
