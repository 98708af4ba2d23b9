"""Dynamic programming against brute force over every string."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiers import daily

from sedd.constraints import compile_regex
from sedd.constraints.decode import Automaton
from sedd.constraints.tables import Sizes, tables
from sedd.errors import UserError

TOKENS, LENGTH = 5, 4  # 625 strings


def from_table(next_SN, accepting, eos_id=None):
    """The automaton of a table of next states, -1 where there is none; untrimmed."""
    columns, class_of = np.unique(next_SN, axis=1, return_inverse=True)
    dead = np.flatnonzero((columns < 0).all(0))
    source, column = np.nonzero(columns >= 0)
    distance = np.where(accepting, 0, 99)
    for _ in range(len(next_SN)):
        ahead = np.where(next_SN >= 0, distance[next_SN], 99).min(1) + 1
        distance = np.minimum(distance, ahead)
    return Automaton(
        accepting=np.asarray(accepting, bool),
        class_of=np.where(np.isin(class_of, dead), -1, class_of).astype(np.int32),
        edge_source=source.astype(np.int32),
        edge_class=column.astype(np.int32),
        edge_target=columns[source, column].astype(np.int32),
        eos_id=eos_id,
        pattern="a table",
        distance=distance.astype(np.int32),
    )


def random_case(seed):
    """An automaton with a string of the length, and log probabilities, some of them -inf."""
    rng = np.random.default_rng(seed)
    while True:
        states = int(rng.integers(1, 6))
        next_SN = np.where(
            rng.random((states, TOKENS)) < rng.choice([0.3, 0.7, 1.0]),
            rng.integers(0, states, (states, TOKENS)),
            -1,
        )
        accepting = rng.random(states) < 0.5
        scale = rng.choice([0.1, 1.0, 5.0])
        logits = scale * rng.standard_normal((LENGTH, TOKENS))
        logits[rng.random(logits.shape) < rng.choice([0.0, 0.2])] = -np.inf
        if np.isinf(logits).all(1).any():
            continue
        log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        strings = brute_force(next_SN, accepting, log_probs)
        if strings:
            return from_table(next_SN, accepting), log_probs, strings


def brute_force(next_SN, accepting, log_probs, *, start=0, fixed=None):
    """(log probability, string) of each that matches and is possible, the best first."""
    found = []
    for string in itertools.product(range(TOKENS), repeat=len(log_probs)):
        state = start
        for token in string:
            state = next_SN[state, token] if state >= 0 else -1
        given = fixed is None or all(f in (-1, t) for f, t in zip(fixed, string, strict=True))
        # A given token counts as certain.
        free = range(len(string)) if fixed is None else np.flatnonzero(np.asarray(fixed) < 0)
        value = sum(log_probs[i, string[i]] for i in free)
        if state >= 0 and accepting[state] and given and value > -np.inf:
            found.append((value, string))
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))


@pytest.mark.parametrize("first", daily(range(0, 200, 25), [0]))
def test_everything_against_brute_force(first):
    for seed in range(first, first + 25):
        automaton, log_probs, strings = random_case(seed)
        values = np.array([value for value, _ in strings])
        log_z = np.log(np.exp(values - values[0]).sum()) + values[0]

        tokens, value = automaton.most_likely(log_probs)
        assert value == pytest.approx(values[0], abs=1e-4)
        assert sum(log_probs[range(LENGTH), tokens]) == pytest.approx(values[0], abs=1e-4)
        assert automaton.accepts(tokens)

        assert automaton.log_partition(log_probs) == pytest.approx(log_z, abs=1e-4)

        marginals = np.zeros((LENGTH, TOKENS))
        for value, string in strings:
            marginals[range(LENGTH), string] += np.exp(value - log_z)
        np.testing.assert_allclose(automaton.marginals(log_probs), marginals, atol=1e-4)

        best = automaton.top_k(log_probs, 5)
        assert len(best) == min(5, len(strings))
        np.testing.assert_allclose([v for _, v in best], values[:5], atol=1e-4)
        assert len({tuple(t) for t, _ in best}) == len(best)
        for tokens, value in best:
            assert automaton.accepts(tokens)
            assert sum(log_probs[range(LENGTH), tokens]) == pytest.approx(value, abs=1e-4)

        if seed % 5:  # draws take most of the time
            continue
        drawn = automaton.sample(jax.random.key(seed), log_probs, 400)
        index = {string: i for i, (_, string) in enumerate(strings)}
        counts = np.bincount([index[tuple(row)] for row in drawn.tolist()], minlength=len(strings))
        assert oracle.chi_square_p(counts, np.exp(values - log_z)) > 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))
def test_many_samples_have_their_law_and_no_other(seed):
    automaton, log_probs, strings = random_case(1000 + seed)
    index = {string: i for i, (_, string) in enumerate(strings)}
    law = np.exp([value for value, _ in strings])
    law /= law.sum()
    drawn = automaton.sample(jax.random.key(seed), log_probs, 3000)
    counts = np.bincount([index[tuple(row)] for row in drawn.tolist()], minlength=len(law))
    assert oracle.chi_square_p(counts, law) > 1e-4
    if len(law) > 1:
        assert oracle.chi_square_p(counts, np.roll(law, 1)) < 1e-4


@pytest.mark.parametrize("seed", range(10))
def test_given_tokens(seed):
    automaton, log_probs, strings = random_case(2000 + seed)
    given = strings[-1][1]
    fixed = np.array([given[0], -1, given[2], -1])
    table = table_of(automaton)
    strings = brute_force(table, automaton.accepting, log_probs, fixed=fixed)
    if not strings:  # what is given is fine, the rest impossible
        return
    values = np.array([value for value, _ in strings])
    tokens, value = automaton.most_likely(log_probs, fixed=fixed)
    assert value == pytest.approx(values[0], abs=1e-4)
    assert (tokens[[0, 2]] == fixed[[0, 2]]).all()
    expected = np.log(np.exp(values).sum())
    assert automaton.log_partition(log_probs, fixed=fixed) == pytest.approx(expected, abs=1e-4)
    marginals = automaton.marginals(log_probs, fixed=fixed)
    assert marginals[0, fixed[0]] == pytest.approx(1, abs=1e-4)


def table_of(automaton):
    return np.array(
        [[automaton.step(s, t) for t in range(TOKENS)] for s in range(automaton.num_states)]
    )


VOCABULARY = [b"a", b"b", b"c", b"d", None]


def uniform(length, tokens=5):
    return np.full((length, tokens), -np.log(tokens))


def test_ties_go_to_the_smallest_tokens():
    automaton = compile_regex("[abcd]{3}|dddd", VOCABULARY)
    tokens, value = automaton.most_likely(uniform(3))
    assert tokens.tolist() == [0, 0, 0]
    assert value == pytest.approx(3 * -np.log(5))
    best = [tokens.tolist() for tokens, _ in automaton.top_k(uniform(3), 3)]
    assert best == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


def test_long_strings_do_not_underflow():
    """In linear float32 the sum over strings of 200 tokens is 0."""
    automaton = compile_regex("[ab]*c[ab]*", VOCABULARY)
    length = 200
    got = automaton.log_partition(uniform(length))
    strings = np.log(length) + (length - 1) * np.log(2)
    assert got == pytest.approx(strings - length * np.log(5), rel=1e-5)
    marginals = automaton.marginals(uniform(length))
    np.testing.assert_allclose(marginals[:, 2], 1 / length, rtol=1e-3)
    np.testing.assert_allclose(marginals.sum(1), 1, rtol=1e-4)


def test_unused_places_hold_the_end():
    automaton = compile_regex("ab?", VOCABULARY, eos_id=4)
    for row in automaton.sample(jax.random.key(0), uniform(4), 50).tolist():
        assert row in ([0, 4, 4, 4], [0, 1, 4, 4])
    certain = np.full((4, 5), -30.0)
    certain[range(4), [0, 1, 4, 4]] = 0
    assert automaton.most_likely(certain)[0].tolist() == [0, 1, 4, 4]


def test_a_budget_keeps_the_string_finishable():
    """Blocks of two tokens of a string of ten: whatever is drawn, the rest can finish it."""
    automaton = compile_regex("a(bc)*d", VOCABULARY, eos_id=4)
    for seed in range(20):
        state, tokens = 0, []
        for block in range(5):
            drawn = automaton.sample(
                jax.random.key(100 * seed + block), uniform(2), start=state, budget=8 - 2 * block
            )[0]
            tokens += drawn.tolist()
            state = automaton.run(drawn, state)
        assert automaton.accepts(tokens)
    with_budget = automaton.log_partition(uniform(2), budget=1)  # abX, ad with an end behind it
    assert with_budget == pytest.approx(np.log(1 / 25), abs=1e-5)


def test_budget_against_the_whole_by_brute_force():
    for seed in range(20):
        automaton, *_ = random_case(3000 + seed)
        final = automaton.final(2)
        table = table_of(automaton)
        for state in range(automaton.num_states):
            ends = [
                table[table[state, a], b]
                for a in range(TOKENS)
                if table[state, a] >= 0
                for b in range(TOKENS)
            ]
            assert final[state] == any(e >= 0 and automaton.accepting[e] for e in ends)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda a: a.most_likely(uniform(2)), "needs at least 3 tokens, but has room for 2; give"),
        (
            lambda a: a.sample(jax.random.key(0), uniform(1), budget=1),
            r"room for 1 \(1 more may follow\);",
        ),
        (lambda a: a.most_likely(uniform(4)), "matches no string of exactly 4 tokens"),
        (
            lambda a: a.most_likely(uniform(5), fixed=[-1, 3, -1, -1, -1]),
            "token 3 that is given at position 1 contradicts",
        ),
        (
            lambda a: a.marginals(bad(uniform(3), 1, np.nan)),
            r"position 1: .* hold nan, in state \d",
        ),
        (
            lambda a: a.log_partition(bad(uniform(3), 1, -np.inf)),
            "position 1: .*in state 1.*probability 0",
        ),
        (lambda a: a.top_k(bad(uniform(3), 2, -np.inf), 2), "position 2: .*probability 0"),
        (lambda a: a.top_k(uniform(3), 0), "k must be at least 1, got 0"),
        (lambda a: a.most_likely(uniform(3, 6)), r"log_probs must be \[length, 5\]"),
        (lambda a: a.most_likely(uniform(3), fixed=[1]), r"fixed must be \[3\]"),
        (lambda a: a.most_likely(uniform(3), budget=-1), "budget must be at least 0"),
        (lambda a: a.most_likely(uniform(3), start=99), "start must be a state"),
    ],
)
def test_what_is_impossible_is_named(ask, message):
    automaton = compile_regex("a(bc)*bd", VOCABULARY)
    with pytest.raises(UserError, match=message):
        ask(automaton)


def bad(log_probs, position, value):
    log_probs[position] = value
    return log_probs


def test_another_automaton_of_the_size_compiles_nothing():
    from sedd.constraints import decode

    log_probs = uniform(6)
    compile_regex("a*b", VOCABULARY).most_likely(log_probs)
    before = decode._most_likely._cache_size()
    for pattern, length in (("(ab|cd)*", 6), ("[abc]+d?", 5), ("a{2,9}", 7)):
        compile_regex(pattern, VOCABULARY).most_likely(uniform(length))
    assert decode._most_likely._cache_size() == before


def test_the_padding_changes_nothing():
    automaton, log_probs, _ = random_case(5)
    shorter = automaton.log_partition(log_probs)
    wide = dataclasses.replace(automaton)
    object.__setattr__(wide, "tables", jax.tree.map(jnp.asarray, wider(automaton)))
    assert wide.log_partition(log_probs) == pytest.approx(shorter, abs=1e-6)
    np.testing.assert_allclose(wide.marginals(log_probs), automaton.marginals(log_probs), atol=1e-6)
    for (a, _), (b, _) in zip(wide.top_k(log_probs, 3), automaton.top_k(log_probs, 3), strict=True):
        np.testing.assert_array_equal(a, b)
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        wide.sample(key, log_probs, 50), automaton.sample(key, log_probs, 50)
    )


def wider(automaton):
    return tables(automaton, Sizes(classes=96, blocks=80, groups=64, edges=304, states=72))


# ---------------------------------------------------------------- classes of many tokens

# One class of 2,500 tokens: three groups of blocks, the last ones of both incomplete.
NUMBERS = [b"%04d" % i for i in range(2500)] + [b"a", b"b", b"c", b"d"]


def steep(seed, offset=0.0):
    """Log probabilities over NUMBERS that span 40 nats; the letters have nearly all of the mass."""
    rng = np.random.default_rng(seed)
    row = np.concatenate([rng.uniform(-40, 0, 2500) + offset, np.zeros(4)])
    return (row - np.log(np.exp(row).sum()))[None]


@pytest.mark.nightly
def test_draws_from_a_class_of_many_tokens_have_their_law():
    log_probs = steep(0)
    automaton = compile_regex(r"\d{4}", NUMBERS)
    law = np.exp(log_probs[0, :2500])
    likeliest, value = automaton.most_likely(log_probs)
    assert likeliest[0] == law.argmax()
    assert value == pytest.approx(np.log(law.max()), abs=1e-4)
    assert automaton.log_partition(log_probs) == pytest.approx(np.log(law.sum()), abs=1e-4)
    drawn = automaton.sample(jax.random.key(0), log_probs, 4000)[:, 0]
    counts = np.bincount(drawn, minlength=2500)
    assert oracle.chi_square_p(counts, law / law.sum()) > 1e-4
    assert oracle.chi_square_p(counts, np.roll(law, 1) / law.sum()) < 1e-4


def test_the_first_of_many_equal_tokens_is_the_likeliest():
    automaton = compile_regex(r"\d{4}", NUMBERS)
    for place in (0, 31, 32, 1023, 1024, 2499):
        log_probs = np.full((1, len(NUMBERS)), -9.0)
        log_probs[0, place:2500] = -8.0
        assert automaton.most_likely(log_probs)[0][0] == place


@pytest.mark.nightly
@pytest.mark.parametrize("offset", [-50.0, -200.0, -1e4])
def test_classes_that_underflow_beside_the_largest_token_keep_their_law(offset):
    """exp(-200) is 0 in float32: sums relative to the row's maximum would lose all of them."""
    log_probs = np.repeat(steep(1, offset), 2, axis=0)
    log_probs[:, 2501] += offset - np.log(2)  # b is as rare, and c and d rarer
    log_probs[:, 2502:] += offset - np.log(4)
    automaton = compile_regex(r"bc|cb|dd", NUMBERS)
    b, c, d = log_probs[0, 2501:]
    values = np.array([b + c, c + b, d + d])
    top = values.max()
    law = np.exp(values - top)
    expected = top + np.log(law.sum())
    assert automaton.log_partition(log_probs) == pytest.approx(expected, rel=1e-6)
    drawn = automaton.sample(jax.random.key(1), log_probs, 2_000)
    strings = [[2501, 2502], [2502, 2501], [2503, 2503]]
    counts = np.array([(drawn == string).all(1).sum() for string in strings])
    assert counts.sum() == 2_000
    assert oracle.chi_square_p(counts, law / law.sum()) > 1e-4
    numbers = compile_regex(r"\d{4}b", NUMBERS)  # within a class, too
    drawn = numbers.sample(jax.random.key(2), log_probs, 2_000)[:, 0]
    law = np.exp(log_probs[0, :2500] - log_probs[0, :2500].max())
    counts = np.bincount(drawn, minlength=2500)
    assert oracle.chi_square_p(counts, law / law.sum()) > 1e-4


# ---------------------------------------------------------------- what is given


@pytest.mark.parametrize(
    ("pattern", "tokens", "position"),
    [
        ("a(bc)*bd", [0, 1, 2, 3, 3], 3),  # the d comes too early
        ("a(bc)*bd", [-1, -1, 0, -1, -1], 2),
        ("[ab]*", [0, 1, 2, 3, 3], 2),
        ("[ab]*", [0, 4, 2, 3, 0], 1),  # of no class
        ("(ab|cd)*a", [-1, -1, -1, 1, 1], 4),
        ("a{3}b{2}", [1, -1, -1, -1, -1], 0),
        ("a*b*", [-1, 1, -1, -1, 0], 4),
    ],
)
def test_the_first_given_token_that_contradicts_is_named(pattern, tokens, position):
    automaton = compile_regex(pattern, VOCABULARY)
    text_of = ["a", "b", "c", "d", "<mask>"].__getitem__
    named = f"token {tokens[position]}, {text_of(tokens[position])!r}, that is given at position "
    with pytest.raises(UserError, match=f"{named}{10 + position} contradicts"):
        automaton.check_span(5, fixed=tokens, first=10, text_of=text_of)
    upto = np.where(np.arange(5) < position, tokens, -1)
    automaton.check_span(5, fixed=upto)  # everything before it is fine


def test_given_tokens_are_checked_in_one_pass(monkeypatch):
    passes = []
    ways = Automaton._ways

    def counted(self, fixed, final):
        passes.append(len(fixed))
        return ways(self, fixed, final)

    monkeypatch.setattr(Automaton, "_ways", counted)
    automaton = compile_regex("(ab)*c?", VOCABULARY)
    fixed = np.tile([0, 1], 512)
    automaton.check_span(1024, fixed=fixed)
    assert passes.count(1024) == 1
    fixed[701] = 3
    with pytest.raises(UserError, match="token 3 that is given at position 701"):
        automaton.check_span(1024, fixed=fixed)
    assert passes.count(1024) <= 2 + 1 + 11  # a bisection of 1,024 tokens


def test_ways_over_long_spans_with_given_tokens():
    """Where nothing changes any more positions are skipped: never one with a given token."""
    rng = np.random.default_rng(0)
    for seed in range(60):
        automaton, *_ = random_case(4000 + seed)
        table = table_of(automaton)
        fixed = np.where(rng.random(14) < 0.2, rng.integers(0, TOKENS, 14), -1)
        ways = np.zeros((15, automaton.num_states), bool)
        ways[-1] = automaton.accepting
        for position in reversed(range(14)):
            tokens = range(TOKENS) if fixed[position] < 0 else [fixed[position]]
            for state in range(automaton.num_states):
                ends = [table[state, t] for t in tokens]
                ways[position, state] = any(e >= 0 and ways[position + 1, e] for e in ends)
        np.testing.assert_array_equal(automaton._ways(fixed, automaton.accepting), ways)
