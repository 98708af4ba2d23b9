"""Constraints on sampled text: given tokens, regular expressions and JSON schemas.

``compile_regex`` and ``compile_json_schema`` return an ``Automaton`` over tokens. Its methods
decode exactly from given distributions (``sedd.constraints.decode``).
``sedd.sample(constraint=…)`` draws samples that it accepts.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sedd.constraints.decode import Automaton
from sedd.constraints.json_schema import DEPTH, regex_to_compile
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
    """Compile a regex to an automaton over the tokens of a vocabulary.

    The automaton accepts a sequence of tokens if its text matches under
    ``re.fullmatch(pattern, text, re.ASCII)``.

    Args:
        pattern: the regex; ``sedd.constraints.regex`` states the supported constructs.
        vocabulary: the bytes of each of the N tokens, as ``Tokenizer.token_bytes`` returns them;
            None for a token that is no text. Leave out the mask.
        eos_id: the end-of-text token, 0 to ``len(vocabulary) - 1``. With it, a string may end
            early and is filled up with this token.
        cache_dir: a directory; compiled automata are written to its folder ``automata`` and read
            from there the next time. None always compiles.

    Raises:
        UserError: the pattern is malformed, unsupported, matches nothing or is too large (the
            message has the position), or no tokens spell a match.

    Example:
        >>> from sedd.constraints import compile_regex
        >>> automaton = compile_regex("(ab)+", [b"a", b"b", b"ab"])
        >>> automaton.run([2, 0, 1]) >= 0, automaton.run([0, 0])
        (True, -1)
    """
    if not isinstance(pattern, str):
        raise UserError(f"expected a regex as a str, got {pattern!r}")
    index = _index(tuple(vocabulary), eos_id)
    kept = None if cache_dir is None else cache_dir / "automata"
    return Automaton.of(compile_tokens(pattern, index, cache_dir=kept))


def compile_json_schema(
    schema: Any,
    vocabulary: Sequence[bytes | None],
    *,
    depth: int = DEPTH,
    eos_id: int | None = None,
    cache_dir: Path | None = None,
) -> Automaton:
    """Compile a JSON schema to an automaton over the tokens of a vocabulary.

    Every text that the automaton accepts is JSON that validates against the schema. It may accept
    fewer texts than validate; ``sedd.constraints.json_schema`` states which.

    Args:
        schema: the schema as ``json.loads`` returns it.
        vocabulary: as for ``compile_regex``.
        depth: how deep values nest where the schema sets no limit, 0 to 64: in a schema that allows
            any value, and in a recursive reference.
        eos_id: as for ``compile_regex``.
        cache_dir: as for ``compile_regex``.

    Raises:
        UserError: the schema is malformed, unsupported, allows no value or is too large; the
            message begins with the path of the keyword at fault, such as ``#/properties/age``. Or
            no tokens spell a value.
        FieldError: the depth is out of range.

    Example:
        >>> from sedd.constraints import compile_json_schema
        >>> vocabulary = [bytes([byte]) for byte in range(256)]
        >>> automaton = compile_json_schema({"enum": ["yes", "no"]}, vocabulary)
        >>> automaton.run(b'"yes"') >= 0, automaton.run(b'"maybe"')
        (True, -1)
    """
    with regex_to_compile(schema, depth=depth) as pattern:
        return compile_regex(pattern, vocabulary, eos_id=eos_id, cache_dir=cache_dir)


@lru_cache(maxsize=4)
def _index(vocabulary: tuple[bytes | None, ...], eos_id: int | None) -> Vocabulary:
    """The trie of a vocabulary, shared by the patterns compiled for it."""
    return Vocabulary.of(vocabulary, eos_id=eos_id)
