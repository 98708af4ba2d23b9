"""Training on records: the loss of each padding, packing, validation, and learned answers."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from chat_toy import LLADA, answer, tokenizer, user
from tiers import daily
from tiny_run import TINY, call

import sedd
from sedd.configuration.build import build_parts
from sedd.configuration.components import options
from sedd.data.answer_rows import pack_records
from sedd.data.corpora import open_corpus
from sedd.data.loader import Batches
from sedd.data.tokenizers import Bytes, Characters
from sedd.errors import UserError
from sedd.evaluation import Protocol
from sedd.evaluation.bound import estimates
from sedd.objectives.base import GOLDEN
from sedd.training.state import init_state
from sedd.training.step import Step, keys_of

L = 40
PADDINGS = ("none", "eos", "rainbow", "unified")
RECORDS = [
    {"prompt": "p" * (i % 5), "completion": "answer "[: 1 + i % 7] * (1 + i % 3)} for i in range(12)
]
PARTS = build_parts(tiny_run.config("radd", length=L), 257)


class Spare(Bytes):
    """The bytes 0 to 6 as the spare tokens that fill rows with the padding rainbow."""

    specials = {f"<|reserved_token_{i}|>": i for i in range(7)}  # noqa: RUF012


@functools.cache
def params():
    first = jax.jit(PARTS.network.init)(jax.random.key(0))
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.2 * noise.standard_normal(x.shape).astype(x.dtype), first)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of each padding."""
    place = tmp_path_factory.mktemp("records")
    (place / "r.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    corpus = open_corpus(str(place / "r.jsonl"), cache_dir=place)
    return {
        padding: pack_records(
            corpus,
            Spare() if padding == "rainbow" else Bytes(),
            "all",
            length=L,
            padding=padding,
            answers="all",
            cache_dir=place,
            workers=1,
        )
        for padding in PADDINGS
    }


@jax.jit
def raw(xt_BL, segment_BL):
    attend = sedd.networks.Attend(segment_BL=segment_BL)
    return PARTS.network.raw(params(), xt_BL, attend=attend)


def cross_entropy(xt_BL, x0_BL, segment_BL):
    """-log p of each clean token in numpy, the mask excluded, [B, L]."""
    raw_BLN = np.asarray(raw(xt_BL, segment_BL), np.float64)[..., :257]
    log_probs = raw_BLN - np.log(np.exp(raw_BLN).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, np.asarray(x0_BL)[..., None], -1)[..., 0]


@pytest.mark.parametrize(
    ("padding", "by_text"),
    daily(
        [*((name, False) for name in PADDINGS), ("none", True), ("eos", True)],
        [("none", True)],
    ),
)
def test_the_loss_of_a_padding(rows, padding, by_text):
    """λ-DCE in numpy: (1/λ)·Σ -log p over masked tokens, one λ for each text of a row."""
    size = 4
    batch = next(Batches([(rows[padding], 1.0)], batch_size=size, seed=3, prefetch=0))
    step = Step(
        network=PARTS.network,
        objective=PARTS.objective,
        optimizer=optax.sgd(0.1),
        ema_decay=0.9,
        batch_size=size,
        by_text=by_text,
    )
    given = {name: jnp.asarray(value)[None] for name, value in batch.items() if name != "step"}
    totals = jax.jit(functools.partial(step.totals, axis_name=None))(
        params(), jax.random.key(5), jnp.asarray(7), given
    )
    # The same noise again: the keys of the step, and of its examples.
    times_key, key, _ = jax.random.split(jax.random.fold_in(jax.random.key(5), 7), 3)
    u_B = (jax.random.uniform(times_key) + batch["index"] / size) % 1.0
    noise = (7, keys_of(key, batch["index"]), u_B, batch["x0"], batch["scored"])
    segment_BL = batch.get("segment", np.ones_like(batch["x0"]))
    if padding == "none":
        corrupted = PARTS.objective.corrupt_segments(*noise, segment_BL)
        assert segment_BL.max() > 2
        u_BL = (np.asarray(u_B)[:, None] + segment_BL * GOLDEN) % 1.0
    else:
        corrupted = PARTS.objective.corrupt_at(*noise)
        u_BL = np.broadcast_to(np.asarray(u_B)[:, None], segment_BL.shape)
    masked_BL = np.asarray(corrupted.xt_BL) == 257
    assert masked_BL.any()
    assert (padding == "rainbow") == (batch["x0"] < 7).any()
    assert not (masked_BL & ~batch["scored"]).any()
    nats_BL = cross_entropy(corrupted.xt_BL, batch["x0"], segment_BL) / (1 - u_BL)
    scored_BL = np.asarray(batch["scored"])
    assert totals["tokens"] == scored_BL.sum()
    if by_text:
        texts = [
            scored_BL & (segment_BL == number) & (np.arange(size)[:, None] == row)
            for row in range(size)
            for number in np.unique(segment_BL[row][scored_BL[row]])
        ]
        nats = sum(nats_BL[text & masked_BL].sum() / text.sum() for text in texts)
    else:
        nats = nats_BL[masked_BL].sum()
    np.testing.assert_allclose(totals["nats"], nats, rtol=1e-4)
    np.testing.assert_allclose(
        totals["terms"], len(texts) if by_text else scored_BL.sum(), rtol=1e-6
    )


def all_masked(denoiser, schedule, keys_B, x0_BL, scored_BL):
    """-log p of all scored tokens, each given the tokens that are not scored."""
    log_probs = denoiser.log_conditional(jnp.where(scored_BL, denoiser.mask_id, x0_BL))
    picked_BL = jnp.take_along_axis(log_probs, x0_BL[..., None], -1)[..., 0]
    return -jnp.where(scored_BL, picked_BL, 0.0).sum(-1)


def test_packed_texts_are_scored_like_single_ones(rows):
    """In validation and in training: a text does not see its neighbours."""
    packed = rows["none"].rows(np.arange(rows["none"].num_rows))
    x0_BL, scored_BL, segment_BL = packed
    texts = [
        (row, segment_BL[row] == number)
        for row in range(len(x0_BL))
        for number in range(1, segment_BL[row].max() + 1)
    ]
    assert len(texts) == len(RECORDS) > len(x0_BL)
    alone_x0, alone_scored, alone = (np.zeros((len(texts), L), kind) for kind in (int, bool, int))
    for i, (row, here_L) in enumerate(texts):
        size = here_L.sum()
        alone_x0[i, :size] = x0_BL[row][here_L]
        alone_scored[i, :size] = scored_BL[row][here_L]
        alone[i, :size] = 1
    singles = (alone_x0.astype(np.int32), alone_scored, alone.astype(np.int32))
    denoiser = PARTS.denoiser(params())
    found = {}
    for name, batch in (("packed", packed), ("single", singles)):
        ((*_, nats),) = estimates(denoiser, PARTS.schedule, jax.random.key(0), [batch], all_masked)
        found[name] = nats
    of_row = np.bincount([row for row, _ in texts], found["single"])
    np.testing.assert_allclose(found["packed"], of_row, rtol=1e-5)
    ((*_, blind),) = estimates(
        denoiser, PARTS.schedule, jax.random.key(0), [packed[:2]], all_masked
    )
    assert abs(blind - found["packed"]).max() > 1e-3  # without segments they do


def test_any_objective_masks_texts_apart(rows):
    """k-DCE masks 1 to n tokens of each text of n, with the weight n / k."""
    objective = options("objectives", "k_dce").build(
        schedule=PARTS.schedule, parameterization=PARTS.parameterization
    )
    x0_BL, scored_BL, segment_BL = rows["none"].rows(np.arange(rows["none"].num_rows))
    keys_B = jax.random.split(jax.random.key(0), len(x0_BL))
    corrupted = objective.corrupt_segments(
        0, keys_B, jnp.linspace(0, 0.9, len(x0_BL)), x0_BL, scored_BL, segment_BL
    )
    for row in range(len(x0_BL)):
        for number in range(1, segment_BL[row].max() + 1):
            here_L = segment_BL[row] == number
            weights = np.asarray(corrupted.weight_BL[row])[here_L]
            k, n = (weights > 0).sum(), scored_BL[row][here_L].sum()
            assert 1 <= k <= n
            np.testing.assert_allclose(weights[weights > 0], n / k)


TASKS = [
    *(("2+3=", "5"), ("sky?", "blue"), ("cat?", "miau"), ("a,b,c,", "d"), ("hi", "hello")),
    *(("up?", "down"), ("0", "1 2 3"), ("end", "")),
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A place with eight questions and answers in a folder of splits."""
    place = tmp_path_factory.mktemp("chats")
    lines = [{"prompt": question, "completion": said} for question, said in TASKS]
    (place / "data").mkdir()
    for split in ("train", "validation"):
        (place / "data" / f"{split}.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    return place


def train(place, run, *flags):
    told = call(
        *("train", *TINY, "--workdir", place / run, "--data.corpus", place / "data"),
        *("--data.tokenizer", "bytes", "--data.length", "12", "--training.batch-size", "8"),
        *("--training.sample-every", "None", "--data.cache-dir", place / "cache", *flags),
    )
    assert told.code == 0, told.err
    return told


def losses(place, run):
    lines = (place / run / "metrics.jsonl").read_text().splitlines()
    found = {}
    for line in map(json.loads, lines):
        if "loss" in line:
            found[line["step"]] = line["loss"]
    return found


@pytest.mark.nightly
def test_eight_questions_are_learned(chats):
    """Answers are reproduced exactly, up to their ends."""
    recipe = tiny_run.config("radd", length=12)
    network = dataclasses.replace(recipe.network, hidden_dim=32, num_layers=2)
    letters = Characters.of("letters", "".join(sorted(set("".join(map("".join, TASKS))))), eos=True)
    parts = build_parts(dataclasses.replace(recipe, network=network), letters.num_tokens)
    corpus = open_corpus(str(chats / "data"), cache_dir=chats)
    packed = pack_records(
        corpus, letters, "train", length=12, padding="eos", answers="all", cache_dir=chats
    )
    step = Step(
        network=parts.network,
        objective=parts.objective,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, 300)),
        ema_decay=0.9,
        batch_size=32,
    )
    x0_BL, scored_BL = (jnp.tile(each, (1, 4, 1)) for each in packed.rows(np.arange(8)))
    batch = {"x0": x0_BL, "scored": scored_BL, "index": jnp.arange(32)[None]}

    @jax.jit
    def trained(state):
        def one(state, _):
            return step(state, batch, axis_name=None)

        return jax.lax.scan(one, state, length=300)

    state, metrics = trained(init_state(parts.network, step.optimizer, 0))
    assert not (np.isnan(metrics["loss"])).any()
    model = sedd.Model(
        denoiser=parts.denoiser(state.ema_params),
        parts=parts,
        config=recipe,
        tokenizer=letters,
        source="the test",
    )
    questions = [question for question, _ in TASKS]
    drawn = sedd.sample(model, 0, prompt=questions, length=12, temperature=0, sampler="confidence")
    assert drawn.text == ["".join(task) for task in TASKS]


@pytest.mark.nightly
def test_a_run_that_is_resumed_masks_the_same(chats):
    every = ("--training.log-every", "1", "--training.eval-every", "4", "--data.padding", "none")
    train(chats, "whole", "--training.steps", "4", *every)
    train(chats, "parts", "--training.steps", "2", *every)
    train(chats, "parts", "--training.steps", "4", *every)
    assert losses(chats, "whole") == losses(chats, "parts")
    assert len(losses(chats, "whole")) == 4
    # Its validation and an evaluation of the same records bound the same tokens.
    lines = (chats / "whole" / "metrics.jsonl").read_text().splitlines()
    validated = [x for x in map(json.loads, lines) if "validation_nats_per_token" in x][-1]
    model = sedd.load(chats / "whole")
    held_out = str(chats / "data" / "validation.jsonl")
    bound = sedd.evaluate(model, held_out, protocol=Protocol(draws=64))
    assert bound.num_tokens == sum(len(said) + 1 for _, said in TASKS)
    error = math.hypot(bound.standard_error_draws, validated["validation_standard_error_draws"])
    assert abs(bound.nats_per_token - validated["validation_nats_per_token"]) < 4 * error
    with pytest.raises(UserError, match="records of messages or prompts are cut as in training"):
        sedd.evaluate(model, held_out, protocol=Protocol(cut="wrapped"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data.no-wrap", "--data.wrap: --data.padding says how records fill rows"),
        ("--data.corpus stdlib --data.padding eos", "--data.padding is eos, which needs a corpus"),
        (
            "--data.padding none --objective any_subset --parameterization any_subset",
            "--data.padding none packs several texts into a row, which the objective any_subset",
        ),
        ("--data.padding none --data.tokenizer characters", "is made from text, and"),
        ("--data.padding rainbow", "padding rainbow needs 7 special tokens"),
    ],
)
def test_what_training_on_records_refuses(chats, flags, says):
    told = call(
        *("train", *TINY, "--workdir", chats / "refused", "--data.corpus", chats / "data"),
        *("--data.tokenizer", "bytes", "--data.cache-dir", chats / "cache", *flags.split()),
    )
    assert told.code == 2
    assert says in told.errors[0]


@pytest.mark.nightly
def test_conversations_by_a_template(tmp_path):
    """Messages, the tokenizer of a model's directory, and answers by ``messages``."""
    turns = [user("hi"), answer("yo")]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 3)
    model = tokenizer(LLADA)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text(model.source)
    named = dict(model.turns.variables) | {"chat_template": LLADA}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(named))
    train(
        *(tmp_path, "run", "--data.corpus", tmp_path / "chat.jsonl"),
        *("--data.tokenizer", tmp_path / "model", "--data.length", "120"),
        *("--training.steps", "2", "--training.eval-every", "2"),
    )
    run = sedd.load(tmp_path / "run")
    drawn = sedd.sample(run, 0, messages=[user("hi")], length=120, steps=2)
    assert len(drawn.text) == 1
    assert dataclasses.asdict(run.tokenizer.turns)["template"] == LLADA
