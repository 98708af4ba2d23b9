"""Token automata against brute force over token sequences, and the cache of them."""

import itertools
import random
import re

import numpy as np
import pytest
from random_regexes import Generator

import sedd.constraints.token_automaton as module
from sedd.constraints.automaton import compile_bytes
from sedd.constraints.regex import RegexError
from sedd.constraints.token_automaton import ARRAYS, TokenAutomaton, Vocabulary, compile_tokens
from sedd.data.tokenizer_sources import build_tokenizer
from sedd.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Possible (nested )?set:FutureWarning")

LETTERS = "ab0é—😀\n"


def matches(pattern, text):
    """Whether bytes are text that ``re`` matches whole."""
    try:
        return re.fullmatch(pattern, text.decode(), re.ASCII) is not None
    except UnicodeDecodeError:
        return False


def columns(automaton, size):
    """Where each token leads from each state, one step at a time."""
    states = range(automaton.num_states)
    return [tuple(automaton.step(state, token) for state in states) for token in range(size)]


def cut(generator, text):
    """Bytes in random pieces, through characters too."""
    pieces = []
    while text:
        size = generator.randint(1, 3)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def cases(count):
    """Patterns that few tokens, some of them parts of characters, can spell; with sequences."""
    choose = random.Random(0)
    generator = Generator(2, alphabet=LETTERS)
    for index in range(count):
        piece = generator.pattern()
        samples = [cut(choose, piece.sample().encode()) for _ in range(4)]
        pieces = {part for sample in samples for part in sample[:4]}
        tokens = [*sorted(pieces)[:6], choose.choice(LETTERS).encode(), b"", None]
        choose.shuffle(tokens)
        if choose.random() < 0.3:
            tokens.append(choose.choice(tokens))  # two tokens that spell the same
        eos_id = tokens.index(None) if index % 2 else None
        yield piece.pattern, tokens, eos_id, samples


def test_sequences_of_tokens_match_what_their_text_does():
    accepted = rejected = refused = 0
    for pattern, tokens, eos_id, samples in cases(250):
        ids = [i for i, token in enumerate(tokens) if token]
        sequences = [
            list(sequence) for n in range(4) for sequence in itertools.product(ids, repeat=n)
        ]
        sequences += [
            [tokens.index(part) for part in sample]
            for sample in samples
            if all(part in tokens for part in sample)
        ]
        expected = [matches(pattern, b"".join(tokens[i] for i in ids)) for ids in sequences]
        try:
            automaton = compile_tokens(pattern, Vocabulary.of(tokens, eos_id=eos_id))
        except RegexError:
            raise
        except UserError:
            if any(expected):
                raise
            refused += 1
            continue
        assert [automaton.accepts(sequence) for sequence in sequences] == expected, pattern
        accepted += sum(expected)
        rejected += len(expected) - sum(expected)
        if any(expected):
            fewest = min(len(s) for s, e in zip(sequences, expected, strict=True) if e)
            assert automaton.distance[0] == fewest
    assert accepted > 1000
    assert rejected > 1000
    assert refused < 100


def test_invariants():
    """Of every automaton: its classes, edges, distances and states, each by its definition."""
    checked = trimmed = 0
    for pattern, tokens, eos_id, _ in cases(250):
        try:
            automaton = compile_tokens(pattern, Vocabulary.of(tokens, eos_id=eos_id))
        except UserError:
            continue
        checked += 1
        states = automaton.num_states
        trimmed += states - (eos_id is not None) < compile_bytes(pattern).num_states
        table = columns(automaton, len(tokens))
        # A class is a column: equal ones are one class, different ones are two, dead ones are none.
        live = [(column, cls) for column, cls in zip(table, automaton.class_of, strict=True)]
        assert all((cls < 0) == (max(column) < 0) for column, cls in live)
        pairs = {(column, cls) for column, cls in live if cls >= 0}
        assert len(pairs) == len({c for c, _ in pairs}) == len({c for _, c in pairs})
        assert {cls for _, cls in pairs} == set(range(automaton.num_classes))
        # Edges are those columns' entries, once each, in order.
        by_class = {cls: column for column, cls in pairs}
        edges = [
            (state, cls, by_class[cls][state])
            for state in range(states)
            for cls in range(automaton.num_classes)
            if by_class[cls][state] >= 0
        ]
        found = (automaton.edge_source, automaton.edge_class, automaton.edge_target)
        assert edges == list(zip(*(array.tolist() for array in found), strict=True))
        # Relaxation from the accepting states; each state is met from the start.
        distance = np.where(automaton.accepting, 0, np.inf)
        reached = {0}
        for _ in range(states):
            for source, _, target in edges:
                distance[source] = min(distance[source], distance[target] + 1)
                reached |= {target} if source in reached else set()
        assert automaton.distance.tolist() == distance.tolist()
        assert reached == set(range(states))
        for name in ARRAYS:
            dtype = bool if name == "accepting" else np.int32
            assert getattr(automaton, name).dtype == dtype
    assert checked > 150
    assert trimmed > 20


def test_the_end_of_a_text():
    for pattern, tokens, eos_id, _ in cases(80):
        if eos_id is None:
            continue
        try:
            automaton = compile_tokens(pattern, Vocabulary.of(tokens, eos_id=eos_id))
        except UserError:
            continue
        done = automaton.num_states - 1
        for state in range(done):
            after = done if automaton.accepting[state] else -1
            assert automaton.step(state, eos_id) == after
        assert automaton.accepting[done]
        own = [automaton.step(done, token) for token in range(len(tokens))]
        assert own == [done if token == eos_id else -1 for token in range(len(tokens))]
        assert (automaton.class_of == automaton.class_of[eos_id]).sum() == 1


def test_without_an_end_there_is_no_state_behind_it():
    tokens = [b"a", b"b", None]
    with_end = compile_tokens("a*b", Vocabulary.of(tokens, eos_id=2))
    without = compile_tokens("a*b", Vocabulary.of(tokens))
    assert (with_end.num_states, without.num_states) == (3, 2)
    assert with_end.accepts([0, 1]) and with_end.accepts([0, 1, 2, 2])  # noqa: PT018
    assert not with_end.accepts([0, 2])
    assert not with_end.accepts([1, 2, 1])
    assert without.accepts([0, 1])
    assert not without.accepts([0, 1, 2])


def test_what_never_matches_as_text():
    """Specials, tokens of no bytes, and an end of text that has bytes of its own."""
    automaton = compile_tokens(".*", Vocabulary.of([b"", None, b"a", b"<end>"], eos_id=3))
    assert automaton.class_of.tolist()[:2] == [-1, -1]
    assert automaton.accepts([2, 3, 3])
    assert not automaton.accepts([3, 2])
    with pytest.raises(UserError, match="no token holds the character '<'"):
        compile_tokens("<end>", Vocabulary.of([b"", None, b"a", b"<end>"], eos_id=3))


def test_a_pattern_of_the_empty_text():
    automaton = compile_tokens("", Vocabulary.of([b"a", None]))
    assert automaton.num_states == 1
    assert automaton.num_classes == len(automaton.edge_source) == 0
    assert automaton.accepts([])
    assert not automaton.accepts([0])
    assert compile_tokens("", Vocabulary.of([b"a", None], eos_id=1)).accepts([1, 1])


@pytest.mark.parametrize(
    ("pattern", "tokens", "reason"),
    [
        (r"\d{4}", [b"a", b"bc"], r"no token holds the character '0'$"),
        ("ab|ac", [b"a", b"d"], r"no token holds the character 'b'$"),
        ("aé", [b"a", b"\xa9"], r"no token holds the byte 0xc3$"),
        ("aé", [b"a", b"\xc3"], r"no token holds the byte 0xa9$"),
        ("(ba)*x", [b"a", b"b"], r"no token holds the character 'x'$"),
        ("a", [], r"no token holds the character 'a'$"),
        ("a", [None, b""], r"no token holds the character 'a'$"),
        ("ab", [b"abc", b"b"], r"the vocabulary cannot spell anything that regex 'ab' matches$"),
        ("(ab){3}", [b"abab", b"ba"], r"cannot spell anything that regex '\(ab\)\{3\}' matches$"),
    ],
)
def test_a_vocabulary_that_cannot_spell_it(pattern, tokens, reason):
    with pytest.raises(UserError, match=reason):
        compile_tokens(pattern, Vocabulary.of(tokens))


def test_fingerprints_tell_vocabularies_apart():
    vocabularies = [
        Vocabulary.of(tokens, eos_id=eos_id)
        for tokens, eos_id in [
            ([b"a", b"b"], None),
            ([b"b", b"a"], None),
            ([b"ab", b""], None),
            ([b"a", b"b", None], None),
            ([b"a", b"b", None], 2),
            ([b"a", b"b", b""], None),
            ([b"a1:b", b""], None),
        ]
    ]
    assert len({vocabulary.fingerprint for vocabulary in vocabularies}) == len(vocabularies)
    assert Vocabulary.of([b"a", b"b"]).fingerprint == vocabularies[0].fingerprint
    with pytest.raises(ValueError, match=r"eos_id must be in 0\.\.1, got 2"):
        Vocabulary.of([b"a", b"b"], eos_id=2)


def same(first, second):
    return (first.pattern, first.eos_id) == (second.pattern, second.eos_id) and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in ARRAYS
    )


def bytes_vocabulary():
    return Vocabulary.of([*(bytes([byte]) for byte in range(256)), None], eos_id=256)


def test_the_cache(tmp_path, monkeypatch):
    vocabulary, pattern = bytes_vocabulary(), "[a-cé]{2,5}"
    made = compile_tokens(pattern, vocabulary, cache_dir=tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    assert path.suffix == ".npz"
    compile_tokens(pattern + "x", vocabulary, cache_dir=tmp_path / "new")
    compile_tokens(pattern, Vocabulary.of([b"a", b"b"]), cache_dir=tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 3

    def never(pattern):
        raise AssertionError("compiled again")

    monkeypatch.setattr(module, "compile_bytes", never)
    kept = compile_tokens(pattern, vocabulary, cache_dir=tmp_path / "new")
    assert isinstance(kept, TokenAutomaton)
    assert same(made, kept)
    with pytest.raises(AssertionError, match="compiled again"):
        compile_tokens(pattern, vocabulary, cache_dir=tmp_path / "other")


def test_a_damaged_cache_file_is_made_anew(tmp_path):
    vocabulary, pattern = bytes_vocabulary(), "[ab]{2,5}"
    made = compile_tokens(pattern, vocabulary, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [b"", b"text", whole[:-1], whole[: len(whole) // 2]]
    damaged += [
        whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        for place in range(0, len(whole), 13)
    ]
    for data in damaged:
        path.write_bytes(data)
        assert same(made, compile_tokens(pattern, vocabulary, cache_dir=tmp_path))
    path.write_bytes(b"text")
    compile_tokens(pattern, vocabulary, cache_dir=tmp_path)
    assert same(made, module._read(path, pattern, vocabulary))


def test_errors_are_not_cached(tmp_path):
    with pytest.raises(RegexError, match="nothing to repeat"):
        compile_tokens("*", bytes_vocabulary(), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_gpt2s_vocabulary(tmp_path):
    tokenizer = build_tokenizer("gpt2", None, cache_dir=tmp_path)
    vocabulary = Vocabulary.of(tokenizer.token_bytes(), eos_id=tokenizer.eos_id)
    pattern = r'\{"name": "[^"\\\x00-\x1f]*", "born": \d{4}-(0[1-9]|1[0-2]), "tags": \["é+—"\]\}'
    automaton = compile_tokens(pattern, vocabulary)
    good = '{"name": "Zoë 😀 of the lake", "born": 1984-12, "tags": ["éé—"]}'
    (ids,) = tokenizer.encode_batch([good])
    assert automaton.accepts([*ids, tokenizer.eos_id])
    assert automaton.distance[0] <= len(ids)
    for bad in (good[:-1], good.replace("12", "13"), good.replace("é", "e"), good + " "):
        (ids,) = tokenizer.encode_batch([bad])
        assert not automaton.accepts(ids)
    # Tokens × states would be fifty times the edges: most tokens fit nowhere or in the name alone.
    assert automaton.num_classes < 500
    assert 20 * len(automaton.edge_source) < vocabulary.size
    assert (automaton.class_of >= 0).sum() > 40_000
