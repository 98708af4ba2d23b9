"""Checkpoints of the Hugging Face hub, by ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``."""

import os
import re
from pathlib import Path

from sedd.errors import UserError

SCHEME = "hf://"
REPOSITORY = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@(\S+))?")
SAFE = ["config.json", "tokenizer.json", "model.safetensors"]
PICKLED = "pytorch_model.bin"  # only where there is nothing safer


def fetch(path: str) -> Path:
    """The directory at a path, downloaded into the hub's own cache where it is of the hub.

    ``UserError`` where it cannot be downloaded.
    """
    if not path.startswith(SCHEME):
        return Path(os.path.expanduser(path))
    match = REPOSITORY.fullmatch(path)
    if match is None:
        raise UserError(f"checkpoint {path}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(f"checkpoint {path} needs the hub: pip install 'sedd[hub]'") from error

    def download(files: list[str]) -> Path:
        try:
            return Path(hub.snapshot_download(match[1], revision=match[2], allow_patterns=files))
        except Exception as error:  # the hub's own errors, and those of the network beneath it
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"checkpoint {path}: cannot download it ({type(error).__name__}: {reason})"
            ) from error

    directory = download(SAFE)
    if not (directory / "model.safetensors").exists():
        directory = download([*SAFE, PICKLED])
    return directory
