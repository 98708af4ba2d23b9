"""Constraints in the samplers: whatever the sampler and its steps, the result matches."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false

import dataclasses
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import oracle
import pytest
import tiny_run
from tiers import daily, nightly

import sedd
from sedd.configuration.build import build_parts
from sedd.constraints import compile_json_schema, compile_regex
from sedd.constraints import spans as spans_module
from sedd.constraints.clamp import from_infill, from_prompt
from sedd.constraints.spans import batch_spans, shape_of, spans_of
from sedd.data.tokenizers import Bytes
from sedd.errors import UserError
from sedd.model import Model

LENGTH = 12
BYTES = Bytes()
REGEXES = [
    *("a*", "[ab]+", "(ab|cd)*", "a{3,5}", ".*", ".{12}", "x?y?z?", "(a|b)*abb", "[^a]+", r"\d+"),
    *(r"\d{4}-\d\d-\d\d", r"\w+@\w+\.(com|org)", r"[+-]?\d+(\.\d+)?", "yes|no|maybe", r"\s*a\s*"),
    *("é+", "[à-ÿ]{1,4}", "€|\\$|£", "日本語?", "[一-龯]+", "😀{1,3}", "[😀-😏]*", "naïve|café"),
    *(".€.", "[^é]*é", r"\(\d+\)", "(0|1)+", "((a|b)(c|d)){1,4}", "a.c.e", r"[A-Z][a-z]*( [A-Z])?"),
    *("a|", "(|b)c", "(?:ab)+?c", "[a-c-]+", r"[\]\[]+", r"\x41\u00e9", "a{0}b", r"\D\D", r"\W*\w"),
    *(
        "[^\\x00-\\x7f]+",
        "true|false|null",
        r"#[0-9a-f]{6}",
        r"[01]\d:[0-5]\d",
        "(a?){5}",
        r"\.\.\.",
    ),
    *("Ω|ω", "(ß|ss)+", "[a-zé]{2}", r'"[^"]*"', "𝔸|𝔹"),
]
SAMPLERS = {
    "euler": ["steps"],
    "tweedie": ["steps"],
    "event_jump": ["steps"],
    "ordered": ["steps"],
    "confidence": ["steps"],
    "entropy_bounded": [],
    "token_confidence": ["steps"],
    "planned": ["steps"],
    "remdm": ["steps"],
    "semi_autoregressive": ["steps"],
    "best_of_n": ["steps"],
    "particle": ["steps"],
    "search_paths": ["steps"],
    "zero_order": ["steps"],
}
SEARCHES = ("best_of_n", "particle", "search_paths", "zero_order")


def make_model(kind):
    """With random weights, over bytes: most tokens are parts of characters."""
    config = tiny_run.config(kind, length=LENGTH)
    parts = build_parts(config, BYTES.num_tokens)
    params = jax.jit(parts.network.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [leaf + oracle.f32(0.3 * rng.standard_normal(leaf.shape)) for leaf in leaves]
    return Model(
        denoiser=parts.denoiser(tree.unflatten(leaves)),
        parts=parts,
        config=config,
        tokenizer=BYTES,
        source="a test",
    )


@pytest.fixture(scope="module")
def models():
    return {kind: make_model(kind) for kind in ("radd", "sedd", "uniform")}


@pytest.fixture(scope="module")
def model(models):
    return models["radd"]


def compiled(pattern):
    return compile_regex(pattern, BYTES.token_bytes(), eos_id=BYTES.eos_id)


@pytest.fixture(scope="module")
def automata():
    assert len(REGEXES) == 50
    return [compiled(pattern) for pattern in REGEXES]


def letters(texts):
    return [float(sum(c.isascii() and c.isalpha() for c in text)) for text in texts]


def assert_all_match(result, patterns=REGEXES):
    for text, tokens, pattern in zip(result.text, result.tokens, patterns, strict=True):
        end = tokens.tolist().index(BYTES.eos_id) if BYTES.eos_id in tokens else len(tokens)
        spelt = bytes(tokens[:end].tolist())
        assert re.fullmatch(pattern, spelt.decode(), re.ASCII), (pattern, spelt)
        assert (tokens[end:] == BYTES.eos_id).all()
        assert text == spelt.decode()


@pytest.mark.parametrize(
    ("name", "steps"),
    daily(
        # Each is a program of its own; benchmarks/constrained.py goes through all.
        [
            *((name, 4 if has_steps else None) for name, has_steps in SAMPLERS.items()),
            *[("event_jump", 1), ("tweedie", LENGTH)],
        ],
        [
            ("event_jump", 1),
        ],
    ),
)
def test_every_sampler_always_matches(model, automata, name, steps):
    options = {} if steps is None else {"steps": steps}
    if name == "planned":
        options = {"calls": steps, "profile": tiny_run.profile_of(model, LENGTH)}
    if name in ("semi_autoregressive", *SEARCHES):
        options = {"inner": sedd.samplers.options("event_jump", **options)}
    if name == "semi_autoregressive":
        options["block"] = 4
    if name in SEARCHES:
        options["verifier"] = letters
    if name == "particle":
        options |= {"particles": 2, "resample_every": 2}
    if name == "best_of_n":
        options["n"] = 2
    if name == "search_paths":
        options |= {"paths": 1, "branches": 2}
    if name == "zero_order":
        options |= {"neighbours": 2, "rounds": 2}
    keys = jax.random.key(steps or 0)
    result = sedd.sample(
        model, keys, num=50, length=LENGTH, sampler=name, constraint=automata, **options
    )
    assert_all_match(result)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["euler", "tweedie", "remdm"])
def test_also_on_a_model_that_depends_on_the_noise_level(models, automata, name):
    result = sedd.sample(
        models["sedd"],
        jax.random.key(0),
        num=50,
        length=LENGTH,
        sampler=name,
        constraint=automata,
        steps=5,
    )
    assert_all_match(result)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "dingo", "steps": 4},
        nightly({"rule": "dingo", "sampler": "token_confidence", "steps": 6}),
        nightly({"temperature": 0.0, "steps": 4}),
        nightly({"top_k": 1, "steps": 4}),
        nightly({"top_p": 0.1, "temperature": 2.0, "steps": 4}),
    ],
    ids=str,
)
def test_with_every_rule_and_reshaped_conditionals(model, automata, options):
    options = {"sampler": "event_jump", **options}
    key = jax.random.key(1)
    assert_all_match(sedd.sample(model, key, num=50, length=LENGTH, constraint=automata, **options))


def test_control_without_a_constraint_little_matches(model):
    result = sedd.sample(model, jax.random.key(0), num=50, length=LENGTH, sampler="event_jump")
    matches = [
        re.fullmatch(pattern, text, re.ASCII) is not None
        for pattern, text in zip(REGEXES, result.text, strict=True)
    ]
    assert sum(matches) < 10


def test_prompt_span_and_suffix(model):
    clamps = [
        from_prompt(BYTES, 12, prompt="on ", suffix="."),
        from_infill(BYTES, "{mask:4}-{mask:3}!"),
        from_infill(BYTES, "x={mask:5}"),
    ]
    constraints = [
        compiled(r"\d\d?/\d+"),
        [compiled("[a-c]+"), compiled("é?")],
        None,
    ]
    result = sedd.sample(
        model, jax.random.key(0), num=3, sampler="ordered", clamp=clamps, constraint=constraints
    )
    first, second, third = result.text
    assert re.fullmatch(r"on \d\d?/\d+\.", first)
    assert re.fullmatch(r"[a-c]+-é?!", second)
    assert third.startswith("x=")


@pytest.mark.nightly
def test_one_span_over_given_text(model):
    clamp = from_infill(BYTES, "{mask:2}b{mask:2}")
    result = sedd.sample(
        model,
        jax.random.key(0),
        num=8,
        sampler="event_jump",
        clamp=clamp,
        constraint=compiled("(a|c)[bc]b?(bc|d)*"),
    )
    for text in result.text:
        assert re.fullmatch("(a|c)[bc]b?(bc|d)*", text)
        assert text[2] == "b"


@pytest.mark.nightly
def test_several_spans_do_not_disturb_each_other(model):
    text = "{mask:3},{mask:3},{mask:3}"
    patterns = ["a+", "[01]{3}", "(xy)?z"]
    result = sedd.sample(
        model,
        jax.random.key(0),
        num=6,
        sampler="confidence",
        clamp=from_infill(BYTES, text),
        constraint=[[compiled(p) for p in patterns]] * 6,
        steps=2,
    )
    for text in result.text:
        assert re.fullmatch("a+,[01]{3},(xy)?z", text)


SCHEMAS = [
    {"type": "integer", "minimum": -20, "maximum": 300},
    {"enum": ["no", 1, None, True]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 3}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"type": "string", "format": "date"},
]


@pytest.mark.nightly
def test_json(model):
    automata = [
        compile_json_schema(schema, BYTES.token_bytes(), eos_id=BYTES.eos_id) for schema in SCHEMAS
    ]
    result = sedd.sample(
        model,
        jax.random.key(0),
        num=50,
        length=24,
        sampler="event_jump",
        steps=3,
        constraint=automata * 10,
    )
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for text, schema in zip(result.text, SCHEMAS * 10, strict=True):
        jsonschema.validate(json.loads(text), schema, format_checker=checker)


# ---------------------------------------------------------------- laws


def one_step(first, second, rule, count=1000):
    """How often each two-token string is drawn, and what a step that keeps slot 1 commits there.

    Tokens a, b, c, d with the given probabilities in two slots, under ab|cd.
    """
    vocabulary = [b"a", b"b", b"c", b"d"]
    automaton = compile_regex("ab|cd", vocabulary)
    spans = batch_spans([spans_of(sedd.constraints.clamp.free(2), automaton)] * count, rule)
    log_probs = jnp.log(jnp.asarray([first, second]) + 1e-30)

    def read(positions_BK):
        return log_probs[positions_BK]

    tokens = jax.jit(spans.propose, static_argnums=(3, 4))(
        oracle.keys(0, count),
        jnp.full((count, 2), 4, jnp.int32),
        jnp.broadcast_to(jnp.array([True, False]), (count, 2)),
        read,
        4,
    )
    return np.asarray(tokens)


@pytest.mark.nightly
def test_dingo_commits_to_the_wrong_branch_and_the_default_does_not():
    """The example of ab|cd: slot 2 hardly allows what its wildcard lets slot 1 take."""
    first, second = [0.6, 0, 0.4, 0], [0, 0.01, 0, 0.99]
    assert (one_step(first, second, "dingo")[:, 0] == 0).all()  # a
    assert (one_step(first, second, "most_likely")[:, 0] == 2).all()  # c
    drawn = one_step(first, second, "joint")
    law = np.array([0.6 * 0.01, 0.4 * 0.99])
    counts = np.bincount(drawn[:, 0] // 2, minlength=2)
    assert oracle.chi_square_p(counts, law / law.sum()) > 1e-4
    assert (drawn[:, 1] == drawn[:, 0] + 1).all()  # b after a, d after c


def test_one_call_draws_from_the_product_restricted_to_the_language(model):
    """All positions at once, by a real network, against the automaton's own partition function."""
    automaton = compiled("(ab|b)(a|ba)?")
    count = 1500
    result = sedd.sample(
        model,
        jax.random.key(5),
        num=count,
        length=4,
        sampler="event_jump",
        steps=1,
        constraint=automaton,
    )
    mask = np.full((1, 4), model.process.mask_id, np.int32)
    log_probs = np.asarray(model.log_conditional(jnp.asarray(mask)))[0]
    texts = ["ab", "b", "aba", "abba", "ba", "bba"]
    strings = [[*t.encode(), *[BYTES.eos_id] * (4 - len(t))] for t in texts]
    law = np.exp([log_probs[range(4), string].sum() for string in strings])
    counts = [result.text.count(text) for text in texts]
    assert sum(counts) == count
    assert oracle.chi_square_p(np.array(counts), law / law.sum()) > 1e-4


def test_a_request_does_not_depend_on_its_batch(model, automata):
    """Its regex alone, and beside others of other sizes."""
    keys = oracle.keys(3, 3)
    chosen = [automata[i] for i in (0, 11, 49)]
    options = {"sampler": "event_jump", "length": LENGTH, "steps": 4}
    together = sedd.sample(model, keys, constraint=chosen, **options)
    alone = sedd.sample(model, keys[1:2], constraint=chosen[1:2], **options)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])


def test_another_regex_of_the_size_compiles_nothing(model):
    from sedd.sampling.batch import run_sampler

    options = {"num": 2, "length": LENGTH, "sampler": "event_jump"}
    sedd.sample(model, jax.random.key(0), constraint=compiled("a*b"), **options)
    before = run_sampler._cache_size()
    sedd.sample(model, jax.random.key(0), constraint=compiled("(cd|e){1,5}"), **options)
    assert run_sampler._cache_size() == before


# ---------------------------------------------------------------- programs and memory


def test_no_array_of_the_program_has_all_rows_of_the_vocabulary(monkeypatch):
    """Of positions × vocabulary only a chunk exists, for every rule; the control has it all."""
    monkeypatch.setattr(spans_module, "CHUNK_BYTES", 2**18)
    tokens, length, width, batch = 2000, 64, 16, 2
    vocabulary = [b"%04d" % i for i in range(tokens)]
    automaton = compile_regex(r"(\d{4})+", vocabulary)
    row = spans_of(sedd.constraints.clamp.free(length), automaton)
    head = jnp.zeros((width, tokens))
    hidden = jnp.zeros((batch, length, width))

    def log_probs(hidden_BLD):
        return jax.nn.log_softmax(hidden_BLD @ head)

    def propose(rule, keys, x, hidden):
        def read(positions_BK):
            return log_probs(jnp.take_along_axis(hidden, positions_BK[..., None], 1))

        spans = batch_spans([row] * batch, rule)
        return spans.propose(keys, x, jnp.ones(x.shape, bool), read, tokens)

    def largest(function, *arguments):
        text = jax.jit(function).lower(*arguments).compile().as_text()
        shapes = re.findall(r"\b(?:f|s|u|bf|pred)\d*\[([\d,]+)\]", text)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    x = jnp.full((batch, length), tokens)
    for rule in ("joint", "most_likely"):
        found = largest(partial(propose, rule), oracle.keys(0, batch), x, hidden)
        assert found < batch * length * tokens / 2
    assert largest(log_probs, hidden) == batch * length * tokens


def test_what_is_read_in_chunks_is_what_is_read_at_once(monkeypatch):
    automaton = compile_regex(r"([ab]{2}c)*", [b"a", b"b", b"c"], eos_id=None)
    row = spans_of(sedd.constraints.clamp.free(9), automaton)
    spans = batch_spans([row] * 3, "joint")
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (3, 9, 3)))
    given = jnp.full((3, 9), 3).at[1, 4].set(1).at[2, :5].set(jnp.array([0, 1, 2, 1, 1]))

    def propose(chunk):
        monkeypatch.setattr(spans_module, "CHUNK_BYTES", chunk)
        rows_B1 = jnp.arange(3)[:, None]
        return jax.jit(
            lambda: spans.propose(
                oracle.keys(0, 3), given, given == 3, lambda p: log_probs[rows_B1, p], 3
            )
        )()

    whole, chunked = propose(2**20), propose(4 * 4 * 3 * 3 * 2)  # two positions at a time
    np.testing.assert_array_equal(whole, chunked)
    assert (whole[given != 3] == given[given != 3]).all()
    assert all(automaton.accepts(tokens) for tokens in whole.tolist())


def test_batches_of_a_file_share_a_shape():
    """Two batches with automata of other sizes, other numbers of spans and other lengths."""
    small, large = compiled("a*b"), compiled(r"([a-z]{1,9}|\d+\.\d{3}|[^a]{2}){1,6}")
    texts = ["{mask:3}", "{mask:30}", "{mask:9},{mask:8}"]
    rows = [
        spans_of(from_infill(BYTES, text), given)
        for text, given in zip(texts, [small, large, [small, None]], strict=True)
    ]
    rows.append(spans_of(from_infill(BYTES, texts[2]), [small, large]))
    shape = shape_of(rows[:2]).joined(shape_of(rows[2:]))
    assert shape == shape_of(rows)

    def program(batch, shape):
        spans = batch_spans(batch, "joint", shape)
        return jax.tree.structure(spans), [leaf.shape for leaf in jax.tree.leaves(spans)]

    assert program(rows[:2], shape) == program(rows[2:], shape)
    assert program(rows[:2], None) != program(rows[2:], None)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("{mask:3}{mask:4}", ["a+", "[01]{4}"]),
        ("x{mask}{mask:2}{mask}y", ["a", "bb", None]),
        ("{mask:2}{mask:3},{mask:2}", ["zz", None, "é"]),
    ],
)
def test_gaps_that_touch_have_a_constraint_each(text, patterns):
    clamp = from_infill(BYTES, text)
    given = [None if pattern is None else compiled(pattern) for pattern in patterns]
    found = {(span.start, span.length): span.automaton for span in spans_of(clamp, given)}
    wanted = zip(clamp.gaps, given, strict=True)
    assert found == {gap: automaton for gap, automaton in wanted if automaton is not None}


@pytest.mark.parametrize(
    ("text", "patterns", "message"),
    [
        ("{mask:2}", "abc", "'abc' needs at least 3 tokens, but has room for 2;"),
        ("{mask:2}z{mask:2}", "[ab]+", "token 122, 'z', that is given at position 2 contradicts"),
        ("ab{mask:2}z{mask:2}", "[ab]+", "token 122, 'z', that is given at position 4 contradicts"),
        ("{mask:2} {mask:2}", ["a"], r"1 constraints for 2 gaps \(positions 0 to 1, 3 to 4\)"),
        ("{mask:2}", ["a", "b"], "2 constraints for 1 gaps .*every {mask} is a gap"),
        ("{mask}{mask:2}", ["a"], r"1 constraints for 2 gaps \(positions 0 to 0, 1 to 2\)"),
        ("{mask:2}z{mask:2}", "[ab]+", "one constraint for 2 gaps must match the whole stretch"),
    ],
)
def test_what_cannot_be_is_named(model, text, patterns, message):
    one = isinstance(patterns, str)
    constraint = compiled(patterns) if one else [[compiled(p) for p in patterns]]
    with pytest.raises(UserError, match=message):
        sedd.sample(
            model,
            jax.random.key(0),
            sampler="event_jump",
            clamp=from_infill(BYTES, text),
            constraint=constraint,
        )


def test_everything_given_leaves_nothing_to_constrain(model):
    with pytest.raises(UserError, match="a constraint needs a gap"):
        sedd.sample(
            model,
            jax.random.key(0),
            clamp=from_prompt(BYTES, 2, prompt="ab"),
            constraint=compiled("ab"),
        )


def test_not_on_a_uniform_process(models):
    with pytest.raises(UserError, match="constraints act on the conditional of clean tokens"):
        sedd.sample(models["uniform"], jax.random.key(0), constraint=compiled("a*"))


@pytest.mark.parametrize("name", ["ordered", nightly("confidence"), nightly("tweedie")])
def test_nan_is_an_error_and_never_a_string(model, name):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, model.denoiser.params)
    broken = dataclasses.replace(model, denoiser=dataclasses.replace(model.denoiser, params=broken))
    message = "sequence 0, position 0, state 0 of '.*': the probabilities are nan"
    with pytest.raises(UserError, match=message):
        sedd.sample(broken, jax.random.key(0), sampler=name, constraint=compiled("[ab]{12}"))
