"""Fine-tuning to a control: weighted rows, their loss, what it converges to, and the commands."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny_run
from oracle import L, N
from tiny_run import TOKENIZER, call

from sedd.data.corpora import open_corpus
from sedd.data.loader import Batches
from sedd.data.weighted_rows import read_weighted
from sedd.errors import UserError
from sedd.objectives.gdc import GDC
from sedd.schedules import LogLinear
from sedd.training.metrics import read_metrics
from sedd.training.step import Step

CLEAN = oracle.all_states(N)
SIZE = N**L


def step_on(denoiser, batch_size=SIZE):
    return Step(
        network=denoiser.network,
        objective=GDC(schedule=LogLinear(), parameterization=denoiser.parameterization),
        optimizer=optax.adam(0.1),
        ema_decay=0.9,
        batch_size=batch_size,
    )


def batch_of(rows, weights=None):
    batch = {
        "x0": jnp.asarray(rows, jnp.int32)[None],
        "scored": jnp.ones((1, *np.shape(rows)), bool),
        "index": jnp.arange(len(rows))[None],
    }
    return batch if weights is None else {**batch, "weight": oracle.f32(weights)[None]}


def test_weights_multiply_the_loss_of_each_row():
    denoiser = oracle.table_denoiser(oracle.random_table(), N)
    step, weights = step_on(denoiser), np.linspace(0, 2, SIZE)
    totals = jax.jit(functools.partial(step.totals, axis_name=None))
    given = (denoiser.params, jax.random.key(0), jnp.asarray(3))
    whole = totals(*given, batch_of(CLEAN, weights))
    single = [
        float(totals(*given, batch_of(CLEAN, np.eye(SIZE)[row]))["nats"]) for row in range(SIZE)
    ]
    np.testing.assert_allclose(float(whole["nats"]), weights @ single, rtol=1e-5)
    plain, ones = (totals(*given, batch_of(CLEAN, w))["nats"] for w in (None, np.ones(SIZE)))
    np.testing.assert_allclose(plain, ones)
    assert whole["tokens"] == SIZE * L


def test_the_minimum_is_the_controlled_law():
    """On all texts, drawn evenly and weighted by p, the gradient vanishes at the conditionals of p.

    The loss is convex in a table of logits, so that this is its minimum. Entries of the gradient
    are means over draws, and held against 0 at 5σ; those of another law are further away.
    """
    world = oracle.Oracle("absorbing", seed=3)
    a = world.joint.ravel()
    p = a * np.exp(2.0 * (CLEAN[:, 0] == CLEAN[:, 1]))
    p /= p.sum()
    towards = oracle.Oracle("absorbing")
    towards.joint = p.reshape(world.joint.shape)
    batch = batch_of(CLEAN, p * SIZE)

    def largest_z(denoiser):
        step = step_on(denoiser)

        @jax.jit
        def gradients(keys):
            def one(key):
                totals = step.totals(denoiser.params, key, 0, batch, axis_name=None)
                return totals["grads"]["table"]

            return jax.lax.map(one, keys)

        grads = np.asarray(gradients(oracle.keys(0, 400)), np.float64)
        error = grads.std(0) / 20
        return np.abs(grads.mean(0)[error > 1e-6] / error[error > 1e-6]).max()

    assert largest_z(towards.conditional_denoiser()) < 5
    assert largest_z(world.conditional_denoiser()) > 10


# ---------------------------------------------------------------- data

ROWS = [{"id": i, "text": "x", "tokens": [i % 5] * 6, "weight": i / 10} for i in range(40)]


def corpus_of(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return open_corpus(str(path), cache_dir=path.parent)


def test_lines_are_rows_with_their_weights(tmp_path):
    rows = [{**row, "given": [0, 1]} if row["id"] == 3 else row for row in ROWS]
    packed = read_weighted(corpus_of(tmp_path / "w.jsonl", rows), TOKENIZER, "all", length=6)
    x0_BL, scored_BL = packed.rows(np.array([3, 4]))
    np.testing.assert_array_equal(x0_BL, [[3] * 6, [4] * 6])
    np.testing.assert_array_equal(scored_BL[0], [False] * 2 + [True] * 4)
    assert scored_BL[1].all()
    assert packed.weights is not None
    assert packed.weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(packed.weights, np.arange(40) / 19.5)
    assert packed.num_tokens_total == 40 * 6 - 2
    batch = next(Batches([(packed, 1.0)], batch_size=8, seed=0, prefetch=0))
    rank = batch["x0"][:, 0]
    assert batch["weight"].dtype == np.float32
    np.testing.assert_array_equal(np.round(batch["weight"] * 19.5) % 5, rank)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [1] * 5}, "it has 5 tokens and --data.length is 6: give --data.length 5"),
        ({"tokens": [99] * 6}, "the ids of tokens must be in 0.."),
        ({"tokens": ["a"] * 6}, "tokens and weight must be numbers"),
        ({"weight": -1}, "a weight must be a finite number from 0 on, got -1.0"),
        ({"weight": "x"}, "tokens and weight must be numbers"),
        ({"given": [6]}, "given positions must be in 0..5"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    corpus = corpus_of(tmp_path / "w.jsonl", [ROWS[1], {**ROWS[2], **change}])
    with pytest.raises(UserError) as error:
        read_weighted(corpus, TOKENIZER, "all", length=6)
    assert str(error.value).startswith(f"{tmp_path}/w.jsonl, line 2: ")
    assert message in str(error.value)


def test_lines_of_another_kind_and_no_weight(tmp_path):
    mixed = [ROWS[1], {"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match="line 2: other lines have tokens and a weight"):
        read_weighted(corpus_of(tmp_path / "m.jsonl", mixed), TOKENIZER, "all", length=6)
    with pytest.raises(UserError, match="all weights are 0"):
        read_weighted(corpus_of(tmp_path / "z.jsonl", ROWS[:1]), TOKENIZER, "all", length=6)


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, features, a pool of its texts with weights, and plain text."""
    top = tmp_path_factory.mktemp("gdc")
    tiny_run.make_run(top / "run", tiny_run.config("radd"))
    (top / "f.py").write_text("def early(texts):\n    return [t[:1] < 'n' for t in texts]\n")
    (top / "my.txt").write_text(tiny_run.text(600))
    result = call(
        *("sample", "--checkpoint", top / "run", "--features", f"{top}/f.py:early"),
        *("--moments", ".8", "--method", "weigh", "--pool", 400, "--batch-size", 64),
        *("--output", top / "pool.jsonl"),
    )
    assert result.code == 0, result.err
    return top


def train(place, name, *flags, code=0):
    result = call(
        *("train", "--workdir", place / name, "--init-from", place / "run"),
        *("--training.steps", 30, "--training.batch-size", 16, "--optimizer.warmup-steps", 1),
        *(
            "--training.eval-every",
            15,
            "--training.sample-every",
            "None",
            "--training.log-every",
            5,
        ),
        *("--training.checkpoint-every", 15, "--optimizer.learning-rate", "3e-3", *flags),
    )
    assert result.code == code, result.err
    return result


def test_a_pool_is_written_with_its_weights(place):
    lines = [json.loads(line) for line in (place / "pool.jsonl").read_text().splitlines()]
    assert len(lines) == 400
    weight = np.array([line["weight"] for line in lines])
    early = np.array([line["features"]["early"] for line in lines])
    assert weight.mean() == pytest.approx(1)
    assert abs(weight @ early / 400 - 0.8) < 0.1
    assert abs(early.mean() - 0.8) > 0.1  # without the weights


@pytest.mark.nightly
def test_a_run_comes_nearer_to_the_controlled_law(place):
    flags = ("--objective", "gdc", "--data.corpus", place / "pool.jsonl")
    result = train(place, "gdc", *flags)
    assert "KL(controlled law‖model) by bounds, nats per text: " in result.out
    records = [r for r in read_metrics(place / "gdc") if "validation_divergence" in r]
    assert [record["step"] for record in records] == [15, 30]
    start = {record["validation_divergence_at_start"] for record in records}
    assert len(start) == 1
    for record in records:
        fall = record["validation_divergence_at_start"] - record["validation_divergence"]
        assert record["validation_divergence_fall"] == pytest.approx(fall)
        assert record["validation_divergence_fall"] != 0
        assert math.isfinite(record["validation_unweighted_fall"])
    resumed = train(place, "gdc", *flags, "--training.steps", 31)
    assert "resuming" in resumed.out
    assert read_metrics(place / "gdc")[-1]["validation_divergence_at_start"] in start


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--objective k_dce --data.corpus {pool}", "objective k_dce ignores the weights of"),
        ("--objective gdc --data.corpus {text}", "the objective gdc needs texts with weights"),
        (
            "--objective gdc --data.corpus {pool} --data.length 20",
            "it has 12 tokens and --data.length is 20",
        ),
        ("--objective gdc --data.corpus {pool} --data.padding none", "has whole rows of tokens"),
    ],
)
def test_what_does_not_go_together(place, flags, message):
    flags = flags.format(pool=place / "pool.jsonl", text=place / "my.txt").split()
    (error,) = train(place, "refused", *flags, code=2).errors
    assert message in error
    assert not (place / "refused" / "checkpoints").exists()
