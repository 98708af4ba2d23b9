"""SIGTERM and SIGINT: a clean exit before training starts, and a last checkpoint during it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Catch SIGTERM and SIGINT; yields ``stop(step)``, which tells whether to stop after a step.

    The first signal is acknowledged at once by a line on standard error, even while XLA compiles; a
    second one acts as it does by default. Outside of the main thread no handler can be set, and
    ``stop`` always returns False.

    In a run of several processes JAX's preemption service catches SIGTERM instead: sent to any
    process, it stops all of them after the same step. SIGINT acts as it does by default.
    """
    if jax.process_count() > 1:
        with _handlers({signal.SIGINT: USUAL[signal.SIGINT]}):
            yield multihost_utils.reached_preemption_sync_point
        return
    requested = threading.Event()

    def request(number, frame):
        requested.set()
        for number, handler in USUAL.items():
            signal.signal(number, handler)

    with _handlers(dict.fromkeys(USUAL, request)), _answer_at_once(ANSWER):
        yield lambda step: requested.is_set()


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """Within the block, exit with code 0 on SIGTERM or SIGINT.

    ``stop_requests`` replaces these handlers while it is active.

    The exit is an exception, so code that was writing a file removes the incomplete file. Python
    drops an exception that is raised during a garbage collection or in a destructor: the signal is
    then sent again.
    """
    received, usual_hook = [], sys.unraisablehook

    def leave(number, frame):
        if not received:
            print("stopped before the first step; start again to go on", flush=True)
        received.append(number)
        sys.exit(0)

    def dropped(unraisable):
        if received and unraisable.exc_type is SystemExit:
            threading.Timer(0.01, os.kill, (os.getpid(), received[-1])).start()
        else:
            usual_hook(unraisable)

    sys.unraisablehook = dropped
    try:
        with _handlers(dict.fromkeys(USUAL, leave)):
            yield
    finally:
        sys.unraisablehook = usual_hook


ANSWER = (
    b"\nnote: stopping after the current step; send the signal (Ctrl-C) again to stop at once\n"
)
# The handlers that Python starts with.
USUAL = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


@contextmanager
def _handlers(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Set signal handlers for the block, if it runs in the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None stands for a handler that was not set from Python
                signal.signal(number, handler)


@contextmanager
def _answer_at_once(line: bytes) -> Iterator[None]:
    """Write ``line`` to standard error as soon as one of the signals in ``USUAL`` arrives.

    Python runs a signal handler only when the main thread is back in Python code, which may be
    minutes later if XLA is compiling. The interpreter's own handler, in C, runs at once and writes
    the number of the signal to the wakeup descriptor. A thread waits at the other end of that pipe.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)

    def answer():
        while (number := os.read(read, 1)[0]) not in (0, *USUAL):
            pass  # some other signal, such as SIGCHLD
        if number:
            with suppress(OSError):
                os.write(2, line)

    thread = threading.Thread(target=answer, name="answer signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(write, b"\0")  # ends the thread where no signal came
        thread.join()
        os.close(read)
        os.close(write)
