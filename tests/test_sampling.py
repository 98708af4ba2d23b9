"""``sedd.sample``: what is compiled, which options go where, what is refused, what comes back."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false, reportOptionalSubscript=false

import gc
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiers import daily, nightly

import sedd
from sedd.arrays import bucket
from sedd.configuration.build import build_sampler
from sedd.configuration.components import makers
from sedd.constraints.clamp import Clamp, free, from_infill, from_prompt
from sedd.data.tokenizers import Bytes
from sedd.errors import FieldError, UserError
from sedd.samplers.best_of_n import BestOfN
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.verifier import _VERIFIERS, text_verifier
from sedd.sampling.batch import run_sampler

KEY = jax.random.key(0)
FIVE_STEPS = sedd.samplers.options("event_jump", steps=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By kind: "radd", and "sedd" and "uniform", which depend on the time."""
    return {
        kind: sedd.load(tiny_run.make_run(tmp_path_factory.mktemp(kind), tiny_run.config(kind)))
        for kind in ("radd", "sedd", "uniform")
    }


@pytest.fixture(scope="module")
def model(models):
    return models["radd"]


def vowels(texts):
    """A verifier."""
    return [float(sum(character in "aeiou" for character in text)) for text in texts]


# ---------------------------------------------------------------- texts and keys


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Compiled constraints are kept there, not in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEDD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_texts_are_one_for_all_or_one_each(model):
    options = {"sampler": "ordered", "steps": 2, "length": 9}
    one: Any = sedd.sample(model, 0, num=3, prompt="the ", suffix="s", **options)
    assert all(text.startswith("the ") and text.endswith("s") for text in one.text)
    clamp = from_prompt(model.tokenizer, 9, prompt="the ", suffix="s")
    same = sedd.sample(model, KEY, num=3, clamp=clamp, sampler="ordered", steps=2)
    np.testing.assert_array_equal(one.tokens, same.tokens)
    each: Any = sedd.sample(model, 0, prompt=["a", "b", "cat"], **options)
    assert [text[:1] for text in each.text] == ["a", "b", "c"]
    gaps: Any = sedd.sample(
        model, 0, infill=["a{mask:2}b", "c{mask:4}"], sampler="ordered", steps=2
    )
    assert (gaps.text[0][0], gaps.text[0][3], gaps.text[1][0]) == ("a", "b", "c")


@pytest.mark.nightly
def test_constraints_are_one_for_all_or_one_each(model):
    options = {"sampler": "ordered", "steps": 2, "length": 6}
    one: Any = sedd.sample(model, 0, num=2, regex="(cat|dog)s", **options)
    assert {text.rstrip("s") for text in one.text} <= {"cat", "dog"}
    each: Any = sedd.sample(model, 0, regex=["[ab]+", None], prompt=["a", "b"], **options)
    assert set(each.text[0]) <= {"a", "b"}
    gaps = ["x{mask:2}y{mask:1}", "x{mask:2}y{mask:1}"]
    result: Any = sedd.sample(
        model, 0, infill=gaps, regex=[["ab", None], "c{2}yd"], sampler="ordered", steps=2
    )
    assert result.text[0].startswith("xaby")
    assert result.text[1] == "xccyd"


@pytest.mark.parametrize(
    ("schema", "around"),
    [
        ({"anyOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#"}}]}, "[{}]"),
        ({"anyOf": [{"const": 1}, {"additionalProperties": {"$ref": "#"}}]}, '{{"a": {}}}'),
        ({}, "[{}]"),
    ],
)
def test_the_depth_of_a_schema_is_one_for_all_or_one_each(model, monkeypatch, schema, around):
    """A value nested as deep as asked for matches, and one level more does not."""
    monkeypatch.setattr("sedd.sampling.whole.draw", lambda *given, **_: given[4])  # the spans alone
    bytewise = replace(model, tokenizer=Bytes())

    def spans(**given) -> Any:
        return sedd.sample(bytewise, 0, length=40, **given)

    texts = ["1"]
    for _ in range(4):
        texts.append(around.format(texts[-1]))
    depths = (0, 1, None, 3)
    each = spans(json_schema=[schema] * 4, json_schema_depth=list(depths))
    each += [spans(json_schema=schema, json_schema_depth=depth)[0] for depth in depths]
    for (span,), depth in zip(each, (0, 1, 2, 3) * 2, strict=True):
        assert span.automaton.accepts(texts[depth].encode())
        assert not span.automaton.accepts(texts[depth + 1].encode())
    (free_text, (span,)) = spans(json_schema=[None, schema], json_schema_depth=1)
    assert free_text == []
    assert span.automaton.accepts(texts[1].encode())


def test_keys_of_every_kind(model):
    options = {"sampler": "ordered", "steps": 2, "num": 2}
    tokens = sedd.sample(model, jax.random.key(3), **options).tokens
    every: list[Any] = [3, np.int64(3), jax.random.PRNGKey(3), np.array([0, 3], np.uint32)]
    for key in every:
        np.testing.assert_array_equal(sedd.sample(model, key, **options).tokens, tokens)
    own = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(2))
    for keys in (own, jax.random.key_data(own)):
        got = sedd.sample(model, keys, sampler="ordered", steps=2)
        np.testing.assert_array_equal(got.tokens, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": -1}, "num must be at least 1, got -1"),
        ({"prompt": []}, "prompt must be at least 1, got 0"),
        ({"num": 2, "prompt": ["a"] * 3}, "the numbers of sequences differ: 3 of prompt, 2 of num"),
        ({"prompt": ["a", "b"], "regex": ["a"]}, "sequences differ: 2 of prompt, 1 of regex"),
        ({"num": 2.5}, "num must be a whole number, got 2.5"),
        ({"num": True}, "num must be a whole number, got True"),
        ({"length": 2.5}, "length must be a whole number, got 2.5"),
        ({"prompt": 3}, "prompt must be a string, got 3"),
        ({"suffix": b"a"}, "suffix must be a string, got \"b'a'\""),
        ({"infill": ["a{mask}", 3]}, "infill must be a string, got 3"),
        ({"regex": b"a"}, "regex must be a string, or a list"),
        ({"json_schema": "{}"}, "json_schema must be an object, or a list"),
        ({"json_schema": {}, "json_schema_depth": "3"}, "json_schema_depth must be a whole number"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": [0.5, "all"]}, "top_p must be a number, got"),
        ({"rule": "dingoo"}, "rule must be one of joint, most_likely, dingo, got 'dingoo'"),
        ({"sampler": 3}, "sampler must be a name, options or a sampler, got 3"),
        ({"key": None}, "key must be an integer below .* or keys of jax.random, got None"),
        ({"key": "a"}, "key must be an integer below .* got 'a'"),
        ({"key": 2**70}, "key must be an integer below .* got 1180591620717411303424"),
        ({"key": 1.5}, "key must be an integer or keys of jax.random, got float32"),
        ({"prompt": "a" * 13}, r"prompt \(13 tokens\) do not fit into the length of 12"),
        ({"prompt": "a", "clamp": free(3)}, "prompt does not go with clamp"),
        ({"length": 3, "clamp": free(3)}, "length does not go with clamp"),
        ({"prompt": "A"}, "prompt: character 'A'"),
        ({"regex": "a(b"}, "^regex, position 1"),
        ({"regex": "a{13}"}, "^regex: 'a.13.' needs at least 13 tokens, but has room for 12"),
        ({"json_schema": {}, "json_schema_depth": 65}, "^json_schema_depth must be in 0..64, got"),
        ({"json_schema_depth": 1}, "^json_schema_depth is 1, but there is no json_schema"),
        ({"regex": "a", "json_schema_depth": 0}, "^json_schema_depth is 0, but there is no json_"),
        (
            {"json_schema": [{}, {}], "json_schema_depth": [1]},
            "sequences differ: 2 of json_schema, 1 of json_schema_depth",
        ),
        ({"clamp": Clamp(tokens_L=np.array([40, 1]), fixed_L=np.array([True, False]))}, "id 40: "),
        ({"clamp": Clamp(tokens_L=np.array([1, -2]), fixed_L=np.array([False, True]))}, "id -2: "),
    ],
)
def test_texts_and_keys_that_do_not_fit(model, options, message):
    with pytest.raises(UserError, match=message):
        sedd.sample(model, **{"key": 0, **options})


@pytest.mark.parametrize("bad", [-1, 34, 2**31 - 1])
def test_ids_out_of_range_are_named(model, bad):
    x_BL = np.array([[1, 2, bad]])
    for function in (model.log_conditional, lambda x: model.log_score(x, [0.5])):
        with pytest.raises(UserError, match=f"token id {bad}: the ids of this model are 0 to 33"):
            function(x_BL)
    assert np.isfinite(model.log_conditional(np.array([[1, 2, model.process.mask_id]]))).all()


def test_a_model_is_shown_in_a_few_lines(model):
    assert len(repr(model).splitlines()) == 2
    assert "4,322 parameters, length 12, tokenizer characters" in repr(model)


# ---------------------------------------------------------------- buckets


def test_buckets():
    sizes = np.array([bucket(n) for n in range(1, 5000)])
    n = np.arange(1, 5000)
    assert (np.diff(sizes) >= 0).all()
    assert (sizes >= n).all()
    assert (sizes <= 1.25 * n).all()
    assert [bucket(int(size)) for size in sizes] == sizes.tolist()
    assert all(bucket(2**k) == 2**k for k in range(13))
    assert len(np.unique(sizes[512:1024])) == 4  # an octave


def programs() -> int:
    """How many programs have been compiled."""
    jitted: Any = run_sampler
    return jitted._cache_size()


def compiled(model, texts, length, seed, **options):
    """How many programs a call adds."""
    before = programs()
    clamps = [from_infill(model.tokenizer, text, length) for text in texts]
    result = sedd.sample(model, jax.random.key(seed), num=len(texts), clamp=clamps, **options)
    assert result.tokens.shape == (len(texts), length)
    return programs() - before


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "event_jump", "steps": 5},
        nightly({"sampler": "confidence"}),
        nightly({"sampler": "speculative", "lookahead": 3}),
        nightly({"sampler": "best_of_n", "n": 2, "verifier": vowels, "inner": FIVE_STEPS}),
    ],
)
def test_requests_of_one_bucket_share_a_program(model, options):
    """Whatever their prompts, lengths, seeds and number."""
    assert compiled(model, ["ab{mask:3}"] * 9, 17, 0, **options) == 1
    assert compiled(model, ["{mask:1}"] * 10, 18, 1, **options) == 0
    assert compiled(model, ["a", "{mask:3}bc", "the cat", *[""] * 6], 19, 2, **options) == 0


def test_other_buckets_and_none(model):
    """The control, and the whole length of a bucket: without padding there is nothing to hide."""
    options = {"sampler": "event_jump", "steps": 5}
    compiled(model, ["{mask:2}"] * 9, 19, 0, **options)
    assert compiled(model, ["{mask:2}"] * 9, 20, 0, **options) == 1
    assert compiled(model, ["b{mask:2}"] * 10, 20, 1, **options) == 0
    assert compiled(model, ["{mask:1}"] * 9, 21, 0, **options) == 1


SETTINGS = {  # of 16 requests; None and 1.0 are off
    "temperature": [0.0, 1.0, 0.7, 1.3] * 4,
    "top_p": [None, 0.9, 1.0, 0.3, 0.6, None, 0.95, 0.5] * 2,
    "top_k": [*[None] * 8, 3, 1, 99, None, 5, 8, 2, 20],
}


@pytest.mark.parametrize(
    "options",
    [{"sampler": "event_jump"}, nightly({"sampler": "best_of_n", "n": 2, "verifier": vowels})],
)
def test_requests_of_sixteen_settings_share_a_program(model, options):
    """And each is drawn bit for bit as by itself; one that changes nothing as without settings."""
    keys_B = jax.random.split(KEY, 16)
    before = programs()
    together = sedd.sample(model, keys_B, **options, **SETTINGS)
    sedd.sample(model, keys_B, **options, temperature=0.5)
    sedd.sample(model, keys_B, **options, top_p=0.5, top_k=4)
    assert programs() == before + 1
    for i in range(16):
        own = {name: values[i : i + 1] for name, values in SETTINGS.items()}
        alone = sedd.sample(model, keys_B[i : i + 1], **options, **own)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
    assert programs() == before + 2  # one sequence is another size of batch
    plain = sedd.sample(model, keys_B, **options)
    same_B = (plain.tokens == together.tokens).all(1)
    changes_nothing_B = [i == 5 for i in range(16)]  # temperature 1, and neither top-p nor top-k
    assert same_B[changes_nothing_B].all()
    assert not same_B[:4].any()  # the control


@pytest.mark.nightly
def test_guidance_is_that_of_each_request(model):
    """A weight of 0 beside others: as without, and one call for one."""
    clamp = from_infill(model.tokenizer, "ab{mask:6}", 8)
    keys_B = jax.random.split(KEY, 3)
    options = {"sampler": "ordered", "clamp": clamp}
    together = sedd.sample(model, keys_B, guidance=[0.0, 2.0, 5.0], **options)
    assert together.calls.tolist() == [6, 12, 12]
    for i, weight in enumerate([0.0, 2.0, 5.0]):
        alone = sedd.sample(model, keys_B[i : i + 1], guidance=weight, **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])


@pytest.mark.parametrize("options", [{"temperature": [1.0]}, {"top_k": [3, 3]}, {"top_p": []}])
def test_numbers_are_one_or_one_each(model, options):
    with pytest.raises(UserError, match="must be a number or 3 numbers, got"):
        sedd.sample(model, KEY, num=3, **options)


# ---------------------------------------------------------------- options


def test_options_go_to_the_sampler_that_has_them(model):
    """Those of the inner sampler are nested in it, at any depth."""
    search = {"sampler": "best_of_n", "verifier": vowels, "n": 2}
    inner = sedd.samplers.options("ordered", steps=3)
    flat = sedd.sample(model, KEY, num=2, inner=inner, **search)
    inner = Ordered(schedule=model.schedule, steps=3)
    given = sedd.sample(model, KEY, num=2, inner=inner, **search)
    assert flat.calls.tolist() == [6, 6]
    np.testing.assert_array_equal(flat.tokens, given.tokens)
    np.testing.assert_array_equal(flat.score, vowels(flat.text))
    blocks = sedd.samplers.options("semi_autoregressive", inner=inner, block=4)
    nested = sedd.samplers.options("best_of_n", inner=blocks, n=3)
    result = sedd.sample(model, KEY, num=2, sampler=nested, verifier=vowels)
    assert result.calls.tolist() == [27, 27]  # 3 draws of 3 blocks in 3 calls


@pytest.mark.parametrize(
    ("inner", "field", "message"),
    [
        (("ordered", {"steps": 0}), "inner.steps", "samplers 'ordered': inner.steps must be at le"),
        (("entropy_bounded", {"gamma": -1.0}), "inner.gamma", "inner.gamma must be finite"),
        (
            ("semi_autoregressive", {"inner": sedd.samplers.options("remdm", eta=2.0)}),
            "inner.inner.eta",
            "inner.inner.eta must be in",
        ),
    ],
)
def test_an_error_names_the_nested_field(model, inner, field, message):
    name, values = inner
    with pytest.raises(FieldError, match=message) as caught:
        sedd.sample(
            *(model, KEY),
            sampler="best_of_n",
            verifier=vowels,
            inner=sedd.samplers.options(name, **values),
        )
    assert caught.value.field == field


def test_a_sampler_by_name_is_the_one_that_is_built(model):
    """Reshaping is not among its options; one key stands for one a sequence."""
    keys_B = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(2))
    reshaped = {"temperature": 0.5, "top_k": 5, "top_p": 0.9}
    by_name = sedd.sample(model, KEY, num=2, sampler="event_jump", steps=4, **reshaped)
    built = EventJump(schedule=model.schedule, steps=4)
    other = sedd.sample(model, keys_B, sampler=built, **reshaped)
    np.testing.assert_array_equal(by_name.tokens, other.tokens)
    other = sedd.sample(model, keys_B[::-1], sampler=built, **reshaped)
    np.testing.assert_array_equal(by_name.tokens[::-1], other.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "tweedy"}, "samplers has no 'tweedy'; did you mean 'tweedie'"),
        ({"sampler": "tweedie", "stesp": 4}, "no field 'stesp'; did you mean 'steps'"),
        ({"sampler": "first_hitting"}, "samplers has no 'first_hitting'"),
        ({"sampler": "event_jump", "steps": 0}, "steps must be at least 1, got 0"),
        ({"sampler": "ordered", "order": "up"}, "order must be .*got 'up'"),
        ({"sampler": "best_of_n"}, "'best_of_n' needs a verifier"),
        ({"sampler": "particle"}, "'particle' needs a verifier"),
        ({"sampler": "event_jump", "verifier": vowels}, "'event_jump' takes no verifier"),
        ({"sampler": "event_jump", "inner": "tweedie"}, "'event_jump' takes no inner"),
        ({"sampler": "best_of_n", "verifier": vowels, "n": 0}, "n must be at least 1, got 0"),
        ({"sampler": "best_of_n", "verifier": vowels, "inner": "eulr"}, "did you mean 'euler'"),
        ({"sampler": "best_of_n", "verifier": vowels, "size": 4}, "no field 'size'"),
        ({"temperature": -1.0}, "temperature .*got -1.0"),
        ({"top_p": 1.5}, "top_p .*got 1.5"),
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"length": 0}, "length must be in 1.."),
    ],
)
def test_bad_options_are_named(model, options, message):
    with pytest.raises(UserError, match=message):
        sedd.sample(model, KEY, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4}, "options are fixed: steps"),
        ({"inner": "tweedie"}, "options are fixed: inner"),
        ({"verifier": vowels}, "options are fixed: verifier"),
    ],
)
def test_a_built_sampler_takes_no_options(model, options, message):
    sampler = EventJump(schedule=model.schedule)
    with pytest.raises(UserError, match=message):
        sedd.sample(model, KEY, sampler=sampler, **options)
    with pytest.raises(UserError, match="'semi_autoregressive' has no field 'steps'"):
        sedd.sample(model, KEY, sampler="semi_autoregressive", inner=sampler, steps=4)


def test_clamps_that_do_not_fit_are_refused(model):
    clamp = from_prompt(model.tokenizer, 8, prompt="ab")
    with pytest.raises(UserError, match="2 of clamp, 3 of num"):
        sedd.sample(model, KEY, num=3, clamp=[clamp, clamp])
    with pytest.raises(UserError, match="length does not go with clamp"):
        sedd.sample(model, KEY, clamp=clamp, length=8)


@pytest.mark.parametrize(
    "name",
    ["event_jump", "ordered", "confidence", "entropy_bounded", "token_confidence", "speculative"],
)
def test_a_sampler_says_which_model_it_needs(models, name):
    for kind, need in (("sedd", "time-independent"), ("uniform", "absorbing")):
        with pytest.raises(UserError, match=f"{name}.* needs a .*{need}"):
            sedd.sample(models[kind], KEY, sampler=name)
        with pytest.raises(UserError, match=f"{name}.* needs a .*{need}"):
            sedd.sample(models[kind], KEY, sampler="best_of_n", inner=name, verifier=vowels)


def test_or_which_process(models):
    for name, inner in (("remdm", None), ("semi_autoregressive", "tweedie")):
        with pytest.raises(UserError, match=f"{name}.* needs a model of the absorbing process"):
            sedd.sample(models["uniform"], KEY, sampler=name, inner=inner)
    result = sedd.sample(models["sedd"], KEY, sampler="remdm", steps=3)
    assert (result.tokens < tiny_run.TOKENIZER.num_tokens).all()


# ---------------------------------------------------------------- verifiers


class Moody:
    """A verifier that fails in one of several ways until its mood is better."""

    __name__ = "moody"
    mood: str

    def __call__(self, texts):
        if self.mood == "raises":
            raise RuntimeError("out of patience")
        last = {"nan": float("nan"), "infinite": float("inf")}.get(self.mood, 0.0)
        scores = [*vowels(texts)[:-1], last]
        return {"good": vowels(texts), "scalar": 1.0, "longer": [*scores, 0.0]}.get(
            self.mood, scores
        )


FAILURES = {
    "raises": "verifier moody raised RuntimeError: out of patience",
    "nan": "verifier moody: a score must be finite, got nan for '",
    "infinite": "verifier moody: a score must be finite, got inf for '",
    "scalar": r"verifier moody must return one score a text, .* shape \(\)",
    "longer": r"verifier moody must return one score a text, .* shape \(\d+,\)",
}


@pytest.mark.parametrize("sampler", ["best_of_n", nightly("particle")])
def test_a_failing_verifier_is_named_and_may_recover(model, sampler):
    verifier = Moody()
    own: dict[str, Any]
    own = {"n": 2} if sampler == "best_of_n" else {"particles": 2, "resample_every": 2}
    own["inner"] = sedd.samplers.options("event_jump", steps=4)
    for mood, message in FAILURES.items():
        verifier.mood = mood
        with pytest.raises(UserError, match=message):
            sedd.sample(model, KEY, num=2, sampler=sampler, verifier=verifier, **own)
        verifier.mood = "good"
        result = sedd.sample(model, KEY, num=2, sampler=sampler, verifier=verifier, **own)
        np.testing.assert_array_equal(result.score, vowels(result.text))


def test_verifiers_live_as_long_as_they_are_used(model):
    held = text_verifier(vowels, model.tokenizer)
    assert text_verifier(vowels, model.tokenizer) is held
    before = len(_VERIFIERS)
    for _ in range(5):
        text_verifier(lambda texts: [0.0] * len(texts), model.tokenizer)
    gc.collect()
    assert len(_VERIFIERS) == before


NAN_OPTIONS = {
    "euler": {"steps": 3},
    "tweedie": {"steps": 3},
    "event_jump": {},
    "ordered": {},
    "confidence": {"by": "entropy"},
    "entropy_bounded": {"gamma": 0.1},
    "token_confidence": {"steps": 3},
    "planned": {"calls": 3},
    "remdm": {"steps": 3},
    "semi_autoregressive": {"inner": "confidence", "block": 4},
    "best_of_n": {"inner": "event_jump", "verifier": vowels, "n": 2},
    "particle": {"inner": "event_jump", "verifier": vowels, "particles": 2},
    "search_paths": {"inner": "event_jump", "verifier": vowels, "branches": 2},
    "speculative": {"lookahead": 2},
    "zero_order": {"inner": "event_jump", "verifier": vowels, "neighbours": 2, "rounds": 2},
}


@pytest.mark.parametrize(
    "name",
    daily(
        sorted(set(makers("samplers")) - {"self_correct"}),  # which needs another model
        ["event_jump"],
    ),
)
def test_nan_ends_as_an_error_that_says_where(model, name):
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, model.denoiser.params)
    broken = replace(model, denoiser=replace(model.denoiser, params=params))
    clamp = from_infill(model.tokenizer, "ab{mask:3}", 5)
    where = "4" if name == "search_paths" else "2"  # which begins with a part of the positions
    nan = "the probabilities are nan: check the parameters of the model"
    message = f"sequence 0, position {where}: {nan}"
    options = {**NAN_OPTIONS[name], **profile_if_planned(name, broken, 5)}
    with pytest.raises(UserError, match=message):
        sedd.sample(broken, KEY, num=2, clamp=clamp, sampler=name, **options)


def profile_if_planned(name, model, length):
    return {"profile": tiny_run.profile_of(model, length)} if name == "planned" else {}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["confidence", "entropy_bounded", "token_confidence"])
def test_a_processor_that_gives_nan_at_times_is_found(model, name):
    """Where some scores are nan the others come first, and the run still ends."""

    def broken(log_probs, x_BL, positions_BK):
        return jnp.where((positions_BK == 3)[..., None], jnp.nan, log_probs)

    with pytest.raises(UserError, match=r"sequence 0, position 3: .*logit processor"):
        sedd.sample(model, KEY, length=6, sampler=name, logit_processor=broken)


@pytest.mark.parametrize(
    "options", [nightly({"temperature": 0.0}), nightly({"top_k": 2}), {"top_p": 0.5}], ids=str
)
def test_nan_stays_nan_whatever_the_shape(model, options):
    broken: dict[str, Any] = {
        "logit_processor": lambda log_probs, x_BL, positions_BK: log_probs * jnp.nan
    }
    with pytest.raises(UserError, match="are nan"):
        sedd.sample(model, KEY, length=4, sampler="ordered", **options, **broken)


@pytest.mark.parametrize("name", [nightly("euler"), "tweedie"])
def test_nan_on_the_uniform_process(models, name):
    model = models["uniform"]
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, model.denoiser.params)
    broken = replace(model, denoiser=replace(model.denoiser, params=params))
    with pytest.raises(UserError, match=r"sequence 0, position 0: .* are nan"):
        sedd.sample(broken, KEY, length=5, sampler=name, steps=2)


@pytest.mark.nightly
def test_guidance_counts_for_those_that_were_given_something(model):
    clamps = [from_infill(model.tokenizer, text, 5) for text in ("{mask:5}", "ab{mask:3}")]
    options = {"sampler": "ordered", "guidance": 1.0}
    keys = jax.random.split(KEY, 2)
    both = sedd.sample(model, keys, clamp=clamps, **options)
    alone = [sedd.sample(model, keys[i : i + 1], clamp=clamps[i], **options) for i in range(2)]
    assert both.calls.tolist() == [5, 6] == [int(one.calls[0]) for one in alone]
    for i in range(2):
        np.testing.assert_array_equal(both.tokens[i], alone[i].tokens[0])


def test_a_search_wraps_no_other_search(model):
    verifier = text_verifier(vowels, model.tokenizer)
    inner = build_sampler("best_of_n", model.schedule, n=2, verifier=verifier)
    with pytest.raises(UserError, match="inner must not be a search"):
        sedd.sample(model, KEY, sampler="best_of_n", verifier=vowels, inner=inner)


# ---------------------------------------------------------------- what comes back

FRAMES = {  # of the trace of twelve positions, of which seven are free
    "euler": ({"steps": 5}, 7),
    "tweedie": ({"steps": 5}, 7),
    "event_jump": ({}, 8),
    "ordered": ({}, 8),
    "confidence": ({"steps": 4}, 5),
    "entropy_bounded": ({"gamma": 0.0}, 8),
    "token_confidence": ({"steps": 3}, 4),
    "planned": ({"calls": 4}, 5),
    "remdm": ({"steps": 5, "eta": 0.5}, None),  # as many as its draws need
    "semi_autoregressive": (
        {"block": 3, "inner": sedd.samplers.options("ordered", steps=2)},
        6,
    ),
    "best_of_n": (
        {"n": 2, "verifier": vowels, "inner": sedd.samplers.options("tweedie", steps=5)},
        7,
    ),
    "speculative": ({"lookahead": 2, "draft": "batch"}, 5),  # two positions a round
    "particle": ({"particles": 2, "verifier": vowels, "resample_every": 2, "tilt": 3.0}, 8),
    "search_paths": ({"paths": 1, "branches": 2, "verifier": vowels}, None),
    "zero_order": (
        {"rounds": 2, "verifier": vowels, "inner": sedd.samplers.options("tweedie", steps=5)},
        7,
    ),
}
TIMED = ("euler", "tweedie", "best_of_n", "zero_order")
SEARCHES = ("best_of_n", "particle", "search_paths", "zero_order")


@pytest.mark.parametrize("name", daily(FRAMES, ["tweedie", "particle"]))
def test_the_trace_of_every_sampler(model, name):
    """From masks to the result, what is given standing still, no mask left at the end."""
    options, frames = FRAMES[name]
    options = {**options, **profile_if_planned(name, model, 12)}
    clamps = [
        from_infill(model.tokenizer, "ab{mask:4}cde{mask:3}"),
        from_prompt(model.tokenizer, 12 if name == "planned" else 5, prompt="ab"),
    ]
    result: Any = sedd.sample(model, KEY, num=2, clamp=clamps, sampler=name, trace=True, **options)
    mask_id = model.process.mask_id
    assert result.trace.shape[1:] == (2, 12)
    if name != "search_paths":  # in which branches wait for each other
        assert len(result.trace) == (frames or result.calls.max() + 1)
    np.testing.assert_array_equal(result.trace[-1], result.tokens)
    for row, clamp in enumerate(clamps):
        own_TL = result.trace[:, row, : clamp.length]
        assert (own_TL[:, clamp.fixed_L] == clamp.tokens_L[clamp.fixed_L]).all()
        assert (own_TL[0, ~clamp.fixed_L] == mask_id).all()
        assert (own_TL[-1] != mask_id).all()
        assert result.text[row] == model.tokenizer.decode(own_TL[-1])
        if name not in ("remdm", "search_paths"):
            shown = own_TL != mask_id
            assert (shown[1:] | ~shown[:-1]).all()  # what is revealed stays
    assert (result.times is not None) == (name in TIMED)
    if result.times is not None:
        assert result.times.shape == (frames,)
        assert (np.diff(result.times) < 0).all()
        assert (result.times[0], result.times[-1]) == (1.0, 0.0)
    assert (result.score is not None) == (name in SEARCHES)
    assert (result.verifier_calls is not None) == (name in SEARCHES)
    assert (result.log_partition is not None) == (name == "particle")
    assert (result.log_prob is not None) == (name == "speculative")


def test_a_result_is_without_padding(model):
    result: Any = sedd.sample(model, KEY, num=9, length=11, sampler="event_jump", steps=4)
    assert result.tokens.shape == (9, 11)
    assert result.calls.shape == (9,)
    assert len(result.text) == 9
    assert result.trace is None
    assert result.times is None


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["event_jump", "tweedie", "confidence"])
def test_what_is_given_whole_takes_no_call(model, name):
    clamps = [from_prompt(model.tokenizer, n, prompt="abcdefghijkl"[:n]) for n in (12, 5)]
    options, _ = FRAMES[name]
    result: Any = sedd.sample(model, KEY, num=2, clamp=clamps, sampler=name, trace=True, **options)
    assert result.calls.tolist() == [0, 0]
    assert result.trace.shape == (1, 2, 12)
    assert result.text == ["abcdefghijkl", "abcde"]


@pytest.mark.nightly
def test_the_best_is_the_best_of_the_same_draws(model):
    """By hand from the inner sampler's own draws, keys as the search derives them."""
    sampler = BestOfN(
        schedule=model.schedule, inner=EventJump(schedule=model.schedule), verifier=_ids, n=4
    )
    best = sedd.sample(model, KEY, num=2, sampler=sampler)
    keys_Bn = jax.vmap(
        lambda b: jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, b), i))(
            jnp.arange(4)
        )
    )(jnp.arange(2))
    drawn = sedd.sample(model, keys_Bn.ravel(), sampler=sampler.inner)
    score_Bn = _ids(drawn.tokens, None).reshape(2, 4)
    np.testing.assert_array_equal(best.score, score_Bn.max(1))
    np.testing.assert_array_equal(
        best.tokens, drawn.tokens.reshape(2, 4, -1)[np.arange(2), score_Bn.argmax(1)]
    )
    np.testing.assert_array_equal(best.calls, drawn.calls.reshape(2, 4).sum(1))


def _ids(tokens_RL, real_RL):
    return np.asarray(tokens_RL).sum(1).astype(np.float32)
