"""Requests for samples: the given text, and the pattern that free text must match.

A ``Request`` comes from flags, from a line of a requests file (``RequestFile``) or from Python. It
consists of text and numbers; ``clamp`` and ``constraint`` turn them into tokens and automata.
"""

import functools
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from sedd.constraints import Automaton, compile_regex
from sedd.constraints.clamp import MAX_LENGTH, Clamp, from_infill, from_messages, from_prompt
from sedd.constraints.json_schema import DEPTH, MAX_NESTING, regex_to_compile
from sedd.constraints.spans import Given, Span, spans_of
from sedd.data.chat import Message, check_messages
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError, did_you_mean, mistakes_in

Answerable = TypeVar("Answerable")
# The fields of a line of a requests file: their types, and words for messages. Each field may be
# null, which is its default.
FIELD_TYPES: dict[str, tuple[Any, str]] = {
    "id": ((str, Integral), "a string or a whole number"),
    "prompt": (str, "a string"),
    "suffix": (str, "a string"),
    "infill": (str, "a string"),
    "messages": ((list, tuple), "a list of messages"),
    "length": (Integral, "a whole number"),
    "seed": (Integral, "a whole number"),
    "regex": ((str, list, tuple), "a string, or a list with one or null for each gap"),
    "json_schema": ((Mapping, list, tuple), "an object, or a list with one or null for each gap"),
    "json_schema_depth": (Integral, "a whole number"),
    "temperature": (Real, "a number"),
    "top_k": (Integral, "a whole number"),
    "top_p": (Real, "a number"),
    "guidance": (Real, "a number"),
    "sampler": (Mapping, "an object of the sampler's options"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to draw.

    Raises UserError if a value is out of range or two fields exclude each other.
    """

    id: str | int
    """Name of the request, copied to the output."""
    prompt: str = ""
    """Text at the start."""
    suffix: str = ""
    """Text at the end."""
    infill: str | None = None
    """Text with gaps: ``{mask:12}`` leaves 12 tokens free, ``{mask}`` one. Excludes prompt and
    suffix."""
    messages: Sequence[Message] | None = None
    """A conversation to answer: objects with ``role`` and ``content``. The text of the sequence is
    the answer alone. Excludes prompt, suffix and infill."""
    length: int | None = None
    """Number of tokens, the given ones included. None takes the training length, or with
    ``infill`` the length of the text."""
    seed: int = 0
    """Seed of the noise, in [0, 2**32)."""
    regex: str | Sequence[str | None] | None = None
    """Regex that the free text must match: one regex for everything from the first free token to
    the last, given text in between included; or a list with a regex or None for each gap."""
    json_schema: Any = None
    """JSON Schema of the free text: one, or a list, as for ``regex``; excludes regex."""
    json_schema_depth: int | None = None
    """Greatest nesting of values, 0 to ``MAX_NESTING``, where the JSON Schema sets none: in a
    schema that allows any value, and in recursion by ``$ref``. None takes ``DEPTH``, 2."""
    temperature: float | None = None
    """Temperature of the distributions, see ``Reshape``. For this field and the next three, None
    takes the value of the command."""
    top_k: int | None = None
    """Number of tokens to draw from, see ``Reshape``."""
    top_p: float | None = None
    """Probability of the tokens to draw from, see ``Reshape``."""
    guidance: float | None = None
    """Weight of classifier-free guidance, see ``Reshape``."""
    sampler: Mapping[str, Any] | None = None
    """Options of the sampler that differ from the command's; those of an inner sampler are nested
    under ``inner``."""

    def __post_init__(self):
        for name, value in vars(self).items():
            kinds, wanted = FIELD_TYPES[name]
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise FieldError(name, f"must be {wanted}, got {_json(value)}")
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise FieldError(
                    name,
                    "contains a lone surrogate (U+D800 to U+DFFF), which is not valid text",
                )
        if self.length is not None and not 1 <= self.length <= MAX_LENGTH:
            raise FieldError("length", f"must be in 1..{MAX_LENGTH}, got {self.length}")
        if not 0 <= self.seed < 2**32:
            raise FieldError("seed", f"must be in [0, 2**32), got {self.seed}")
        if self.infill is not None and (self.prompt or self.suffix):
            raise UserError("infill already holds its context: give no prompt or suffix beside it")
        if self.messages is not None:
            check_messages(self.messages)
            if self.prompt or self.suffix or self.infill is not None:
                raise UserError(
                    "messages are all of the given text: give no prompt, suffix or infill"
                )
        if self.regex is not None and self.json_schema is not None:
            raise UserError("regex and json_schema: give one of them")
        if self.json_schema_depth is not None:
            depth = self.json_schema_depth
            if self.json_schema is None:
                raise FieldError("json_schema_depth", f"is {depth}, but there is no json_schema")
            if not 0 <= depth <= MAX_NESTING:
                raise FieldError("json_schema_depth", f"must be in 0..{MAX_NESTING}, got {depth}")

    def clamp(self, tokenizer: Tokenizer, default_length: int) -> Clamp:
        """The given tokens and the free positions.

        Args:
            tokenizer: encodes the text.
            default_length: the number of tokens if neither ``length`` nor ``infill`` is given.

        Raises:
            UserError: the text does not fit the length, or cannot be encoded; there are messages,
                and the tokenizer has no chat template or refuses them.
        """
        if self.infill is not None:
            return from_infill(tokenizer, self.infill, self.length)
        length = default_length if self.length is None else self.length
        if self.messages is not None:
            return from_messages(tokenizer, length, self.messages)
        return from_prompt(tokenizer, length, prompt=self.prompt, suffix=self.suffix)

    def spans(self, clamp: Clamp, tokenizer: Tokenizer, cache_dir: Path | None) -> list[Span]:
        """The spans of the sequence that its regex or schema governs; empty without any.

        Args:
            clamp: the given tokens.
            tokenizer: as for ``constraint``.
            cache_dir: as for ``constraint``.

        Raises:
            FieldError: the regex or schema cannot be compiled, or does not fit ``clamp``.
        """
        with mistakes_in("json_schema" if self.regex is None else "regex"):
            return spans_of(clamp, self.constraint(tokenizer, cache_dir), tokenizer)

    def constraint(self, tokenizer: Tokenizer, cache_dir: Path | None) -> Given:
        """The compiled regex or schema, a list with one for each gap, or None without any.

        Args:
            tokenizer: its vocabulary spells the matches.
            cache_dir: keeps compiled automata; None compiles anew.

        Raises:
            UserError: a regex or schema is malformed, unsupported or matches nothing.
        """
        given, compiled = self.regex, _compile_regex
        if given is None:
            depth = DEPTH if self.json_schema_depth is None else self.json_schema_depth
            given = self.json_schema
            compiled = functools.partial(_compile_json_schema, depth=depth)
        if given is None:
            return None

        def one(text):
            return None if text is None else compiled(text, tokenizer, cache_dir)

        return [one(each) for each in given] if isinstance(given, list | tuple) else one(given)


def _compile_regex(pattern: Any, tokenizer: Tokenizer, cache_dir: Path | None) -> Automaton:
    """Compile a regex; refuses another type, which a list of a line may contain."""
    if not isinstance(pattern, str):
        raise FieldError("regex", f"must be {FIELD_TYPES['regex'][1]}, got {_json(pattern)}")
    return _compiled(pattern, tokenizer, cache_dir)


def _compile_json_schema(
    schema: Any, tokenizer: Tokenizer, cache_dir: Path | None, *, depth: int
) -> Automaton:
    """Compile a JSON schema; ``depth`` is how deep values nest where it sets no limit."""
    with regex_to_compile(schema, depth=depth) as pattern:
        return _compiled(pattern, tokenizer, cache_dir)


@functools.lru_cache(maxsize=1024)  # requests with the same pattern share an automaton in a batch
def _compiled(pattern: str, tokenizer: Tokenizer, cache_dir: Path | None) -> Automaton:
    """Compile a regex over the tokens of a tokenizer."""
    vocabulary = tokenizer.token_bytes()
    return compile_regex(pattern, vocabulary, eos_id=tokenizer.eos_id, cache_dir=cache_dir)


class RequestFile:
    """A JSON Lines file of requests.

    It can be read several times, with one line in memory at a time. A pipe or device is copied to a
    temporary file first. Use it in a ``with`` statement, or close it.

    Raises:
        UserError: the file cannot be read, or holds NUL bytes, as UTF-16 text does.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = path.open("rb")
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                copy = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
                with self._file:
                    shutil.copyfileobj(self._file, copy)
                self._file = copy
        except OSError as error:
            raise UserError(f"--requests {path}: {error.strerror}") from None
        if b"\0" in self._file.read(4096):
            self._file.close()
            raise UserError(f"--requests {path}: not a file of JSON lines: it holds NUL bytes")
        self._file.seek(0)
        self.close = self._file.close

    def __enter__(self) -> "RequestFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(
        self, seed: int, check: Callable[[Request], Answerable]
    ) -> Iterator[Answerable | UserError]:
        """Yield the result of ``check`` for each line, in order.

        Args:
            seed: the seed of the first line; line number n has ``seed`` + n - 1, unless it sets
                its own seed.
            check: turns a request into a result, or raises UserError.

        Yields:
            The result, or for a bad line a UserError that names the line. Empty lines are skipped.

        Raises:
            UserError: the file has no line with text.
        """
        self._file.seek(0)
        empty = True
        for number, line in enumerate(self._file, 1):  # ends at "\n" alone, as JSON Lines do
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            empty = False
            try:
                yield check(_parse(line, number, seed))
            except UserError as error:
                yield UserError(f"{self.path}, line {number}: {error}")
        if empty:
            raise UserError(f"--requests {self.path}: the file is empty")


def _parse(line: bytes, number: int, seed: int) -> Request:
    """The request of line ``number`` of a file; UserError if the line is malformed."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text, at byte {error.start + 1}") from None
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"a request must be an object, got {text.strip()[:40]}")
    given = {name: value for name, value in data.items() if value is not None}
    for name in data:
        if name not in FIELD_TYPES:
            raise UserError(
                f"unknown field {name!r}{did_you_mean(name, FIELD_TYPES)}; "
                f"it has {', '.join(FIELD_TYPES)}"
            )
    return Request(**{"id": number, "seed": seed + number - 1, **given})


def _json(value: Any) -> str:
    """A value of a line as JSON, for messages."""
    return json.dumps(value, ensure_ascii=False, default=repr)
