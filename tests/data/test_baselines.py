"""The trigram model against its definition, and frequencies against another text's."""

import numpy as np
import pytest

from sedd.data.baselines import CODE_POINTS, CharacterTrigram, joined_text, unigram_nats
from sedd.data.tokenizers import Bytes

TEXT = "the cat sat on the mat, the hat é\U0001f600 that the cat ate"


def witten_bell(text, context, character):
    """The formula, by counting substrings."""
    if context is None:
        return 1 / CODE_POINTS
    n = len(context)
    after = [text[i + n] for i in range(len(text) - n) if text[i : i + n] == context]
    shorter = witten_bell(text, context[1:] if context else None, character)
    if not after:
        return shorter
    distinct = len(set(after))
    return (after.count(character) + distinct * shorter) / (len(after) + distinct)


@pytest.mark.parametrize("texts", [["the mat"], ["a", "", "hé"], ["zq\U0001f601", "cat, that"]])
def test_the_trigram_model_is_witten_bell(texts):
    expected = [
        witten_bell(TEXT, text[max(i - 2, 0) : i], character)
        for text in texts
        for i, character in enumerate(text)
    ]
    nats, characters = CharacterTrigram.fit(TEXT).nats(texts)
    assert characters == len(expected)
    assert nats == pytest.approx(-np.log(expected).sum(), rel=1e-12)


@pytest.mark.parametrize("context", ["", "h", "th", "xy"])
def test_its_probabilities_sum_to_one(context):
    model = CharacterTrigram.fit(TEXT)
    before, _ = model.nats([context])
    alphabet = sorted(set(TEXT))
    nats = [model.nats([context + c])[0] - before for c in alphabet]
    unseen = model.nats([context + "\u4e00"])[0] - before  # every character that is not in it
    others = CODE_POINTS - len(alphabet)
    assert np.exp(-np.array(nats)).sum() + others * np.exp(-unseen) == pytest.approx(1, rel=1e-9)


def test_frequencies_of_another_text_cost_more_than_its_own():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(50, 0.3))
    train, held_out = rng.multinomial(10_000, probs), rng.multinomial(100, probs)
    own = held_out[held_out > 0] / held_out.sum()
    entropy = -(own * np.log(own)).sum()
    assert unigram_nats(train, held_out) > entropy  # Gibbs' inequality
    smoothed = (train + 0.5) / (train + 0.5).sum()
    expected = -(held_out / held_out.sum() * np.log(smoothed)).sum()
    assert unigram_nats(train, held_out) == pytest.approx(expected)


def test_text_of_tokens():
    ids = Bytes().encode_batch(["hé"])[0]
    assert joined_text(Bytes().token_bytes(), np.append(ids, Bytes().eos_id)) == "hé"
