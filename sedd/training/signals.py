"""SIGTERM and SIGINT: a clean end before training, and a last checkpoint during it."""

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
    """Catch SIGTERM and SIGINT; yields ``stop(step) -> bool``, whether one has come.

    A first SIGINT or SIGTERM is acknowledged by a line at once; a second one acts as usual. With
    several processes the coordinator decides, so that all of them stop after the same step. Outside
    of the main thread no handler can be set, and ``stop`` is always False.
    """
    if jax.process_count() > 1:
        with _handlers({signal.SIGINT: USUAL[signal.SIGINT]}):
            yield multihost_utils.reached_preemption_sync_point
        return
    requested = threading.Event()

    def request(number, frame):
        requested.set()
        # A print may be under way where the signal arrives; a write to the descriptor is safe.
        with suppress(OSError):
            os.write(2, b"\nnote: stopping after the step under way; once more to stop at once\n")
        for number, handler in USUAL.items():
            signal.signal(number, handler)

    with _handlers(dict.fromkeys(USUAL, request)):
        yield lambda step: requested.is_set()


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """End the program with exit code 0 on SIGTERM or SIGINT, before ``train`` takes over.

    Partly written files are removed on the way out by the code that was writing them.
    """

    def leave(number, frame):
        print("stopped before the first step; start again to go on", flush=True)
        sys.exit(0)

    with _handlers(dict.fromkeys(USUAL, leave)):
        yield


USUAL = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


@contextmanager
def _handlers(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None is one that was not set from Python
                signal.signal(number, handler)
