"""What sampled text has to be: given in places, or the match of a regex or a JSON schema."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sedd.constraints.decode import Automaton
from sedd.constraints.json_schema import regex_to_compile
from sedd.constraints.token_automaton import Vocabulary, compile_tokens
from sedd.errors import UserError

__all__ = ["Automaton", "compile_json_schema", "compile_regex"]


def compile_regex(
    pattern: str,
    vocabulary: Sequence[bytes | None],
    *,
    eos_id: int | None = None,
    cache_dir: Path | None = None,
) -> Automaton:
    """The token strings whose bytes match as of ``re.fullmatch(pattern, text, re.ASCII)``.

    ``vocabulary`` holds the bytes of every token; None are tokens that are no text. With
    ``eos_id`` a string may end early, and is filled up with that token. ``cache_dir`` keeps what
    was compiled. UserError, with the position, on what is no regex or not supported, on one that
    matches nothing or grows too large, and where the vocabulary cannot spell it.

    Example:
        >>> from sedd.constraints import compile_regex
        >>> automaton = compile_regex("(ab)+", [b"a", b"b", b"ab"])
        >>> automaton.run([2, 0, 1]) >= 0, automaton.run([0, 0])
        (True, -1)
    """
    if not isinstance(pattern, str):
        raise UserError(f"expected a regex as text, got {pattern!r}")
    index = _index(tuple(vocabulary), eos_id)
    kept = None if cache_dir is None else cache_dir / "automata"
    return Automaton.of(compile_tokens(pattern, index, cache_dir=kept))


def compile_json_schema(
    schema: Any,
    vocabulary: Sequence[bytes | None],
    *,
    eos_id: int | None = None,
    cache_dir: Path | None = None,
) -> Automaton:
    """The token strings that are JSON of the schema; see ``schema_to_regex`` for its subset.

    UserError, with the path, on what is not in the subset or grows too large.

    Example:
        >>> from sedd.constraints import compile_json_schema
        >>> vocabulary = [bytes([byte]) for byte in range(256)]
        >>> automaton = compile_json_schema({"enum": ["yes", "no"]}, vocabulary)
        >>> automaton.run(b'"yes"') >= 0, automaton.run(b'"maybe"')
        (True, -1)
    """
    with regex_to_compile(schema) as pattern:
        return compile_regex(pattern, vocabulary, eos_id=eos_id, cache_dir=cache_dir)


@lru_cache(maxsize=4)
def _index(vocabulary: tuple[bytes | None, ...], eos_id: int | None) -> Vocabulary:
    return Vocabulary.of(vocabulary, eos_id=eos_id)
