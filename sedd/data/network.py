"""Whether a server answers, asked once before a library's downloads retry for minutes."""

import functools
import http.client
import os
import urllib.error
import urllib.request

SECONDS = 5  # a server that has said nothing for so long counts as unreachable


def why_unreachable(url: str, *, seconds: float = SECONDS) -> str | None:
    """Ask a server for the header of ``url``, through the proxy of the environment if there is one.

    Returns:
        Why no connection was made; None where the server answered anything, errors included.
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
    """Why the Hugging Face hub cannot be reached; None where it answers.

    The hub is asked once in a process. Where it does not answer, ``HF_HUB_OFFLINE`` is set for the
    libraries that read it when they are imported: they then use their cache and fail at once.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    reason = why_unreachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if reason is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return reason
