"""The automata of bytes: as small as an independent minimiser's, and refused where they blow up."""

import time

import numpy as np
import pytest
from greenery import Charclass
from greenery.fsm import Fsm
from random_regexes import Generator

from sedd.constraints.automaton import compile_bytes
from sedd.constraints.minimize import minimal
from sedd.constraints.regex import RegexError, shown
from sedd.errors import UserError

BYTE = [Charclass(chr(byte)) for byte in range(256)]
REST = ~Charclass("".join(map(chr, range(256))))  # greenery's alphabets are all of Unicode


def minimal_size(transitions, accepting):
    """States that reach acceptance in the minimal automaton, by Brzozowski's double reversal."""
    columns, symbol = np.unique(transitions, axis=1, return_inverse=True)
    symbols = [
        Charclass("".join(chr(byte) for byte in np.flatnonzero(symbol.reshape(-1) == index)))
        for index in range(columns.shape[1])
    ]
    dead = len(accepting)
    moves = {
        state: {
            **{symbols[i]: int(t) if t >= 0 else dead for i, t in enumerate(columns[state])},
            REST: dead,
        }
        for state in range(dead)
    } | {dead: dict.fromkeys([*symbols, REST], dead)}
    reduced = Fsm(
        alphabet={*symbols, REST},
        states=set(moves),
        initial=0,
        finals=set(np.flatnonzero(accepting).tolist()),
        map=moves,
    ).reduce()
    return sum(reduced.islive(state) for state in reduced.states)


def some_automata(count, most):
    """Compiled random patterns of at most ``most`` states: the minimiser compared with is slow."""
    generator = Generator(1)
    while count:
        try:
            automaton = compile_bytes(generator.pattern().pattern)
        except UserError:
            continue
        if automaton.num_states <= most:
            count -= 1
            yield automaton


def test_sizes_are_those_of_an_independent_minimiser():
    sizes = []
    for automaton in some_automata(250, 32):
        sizes.append(automaton.num_states)
        assert minimal_size(automaton.transitions, automaton.accepting) == automaton.num_states
    assert np.mean(sizes) > 8


def test_the_independent_minimiser_finds_equal_states():
    """The control of the test above: a state that is there twice is found."""
    automaton = compile_bytes("(ab|cd)e*")
    twice = np.concatenate([automaton.transitions, automaton.transitions[-1:]])
    twice[0, ord("a")] = len(twice) - 1
    twice[0, ord("c")] = len(twice) - 2
    accepting = np.append(automaton.accepting, automaton.accepting[-1])
    assert (twice[-1] == twice[-2]).all()
    assert minimal_size(twice, accepting) < len(accepting)


@pytest.mark.parametrize("seed", range(40))
def test_random_tables_are_minimised(seed):
    """Tables with many equal and dead states, which patterns' own hardly have."""
    random = np.random.default_rng(seed)
    states, classes = int(random.integers(1, 14)), int(random.integers(1, 4))
    moves = random.integers(-1, states, (states, classes)).astype(np.int32)
    moves[random.random(moves.shape) < 0.3] = -1
    accepting = random.random(states) < 0.3
    found_moves, found_accepting = minimal(moves, accepting)

    padded = np.full((states, 256), -1, np.int32)
    padded[:, :classes] = moves
    assert len(found_moves) == minimal_size(padded, accepting)

    def accepts(moves, accepting, word):
        state = 0
        for symbol in word:
            state = moves[state, symbol] if 0 <= state < len(moves) else -1
        return bool(0 <= state < len(moves) and accepting[state])

    for word in (random.integers(0, classes, random.integers(0, 12)) for _ in range(200)):
        same = accepts(found_moves, found_accepting, word)
        assert same == accepts(moves, accepting, word)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("", 1),
        ("a", 2),
        ("a*", 1),
        ("a|b|[cd]", 2),
        ("(?:ab|cb)", 3),
        ("a{0,7}", 8),
        ("(a|ab)(c|bcd)", 7),
        ("[ac]|[bc]", 2),
        ("é", 3),
        ("[é-ö]", 3),
        (".", 9),  # the end, and what is left to read after C2, E0, E1, ED, F0, F1, F4
        ("(.|\\n)*", 8),
        ("(a|b)*a(a|b){8}", 512),
        ("(a|b){8}a(a|b)*", 10),
        ("(?:a|aa|aaa)*(?:aa)*", 1),
    ],
)
def test_sizes(pattern, states):
    automaton = compile_bytes(pattern)
    assert automaton.num_states == states
    assert automaton.transitions.shape == (states, 256)
    assert automaton.transitions.dtype == np.int32
    assert automaton.accepting.dtype == bool


@pytest.mark.parametrize(
    ("pattern", "part", "position", "what"),
    [
        ("a{0,1000000}", "a{0,1000000}", 0, "repeated 1000000 times, leads to more than"),
        ("x(y{1000}|z){1000}", "(y{1000}|z){1000}", 1, "repeated 1000 times"),
        ("x((a{1,100}){1,100}){1,100}y", "((a{1,100}){1,100}){1,100}", 1, "repeated 100 times"),
        ("(((a{9}){99999999}){9})*", "(a{9}){99999999}", 2, "repeated 99999999 times"),
        ("(){0,900000}", "(){0,900000}", 0, "repeated 900000 times"),
        ("x[ab]*a([ab]|c){20}y", "([ab]|c){20}", 7, "more than 40000 states"),
        ("a?" * 11_000, "a?" * 11_000, 0, "too many ways to read a text"),
        ("(a|aa)+" * 3000, "(a|aa)+" * 3000, 0, "too many ways to read a text"),
        ("(a?b?c?)*" * 2000, "(a?b?c?)*" * 2000, 0, "too many ways to read a text"),
        ("a:(b?){0,9000}", "(b?){0,9000}", 2, "too many ways to read a text"),
        ("<(.|\\n){0,3000}>", "(.|\\n){0,3000}", 1, "more than 20000 states"),
    ],
)
def test_caps_name_the_part(pattern, part, position, what):
    start = time.perf_counter()
    with pytest.raises(RegexError) as caught:
        compile_bytes(pattern)
    assert time.perf_counter() - start < 10  # the machine may be busy; without caps it is for ever
    assert caught.value.position == position
    assert str(caught.value).endswith(f": {shown(part)}")
    assert what in str(caught.value)


def test_the_cap_is_the_callers():
    assert compile_bytes("a{9}", max_states=10).num_states == 10
    with pytest.raises(RegexError, match=r"more than 9 states: 'a\{9\}'"):
        compile_bytes("a{9}", max_states=9)


@pytest.mark.parametrize("pattern", [r"[^\x00-\U0010ffff]", r"a[^\d\D]b", r"[\ud800-\udfff]"])
def test_a_pattern_that_matches_nothing(pattern):
    with pytest.raises(UserError, match="matches nothing"):
        compile_bytes(pattern)


def test_a_long_count_is_compiled_quickly():
    """The best of three, since a test machine is shared; it takes a thirtieth of a second alone."""
    pattern = r'"([^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}){0,200}"'
    times = []
    for _ in range(3):
        start = time.perf_counter()
        automaton = compile_bytes(pattern)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3
    assert automaton.num_states == 200 * 13 + 3
    for text, matches in [("a" * 200, True), ("é" * 201, False), ("\\u00e9" * 200, True)]:
        assert automaton.accepts(f'"{text}"'.encode()) == matches
