"""Requests of evaluation tasks, answered by a model without lm-eval."""

import dataclasses
import sys

import chat_toy
import numpy as np
import pytest
import tiny_run

import sedd
from sedd.errors import FieldError, UserError
from sedd.harness import evaluate_tasks
from sedd.harness.answering import Harness, Question, continued, cut

LENGTH = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("radd")
    return sedd.load(tiny_run.make_run(directory, tiny_run.config("radd", length=LENGTH)))


def harness(model, **options):
    return Harness(model=model, **{"draws": 4, "batch_size": 4, **options})


QUESTIONS = [  # rows of 13 and 14 tokens have one padded length
    Question(context="the cat", max_new_tokens=6, temperature=1.0),
    Question(context="a dog saw", max_new_tokens=5, top_k=3),
    Question(context="the cat", max_new_tokens=6, temperature=1.0),
    Question(context="", max_new_tokens=12, top_p=0.9, temperature=0.7),
]


@pytest.mark.nightly
def test_answers_do_not_depend_on_the_batch_but_on_the_seed(model):
    together = harness(model).answer(QUESTIONS)
    # Of equal questions the first stays the first; only their noise differs.
    order = [3, 0, 1, 2]
    apart = harness(model, batch_size=1).answer([QUESTIONS[i] for i in order])
    assert apart == [together[i] for i in order]
    assert together[0] != together[2]
    other = harness(model, seed=1).answer(QUESTIONS)
    assert [one.text for one in other] != [one.text for one in together]
    for question, one in zip(QUESTIONS, together, strict=True):
        assert 1 <= one.calls <= question.max_new_tokens
        assert len(one.text) == one.tokens <= question.max_new_tokens


def test_the_sampler_decides_the_calls(model):
    steps = sedd.samplers.options("event_jump", steps=2)
    (drawn,) = harness(model, sampler=steps).answer(QUESTIONS[3:])
    assert 1 <= drawn.calls <= 2
    with pytest.raises(UserError, match="steps"):
        harness(model, sampler=sedd.samplers.options("event_jump", steps=0))
    with pytest.raises(UserError, match="needs a verifier"):
        harness(model, sampler="best_of_n")


def test_an_answer_ends_at_the_end_of_a_document_and_before_until(model, monkeypatch):
    eos = model.tokenizer.eos_id
    ids = [*model.tokenizer.encode_batch(["on a mat"])[0].tolist(), eos, 3, 4]

    def drawn(model, keys_B, sampler, clamps, spans, reshape):
        assert all(clamp.end_ids == (eos,) for clamp in clamps)
        tokens = np.stack([np.append(clamp.tokens_L[clamp.fixed_L], ids) for clamp in clamps])
        return dataclasses.make_dataclass("Result", ["tokens", "calls"])(tokens, np.array([7]))

    monkeypatch.setattr("sedd.harness.answering.draw", drawn)
    for until, text in [((), "on a mat"), (("mat", " a", ""), "on"), (("dog",), "on a mat")]:
        question = Question(context="cat ", until=until, max_new_tokens=len(ids))
        (one,) = harness(model).answer([question])
        assert (one.text, one.tokens, one.calls) == (text, 8, 7)


def test_text_behind_a_context_keeps_its_leading_space():
    tokenizer = chat_toy.tokenizer(None)
    context, ids = (tokenizer.encode_batch([text])[0].tolist() for text in ("a cat", " sat"))
    assert continued(tokenizer, context, ids) == " sat"
    assert cut("one two one", ("two", "one")) == ""


def test_windows_cut_a_text_without_losing_a_token(model):
    text = tiny_run.text(words=30)[:85]
    one = harness(model, max_length=9)
    windows = one.windows(text)
    ids = one.encode(text)
    assert [token for _, part in windows for token in part] == ids
    assert windows[0] == ([model.tokenizer.bos_id], ids[:8])
    assert windows[1] == (ids[7:8], ids[8:16])
    context, last = windows[-1]
    assert len(last) < 8
    assert context == ids[-9 : -len(last)]  # as long as possible
    assert one.windows("") == []


def test_requests_that_are_too_long_or_empty_are_refused_before_anything_is_scored(model):
    one = harness(model)
    short, long = ([1, 2], [3]), ([1] * 20, [2] * 5)
    with pytest.raises(UserError, match=r"25 tokens \(20 of context, 5 of answer\).*limit of 24"):
        one.score([short, long])
    with pytest.raises(UserError, match="a continuation has no tokens"):
        one.score([short, ([1, 2], [])])
    with pytest.raises(UserError, match=r"31 tokens \(7 of context, 24 of answer\)"):
        one.answer([QUESTIONS[0], Question(context="the cat", max_new_tokens=24)])
    assert len(harness(model, max_length=25).score([long]).nats_S) == 1


def test_chats(model):
    """A context with special tokens, whose answer ends where the template ends a turn."""
    with pytest.raises(UserError, match="has no chat template"):
        harness(model, chat=True)
    tokenizer = chat_toy.tokenizer(chat_toy.CHATML)
    one = harness(dataclasses.replace(model, tokenizer=tokenizer), chat=True)
    messages = [chat_toy.user("a <|im_end|> b"), chat_toy.answer("c"), chat_toy.user("d")]
    text = one.conversation(messages, answer=True)
    assert text.endswith("<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n")
    specials = tokenizer.specials
    assert one.encode(text).count(specials["<|im_end|>"]) == 4  # and not the user's
    assert harness(one.model).encode("<|im_end|>") != [specials["<|im_end|>"]]
    begun = one.conversation([messages[0], chat_toy.answer("Answer:")], answer=False)
    assert begun.endswith("<|im_start|>assistant\nAnswer:")
    with pytest.raises(UserError, match="unknown role 'usr'"):
        one.conversation([{"role": "usr", "content": "a"}], answer=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 5}, "draws must be a positive multiple of 4, got 5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"seed": -1}, "seed must be in"),
        ({"likelihood": "exact"}, "likelihood must be one of bound, ordered, got 'exact'"),
    ],
)
def test_mistakes(model, options, message):
    with pytest.raises(FieldError, match=message):
        harness(model, **options)


def test_a_model_without_a_tokenizer_is_refused(model):
    with pytest.raises(UserError, match="it has no tokenizer"):
        harness(dataclasses.replace(model, tokenizer=None))


def test_without_lm_eval_the_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"needs lm-eval .*pip install -e '\.\[harness\]'"):
        evaluate_tasks(harness(model), ["arc_easy"])
