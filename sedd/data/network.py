"""Check whether a server answers before a download.

Libraries repeat failed downloads for minutes. One short request beforehand lets a command without a
network fail in seconds.
"""

import functools
import http.client
import os
import urllib.error
import urllib.request

SECONDS = 5  # a server that does not answer within this time counts as unreachable


def why_unreachable(url: str, *, seconds: float = SECONDS) -> str | None:
    """Test whether a server answers, by a request for the header of ``url``.

    The request goes through the proxy that the environment names, if it names one.

    Returns:
        None if the server answered, even with an error; otherwise why there was no connection.
    """
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=seconds).close()
    except (urllib.error.HTTPError, http.client.HTTPException):
        return None
    except OSError as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return None


@functools.cache
def why_hub_unreachable() -> str | None:
    """Why the Hugging Face hub cannot be reached; None if it can.

    The hub is asked once in a process. If it does not answer, ``HF_HUB_OFFLINE`` is set. The hub's
    libraries, which read this variable when they are imported, then use their cache and do not try
    to download.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    reason = why_unreachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if reason is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return reason
