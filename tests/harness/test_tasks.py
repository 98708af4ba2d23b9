"""Tasks of lm-eval in local files, evaluated offline by the command and from Python."""

import json
import math

import chat_toy
import numpy as np
import pytest
import tiny_run

import sedd
from sedd.commands.harness import generation_options
from sedd.errors import UserError
from sedd.harness import Harness, evaluate_tasks, language_model

LENGTH = 40
CHOICES = [
    {"subject": "cat", "choices": ["sat", "dog", "a"], "answer": 0},
    {"subject": "dog", "choices": ["run", "a", "far"], "answer": 2},
    {"subject": "mat", "choices": ["on", "my", "saw"], "answer": 1},
]
TEXTS = [{"page": "the cat sat on a mat and saw my dog run far away"}, {"page": "my dog"}]
TASKS = {
    "toy_choice": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "the {{subject}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "toy_answer": (
        CHOICES,
        {
            "output_type": "generate_until",
            "doc_to_text": "the {{subject}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "toy_text": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _lm_eval(tmp_path_factory):
    """lm-eval without the network, with its caches in a temporary folder."""
    reason = "lm-eval, of the optional dependency `harness`, is not installed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        pytest.importorskip("lm_eval", reason=reason)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks, whose data are JSON files."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (documents, task) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        read = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        task = {"task": name, "test_split": "test", "target_delimiter": " ", **read, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("radd")
    return tiny_run.make_run(directory, tiny_run.config("radd", length=LENGTH))


@pytest.mark.nightly
def test_the_command_evaluates_three_tasks(run, tasks, tmp_path):
    files = {"--json": tmp_path / "results.json", "--records": tmp_path / "records.jsonl"}
    outcome = tiny_run.call(
        "harness",
        *("--checkpoint", run, "--include-path", tasks, "--tasks", ",".join(TASKS)),
        *("--draws", 8, "--batch-size", 4, "--steps", 3),
        *(word for flag in files.items() for word in flag),
    )
    assert (outcome.code, outcome.errors) == (0, [])
    assert "bounds (k_dce, 8 draws)" in outcome.out
    results = json.loads(files["--json"].read_text())
    records = [json.loads(line) for line in files["--records"].read_text().splitlines()]
    of = {name: [r for r in records if r["task"] == name] for name in TASKS}

    # The metrics are those of the recorded scores.
    nats = np.array([r["nats"] for r in of["toy_choice"]]).reshape(3, 3)
    right = nats.argmin(1) == [document["answer"] for document in CHOICES]
    choice = results["results"]["toy_choice"]
    assert choice["acc,none"] == pytest.approx(right.mean())
    assert 0 <= choice["acc_mc_stderr,none"] < 0.5
    assert [r["exact"] for r in of["toy_choice"]] == [False] * 9

    total = sum(r["nats"] for r in of["toy_text"])
    words = sum(len(text["page"].split()) for text in TEXTS)
    text = results["results"]["toy_text"]
    assert text["word_perplexity,none"] == pytest.approx(math.exp(total / words))
    # The error of exp(x) is that of x times exp(x), to first order; it is estimated from 64 draws.
    error = math.sqrt(sum(r["nats_error"] ** 2 for r in of["toy_text"])) / words
    expected = text["word_perplexity,none"] * error
    assert text["word_perplexity_mc_stderr,none"] == pytest.approx(expected, rel=0.5)

    assert all(len(r["text"]) <= r["tokens"] <= 6 for r in of["toy_answer"])
    calls = [r["calls"] for r in of["toy_answer"]]
    assert 1 <= min(calls) <= max(calls) == 3
    about = results["sedd"]
    assert (about["likelihood"], about["draws"], about["seed"]) == ("bound", 8, 0)
    assert about["tasks"]["toy_answer"]["calls_per_answer"] == pytest.approx(np.mean(calls))
    assert results["config"]["model_digest"] == about["model_digest"]


def test_scores_from_python_do_not_depend_on_the_batch(run, tasks):
    model = sedd.load(run)

    def evaluate(**options):
        harness = Harness(model=model, draws=8, **options)
        return evaluate_tasks(harness, [str(tasks / "toy_choice.yaml")], limit=2)[1]

    here, there, other = evaluate(), evaluate(batch_size=2), evaluate(seed=1)
    assert len(here) == 6
    for one, two, three in zip(here, there, other, strict=True):
        assert one["nats"] == pytest.approx(two["nats"], rel=1e-5)
        assert one["nats_error"] == pytest.approx(two["nats_error"], rel=1e-3)
        assert one["nats"] != three["nats"]


def test_the_interface_that_lm_eval_calls(run):
    harness = Harness(model=sedd.load(run), likelihood="ordered")
    lm = language_model(harness, [])
    context, continuation = lm._encode_pair("the cat ", "sat")
    assert harness.tokenizer.decode(continuation) == " sat"
    ((nats, greedy),) = lm._loglikelihood_tokens([(("", ""), context, continuation)])
    assert nats == -harness.score([(context, continuation)]).nats_S[0]
    assert greedy is False
    assert lm.max_length == LENGTH
    assert lm.eot_token_id == harness.tokenizer.eos_id
    assert harness.tokenizer.name in lm.tokenizer_name
    assert lm.chat_template(True) == ""
    assert harness.describe()["likelihood"] == "exact"


def test_a_chat_task(run, tasks):
    """Examples are earlier turns, and the template writes the question."""
    tokenizer = chat_toy.tokenizer(chat_toy.CHATML)
    asked = []

    class Listening(Harness):
        def answer(self, questions):
            asked.extend(questions)
            return []

        @property
        def tokenizer(self):
            return tokenizer

    harness = Listening(model=sedd.load(run), chat=True)
    with pytest.raises(ValueError, match="zip"):  # lm-eval misses the answers
        evaluate_tasks(
            harness, [str(tasks / "toy_answer.yaml")], num_fewshot=1, limit=1, system="Be brief."
        )
    (question,) = asked
    assert question.context.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert question.context.count("<|im_start|>assistant\n") == 2
    assert question.context.endswith("the cat<|im_end|>\n<|im_start|>assistant\n")
    assert (question.until, question.max_new_tokens, question.temperature) == (("\n",), 6, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "toy_choice", "--max-length", "9"], "is longer than the limit of 9"),
        (["--tasks", "toy_chice"], "toy_chice"),
        (["--tasks", "toy_choice", "--likelihood", "exact"], "--likelihood"),
        (["--tasks", "toy_choice", "--draws", "6"], "--draws must be a positive multiple of 4"),
        (["--tasks", "toy_choice", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--tasks", "toy_choice", "--chat"], "has no chat template"),
        (["--tasks", "toy_answer", "--gen-kwargs", "num_beams=2"], "--gen-kwargs num_beams=2"),
        (["--tasks", "toy_answer", "--gen-kwargs", "max_gen_toks=99"], "99 of answer"),
    ],
)
def test_mistakes_are_one_line(run, tasks, flags, message, monkeypatch):
    # lm-eval's own tasks, thousands of files, are not needed to say that a task is unknown.
    monkeypatch.setattr("sedd.harness.tasks.DEFAULT_TASKS", (False,))
    outcome = tiny_run.call("harness", "--checkpoint", run, "--include-path", tasks, *flags)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]


def test_data_that_cannot_be_read(run, tasks, tmp_path):
    task = json.loads((tasks / "toy_choice.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "missing.jsonl")
    (tmp_path / "toy.yaml").write_text(json.dumps(task))
    with pytest.raises(UserError, match=r"tasks .*toy\.yaml: .*missing\.jsonl"):
        evaluate_tasks(Harness(model=sedd.load(run)), [str(tmp_path / "toy.yaml")])


def test_tasks_that_run_code_are_to_be_confirmed(run, tasks, tmp_path):
    task = json.loads((tasks / "toy_choice.yaml").read_text())
    (tmp_path / "toy.yaml").write_text(json.dumps({**task, "unsafe_code": True}))
    harness = Harness(model=sedd.load(run), draws=8, batch_size=4)
    arguments = (harness, [str(tmp_path / "toy.yaml")])
    with pytest.raises(UserError, match="task toy_choice runs code that the model writes"):
        evaluate_tasks(*arguments)
    results, _ = evaluate_tasks(*arguments, confirm_run_unsafe_code=True)
    assert "acc,none" in results["results"]["toy_choice"]


def test_generation_options():
    assert generation_options(["temperature=0.5", 'until=["a", "b"]', "do_sample=true"]) == {
        "temperature": 0.5,
        "until": ["a", "b"],
        "do_sample": True,
    }
    assert generation_options(["until=Question:"]) == {"until": "Question:"}
