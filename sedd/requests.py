"""Requests for samples: what is given and what must match, as text; from flags, lines or Python."""

import functools
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sedd.constraints import Automaton, compile_regex
from sedd.constraints.clamp import MAX_LENGTH, Clamp, from_infill, from_prompt
from sedd.constraints.json_schema import DEPTH, MAX_NESTING, regex_to_compile
from sedd.constraints.spans import Given
from sedd.data.tokenizers import Tokenizer
from sedd.errors import FieldError, UserError, did_you_mean

Answerable = TypeVar("Answerable")
FIELD_TYPES: dict[str, tuple[Any, str]] = {  # of a line's fields; null is the default of each
    "id": ((str, int), "a string or a whole number"),
    "prompt": (str, "a string"),
    "suffix": (str, "a string"),
    "infill": (str, "a string"),
    "length": (int, "a whole number"),
    "seed": (int, "a whole number"),
    "regex": ((str, list), "a string, or a list with one or null for each gap"),
    "json_schema": ((dict, list), "an object, or a list with one or null for each gap"),
    "json_schema_depth": (int, "a whole number"),
    "temperature": ((int, float), "a number"),
    "top_k": (int, "a whole number"),
    "top_p": ((int, float), "a number"),
    "guidance": ((int, float), "a number"),
    "sampler": (dict, "an object of the sampler's options"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to draw.

    Raises UserError on a value out of range and on fields that exclude each other.
    """

    id: str | int
    """Name of the request in the output."""
    prompt: str = ""
    """Text at the start."""
    suffix: str = ""
    """Text at the end."""
    infill: str | None = None
    """Text with gaps such as ``{mask:12}``; excludes prompt and suffix."""
    length: int | None = None
    """Tokens in the sequence, the given ones included; None takes the training length, or with
    ``infill`` the text's own."""
    seed: int = 0
    """Seed of the noise, in [0, 2**32)."""
    regex: str | Sequence[str | None] | None = None
    """Regex that the free text must match: one from the first free token to the last, with given
    text in between, or a list with one or None for each gap."""
    json_schema: Any = None
    """JSON Schema of the free text, in the same form; excludes regex."""
    json_schema_depth: int | None = None
    """How deep values nest where the JSON Schema sets no limit; None takes the default depth."""
    temperature: float | None = None
    """See ``Reshape``, as for the next three; None leaves the number to the command."""
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None
    sampler: Mapping[str, Any] | None = None
    """Options of the sampler that differ from the command's, those of its inner one nested."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise UserError(f"{name} is not text: it has no UTF-8")
        if self.length is not None and not 1 <= self.length <= MAX_LENGTH:
            raise FieldError("length", f"must be in 1..{MAX_LENGTH}, got {self.length}")
        if not 0 <= self.seed < 2**32:
            raise FieldError("seed", f"must be in [0, 2**32), got {self.seed}")
        if self.infill is not None and (self.prompt or self.suffix):
            raise UserError("infill already holds its context: give no prompt or suffix beside it")
        if self.regex is not None and self.json_schema is not None:
            raise UserError("regex and json_schema: give one of them")
        if self.json_schema_depth is not None:
            depth = self.json_schema_depth
            if self.json_schema is None:
                raise FieldError("json_schema_depth", f"is {depth}, but there is no json_schema")
            if not 0 <= depth <= MAX_NESTING:
                raise FieldError("json_schema_depth", f"must be in 0..{MAX_NESTING}, got {depth}")

    def clamp(self, tokenizer: Tokenizer, default_length: int) -> Clamp:
        """The given and the free tokens; UserError where the text does not fit the length."""
        if self.infill is not None:
            return from_infill(tokenizer, self.infill, self.length)
        length = default_length if self.length is None else self.length
        return from_prompt(tokenizer, length, prompt=self.prompt, suffix=self.suffix)

    def constraint(self, tokenizer: Tokenizer, cache_dir: Path | None) -> Given:
        """The compiled regex or schema, or a list for the gaps; UserError on one with a mistake.

        ``cache_dir`` keeps compiled automata; None compiles anew.
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
    if not isinstance(pattern, str):
        raise FieldError("regex", f"must be {FIELD_TYPES['regex'][1]}, got {_json(pattern)}")
    return _compiled(pattern, tokenizer, cache_dir)


def _compile_json_schema(
    schema: Any, tokenizer: Tokenizer, cache_dir: Path | None, *, depth: int
) -> Automaton:
    with regex_to_compile(schema, depth=depth) as pattern:
        return _compiled(pattern, tokenizer, cache_dir)


@functools.lru_cache(maxsize=1024)  # requests with the same pattern share an automaton in a batch
def _compiled(pattern: str, tokenizer: Tokenizer, cache_dir: Path | None) -> Automaton:
    vocabulary = tokenizer.token_bytes()
    return compile_regex(pattern, vocabulary, eos_id=tokenizer.eos_id, cache_dir=cache_dir)


class RequestFile:
    """A JSON Lines file of requests that can be read several times, one line in memory at a time.

    A pipe or device is copied to a temporary file first. UserError where the file cannot be read.
    Close it, or use it in a ``with`` statement.
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
        """``check(request)`` of each line, or the error that names the line.

        A line without a seed has the seed ``seed`` + the line's number - 1. A bad line does not
        stop the others. Raises UserError on a file without lines.
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
    for name, value in given.items():
        kinds, wanted = FIELD_TYPES[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise FieldError(name, f"must be {wanted}, got {_json(value)}")
    return Request(**{"id": number, "seed": seed + number - 1, **given})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
