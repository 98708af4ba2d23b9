"""A line about what a program is doing, whenever it has printed nothing for a while."""

import threading
import time
from collections.abc import Callable

QUIET_SECONDS = 3.0
LONGEST_SECONDS = 60.0


class Heartbeat:
    """Calls ``say(doing)`` from a thread when ``printed`` has not been called for a while.

    The first line comes after ``seconds``; each further one after twice the silence of the one
    before, up to a minute, so that the log of a long run is not filled with them.

    Args:
        say: prints one line.
        doing: what is being done; the attribute may be set at any time. An empty string is silent.
        seconds: the silence before the first line.
    """

    def __init__(self, say: Callable[[str], None], doing: str = "", *, seconds=QUIET_SECONDS):
        self.doing = doing
        self._say, self._silence = say, seconds
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def printed(self) -> None:
        """Note that something else has been printed now."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop; nothing is said afterwards."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(max(self._last + self._silence - time.monotonic(), 0.01)):
            if time.monotonic() < self._last + self._silence or not self.doing:
                continue
            self._say(self.doing)
            self.printed()
            self._silence = min(2 * self._silence, LONGEST_SECONDS)
