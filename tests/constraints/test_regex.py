"""Patterns against Python's ``re``: the same language, and errors at the same places."""

import re
import sys
import warnings

import pytest
from random_regexes import ALPHABET, Generator

from sedd.constraints.automaton import compile_bytes
from sedd.constraints.regex import MAX_DEPTH, RegexError, parse
from sedd.errors import UserError


def disagreements(pattern, texts):
    """The texts on which the automaton and ``re`` differ."""
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        compiled = re.compile(pattern, re.ASCII)
    if doubts:  # what Python warns about is refused
        with pytest.raises(RegexError):
            compile_bytes(pattern)
        return []
    try:
        automaton = compile_bytes(pattern)
    except RegexError:
        raise
    except UserError:  # it matches nothing
        return [text for text in texts if compiled.fullmatch(text)]
    return [t for t in texts if automaton.accepts(t.encode()) != bool(compiled.fullmatch(t))]


def test_random_patterns_match_what_re_matches():
    generator = Generator(0)
    matched = compared = 0
    for _ in range(1000):
        piece = generator.pattern()
        texts = generator.texts(piece, 4)
        assert disagreements(piece.pattern, texts) == [], piece.pattern
        compared += len(texts)
        with warnings.catch_warnings(action="ignore"):
            matched += sum(bool(re.fullmatch(piece.pattern, text, re.ASCII)) for text in texts)
    assert 0.3 < matched / compared < 0.7  # a comparison of texts that all fail would show nothing


@pytest.mark.parametrize(
    "pattern",
    [
        r".", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[\d_]", r"[^\w]", r"[\D]", r"[\S\n]",
        r"[a-z]", r"[^a-z]", r"[]a]", r"[^]a]", r"[a-]", r"[-a]", r"[a\-z]", r"[+-.]", r"[\d-]",
        r"[\b]", r"[\x00-\x1f]", r"[\101-\103]", r"[é-ࠀ]", r"[^é-ࠀ]", r"[\U00010000-\U0010ffff]",
        r"[^\x00-\uffff]", r"[\ud000-\uf000]", r"\a|\f|\v|\0|\x7f|\012", r"\.|\-|\é|\{", r"\u00e9",
    ],
)  # fmt: skip
def test_one_character(pattern):
    near = [
        code + step
        for code in [*range(0, 0x800, 0x40), *range(0x800, 0x11000, 0x1000), *map(ord, ALPHABET)]
        for step in (-1, 0, 1)
    ]
    codes = {*range(0x180), *near, sys.maxunicode}
    texts = [chr(c) for c in codes if 0 <= c <= sys.maxunicode and not 0xD800 <= c < 0xE000]
    assert disagreements(pattern, texts) == []


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a|ab", ["a", "ab", "b", "abb"]),
        ("a$", ["a", "a\n"]),  # fullmatch, unlike match, leaves no newline behind
        (r"a\Z", ["a", "a\n"]),
        ("^a$|^b$", ["a", "b", "ab"]),
        ("(^a|(?:^b))c(d$|e)", ["ac", "acd", "bce", "cd"]),
        ("^^a$$", ["a", ""]),
        ("^$", ["", "\n"]),
        ("$^", ["", "\n"]),
        ("", ["", "a"]),
        ("()*", ["", "a"]),
        ("(a*)*b", ["b", "aab", "a"]),
        ("(?:a{2}){3}", ["aaaaaa", "aaaaa", "aa"]),
        ("a{,2}", ["", "aa", "aaa"]),
        ("a{,}", ["", "aaaa"]),
        ("a{0}b", ["b", "ab"]),
        ("a{2}?b", ["aab", "ab"]),
        ("a{}|b{x}|c{1|d{1,2", ["a{}", "b{x}", "c{1", "d{1,2", "a"]),
        ("{|}|]", ["{", "}", "]"]),
        (r"\{2}", ["{{", "{2}"]),
        ("é+", ["é", "éé", "e"]),
        ("😀?—", ["😀—", "—", "😀"]),
        ("(?P<year>\\d{4})-(?P<month>\\d\\d)", ["2024-01", "2024-1"]),
        (".*", ["", "a\n", "é—😀"]),
    ],
)  # fmt: skip
def test_language(pattern, texts):
    assert disagreements(pattern, texts) == []


@pytest.mark.parametrize("pattern", [r".", r"[^a]", r"\D", r"[\W]", r"[\x00-\U0010ffff]"])
def test_only_utf_8_matches(pattern):
    """Not what a longer spelling, a surrogate or less than a character is."""
    automaton = compile_bytes(pattern)
    spelt = [b"/", b"\xc2\x80", b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"]
    for text in [*spelt, b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xf4\x8f\xbf\xbf"]:
        assert automaton.accepts(text)
    longer = [b"\xc0\xaf", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf"]
    surrogates = [b"\xed\xa0\x80", b"\xed\xbf\xbf"]
    parts = [b"\x80", b"\xc2", b"\xe0\xa0", b"\xf0\x90\x80", b"\xf4\x90\x80\x80", b"\xff"]
    for text in [*longer, *surrogates, *parts]:
        assert not automaton.accepts(text)


@pytest.mark.parametrize(
    ("pattern", "position", "reason", "piece"),
    [
        ("a(?=b)", 1, "look-ahead is not supported", "(?="),
        ("a(?!b)", 1, "look-ahead is not supported", "(?!"),
        ("(?<=a)b", 0, "look-behind is not supported", "(?<="),
        ("(?<!a)b", 0, "look-behind is not supported", "(?<!"),
        (r"(a)\1", 3, "back-references are not supported", r"\1"),
        (r"(a)\12", 3, "back-references are not supported", r"\1"),
        ("(?P<n>a)(?P=n)", 8, "back-references are not supported", "(?P="),
        ("(a)(?(1)b|c)", 3, "conditional groups are not supported", "(?("),
        ("(?>a)", 0, "atomic groups are not supported", "(?>"),
        ("ab*+", 2, "possessive quantifiers are not supported", "*+"),
        ("ab{2}+", 2, "possessive quantifiers are not supported", "{2}+"),
        (r"a\b", 1, "word boundaries are not supported", r"\b"),
        (r"a\B", 1, "word boundaries are not supported", r"\B"),
        ("(?i)a", 0, "inline flags are not supported", "(?i"),
        ("a(?s:.)", 1, "inline flags are not supported", "(?s"),
        ("(?-i:a)", 0, "inline flags are not supported", "(?-"),
        ("a(?#b)", 1, "comments are not supported", "(?#"),
        (r"\N{DASH}", 0, "named characters are not supported", r"\N"),
        ("a^b", 1, "an anchor is supported only at the start of the pattern", "^"),
        ("a$b", 1, "an anchor is supported only at the end of the pattern", "$"),
        ("a$|b$\n", 4, "an anchor is supported only at the end of the pattern", "$"),
        ("(?:^a)+", 3, "an anchor is supported only at the start of the pattern", "^"),
        ("a(b|^c)", 4, "an anchor is supported only at the start of the pattern", "^"),
        (r"\ud800", 0, "a surrogate is no character of UTF-8", r"\ud800"),
        ("(?<n>a)", 0, "a named group is written (?P<name>…)", "(?<"),
        ("(?P<1>a)", 0, "bad group name", "(?P<1>"),
        ("(?P<n>a)(?P<n>b)", 8, "redefinition of a group name", "(?P<n>"),
        ("(?~a)", 0, "unknown extension", "(?~"),
        (r"\p{L}+", 0, r"Unicode properties (\p{…}) are not supported", r"\p{L}"),
        (r"a\P{Script=Greek}", 1, "Unicode properties", r"\P{Script=Greek}"),
        (r"[^\p{Lu}]", 2, "Unicode properties", r"\p{Lu}"),
        ("[[:alpha:]]+", 0, "POSIX classes are not supported", "[["),
        ("[[:digit:][:punct:]]", 0, "POSIX classes are not supported", "[["),
        ("a[[a-z]x]", 1, "a set within a set is not supported", "[["),
        (r"[\w--_]", 1, r"write \- for the character", r"\w--"),
        ("[a-z&&b]", 4, "set operators are not supported", "&&"),
        ("[a||b]", 2, "set operators are not supported", "||"),
        ("[x~~y]", 2, "set operators are not supported", "~~"),
        (r"\d{1, 3}", 2, "a count has no spaces: write {1,3}", "{1, 3}"),
        ("a{ 2 }", 1, "a count has no spaces: write {2}", "{ 2 }"),
        ("(ab){3 ,}", 4, "a count has no spaces: write {3,}", "{3 ,}"),
        ("(?", 0, "unexpected end of pattern", "(?"),
        ("a{2,1}", 1, "min repeat greater than max repeat", "{2,1}"),
        ("a{9999999999}", 1, "the repetition number is too large", "{9999999999}"),
    ],
)  # fmt: skip
def test_what_is_refused(pattern, position, reason, piece):
    with pytest.raises(RegexError) as caught:
        parse(pattern)
    message = str(caught.value)
    assert caught.value.position == position
    assert message.startswith(f"regex, position {position}: ")
    assert reason in message
    assert message.endswith(f": {piece!r}")


@pytest.mark.parametrize(
    "pattern",
    [
        "a**", "a*?*", "a{2}{3}", "a?{2}", "*", "a|*", "(+a)", "{2}", "^*", "(a", "((a)", "a)",
        "[a", "[]", "[^]", "[a-", "[b-a]", r"[a-\d]", r"[\d-a]", "a\\", r"\q", r"\x1", r"\u12g4",
        r"\U0011", r"\U00110000", r"[\q]", r"[\8]", r"\400", r"[\400]", "é(", "a" * 99 + "(",
    ],
)  # fmt: skip
def test_errors_are_where_re_finds_them(pattern):
    with pytest.raises(re.error) as expected:
        re.compile(pattern, re.ASCII)
    with pytest.raises(RegexError) as caught:
        parse(pattern)
    assert caught.value.position == expected.value.pos
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a(?:,a)*", ["a", "a,a", "a,a,a", "", ",a", "a,", "aa"]),
        ("xab(?:, ab)*y", ["xaby", "xab, aby", "xab, ab, aby", "xb, by", "xa, aby"]),
        ("(?:a|bc)(?:;(?:a|bc))*", ["a", "bc;a", "a;bc;bc", "a;b", ";"]),
        ("ab(?:cb)*", ["ab", "abcb", "abcbcb", "acb", "abb"]),
        ("[[](?:a+(?:,a+)*)?]".replace("[[]", r"\["), ["[]", "[a]", "[aa,a]", "[a,]", "[,a]"]),
        ("a(?:,a)+", ["a", "a,a", "a,a,a"]),
        ("a(?:,a)*?b", ["ab", "a,ab"]),
    ],
)
def test_lists_are_compiled_from_one_copy(pattern, texts):
    assert disagreements(pattern, texts) == []


def test_nested_lists_grow_with_their_depth_alone():
    def nested(depth):
        if not depth:
            return "[0-9]"
        item = nested(depth - 1)
        return rf"\[(?:{item}(?:,{item})*)?\]"

    states = [compile_bytes(nested(depth)).num_states for depth in (2, 3, 4, 11)]
    assert states[2] - states[1] == states[1] - states[0]
    assert states[3] - states[2] == 7 * (states[1] - states[0])


@pytest.mark.parametrize("opening", ["(", "(?:a|", "(?:a*b"])
def test_deep_nesting(opening):
    def nested(depth):
        return opening * depth + "a" + ")*" * depth

    assert compile_bytes(nested(MAX_DEPTH)).accepts(b"")
    for depth in (MAX_DEPTH + 1, 10_000):
        with pytest.raises(RegexError, match=f"deeper than {MAX_DEPTH}") as caught:
            parse(nested(depth))
        assert caught.value.position == MAX_DEPTH * len(opening)
