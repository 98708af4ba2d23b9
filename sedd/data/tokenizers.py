"""Tokenizers: text to ids and back.

A run saves its tokenizer as JSON with everything that it needs (``to_json``), so that a checkpoint
can be used without the corpus or the files that the tokenizer was made from. Ids are 0..N-1; the
mask of an absorbing process is not among them. ``sedd.data.tokenizer_sources`` builds tokenizers by
name.
"""

import base64
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sedd.data.base import digest
from sedd.errors import UserError

EOS_TEXT = "<|endoftext|>"  # shown for the end of a document
# GPT-2's pattern, with the possessive quantifiers of tiktoken: equal pieces, found faster.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# No piece of the pattern has white space after another character: cutting there changes no id.
CUT = re.compile(r"(?<=\S)(?=\s)")
# The 256 bytes in the order of their ids in GPT-2: printable ones first.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
# GPT-2's files write a printable byte as its character, and the k-th other byte as chr(256 + k).
BYTE_OF_CHARACTER = {
    chr(byte if rank < len(PRINTABLE) else 256 + rank - len(PRINTABLE)): byte
    for rank, byte in enumerate(BYTE_ORDER)
}
# Special tokens by their names in common tokenizers; of several names the first found counts.
END_NAMES = (EOS_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]", "[SEP]")
BEGIN_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "[CLS]")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>")
# Behind the first character of a special token's name, it makes the name ordinary text; see
# ``encode_spans``. It is no character of Unicode and reserved for use within programs.
HIDDEN = "\ufdd0"


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How a tokenizer writes conversations; see ``sedd.data.chat``."""

    template: str | None = None
    """The chat template, in Jinja's language; None without one."""
    variables: tuple[tuple[str, Any], ...] = ()
    """What the template may read by name: ``bos_token``, ``eos_token``, ``pad_token`` and
    ``mask_token`` where the tokenizer has them, and settings such as ``enable_thinking``."""
    end_ids: tuple[int, ...] = ()
    """Ids of the tokenizer's file that end an answer beside the end of a turn and of a document."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """Text to ids in 0..N-1 and back."""

    name: str
    num_tokens: int  # N, the end of a document included
    eos_id: int | None  # the id of the end of a document; None without one
    unit: str  # "character", "byte" or "token", for reports

    @property
    def pad_id(self) -> int:
        """The id that fills a row after its text: the end of a document, or 0 without one."""
        return 0 if self.eos_id is None else self.eos_id

    @property
    def bos_id(self) -> int | None:
        """The id that opens a row in protocols that ask for one; by default, ``eos_id``."""
        return self.eos_id

    @property
    def specials(self) -> Mapping[str, int]:
        """The ids of the special tokens that a chat template may write, by their names."""
        return {}

    @property
    def turns(self) -> Turns:
        """How the tokenizer writes conversations; without a template by default."""
        return Turns()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer beside the end of a turn and of a document; none by default."""
        return ()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text as int32 ids, without special tokens. Threads may call it in parallel.

        Raises UserError for a character that the tokenizer does not have.
        """

    def encode_spans(
        self, text: str, given: Sequence[tuple[int, int]] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text of ``sedd.data.chat``, in which special tokens are recognised.

        Args:
            text: the text. The names of special tokens in it become their ids. A name with
                ``HIDDEN`` (the character U+FDD0) after its first character is ordinary text. A
                single ``HIDDEN`` is removed, and two in a row stand for one.
            given: the start and end of each given stretch in characters, ascending. The text is
                encoded piece by piece between these places, so that no token is given in part.

        Returns:
            The ids [L], int32, and which of them are given [L].

        Raises:
            UserError: as ``encode_batch``.
        """
        cuts = sorted({0, len(text), *(place for span in given for place in span)})
        names = sorted(self.specials, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        pieces, pieces_given = [], []
        for start, end in itertools.pairwise(cuts):
            stretch = text[start:end]
            found = [stretch] if pattern is None else pattern.split(stretch)
            pieces += found
            pieces_given += [any(a <= start < b for a, b in given)] * len(found)
        # Of the pieces between special tokens, those that hold text are encoded together.
        plain = [i for i, piece in enumerate(pieces) if piece and piece not in self.specials]
        encoded = [np.array([self.specials[p]] if p in self.specials else [], int) for p in pieces]
        shown = [re.sub(f"{HIDDEN}({HIDDEN}?)", r"\1", pieces[i]) for i in plain]
        for i, ids in zip(plain, self.encode_batch(shown), strict=True):
            encoded[i] = ids
        sizes = [len(ids) for ids in encoded]
        ids = np.concatenate(encoded).astype(np.int32) if encoded else np.zeros(0, np.int32)
        return ids, np.repeat(np.array(pieces_given, bool), sizes)

    def split(self, text: str, size: int) -> list[str]:
        """Cut a text into parts of about ``size`` characters without changing its ids.

        The ids of the parts, joined, are the ids of the text. A tokenizer that cannot cut safely
        returns the whole text as one part.
        """
        return [text]

    def decode(self, ids: Sequence[int], *, keep_eos: bool = False) -> str:
        """Decode ids to text.

        Args:
            ids: token ids.
            keep_eos: write the end of a document as ``EOS_TEXT`` instead of dropping it.

        Returns:
            The text. Other special tokens are dropped, and bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: if an id is not in 0..N-1.
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
    def _decode(self, ids: np.ndarray) -> str:
        """Decode ids without ``eos_id``."""

    @abstractmethod
    def token_bytes(self) -> list[bytes | None]:
        """The bytes of each id; None for an id that is no text, such as a special token.

        The bytes of the ids of a text, joined, are the text in UTF-8, unless one of them is None.
        Constraints and counts of characters need this. Raises UserError for a tokenizer that
        changes the text.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Describe the whole tokenizer in JSON, for ``tokenizer_from_json``."""

    def fingerprint(self) -> str:
        """A hash of the JSON description: tokenizers with equal ones assign equal ids."""
        return digest(self.to_json())


@dataclass(frozen=True, kw_only=True)
class Characters(Tokenizer):
    """One id for each character of ``alphabet``, in its order."""

    alphabet: str  # distinct characters

    @classmethod
    def of(cls, name: str, alphabet: str, *, eos: bool) -> "Characters":
        """Build the tokenizer of an alphabet; with ``eos`` the last id is the end of a document."""
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
        """The id of each code point up to the largest one, -1 for others; the last entry is -1."""
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
        """Cut anywhere: every character is encoded by itself."""
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
    """One id for each byte of UTF-8; the end of a document is 256."""

    name: str = "bytes"
    num_tokens: int = 257
    eos_id: int | None = 256
    unit: str = "byte"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def split(self, text: str, size: int) -> list[str]:
        """Cut between any two characters: every byte is encoded by itself."""
        return [text[start : start + size] for start in range(0, len(text), size)]

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")

    def token_bytes(self) -> list[bytes | None]:
        return [*(bytes([byte]) for byte in range(256)), None]

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}


@dataclass(frozen=True, kw_only=True)
class BytePairs(Tokenizer):
    """Byte-level byte-pair encoding with GPT-2's pattern; the last id is the end of a document.

    It is lossless on any text. A special token's name in a text is encoded as ordinary text.
    """

    vocabulary: tuple[bytes, ...]  # the bytes of each id; ids are in the order of the merges
    encoding: Any = field(repr=False, compare=False)  # of tiktoken

    @classmethod
    def of(cls, name: str, vocabulary: Sequence[bytes]) -> "BytePairs":
        """Build the tokenizer of distinct byte strings, which must include all single bytes."""
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
        """Encode with tiktoken; the name of a special token is ordinary text."""
        encode = self.encoding.encode_to_numpy
        return [encode(text, disallowed_special=()).astype(np.int32) for text in texts]

    def split(self, text: str, size: int) -> list[str]:
        """Cut before white space, where a piece of the pattern always ends."""
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
    """A tokenizer of Hugging Face's ``tokenizers`` library, from its JSON file.

    A published masked model has its mask anywhere in the vocabulary, and here the mask is the state
    after the tokens. With ``mask``, the id of the mask in the file, this id and the last one change
    places: the file's last token gets the id ``mask``, and the mask gets the id ``num_tokens``,
    which is no token. ``swapped`` converts ids of the file to ours and back.
    """

    source: str = field(repr=False)  # content of the file
    backend: Any = field(repr=False, compare=False)  # the library's tokenizer
    padding: int | None  # id of the tokenizer's own padding
    begin: int | None = None  # id of the tokenizer's own begin of text
    end: str | None = None  # the token that ends a document, if the user named it
    mask: int | None = None  # id of the mask in the file, if it is one of its tokens
    turns: Turns = Turns()

    @classmethod
    def of(
        cls,
        name: str,
        source: str,
        *,
        end: str | None = None,
        mask: int | None = None,
        turns: Turns = Turns(),
    ) -> "Pretrained":
        """Build the tokenizer of a ``tokenizer.json``.

        Args:
            name: name of the tokenizer.
            source: content of the file.
            end: the token that ends a document. By default it is the ``eos_token`` of ``turns``, or
                else the first of ``END_NAMES`` in the vocabulary. Padding and begin of text are
                found in the same way.
            mask: the id of the mask in the file. None, or an id after those of the file, if the
                mask is not one of its tokens: ids then stay as they are.
            turns: how the tokenizer writes conversations.

        Raises:
            UserError: if ``source`` is not such a file, its vocabulary has no token ``end``, or it
                lacks some of the 256 bytes and would drop them from texts.
        """
        backend = _read_backend(name, source)
        ids = backend.get_vocab(with_added_tokens=True)
        data = json.loads(source)
        _check_vocabulary(name, data, ids, end)
        last = max(ids.values())
        if mask is not None and mask > last:
            mask = None
        named = dict(turns.variables) | ({} if end is None else {"eos_token": end})

        def first(key: str, names: Sequence[str]) -> int | None:
            """Our id of the token that ``named`` has, or else of the first of ``names`` there is.

            The mask is not a token.
            """
            names = [named[key]] if named.get(key) in ids else names
            found = (ids[token] for token in names if token in ids and ids[token] != mask)
            return next((int(_exchanged(np.asarray(i), mask, last)) for i in found), None)

        return cls(
            name=name,
            num_tokens=last + (mask is None),
            eos_id=first("eos_token", END_NAMES),
            end=end,
            unit="token",
            source=source,
            backend=backend,
            padding=first("pad_token", PAD_NAMES),
            begin=first("bos_token", BEGIN_NAMES),
            mask=mask,
            turns=turns,
        )

    @property
    def pad_id(self) -> int:
        """The tokenizer's own padding if it has one, else as for any tokenizer."""
        return super().pad_id if self.padding is None else self.padding

    @property
    def bos_id(self) -> int | None:
        """The tokenizer's own begin of text if it has one, else ``eos_id``."""
        return super().bos_id if self.begin is None else self.begin

    def with_mask(self, mask: int | None) -> "Pretrained":
        """The same tokenizer with another ``mask``."""
        return Pretrained.of(self.name, self.source, end=self.end, mask=mask, turns=self.turns)

    def swapped(self, ids: np.ndarray) -> np.ndarray:
        """Convert ids of the file to ours, or ours to those of the file.

        Without ``mask`` they are the same. Ids after the last one of the file stay as they are.
        """
        last = self.num_tokens  # with a mask this is the file's last id
        return ids if self.mask is None else _exchanged(ids, self.mask, last)

    @property
    def named_mask(self) -> int | None:
        """The id in the file of the token that the tokenizer's files name as its mask."""
        named = dict(self.turns.variables).get("mask_token")
        return None if named is None else self.backend.token_to_id(named)

    @cached_property
    def specials(self) -> Mapping[str, int]:
        added = [t for t in json.loads(self.source).get("added_tokens", []) if t["special"]]
        ids = self.swapped(np.array([token["id"] for token in added], np.int64)).tolist()
        return dict(zip([token["content"] for token in added], ids, strict=True))

    @property
    def end_ids(self) -> tuple[int, ...]:
        ids = np.array([i for i in self.turns.end_ids if i != self.mask], np.int64)
        return tuple(self.swapped(ids).tolist())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self.swapped(np.array(encoding.ids, np.int32)) for encoding in encodings]

    def _decode(self, ids: np.ndarray) -> str:
        return self.backend.decode(self.swapped(ids).tolist(), skip_special_tokens=True)

    def token_bytes(self) -> list[bytes | None]:
        """The bytes of each id, and None for added tokens, special or not, and ids without a token.

        Some tokenizers bring texts into Unicode's normal form C; the bytes are those of this form.

        Raises:
            UserError: the tokenizer is not byte-level, or changes texts in another way than this.
        """
        data = json.loads(self.source)
        decoder = (data.get("decoder") or {}).get("type")
        prefixed = '"add_prefix_space": true' in json.dumps(data.get("pre_tokenizer"))
        changed = data.get("normalizer") not in (None, {"type": "NFC"})
        if decoder != "ByteLevel" or changed or prefixed:
            raise UserError(
                f"tokenizer {self.name!r} does not say which bytes a token stands for "
                f"(it is not byte-level, or changes the text): use characters, bytes, bpe:SIZE or "
                "gpt2"
            )
        specials = {token["id"] for token in data.get("added_tokens", [])}
        table: list[bytes | None] = [None] * (self.num_tokens + (self.mask is not None))
        for token, index in self.backend.get_vocab().items():
            if index not in specials and index != self.mask:
                table[int(self.swapped(np.asarray(index)))] = gpt2_bytes(token)
        return table[: self.num_tokens]

    def to_json(self) -> dict[str, Any]:
        given: dict[str, Any] = {"end": self.end, "mask": self.mask}
        if self.turns != Turns():
            given["turns"] = {
                "template": self.turns.template,
                "variables": dict(self.turns.variables),
                "end_ids": list(self.turns.end_ids),
            }
        given = {name: value for name, value in given.items() if value is not None}
        return {"kind": "tokenizers", "name": self.name, "source": self.source, **given}


def tokenizer_from_json(data: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from ``Tokenizer.to_json``; UserError for any other JSON object."""
    readers: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
        "characters": lambda d: Characters.of(d["name"], d["alphabet"], eos=d["eos"]),
        "bytes": lambda d: Bytes(),
        "byte_pairs": lambda d: BytePairs.of(
            d["name"], [base64.b64decode(token) for token in d["vocabulary"]]
        ),
        "tokenizers": lambda d: Pretrained.of(
            d["name"],
            d["source"],
            end=d.get("end"),
            mask=d.get("mask"),
            turns=_turns_from_json(d.get("turns", {})),
        ),
    }
    kind = data.get("kind")
    if kind not in readers:
        raise UserError(f"unknown kind of tokenizer {kind!r}: there are {', '.join(readers)}")
    try:
        return readers[kind](data)
    except (KeyError, TypeError) as error:
        raise UserError(f"the description of a {kind} tokenizer is incomplete: {error}") from error


def _read_backend(name: str, source: str) -> Any:
    """The tokenizer of the library ``tokenizers``, which encodes texts as they are.

    It neither pads nor truncates, and a special token's name in a text is ordinary text.
    """
    import tokenizers

    try:
        backend: Any = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {name!r} is not a tokenizers JSON file ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _check_vocabulary(
    name: str, data: Mapping[str, Any], ids: Mapping[str, int], end: str | None
) -> None:
    """Raise UserError if the vocabulary lacks bytes that texts would lose, or the token ``end``.

    Args:
        name: name of the tokenizer.
        data: content of its file.
        ids: the vocabulary.
        end: the token that ends a document, if the user named it.
    """
    byte_level = (data.get("decoder") or {}).get("type") == "ByteLevel"
    if byte_level and (data.get("model") or {}).get("unk_token") is None:
        single = {gpt2_bytes(token) for token in ids if len(token) == 1}
        if len(single) < 256:
            raise UserError(
                f"tokenizer {name!r} would silently drop text: its vocabulary lacks "
                f"{256 - len(single)} of the 256 bytes and has no unk_token"
            )
    if end is not None and end not in ids:
        special = [token["content"] for token in data.get("added_tokens", [])]
        raise UserError(
            f"end of text {end!r}: tokenizer {name!r} has no such token; its special tokens "
            f"are {', '.join(special) or 'none'}"
        )


def _exchanged(ids: np.ndarray, one: int | None, other: int) -> np.ndarray:
    """The ids with ``one`` and ``other`` exchanged; unchanged if ``one`` is None."""
    if one is None:
        return ids
    return np.where(ids == one, other, np.where(ids == other, one, ids)).astype(ids.dtype)


def _turns_from_json(data: dict[str, Any]) -> Turns:
    """Rebuild ``Turns`` from the description of a tokenizer."""
    return Turns(
        template=data.get("template"),
        variables=tuple(data.get("variables", {}).items()),
        end_ids=tuple(data.get("end_ids", ())),
    )


def _code_points(text: str) -> np.ndarray:
    """The Unicode code points of a text, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def gpt2_bytes(token: str) -> bytes:
    """The bytes of a token that is written with one character a byte, as in GPT-2's files."""
    return bytes(BYTE_OF_CHARACTER[character] for character in token)
