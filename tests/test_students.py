"""``sedd train --objective self_distill --teacher RUN``: its students, and mistakes."""

import json

import jax
import numpy as np
import pytest
import tiny_run

import sedd
from sedd.model import read_config

ROUNDS = ("--objective.rounds", 2, "--objective.round-steps", 2, "--objective.teacher-steps", 4)
STUDENT = ("--objective", "self_distill", *ROUNDS, "--evaluation.max-sequences", 8)


def train(workdir, *flags, recipe=tiny_run.TINY):
    return tiny_run.call("train", "--workdir", workdir, *recipe, *flags)


@pytest.fixture(scope="module")
def student(tmp_path_factory, trunk, text):
    """A student of two rounds, stopped in the middle of the second one and resumed."""
    workdir = tmp_path_factory.mktemp("student") / "run"
    flags = ("--data.corpus", text, *STUDENT, "--training.log-every", 1)
    first = train(
        *(workdir, *flags, "--teacher", trunk, "--objective.rounds", 1, "--training.steps", 2)
    )
    assert first.code == 0, first.err
    second = train(workdir, *flags, "--training.steps", 4)
    assert second.code == 0, second.err
    return workdir, second


@pytest.mark.nightly
def test_a_student_is_an_ordinary_model_that_starts_as_its_teacher(student, trunk):
    workdir, outcome = student
    config = read_config(workdir)
    assert config.teacher == str(trunk)
    assert config.objective.rounds == 2  # a further round of a complete run
    assert f"resuming {workdir} at step 2 of 4" in outcome.out
    taught, teacher = (sedd.load(path) for path in (workdir, trunk))
    params = taught.denoiser.params, teacher.denoiser.params
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), *params))
    assert 0 < max(moved) < 0.01  # four updates of the averages, at the start of the warm-up
    assert sedd.sample(taught, jax.random.key(0), steps=2).calls.max() <= 2


@pytest.mark.nightly
def test_validation_is_the_bound_and_not_the_loss(student):
    """The loss of a copy of the teacher is close to 0; the bound is that of the data."""
    workdir, outcome = student
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] < 0.1 for line in lines)
    last = lines[-1]
    assert last["validation_nats_per_token"] > 2
    assert "validation bound at step 4" in outcome.out
    assert f"≤ {last['validation_nats_per_token']:.4f}" in outcome.out


@pytest.mark.nightly
def test_a_uniform_student(tmp_path, text):
    """By consistency, on the score; without a recipe the components are those of the teacher."""
    config = tiny_run.config("uniform", corpus=str(text))
    teacher = tiny_run.make_run(tmp_path / "teacher", config)
    outcome = train(
        *(tmp_path / "run", "--teacher", teacher, *STUDENT, "--data.corpus", text),
        *("--training.steps", 4, "--training.batch-size", 8, "--training.log-every", 1),
        recipe=(),
    )
    assert outcome.code == 0, outcome.err
    assert read_config(tmp_path / "run").process.name == "uniform"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(0 < json.loads(line)["loss"] < 100 for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (STUDENT, "--objective self_distill has no teacher: name a trained model by --teacher"),
        (
            ("--teacher", "RUN"),
            "a teacher goes with --objective self_distill or latent_distill, got lambda_dce",
        ),
        (("--teacher", "nowhere", *STUDENT), "--teacher nowhere: "),
        (
            ("--teacher", "RUN", "--init-from", "RUN", *STUDENT),
            "but the student starts from its teacher RUN: leave out one of the two",
        ),
        (("--init-from", "RUN", *STUDENT), "name the model by --teacher instead"),
        (
            ("--teacher", "RUN", *STUDENT, "--training.steps", 5),
            "--training.steps is 5, and must be --objective.rounds × --objective.round-steps = 2 "
            "× 2 = 4",
        ),
        (
            ("--teacher", "RUN", *STUDENT, "--objective.teacher-steps", 6),
            "--objective.rounds is 2, but the 6 teacher_steps can be halved 1 times",
        ),
        (
            ("--teacher", "RUN", *STUDENT, "--data.length", 10),
            "--teacher RUN: its length is 12, and --data.length is 10",
        ),
        (
            ("--teacher", "RUN", *STUDENT, "--data.tokenizer", "bytes"),
            "--teacher RUN: its tokenizer is characters, and --data.tokenizer is bytes",
        ),
        (
            ("--teacher", "RUN", *STUDENT, "--process", "uniform", "--parameterization", "score"),
            "--teacher RUN: its process is absorbing, and that of the student uniform",
        ),
        (
            ("--teacher", "RUN", *STUDENT, "--network.num-layers", 2),
            "its network.num_layers is 1 and --network.num-layers is 2",
        ),
        (
            ("--teacher", "RUN", *STUDENT, "--parameterization", "score"),
            "on an absorbing process it needs the parameterization conditional",
        ),
    ],
)
def test_mistakes_are_one_line(trunk, tmp_path, text, flags, message):
    steps = () if "--training.steps" in flags else ("--training.steps", 4)
    flags = [str(flag).replace("RUN", str(trunk)) for flag in flags]
    outcome = train(tmp_path / "new", "--data.corpus", text, *steps, *flags)
    assert outcome.code == 2
    [line] = outcome.errors
    assert message.replace("RUN", str(trunk)) in line
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").glob("*.json*"))
