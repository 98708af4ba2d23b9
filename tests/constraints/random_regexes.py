"""Random patterns with all that the dialect has, and texts that match, nearly match or do not."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

# One to four bytes of UTF-8, the edges of each, a newline, and what sets and counts are spelt with.
ALPHABET = 'abcAZ019_ \n\t-]^{},."\\\x08\x7f\x80éê߿ࠀ—あい\ud7ff\ue000\uffff\U00010000😀😁\U0010ffff'
SPECIAL = set(".\\[](){}*+?^$|-")


@dataclass(frozen=True)
class Piece:
    """A pattern and a source of texts, most of which it matches."""

    pattern: str
    sample: Callable[[], str]


class Generator:
    """Patterns from a seed; ``alphabet`` is what literals and texts are made of."""

    def __init__(self, seed: int, *, alphabet: str = ALPHABET, depth: int = 2):
        self.random = random.Random(seed)
        self.alphabet = alphabet
        self.depth = depth
        self.names = 0

    def pattern(self) -> Piece:
        """A whole pattern, some with anchors at their edges."""
        piece = self.alternation(self.depth)
        kind = self.random.randrange(8)
        if kind == 0:
            return Piece(rf"^(?:{piece.pattern})$", piece.sample)
        if kind == 1:
            other = self.concatenation(self.depth)
            both = rf"\A({piece.pattern})$|^{other.pattern}\Z"
            return Piece(both, lambda: self.random.choice([piece, other]).sample())
        return piece

    def texts(self, piece: Piece, count: int) -> list[str]:
        """Samples, near misses and random texts: ``count`` of each."""
        samples = [text for _ in range(count) if len(text := piece.sample()) <= 20]
        near = [self.mutated(text) for text in samples]
        return [*samples, *near, *(self.text(self.random.randrange(6)) for _ in range(count))]

    def text(self, length: int) -> str:
        return "".join(self.random.choice(self.alphabet) for _ in range(length))

    def mutated(self, text: str) -> str:
        """A character less, more or other, or two swapped."""
        at = self.random.randrange(len(text) + 1)
        cut, new = self.random.choice([(1, 0), (0, 1), (1, 1), (2, 0), (0, 2)])
        return text[:at] + self.text(new) + text[at + cut :]

    def alternation(self, depth: int) -> Piece:
        options = [self.concatenation(depth) for _ in range(self.random.choice([1, 1, 2, 3]))]
        pattern = "|".join(option.pattern for option in options)
        return Piece(pattern, lambda: self.random.choice(options).sample())

    def concatenation(self, depth: int) -> Piece:
        parts = [self.repeated(depth) for _ in range(self.random.choice([0, 1, 1, 2, 2, 3]))]
        pattern = "".join(part.pattern for part in parts)
        return Piece(pattern, lambda: "".join(part.sample() for part in parts))

    def repeated(self, depth: int) -> Piece:
        piece = self.atom(depth)
        if self.random.random() < 0.55:
            return piece
        low, more = self.random.randrange(3), self.random.randrange(3)
        quantifier, least, most = self.random.choice(
            [
                ("*", 0, 3),
                ("+", 1, 3),
                ("?", 0, 1),
                (f"{{{low}}}", low, low),
                (f"{{{low},}}", low, low + 2),
                (f"{{,{more}}}", 0, more),
                (f"{{{low},{low + more}}}", low, low + more),
            ]
        )
        lazy = self.random.choice(["", "", "?"])

        def sample() -> str:
            return "".join(piece.sample() for _ in range(self.random.randint(least, most)))

        return Piece(piece.pattern + quantifier + lazy, sample)

    def atom(self, depth: int) -> Piece:
        kind = self.random.randrange(12)
        if kind < 3 and depth:
            inner = self.alternation(depth - 1)
            self.names += 1
            opening = self.random.choice(["(", "(?:", f"(?P<n{self.names}>"])
            return Piece(f"{opening}{inner.pattern})", inner.sample)
        if kind < 5:
            pattern = self.character_set()
        elif kind == 5:
            pattern = self.random.choice(["\\d", "\\w", "\\s", "\\D", "\\W", "\\S", ".", "."])
        elif kind == 6:
            pattern = self.random.choice(["{", "}", "]", "-", "{}", "{a", "{,a}", "{1", "\\0"])
            text = {"\\0": "\0"}.get(pattern, pattern)
            return Piece(pattern, lambda: text)
        else:
            character = self.random.choice(self.alphabet)
            return Piece(self.written(character), lambda: character)
        fitting = [c for c in self.alphabet if re.fullmatch(pattern, c, re.ASCII)]
        return Piece(pattern, lambda: self.random.choice(fitting or ["a"]))

    def written(self, character: str) -> str:
        """A literal in one of the ways to write it."""
        code = ord(character)
        ways = [f"\\U{code:08x}"]
        ways += [f"\\u{code:04X}"] * (code < 0x10000) + [f"\\x{code:02x}"] * (code < 0x100)
        ways += [f"\\{code:03o}"] * (code < 0x100)
        ways += [{"\n": "\\n", "\t": "\\t"}.get(character, re.escape(character))] * 4
        ways += [character] * (4 if character not in SPECIAL else 0)
        return self.random.choice(ways)

    def character_set(self) -> str:
        pattern = self.random.choice(["", "", "]", "-"])
        for _ in range(self.random.randrange(1, 4)):
            kind = self.random.randrange(6)
            first, last = sorted(self.random.choices(self.alphabet, k=2))
            if kind < 2:
                pattern += f"{self.written(first)}-{self.written(last)}"
            elif kind == 2:
                pattern += self.random.choice(["\\d", "\\w", "\\s", "\\D", "\\W", "\\S", "\\b"])
            else:
                pattern += self.written(first)
        return f"[{self.random.choice(['', '', '^'])}{pattern}{self.random.choice(['', '', '-'])}]"
