"""Perplexities and diversity by hand, under judges whose law is known."""

from itertools import pairwise, product

import numpy as np
import pytest

from sedd.evaluation.diversity import longest_repeat, measure_diversity
from sedd.evaluation.generative_perplexity import generative_perplexity, pooled_perplexity
from sedd.evaluation.judges import WindowJudge

LAW = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])  # of the next of a, b, c
START = np.array([0.5, 0.25, 0.25])


def nats(ids_BL, scored_BL):
    """-log p of the scored tokens of a chain."""
    probs_BL = LAW[np.roll(ids_BL, 1, axis=1), ids_BL]
    probs_BL[:, 0] = START[ids_BL[:, 0]]
    return -np.where(scored_BL, np.log(probs_BL), 0).sum(1)


def encode(texts):
    return [np.array([ord(c) - ord("a") for c in text], np.int32) for text in texts]


def chain(**options):
    options = {"context": 16, "scores_first": True, "batch_size": 3} | options
    return WindowJudge(
        name="a chain", encode=encode, nats=nats, hidden=lambda ids_BL: LAW[ids_BL], **options
    )


def by_hand(text):
    indices = encode([text])[0]
    return -np.log(START[indices[0]]) - sum(np.log(LAW[i, j]) for i, j in pairwise(indices))


def test_judge_in_batches_and_windows():
    texts = ["abc", "", "c", "bca" * 5, "aaaa"]
    judgement = chain().judge(texts)
    assert judgement.tokens_S.tolist() == [3, 0, 1, 15, 4]
    assert judgement.nats_S == pytest.approx([by_hand(t) if t else 0 for t in texts])
    # In windows of 4 each window starts anew.
    judgement = chain(context=4).judge(texts)
    parts = ["bcab", "cabc", "abca", "bca"]
    assert judgement.nats_S[3] == pytest.approx(sum(map(by_hand, parts)))
    # Without a law of the first token it is given, in every window.
    judgement = chain(context=4, scores_first=False).judge(texts)
    assert judgement.tokens_S.tolist() == [2, 0, 0, 11, 3]
    first = sum(-np.log(START[ord(p[0]) - ord("a")]) for p in parts)
    assert judgement.nats_S[3] == pytest.approx(sum(map(by_hand, parts)) - first)


def test_both_averages_and_their_errors():
    texts = ["abc", "", "cc", "bca"]
    found = generative_perplexity(texts, chain())
    rates = np.array([by_hand(t) / len(t) for t in texts if t])
    total = sum(by_hand(t) for t in texts if t)
    assert found.samples.mean_of_nats[0] == pytest.approx(np.exp(total / 8))
    assert found.samples.mean_of_perplexities == pytest.approx(
        (np.exp(rates).mean(), np.exp(rates).std(ddof=1) / 3**0.5)
    )
    assert found.samples.num_unscored == 1
    assert any("1 samples have no token" in w for w in found.warnings)
    assert any("no real text" in w for w in found.warnings)
    assert generative_perplexity(["ab"], chain()).samples.mean_of_nats[1] is None
    with pytest.raises(ValueError, match="a chain scores no token of these 2 texts"):
        generative_perplexity(["", ""], chain())


def test_the_error_is_the_spread_of_the_estimate():
    """Over 300 corpora of 50 chains: the mean stated error within 10 % of the actual spread."""
    rng = np.random.default_rng(0)

    def draw():
        ids = [rng.choice(3, p=START)]
        while len(ids) < rng.integers(4, 16):
            ids.append(rng.choice(3, p=LAW[ids[-1]]))
        return "".join("abc"[i] for i in ids)

    pool = [draw() for _ in range(3000)]
    judged = chain(batch_size=500).judge(pool)
    draws = rng.integers(0, 3000, (300, 50))
    both = [pooled_perplexity(judged.nats_S[i], judged.tokens_S[i]) for i in draws]
    values, errors = np.array(both).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)


def test_repetition_is_warned_of_and_variety_is_not():
    rng = np.random.default_rng(1)
    varied = ["".join(rng.choice(list("abc"), 16)) for _ in range(40)]
    fine = generative_perplexity(varied[:20], chain(), reference=varied[20:])
    assert not fine.warnings
    gamed = generative_perplexity(["a" * 16] * 20, chain(), reference=varied[20:])
    assert gamed.samples.mean_of_nats[0] < fine.reference.mean_of_nats[0]  # "better"
    assert ["far below" in w for w in gamed.warnings] == [True]
    short = generative_perplexity([text[:8] for text in varied[:20]], chain(), reference=varied)
    assert ["depend on the length" in w for w in short.warnings] == [True]


def test_diversity_by_hand():
    found = measure_diversity([np.array([5, 5, 5, 5, 5, 5]), np.array([1, 2, 1])], tokenization="t")
    assert found.length == pytest.approx((4.5, 1.5))
    log = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    assert found.entropy[0] == pytest.approx(log / 2)
    assert found.distinct == pytest.approx((3 / 9, 3 / 7, 2 / 5, 1 / 3))
    assert found.repeated_4grams[0] == pytest.approx((2 / 3 + 0) / 2)
    assert found.longest_repeat[0] == pytest.approx((5 / 6 + 1 / 3) / 2)
    empty = measure_diversity([np.zeros(0, int), np.array([7])], tokenization="t")
    assert empty.entropy[0] == 0
    assert empty.distinct == (1, 0, 0, 0)


def test_longest_repeat_against_all_pairs():
    rng = np.random.default_rng(2)
    for size in (1, 2, 7, 30):
        for _ in range(20):
            ids = rng.integers(0, 3, size)
            longest = 0
            for i, j in product(range(size), repeat=2):
                k = 0
                while i < j and j + k < size and ids[i + k] == ids[j + k]:
                    k += 1
                longest = max(longest, k)
            assert longest_repeat(ids) == longest


def test_result_as_section_and_json():
    found = generative_perplexity(["abcabc", "cab"], chain(), reference=["bcabca", "acb"])
    section = found.section()
    assert "the first token of a text is scored" in section.text
    assert len(section.tables[0].rows) == 10
    assert section.figures[0].axes[0].get_yscale() == "log"
    plain = found.to_json()
    assert plain["samples"]["diversity"]["tokenization"] == "a chain"
    assert plain["reference"]["mean_of_nats"][0] > 1
