"""Conversations: what templates write, which tokens are special, and what is given."""

import json

import numpy as np
import pytest
from chat_toy import CHATML, LLADA, QWEN3, SPECIAL, answer, tokenizer, user, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.data.chat import (
    check_messages,
    conversation,
    end_ids,
    end_of_turn,
    prompt_and_completion,
    render,
)
from sedd.data.tokenizer_directory import QWEN_PIECES, read_tokenizer_directory
from sedd.data.tokenizers import HIDDEN, Bytes, tokenizer_from_json
from sedd.errors import UserError

ASKED = [user("Hi")]
ANSWERED = [*ASKED, answer("Hello!")]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
# (template, settings, text before an answer, the answer with its end)
FAMILIES = {
    # github.com/ML-GSAI/LLaDA, and the prompts written out in d1 and dllm
    "llada": (
        LLADA,
        {},
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Hello!<|eot_id|>",
    ),
    # Qwen2.5's, which Dream and Fast-dLLM v2 share
    "dream": (
        CHATML,
        {},
        f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello!<|im_end|>",
    ),
    # Qwen3's, with thoughts left to the model (SDAR) or left out (dllm's A2D)
    "sdar": (
        QWEN3,
        {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        EMPTY_THOUGHT + "Hello!<|im_end|>",
    ),
    "a2d": (
        QWEN3,
        {"enable_thinking": False},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + EMPTY_THOUGHT,
        "Hello!<|im_end|>",
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    template, options, before, after = FAMILIES[request.param]
    return tokenizer(template, **options), before, after


def test_what_a_family_writes(family):
    model, before, after = family
    assert render(model, ASKED, answer=True) == before
    document = conversation(model, ANSWERED)
    assert document.text == before + after
    assert document.given == ((0, len(before)),)
    assert after.endswith(end_of_turn(model) or "nothing")
    assert model.specials[end_of_turn(model)] in end_ids(model)
    assert model.eos_id in end_ids(model)


def test_every_answer_is_left_to_the_model():
    turns = [*ANSWERED, user("And now?"), answer("Bye.")]
    document = conversation(tokenizer(LLADA), turns)
    cuts = [document.text[a:b] for a, b in document.given]
    assert [part.rpartition("\n\n")[0][-30:] for part in cuts] == [
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"[-30:]
    ] * 2
    free = document.text
    for part in cuts:
        free = free.replace(part, "|", 1)
    assert free == "|Hello!<|eot_id|>|Bye.<|eot_id|>"
    last = conversation(tokenizer(LLADA), turns, last_only=True)
    assert last.text == document.text
    assert last.text[last.given[0][1] :] == "Bye.<|eot_id|>"
    assert len(last.given) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused():
    model = tokenizer(QWEN3, enable_thinking=False)
    turns = [*ANSWERED, user("And now?"), answer("Bye.")]
    with pytest.raises(UserError, match=r"before message 2 in another way .*--data\.answers last"):
        conversation(model, turns)
    last = conversation(model, turns, last_only=True)
    assert last.text[last.given[-1][1] :] == "Bye.<|im_end|>"


def test_a_template_without_special_tokens():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    model = tokenizer(plain + "{% if add_generation_prompt %}assistant: {% endif %}")
    document = conversation(model, [*ANSWERED, user("x"), answer("y")])
    assert document.text == "user: Hi\nassistant: Hello!\nuser: x\nassistant: y\n"
    assert [document.text[a:b] for a, b in document.given] == [
        "user: Hi\nassistant: ",
        "user: x\nassistant: ",
    ]
    assert end_of_turn(model) is None


PARTS = ("<|im_end|>", "<|eot_id|>", HIDDEN, "<", "a", "é", "\n")


@given(parts=st.lists(st.sampled_from(PARTS), max_size=8))
@settings(deadline=None, max_examples=50)
def test_special_tokens_come_from_the_template_alone(parts):
    """Whatever a message says, its ids are those of the text without special tokens."""
    text = "".join(parts)
    model = tokenizer(CHATML)
    document = conversation(model, [user(text), answer(text)])
    ids, given_L = model.encode_spans(document.text, document.given)
    special = np.isin(ids, list(model.specials.values()))
    assert special.sum() == 6  # a start and an end around each of three turns
    own = model.encode_batch([text])[0].tolist()
    assert ids[~given_L].tolist() == [*own, model.specials["<|im_end|>"]]
    pair = prompt_and_completion(model, text, text)
    ids, given_L = model.encode_spans(*pair)
    assert (ids[given_L].tolist(), ids[~given_L].tolist()) == (own, own)


def test_the_ids_are_those_of_the_library():
    """For messages without special tokens, the ids of the rendered text as the library has them."""
    model = tokenizer(CHATML)
    document = conversation(model, [user("Wie heißt du?"), answer("No\n name  ")])
    ids, _ = model.encode_spans(document.text)
    model.backend.encode_special_tokens = False
    assert ids.tolist() == model.backend.encode(document.text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", 'must be a list of messages, got "hello"'),
        ([], "must be a list of messages, got \\[\\]"),
        (["hello"], 'number 1: expected an object, got "hello"'),
        ([{"role": "user"}], "number 1: no 'content', the keys are role"),
        ([{}], "number 1: no 'role', the keys are none"),
        (
            [user("a"), {"role": "usr", "content": "b"}],
            "number 2: unknown role 'usr'; did you",
        ),
        ([{"role": "user", "content": None}], "number 1: 'content' must be a string, got null"),
    ],
)
def test_messages_that_are_none(messages, says):
    with pytest.raises(UserError, match=says):
        check_messages(messages)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "tokenizer 'toy' has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "template .*: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "template of tokenizer 'toy': can only concatenate str"),
        ("{% for m in messages %}", "template of tokenizer 'toy': Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "template of tokenizer 'toy': access to attribute"),
        ("{{ messages.clear() }}", "template of tokenizer 'toy': access to attribute"),
    ],
)
def test_a_template_that_fails_is_one_line(template, says):
    with pytest.raises(UserError, match=says) as error:
        render(tokenizer(template), ASKED, answer=True)
    assert "\n" not in str(error.value)


def test_what_templates_are_written_for():
    """The functions and settings of chat templates, as ``transformers`` has them."""
    source = """\
{%- set ns = namespace(n=0) %}
{%- for m in messages %}
    {%- if loop.index > 1 %}{% break %}{% endif %}
    {%- generation %}{{ m | tojson }}{% endgeneration %}
{%- endfor %}
{{ strftime_now('%Y')[:2] }}"""
    text = render(tokenizer(source), [user("<é>"), user("b")], answer=False)
    assert text == '{"role": "user", "content": "<é>"}20'


def test_an_answer_comes_last_in_training():
    with pytest.raises(UserError, match="must be of the role assistant, got 'user'"):
        conversation(tokenizer(CHATML), ASKED)


def test_any_tokenizer_takes_prompts_with_completions():
    ids, given_L = Bytes().encode_spans(*prompt_and_completion(Bytes(), "ab", "é"))
    assert ids.tolist() == [97, 98, 195, 169]
    assert given_L.tolist() == [True, True, False, False]


def write(folder, **files):
    """The files of a directory, by their stems; a template is no JSON."""
    for name, content in files.items():
        suffix = "jinja" if name == "chat_template" else "json"
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.{suffix}").write_text(text)


def test_a_directory(tmp_path):
    assert read_tokenizer_directory(tmp_path) is None
    write(
        tmp_path,
        tokenizer=vocabulary(),
        tokenizer_config={
            "bos_token": {"content": "<|startoftext|>", "lstrip": False},
            "eos_token": "<|eot_id|>",
            "pad_token": "<|endoftext|>",
            "chat_template": [{"name": "default", "template": CHATML}],
            "added_tokens_decoder": {
                "264": {"content": "<|extra|>", "special": False, "__type": "AddedToken"},
                "265": {"content": "<think>", "special": False},
            },
        },
        special_tokens_map={"mask_token": "<|mask|>", "eos_token": "not this one"},
        generation_config={"eos_token_id": [5, 7]},
    )
    found = read_tokenizer_directory(tmp_path, enable_thinking=False)
    assert found is not None
    ids = found.specials
    assert ids.keys() == {*SPECIAL, "<|extra|>"}
    assert (found.num_tokens, found.eos_id, found.pad_id, found.bos_id) == (
        266,
        *(ids[name] for name in ("<|eot_id|>", "<|endoftext|>", "<|startoftext|>")),
    )
    assert found.named_mask == ids["<|mask|>"]
    assert found.turns.template == CHATML
    assert dict(found.turns.variables)["enable_thinking"] is False
    assert set(end_ids(found)) == {ids["<|im_end|>"], found.eos_id, found.pad_id, 5, 7}
    again = tokenizer_from_json(json.loads(json.dumps(found.to_json())))
    assert again.fingerprint() == found.fingerprint()
    assert render(again, ASKED, answer=True) == render(found, ASKED, answer=True)
    masked = read_tokenizer_directory(tmp_path, mask=found.named_mask)
    assert masked.num_tokens == found.num_tokens - 1
    document = conversation(masked, [user("<|mask|>"), answer("a")])
    np.testing.assert_array_equal(
        masked.encode_spans(*document)[0], masked.swapped(found.encode_spans(*document)[0])
    )
    assert set(end_ids(masked)) == set(masked.swapped(np.array(end_ids(found))).tolist())
    write(tmp_path, chat_template=LLADA)
    assert read_tokenizer_directory(tmp_path).turns.template == LLADA


@pytest.mark.parametrize(("family", "thought"), [("A2DQwen3LMHeadModel", EMPTY_THOUGHT), ("", "")])
def test_the_family_of_a_directory_sets_its_template(tmp_path, family, thought):
    config = {"chat_template": QWEN3, "eos_token": "<|im_end|>"}
    write(tmp_path, tokenizer=vocabulary(), tokenizer_config=config)
    write(tmp_path, config={"architectures": [family]})
    found = read_tokenizer_directory(tmp_path)
    assert render(found, ASKED, answer=True) == FAMILIES["sdar"][2] + thought


def test_an_added_token_with_another_id_is_refused(tmp_path):
    config = {"added_tokens_decoder": {"300": {"content": "<|far|>", "special": True}}}
    write(tmp_path, tokenizer=vocabulary(), tokenizer_config=config)
    with pytest.raises(UserError, match=r"far.* has the id 300 in its files, and gets the id 264"):
        read_tokenizer_directory(tmp_path)


def test_a_vocabulary_with_merges(tmp_path):
    """A tokenizer of Qwen's kind without ``tokenizer.json``, as Dream has."""
    letters = json.loads(vocabulary())["model"]["vocab"]
    merges = ["a b", "Ġ ab"]
    words = {**letters, "ab": 256, "Ġab": 257}
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    write(
        tmp_path,
        vocab=words,
        tokenizer_config={"tokenizer_class": "DreamTokenizer", "mask_token": "<|mask|>"},
        added_tokens={"<|endoftext|>": 258, "<|mask|>": 259},
    )
    found = read_tokenizer_directory(tmp_path)
    assert found is not None
    assert (found.eos_id, found.named_mask, found.num_tokens) == (258, 259, 260)
    assert found.encode_batch(["ab ab"])[0].tolist() == [256, 257]
    assert found.decode(found.encode_batch(["1 é <|mask|>"])[0]) == "1 é <|mask|>"
    assert QWEN_PIECES in found.source.replace("\\\\", "\\")
    write(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt of a GPT2Tokenizer"):
        read_tokenizer_directory(tmp_path)


@pytest.mark.parametrize(("content", "says"), [("{", "not readable as JSON"), ("[]", "an object")])
def test_a_damaged_file_is_named(tmp_path, content, says):
    write(tmp_path, tokenizer=vocabulary(), tokenizer_config=content)
    with pytest.raises(UserError, match=f"tokenizer_config.json: .*{says}"):
        read_tokenizer_directory(tmp_path)
