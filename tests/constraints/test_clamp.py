"""Infilling: which positions are given, and which texts with gaps cannot be read."""

import numpy as np
import pytest

from sedd.constraints.clamp import MAX_LENGTH, free, from_hidden, from_infill, from_prompt
from sedd.data.tokenizers import BytePairs, Characters
from sedd.errors import UserError

TOKENIZER = Characters.of("characters", "abcdefghijklmnopqrstuvwxyz {}:0123456789", eos=True)


def shown(clamp) -> str:
    """The text of a clamp, ``_`` where it is free."""
    return "".join(
        TOKENIZER.decode([token]) if fixed else "_"
        for token, fixed in zip(clamp.tokens_L, clamp.fixed_L, strict=True)
    )


@pytest.mark.parametrize(
    ("length", "given", "expected"),
    [
        (4, {}, "____"),
        (5, {"prompt": "ab"}, "ab___"),
        (5, {"suffix": "ab"}, "___ab"),
        (5, {"prompt": "ab", "suffix": "c"}, "ab__c"),
        (3, {"prompt": "ab", "suffix": "c"}, "abc"),
        (3, {"prompt": "abc"}, "abc"),
    ],
)
def test_prompt_and_suffix(length, given, expected):
    assert shown(from_prompt(TOKENIZER, length, **given)) == expected


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("ab{mask:3}cd", None, "ab___cd"),
        ("ab{mask}cd", None, "ab_cd"),
        ("{mask:2}ab{mask:1}", None, "__ab_"),
        ("a{mask:2}{mask:3}b", None, "a_____b"),
        ("{mask: 2 }a", None, "__a"),
        ("{mask:4}", None, "____"),
        ("a{mask:2}b", 7, "a__b___"),
        ("a{mask:2}b", 4, "a__b"),
        ("abc", 5, "abc__"),
        ("", 2, "__"),
        ("a{b} {} {{mask:1}}", None, "a{b} {} {_}"),
        ("{masking} {mask:1}", None, "{masking} _"),
    ],
)
def test_infill(text, length, expected):
    clamp = from_infill(TOKENIZER, text, length)
    assert shown(clamp) == expected
    assert clamp.length == len(expected)
    assert (clamp.tokens_L[~clamp.fixed_L] == 0).all()


@pytest.mark.parametrize(
    ("text", "length", "gaps"),
    [
        ("{mask:3}{mask:4}", None, [(0, 3), (3, 4)]),
        ("{mask}{mask}{mask:2}a{mask:2}", None, [(0, 1), (1, 1), (2, 2), (5, 2)]),
        ("ab{mask:2}{mask:2}c", 9, [(2, 2), (4, 2), (7, 2)]),
        ("ab{mask:2} {mask:2}", 8, [(2, 2), (5, 3)]),
        ("ab", 5, [(2, 3)]),
    ],
)
def test_gaps_that_touch_stay_apart(text, length, gaps):
    assert from_infill(TOKENIZER, text, length).gaps == gaps


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("ab", " cd", " e"), "ab___ e"),
        (("", "abc", "d"), "___d"),
        (("ab", "c", ""), "ab_"),
        (("a", "", "b"), "ab"),
    ],
)
def test_a_hidden_stretch(texts, expected):
    assert shown(from_hidden(TOKENIZER, *texts)) == expected


def test_no_token_crosses_the_edge_of_a_hidden_stretch():
    pairs = BytePairs.of("pairs", [*(bytes([byte]) for byte in range(256)), b"ab"])
    clamp = from_hidden(pairs, "a", "bab", "b")
    assert clamp.tokens_L.tolist() == [ord("a"), 0, 0, ord("b")]
    assert clamp.gaps == [(1, 2)]


def test_gaps_of_a_prompt():
    assert from_prompt(TOKENIZER, 5, prompt="ab", suffix="c").gaps == [(2, 2)]
    assert from_prompt(TOKENIZER, 2, prompt="ab").gaps == []
    assert free(4).gaps == [(0, 4)]


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("abc", None, "has no gap; write {mask:12}"),
        ("", None, "has no gap"),
        ("a{mask:}b", None, "'{mask:}': the size must be a whole number of tokens"),
        ("a{mask:0}b", None, "'{mask:0}': the size"),
        ("a{mask:-1}b", None, "'{mask:-1}': the size"),
        ("a{mask:two}b", None, "'{mask:two}': the size"),
        ("a{mask:1.5}b", None, "'{mask:1.5}': the size"),
        ("a{mask:99999999999999}b", None, "the size must be a whole number"),
        ("a{mask:3 b", None, "'{mask:3 b' cannot be read"),
        ("a{mask", None, "'{mask' cannot be read"),
        ("a{mask12}", None, "'{mask12}' cannot be read"),
        ("a{ mask:3}{mask:1}", None, "'{ mask:3}' cannot be read"),
        ("a{MASK:3}{mask:1}", None, "'{MASK:3}' cannot be read"),
        ("a{mask:3}b", 4, "(5 tokens) does not fit into the length of 4"),
        ("a{mask:3}ä", None, "infill: character 'ä'"),
    ],
)
def test_infill_that_cannot_be_read(text, length, message):
    with pytest.raises(UserError) as caught:
        from_infill(TOKENIZER, text, length)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("length", "given", "message"),
    [
        (2, {"prompt": "abc"}, "prompt (3 tokens) do not fit into the length of 2"),
        (
            4,
            {"prompt": "abc", "suffix": "de"},
            "prompt (3 tokens) and suffix (2 tokens) do not fit",
        ),
        (0, {}, f"length must be in 1..{MAX_LENGTH}, got 0"),
        (MAX_LENGTH + 1, {}, "length must be in"),
        (9, {"suffix": "Ä"}, "suffix: character 'Ä'"),
    ],
)
def test_prompts_that_do_not_fit(length, given, message):
    with pytest.raises(UserError) as caught:
        from_prompt(TOKENIZER, length, **given)
    assert message in str(caught.value)


def test_free():
    assert free(3).tokens_L.dtype == np.int32
    assert shown(free(3)) == "___"
