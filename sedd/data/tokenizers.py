"""Tokenizers: text to ids and back, each of them a value that a checkpoint holds whole."""

import base64
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sedd.data.base import digest
from sedd.errors import UserError

EOS_TEXT = "<|endoftext|>"  # how the end of a document is written where it is shown
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
END_NAMES = (EOS_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]", "[SEP]")
BEGIN_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "[CLS]")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>")


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
            single = {gpt2_bytes(token) for token in ids if len(token) == 1}
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
                table[index] = gpt2_bytes(token)
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


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def gpt2_bytes(token: str) -> bytes:
    """The bytes of a token written with GPT-2's character for each byte."""
    return bytes(BYTE_OF_CHARACTER[character] for character in token)
