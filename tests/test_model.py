"""A trained model: what ``load`` refuses, what ``sample`` keeps, what ``evaluate`` computes."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run
from tiers import nightly

import sedd
from sedd.constraints.clamp import free, from_infill, from_prompt
from sedd.data.tokenizers import BytePairs, Bytes, Pretrained
from sedd.errors import UserError
from sedd.evaluating.bound import text_counter
from sedd.evaluation.bound import evaluate_bound
from sedd.evaluation.protocols import Protocol
from sedd.evaluation.tables import detail_table
from sedd.networks import mesh
from sedd.samplers.euler import Euler
from sedd.schedules import LogLinear
from sedd.training import distributed

KINDS = ["radd", "sedd", "uniform"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run's directory of each kind."""
    top = tmp_path_factory.mktemp("runs")
    return {
        kind: tiny_run.make_run(top / kind, tiny_run.config(kind), steps=(2, 4)) for kind in KINDS
    }


@pytest.fixture(scope="module", params=KINDS)
def model(request, runs):
    return sedd.load(runs[request.param])


def test_what_a_loaded_model_says_of_itself(runs):
    radd, uniform = sedd.load(str(runs["radd"])), sedd.load(runs["uniform"])
    assert radd.network_config == tiny_run.NETWORK
    assert (radd.length, radd.time_independent, uniform.time_independent) == (12, True, False)
    assert (radd.process.mask_id, uniform.process.mask_id) == (len(tiny_run.ALPHABET) + 1, None)
    assert radd.schedule == LogLinear()
    assert radd.tokenizer == tiny_run.TOKENIZER
    x_BL = np.zeros((2, 5), np.int32)
    log_score = radd.log_score(x_BL, np.ones(2, np.float32))
    assert log_score.shape == (2, 5, radd.process.num_states)
    assert radd.log_conditional(x_BL).shape == (2, 5, radd.process.num_tokens)
    # Parameters are on the device: numpy's would be sent there again at every call.
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(radd.denoiser.params))


def test_a_run_is_loaded_straight_into_shards(runs, monkeypatch):
    monkeypatch.setattr(mesh, "LEAST_SPLIT", 16)
    monkeypatch.setattr(mesh.Placement, "place", None)  # it would start from whole arrays
    whole = sedd.load(runs["radd"])
    parts = sedd.load(runs["radd"], mesh=sedd.device_mesh(jax.devices()[:4], fsdp=4))
    pairs = jax.tree.map(lambda *pair: pair, whole.denoiser.params, parts.denoiser.params)
    shares = set()
    for a, b in jax.tree.leaves(pairs, is_leaf=lambda x: isinstance(x, tuple)):
        np.testing.assert_array_equal(a, b)
        shares.add(b.size // b.addressable_shards[0].data.size)
    assert shares == {1, 4}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "no such directory"),
        (lambda run: (run / "config.json").unlink(), "no config.json"),
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lambda run: (run / "config.json").write_bytes(b"\xff"), "config.json: not readable"),
        (lambda run: (run / "config.json").write_text("[" * 100_000), "config.json: not readable"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: must hold an object"),
        (lambda run: edit(run / "config.json", sead=1), "config.json: .*'seed'"),
        (lambda run: edit(run / "config.json", seed="1"), "config.json: .*seed must be int"),
        (lambda run: edit(run / "config.json", data=3), "config.json: .*data must be an object"),
        (lambda run: (run / "tokenizer.json").write_text("{"), "tokenizer.json: not readable"),
        (lambda run: (run / "tokenizer.json").write_text("3"), "tokenizer.json: must hold an obj"),
        (lambda run: edit(run / "tokenizer.json", kind="x"), "tokenizer.json: unknown kind"),
        (lambda run: edit(run / "tokenizer.json", alphabet="aa"), "tokenizer.json: .* distinct"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint in"),
        (lambda run: truncate(run, 2, 4), "all checkpoints in .* are damaged"),
        (
            lambda run: edit(run / "tokenizer.json", alphabet="abc"),
            "checkpoint .* is of another configuration",
        ),
        (
            lambda run: edit(run / "config.json", network={"name": "ddit", "hidden_dim": 24}),
            "of another configuration: ema_params.* in it, and .* in the configuration of this run",
        ),
    ],
)
def test_load_refuses(runs, tmp_path, damage, message):
    run = shutil.copytree(runs["radd"], tmp_path / "run")
    damage(run)
    with pytest.raises(UserError, match=message) as caught:
        sedd.load(run)
    assert str(run) in str(caught.value)
    if "checkpoint" in message or "another configuration" in message:  # others read no array
        tiny_run.collect_failed_reads()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(run, *steps):
    for step in steps:
        tiny_run.truncate(run / "checkpoints" / str(step) / "ema_params")


def test_load_falls_back_to_an_older_checkpoint_and_says_so(runs, tmp_path, capsys):
    run = shutil.copytree(runs["radd"], tmp_path / "run")
    truncate(run, 4)
    sedd.load(run)
    assert "warning: checkpoint" in capsys.readouterr().err
    with pytest.raises(UserError, match="is bad"):
        sedd.load(run, step=4)
    tiny_run.collect_failed_reads()


def test_load_a_step_or_the_best(runs, tmp_path):
    sedd.load(runs["radd"], step=2)
    sedd.load(runs["radd"], step="best")
    with pytest.raises(UserError, match=r"no checkpoint of step 3 .*there are \[2, 4\]"):
        sedd.load(runs["radd"], step=3)
    run = tiny_run.make_run(tmp_path / "run", tiny_run.config(), metric=None)
    with pytest.raises(UserError, match="none was validated"):
        sedd.load(run, step="best")


def test_load_of_a_folder_inside_a_run_names_the_run(runs):
    for inside in ("checkpoints", "checkpoints/4"):
        with pytest.raises(UserError, match=f"did you mean {runs['radd']}\\?"):
            sedd.load(runs["radd"] / inside)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("owner/model-owt", "write hf://owner/model-owt"),
        ("owner/model@v1", "write hf://owner/model@v1"),
        ("hf:owner/model", "a checkpoint of the hub is hf://OWNER/NAME"),
        ("runs", "no such directory$"),
        ("/runs/mine", "no such directory$"),
        ("./mine/run/4", "no such directory$"),
    ],
)
def test_load_of_a_name_of_the_hub_says_how_it_is_written(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=hint):
        sedd.load(name)


@pytest.mark.parametrize(
    ("tpu", "platforms", "plugins", "expected"),
    [
        (False, None, None, "cpu"),
        (True, None, None, None),  # a TPU is to be used
        (False, "cuda", None, "cuda"),  # chosen by the user
        (False, None, "a plugin", None),
    ],
)
def test_load_keeps_libtpu_quiet_where_there_is_no_tpu(
    monkeypatch, tmp_path, tpu, platforms, plugins, expected
):
    updates = {"jax_platforms": platforms}
    stand_in = SimpleNamespace(
        jax_platforms=platforms, update=lambda name, value: updates.update({name: value})
    )
    monkeypatch.setattr(distributed, "on_tpu", lambda: tpu)
    monkeypatch.setattr(distributed, "find_spec", lambda name: plugins)
    monkeypatch.setattr(distributed.jax, "config", stand_in)
    with pytest.raises(UserError, match="no such directory"):
        sedd.load(tmp_path / "none")
    assert updates == {"jax_platforms": expected}


@pytest.mark.parametrize("model", [nightly("radd"), nightly("sedd"), "uniform"], indirect=True)
@pytest.mark.parametrize("sampler", ["tweedie", nightly("euler")])
def test_given_tokens_are_kept(model, sampler):
    clamps = [
        from_prompt(model.tokenizer, 12, prompt="abc", suffix="yz"),
        from_infill(model.tokenizer, "{mask:2}ab{mask:3}c{mask}"),
        free(7),
    ]
    result = sedd.sample(
        model, jax.random.key(0), num=3, clamp=clamps, sampler=sampler, steps=4, trace=True
    )
    assert result.tokens.shape == (3, 12)
    assert result.trace.shape == (6, 3, 12)
    assert result.calls.tolist() == [5, 5, 5]
    for row, clamp in enumerate(clamps):
        frames = result.trace[:, row, : clamp.length]
        assert (frames[:, clamp.fixed_L] == clamp.tokens_L[clamp.fixed_L]).all()
        last = result.tokens[row, : clamp.length]
        np.testing.assert_array_equal(frames[-1], last)
        assert (last < model.process.num_tokens).all()  # no mask survives
        assert result.text[row] == model.tokenizer.decode(last)


@pytest.mark.nightly
def test_a_sequence_depends_on_its_key_alone(model):
    """Not on the others of its batch, nor on how far that is padded."""
    keys = jax.random.split(jax.random.key(1), 3)
    clamps = [free(5), free(12), from_prompt(model.tokenizer, 9, prompt="ab")]
    together = sedd.sample(model, keys, clamp=clamps, steps=4).tokens
    alone = sedd.sample(model, keys[2:], clamp=clamps[2], steps=4).tokens[0]
    np.testing.assert_array_equal(alone, together[2, :9])


@pytest.mark.nightly
def test_sample_defaults(runs):
    model = sedd.load(runs["radd"])
    result = sedd.sample(model, jax.random.key(0), num=2, steps=2)
    assert result.tokens.shape == (2, 12)
    assert result.trace is None
    assert (result.tokens[0] != result.tokens[1]).any()
    again = sedd.sample(model, jax.random.key(0), num=1, steps=2)
    np.testing.assert_array_equal(again.tokens[0], result.tokens[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num must be at least 1"),
        ({"length": 0}, "length must be in 1.."),
        ({"length": 5, "clamp": free(4)}, "length does not go with clamp"),
        (
            {"num": 3, "clamp": [free(4), free(5)]},
            "numbers of sequences differ: 2 of clamp, 3 of num",
        ),
        ({"sampler": "tweedi"}, "did you mean 'tweedie'"),
        ({"step": 3}, "no field 'step'; did you mean 'steps'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"sampler": Euler(schedule=LogLinear()), "steps": 3}, "options are fixed: steps"),
    ],
)
def test_sample_refuses(runs, arguments, message):
    with pytest.raises(UserError, match=message):
        sedd.sample(sedd.load(runs["radd"]), jax.random.key(0), **arguments)


@pytest.mark.parametrize("model", ["radd", nightly("sedd"), nightly("uniform")], indirect=True)
def test_evaluate_is_the_bound_at_any_batch_size(model):
    tokens = np.random.default_rng(0).integers(0, model.process.num_tokens - 1, (7, 12))
    scored = np.ones(tokens.shape, bool)
    scored[2, 4:] = False
    key = jax.random.key(5)
    whole = evaluate_bound(
        model.denoiser,
        model.schedule,
        key,
        [(tokens, scored)],
        draws=8,
        count_text=text_counter(model.tokenizer),
    )
    assert whole.num_tokens == scored.sum() == whole.num_characters
    for batch_size in (3, 32):
        result = sedd.evaluate(
            *(model, tokens, key),
            scored_BL=scored,
            protocol=Protocol(draws=8),
            batch_size=batch_size,
        )
        assert result.to_json().keys() > whole.to_json().keys()
        for name, value in whole.to_json().items():
            other = result.to_json()[name]
            # float32 sums over another batch; the draws are the same
            assert other == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
        np.testing.assert_allclose(result.sequence_nats, whole.sequence_nats, rtol=1e-4)


def test_evaluate_of_everything_scored(runs):
    model = sedd.load(runs["radd"])
    result = sedd.evaluate(model, np.zeros((2, 12), int), protocol=Protocol(draws=4))
    assert (result.num_tokens, result.num_sequences, result.num_bytes) == (24, 2, 24)


def test_the_cross_entropy_of_training_frequencies(runs, tmp_path):
    """By hand with half a count more of each token; unknown where a run did not save its counts."""
    model = sedd.load(runs["radd"])
    assert model.train_counts is None
    tokens = np.array([[0, 0, 1, 5], [5, 5, 5, 2]])
    scored = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    unknown = sedd.evaluate(model, tokens, scored_BL=scored, protocol=Protocol(draws=4))
    assert unknown.to_json()["unigram_nats"] is None
    assert unknown.data.unigram_entropy == pytest.approx(
        -(2 * np.log(2 / 6) + np.log(1 / 6) + 3 * np.log(3 / 6)) / 6
    )
    size = tiny_run.TOKENIZER.num_tokens
    counts = np.arange(size) * 2.0
    run = shutil.copytree(runs["radd"], tmp_path / "run")
    np.save(run / "token_counts.npy", counts)
    result = sedd.evaluate(sedd.load(run), tokens, scored_BL=scored, protocol=Protocol(draws=4))
    probs = (counts + 0.5) / (counts + 0.5).sum()
    expected = -(2 * np.log(probs[0]) + np.log(probs[1]) + 3 * np.log(probs[5])) / 6
    assert result.unigram_nats == pytest.approx(expected)
    assert result.unigram_nats > result.data.unigram_entropy
    assert "cross entropy of training frequencies" in detail_table(result).markdown()
    assert "cross entropy" not in detail_table(unknown).markdown()
    for damage, message in ((np.zeros(3), "must hold"), (np.zeros((2, size)), "must hold")):
        np.save(run / "token_counts.npy", damage)
        with pytest.raises(UserError, match=message):
            sedd.load(run)
    (run / "token_counts.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="not readable as an array"):
        sedd.load(run)


def test_text_counter():
    text = "aé€😀"  # one to four bytes
    ids = Bytes().encode_batch([text])[0]
    assert text_counter(Bytes())(ids) == (4, 10)
    # Wherever it is cut, a character counts once: with its first byte.
    for cut in range(len(ids) + 1):
        parts = [text_counter(Bytes())(part) for part in (ids[:cut], ids[cut:])]
        assert np.sum(parts, 0).tolist() == [4, 10]
    assert text_counter(Bytes())(np.array([256, 97])) == (1, 1)  # the end of a document is no text
    assert text_counter(None) is None


def test_text_counter_where_a_token_holds_parts_of_two_characters():
    vocabulary = [*(bytes([byte]) for byte in range(256)), "é".encode()[1:] + "€".encode()[:1]]
    tokenizer = BytePairs.of("bpe:258", vocabulary)
    ids = np.array(["é".encode()[0], 256, *"€".encode()[1:]])
    assert tokenizer.decode(ids) == "é€"
    assert text_counter(tokenizer)(ids) == (2, 5)


def test_text_counter_of_a_lossy_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    )
    backend.normalizer = tokenizers.normalizers.Lowercase()
    assert text_counter(Pretrained.of("lossy", backend.to_str())) is None
