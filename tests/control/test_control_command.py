"""``sample.py --features`` and ``sedd.control.sample`` on a tiny run: what is drawn and said."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiers import nightly
from tiny_run import call

import sedd
from sedd.errors import UserError
from sedd.evaluation.ordered import nats_over_orders

LENGTH = 12
CODE = '''
def early(texts):
    """Whether the first letter is in the first half of the alphabet."""
    return [text[:1] < "n" for text in texts]

def vowels(texts):
    return [sum(c in "aeiou" for c in text) / len(text) if text else 0 for text in texts]

def length(texts):
    return [len(text) for text in texts]

def never(texts):
    return [0] * len(texts)

def failing(texts):
    raise KeyError("no such word")

def infinite(texts):
    return [float("inf")] * len(texts)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    top = tmp_path_factory.mktemp("control")
    tiny_run.make_run(top / "run", tiny_run.config("radd", length=LENGTH))
    (top / "f.py").write_text(CODE)
    return top


@pytest.fixture(scope="module")
def model(place):
    return sedd.load(place / "run")


@pytest.fixture(autouse=True)
def _one_model(model, monkeypatch):
    """Loaded once: another one would compile another program."""
    monkeypatch.setattr(sedd, "load", lambda path, **options: model)


def draw(place, flags, *more, code=0):
    flags = flags.format(f=place / "f.py").split()
    result = call("sample", "--checkpoint", place / "run", "--batch-size", 64, *flags, *more)
    assert result.code == code, result.err
    return result


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


EARLY = "--features {f}:early,{f}:vowels --moments .8,.2 --pool 256"


@pytest.mark.parametrize("method", ["reject", "qrs", "resample", nightly("particle --particles 4")])
def test_texts_reach_their_moments(place, tmp_path, method):
    """Of 40 texts each mean is within 5 standard errors; the model's own is further away."""
    out = tmp_path / "out.jsonl"
    result = draw(place, f"{EARLY} --method {method} --num 40 --output {out}")
    found = lines(out)
    assert [line["id"] for line in found] == list(range(40))
    for line in found:
        assert line["features"]["early"] == float(line["text"][:1] < "n")
    assert (
        abs(np.mean([line["features"]["early"] for line in found]) - 0.8) < 5 * (0.16 / 40) ** 0.5
    )
    for word in ("wanted", "weight λ", "log Z", "KL to the model", "effective texts of 256"):
        assert word in result.out
    assert ("acceptance" in result.out) == (method in ("reject", "qrs"))
    assert ("log β" in result.out) == (method == "qrs")
    seeds = [line["seed"] for line in found]
    assert min(seeds) >= 256  # the first pool is for the weights alone
    assert (len(set(seeds)) < 40) == (method == "resample")
    assert ("note: resample repeats texts: " in result.err) == (method == "resample")
    assert ("note: particle is approximate" in result.err) == method.startswith("particle")


def test_a_text_is_that_of_its_seed(place, tmp_path):
    """A proposal is an ordinary draw, accepted or not whatever else is asked for."""
    one, other, again = (tmp_path / f"{name}.jsonl" for name in ("one", "other", "again"))
    draw(place, f"{EARLY} --num 5 --output {one}")
    draw(place, f"{EARLY} --num 64 --output {other}")
    assert lines(one) == lines(other)[:5]
    draw(place, f"--seed {lines(one)[3]['seed']} --num 64 --output {again}")
    assert lines(again)[0]["tokens"] == lines(one)[3]["tokens"]


@pytest.fixture(scope="module")
def proposer(tmp_path_factory, place):
    """A model with other weights, and the law of the first as the one that is controlled."""
    top = tmp_path_factory.mktemp("proposer")
    tiny_run.make_run(top / "run", tiny_run.config("radd", length=LENGTH), seed=5)
    return top / "run"


@pytest.mark.nightly
def test_another_model_proposes(place, model, proposer, tmp_path, monkeypatch):
    """The weights are a(x)·exp(λ·φ(x)) / (q(x)·Z), with likelihoods of the order of the sampler."""
    monkeypatch.undo()
    proposing = sedd.load(proposer)
    out = tmp_path / "out.jsonl"
    flags = f"{EARLY} --method weigh --base {place / 'run'} --sampler ordered --output {out}"
    flags = flags.format(f=place / "f.py").split()
    result = call("sample", "--checkpoint", proposer, "--batch-size", 64, *flags)
    assert result.code == 0, result.err
    assert "KL to the proposals" in result.out
    found = lines(out)
    assert len(found) == 256
    tokens = jnp.asarray([line["tokens"] for line in found[:16]])
    keys_B, scored = jax.random.split(jax.random.key(0), 16), jnp.ones(tokens.shape, bool)
    nats = [
        nats_over_orders(each.denoiser, keys_B, tokens, scored, order="forward")
        for each in (model, proposing)
    ]
    features = np.array([list(line["features"].values()) for line in found[:16]])
    drawn = sedd.control.sample(
        proposing,
        features={"early": lambda texts: [float(text[:1] < "n") for text in texts]},
        moments={"early": 0.8},
        **{"method": "weigh", "pool": 64, "base": model, "sampler": "ordered"},
    )
    assert np.mean(drawn.weights) == pytest.approx(1)
    exponent = np.log([line["weight"] for line in found[:16]]) + np.asarray(nats[0] - nats[1])
    # What is left is linear in the features: λ·φ - log Z.
    design = np.column_stack([features, np.ones(16)])
    fitted = design @ np.linalg.lstsq(design, exponent, rcond=None)[0]
    np.testing.assert_allclose(fitted, exponent, atol=1e-4)
    assert np.std(np.asarray(nats[0] - nats[1])) > 0.1  # or the test could not fail


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--sampler ordered --method reject", "--method resample or weigh, since the ratio"),
        ("--method weigh", "give --sampler ordered in a fixed --order"),
        ("--sampler ordered --order random --method weigh", "give --sampler ordered in a fixed"),
        ("--sampler ordered --steps 3 --method weigh", "without --steps"),
        ("--sampler ordered --method weigh --prompt a", "--prompt: with --base"),
        ("--sampler ordered --method weigh --temperature .5", "--temperature: with --base"),
    ],
)
def test_the_law_of_proposals_must_be_known(place, more, message):
    result = draw(place, f"{EARLY} --base {place / 'run'} {more}", code=2)
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.nightly
def test_a_text_does_not_depend_on_its_batch(place, tmp_path):
    one, other = (tmp_path / f"{name}.jsonl" for name in ("one", "other"))
    draw(place, f"{EARLY} --num 5 --output {one}")
    draw(place, f"{EARLY} --num 5 --output {other}", "--batch-size", 16)
    assert lines(one) == lines(other)


@pytest.mark.nightly
@pytest.mark.parametrize("given", [(), nightly(("--regex", "[a-z ]*"))], ids=len)
def test_given_text_stays(place, tmp_path, given):
    out = tmp_path / "out.jsonl"
    given = ["--prompt", "the ", *given]
    features = "--features {f}:vowels --moments .3 --pool 128 --num 6"
    draw(place, f"{features} --output {out}", *given)
    assert all(line["text"].startswith("the ") for line in lines(out))


def test_a_condition_holds_for_every_text(place, tmp_path):
    out = tmp_path / "out.jsonl"
    result = draw(place, "--features {f}:early --moments 1 --pool 64 --num 20", "--output", out)
    assert all(line["features"]["early"] == 1 for line in lines(out))
    assert "+inf" in result.out


def test_figures_go_to_standard_error_beside_json(place):
    result = draw(place, "--features {f}:early --moments .8 --pool 64 --num 3 --output -")
    assert len([json.loads(line) for line in result.out.splitlines()]) == 3
    assert "weight λ" in result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--features {f}:early --moments .5,.5",
            "--moments .5,.5: must be one for each of the features early, got 2",
        ),
        ("--features {f}:early", "give --moments as well"),
        ("--moments .5", "--moments .5: it controls features, give --features as well"),
        ("--method qrs", "--method qrs: it controls features"),
        ("--features {f}:early --moments x", "--moments x: 'x' is no number"),
        ("--features {f}:early --moments nan", "--moments nan: nan is not finite"),
        ("--features {f}:erly --moments .5", "defines no function 'erly'"),
        ("--features {f}:early,{f}:early --moments .5,.5", "the same feature twice"),
        ("--features {f}:early --moments .5 --pool 1", "--pool must be at least 2, got 1"),
        (
            "--features {f}:early --moments .5 --total-variation .1",
            "--total-variation 0.1: it is a flag of --method qrs",
        ),
        (
            "--features {f}:early --moments .5 --method qrs --total-variation 1",
            "--total-variation must be in [0, 1), got 1.0",
        ),
        (
            "--features {f}:early --moments .5 --method particle --sampler tweedie",
            "write --inner tweedie for the one that it steers",
        ),
        (
            "--features {f}:early --moments .5 --method particle --verifier {f}:length",
            "with --method particle the features are the score",
        ),
        (
            "--features {f}:early --moments .5 --method particle --tilt 2",
            "--tilt 2.0: --method particle determines the weights",
        ),
        (
            "--features {f}:early --moments .5 --requests {f}",
            "a control belongs to one form of request",
        ),
        ("--features {f}:early --moments .5 --trace t.html", "draws texts that are not returned"),
        (
            f"--features {{f}}:early --moments .5 --seed {2**32 - 50} --pool 32",
            "go beyond 2**32 - 1",
        ),
    ],
)
def test_flags_that_do_not_go_together(place, flags, message):
    (error,) = draw(place, flags, code=2).errors
    assert message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--features {f}:failing --moments .5", "feature failing raised KeyError: 'no such word'"),
        ("--features {f}:infinite --moments .5", "feature infinite: a value must be finite"),
        ("--features {f}:never --moments .5", "feature never is 0 in all 64 texts"),
        (
            "--features {f}:length --moments 50",
            "feature length is between 9 and 12 in all 64 texts",
        ),
        ("--features {f}:vowels --moments 1.5", "its mean cannot become 1.5"),
        ("--features {f}:early,{f}:never --moments .5,1", "feature never is 0 in all 64 texts"),
    ],
)
def test_features_and_moments_that_cannot_be(place, flags, message):
    result = draw(place, f"{flags} --pool 64", code=2)
    (error,) = result.errors
    assert message in error
    assert result.out == ""


@pytest.mark.nightly
def test_given_positions_are_written_for_fine_tuning(place, tmp_path):
    out = tmp_path / "out.jsonl"
    draw(
        *(place, "--features {f}:vowels --moments .3 --pool 64 --method weigh", "--prompt", "the "),
        *("--output", out),
    )
    found = lines(out)
    assert len(found) == 64
    assert all(line["given"] == [0, 1, 2, 3] for line in found)
    assert np.mean([line["weight"] for line in found]) == pytest.approx(1)


# ---------------------------------------------------------------- Python


def early(texts):
    return [text[:1] < "n" for text in texts]


@pytest.mark.parametrize(
    "method", ["reject", nightly("qrs"), nightly("resample"), nightly("particle")]
)
def test_in_python(model, method):
    options = {"inner": "event_jump", "particles": 4} if method == "particle" else {}
    drawn = sedd.control.sample(
        *(model, 3),
        features={"early": early},
        moments={"early": 0.8},
        method=method,
        num=30,
        pool=256,
        batch_size=64,
        **options,
    )
    assert len(drawn.text) == len(drawn.tokens) == 30
    np.testing.assert_array_equal(drawn.features[:, 0], early(drawn.text))
    assert abs(drawn.moments[0] - 0.8) < 5 * drawn.errors[0]
    assert drawn.proposals >= 512
    assert (drawn.curve is None) == (method != "qrs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments": {"late": 0.5}}, "there are the features early, and the moments of late"),
        ({"moments": [0.5, 0.5]}, "moments must be one for each feature"),
        ({"prompt": ["a", "b"]}, "prompt is a list: a control belongs to one form of request"),
        ({"particles": 3}, "particles: options of the method particle, not of reject"),
        ({"method": "particle", "sampler": "ordered"}, "give inner=, the one to steer"),
        ({"features": {}, "moments": []}, "features must be at least one function"),
    ],
)
def test_wrong_arguments(model, changes, message):
    arguments = {"features": {"early": early}, "moments": [0.5], "pool": 64, **changes}
    with pytest.raises(UserError, match=message):
        sedd.control.sample(model, **arguments)
