"""Download checkpoints from the Hugging Face hub: ``hf://OWNER/NAME`` with or without @REVISION."""

import os
import re
from pathlib import Path

from sedd.data.network import why_hub_unreachable
from sedd.errors import UserError
from sedd.interop.tensor_files import INDEX, SINGLE, TensorFiles, headers_only, read_index

SCHEME = "hf://"
REPOSITORY = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@(\S+))?")
TOKENIZER = [  # see ``sedd.data.tokenizer_directory``
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
]
SMALL = ["config.json", *TOKENIZER, INDEX]
SAFE = [*SMALL, SINGLE]
PICKLED = "pytorch_model.bin"  # a pickle: downloaded only if there is no safetensors file


def fetch(path: str, *, weights: bool = True) -> Path:
    """Find the directory of a checkpoint, downloading it if it is on the hub.

    Args:
        path: a directory (``~`` is the home directory), or ``hf://OWNER/NAME[@REVISION]``.
        weights: whether to download the tensors, too.

    Returns:
        The directory. It need not exist, unless it was downloaded.

    Raises:
        UserError: if the checkpoint cannot be downloaded. Without a network, a copy in the hub's
            own cache is used.
    """
    if not path:  # as an unset variable of the shell gives; Python would take it for "."
        raise UserError("checkpoint '': an empty path")
    if path.startswith("hf:") and not path.startswith(SCHEME) and not Path(path).exists():
        raise UserError(
            f"checkpoint {path}: a checkpoint of the hub is hf://OWNER/NAME; hf:OWNER/NAME is a "
            "data set"
        )
    if not path.startswith(SCHEME):
        return Path(os.path.expanduser(path))
    match = REPOSITORY.fullmatch(path)
    if match is None:
        raise UserError(f"checkpoint {path}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    directory = _download(match, SAFE if weights else SMALL)
    if weights and not (directory / SINGLE).exists():
        if (directory / INDEX).exists():
            _, files = read_index(directory / INDEX)
            return _download(match, [*SMALL, *sorted(set(files.values()))])
        directory = _download(match, [*SAFE, PICKLED])
    return directory


def _download(match: re.Match[str], files: list[str]) -> Path:
    """Download those of the files that exist in a repository; return their directory.

    The repository is a match of ``REPOSITORY``. Without a network, the hub's own cache is read.
    """
    path, repository, revision = match[0], match[1], match[2]
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(f"checkpoint {path} needs the hub: pip install -e '.[hub]'") from error
    unreachable = why_hub_unreachable()
    try:
        return Path(
            hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=files,
                local_files_only=unreachable is not None,
            )
        )
    except Exception as error:  # the hub's own errors, and those of the network beneath it
        if unreachable:
            raise UserError(
                f"checkpoint {path}: the hub cannot be reached ({unreachable}), and its cache "
                "does not hold this checkpoint; give the directory of a copy instead"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path}: cannot download it ({type(error).__name__}: {reason})"
        ) from error


def fetch_headers(path: str) -> TensorFiles | None:
    """Read the names, shapes and types of the tensors of a checkpoint on the hub, without them.

    Args:
        path: ``hf://OWNER/NAME[@REVISION]``.

    Returns:
        The tensors, which cannot be read; None if there are no safetensors files, or the hub cannot
        be reached.
    """
    match = REPOSITORY.fullmatch(path)
    if match is None or why_hub_unreachable() is not None:
        return None
    import huggingface_hub as hub

    try:
        metadata = hub.get_safetensors_metadata(match[1], revision=match[2])
    except Exception:  # the hub's own errors, and those of the network beneath it
        return None
    return headers_only(
        Path(path),
        {
            name: (tuple(tensor.shape), tensor.dtype)
            for file in metadata.files_metadata.values()
            for name, tensor in file.tensors.items()
        },
    )
