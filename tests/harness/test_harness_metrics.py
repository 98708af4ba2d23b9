"""Monte-Carlo errors of metrics against the probability that a draw changes them."""

from types import SimpleNamespace

import numpy as np
from scipy import stats

from sedd.harness.metrics import metric_errors, score_errors, summary


class Choice:
    """A task of two choices, of which the first is right."""

    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, margins):
        self.instances = [
            SimpleNamespace(
                task_name="choice", doc_id=doc_id, idx=idx, doc={}, resps=[(score, False)]
            )
            for doc_id, margin in enumerate(margins)
            for idx, score in enumerate((margin, 0.0))
        ]

    def process_results(self, doc, results):
        (first, _), (second, _) = results
        return {"acc": float(first > second), "pair": (first, second)}

    def aggregation(self):
        return {"acc": np.mean, "pair": lambda pairs: float(np.mean([a for a, _ in pairs]))}


def errors(count, error):
    documents = range(count)
    return score_errors(
        {"task": task, "doc_id": doc_id, "idx": idx, "nats_error": own}
        for task, own in (("choice", error), ("other", 1.0))
        for doc_id in documents
        for idx in range(2)
    )


def test_the_error_of_an_accuracy():
    margins = np.random.default_rng(0).normal(0, 1, 400)
    task, error = Choice(margins), 0.3
    p = stats.norm.cdf(margins / (error * np.sqrt(2)))
    exact = np.sqrt((p * (1 - p)).sum()) / len(margins)
    got = metric_errors(task, errors(400, error), seed=0)
    # The relative error of a spread over 64 draws is 1/√126 = 9 %.
    assert abs(got["acc_mc_stderr,none"] / exact - 1) < 4 * 0.09
    assert abs(got["pair_mc_stderr,none"] / (error / np.sqrt(400)) - 1) < 4 * 0.09
    assert metric_errors(task, errors(400, error), seed=0) == got


def test_exact_scores_have_no_error_and_texts_none_of_this_kind():
    task = Choice([0.0, 1.0])
    assert set(metric_errors(task, errors(2, 0.0), seed=0).values()) == {0.0}
    task.OUTPUT_TYPE = "generate_until"
    assert metric_errors(task, {}, seed=0) == {}


def test_the_summary_of_records():
    got = summary(
        [
            {"task": "a", "nats": 1.0, "nats_error": 0.3, "exact": False},
            {"task": "a", "nats": 2.0, "nats_error": 0.0, "exact": True},
            {"task": "b", "calls": 3, "tokens": 5},
            {"task": "b", "calls": 5, "tokens": 7},
        ]
    )
    assert got == {
        "a": {"requests": 2, "exact": 0.5, "nats_error": np.sqrt(0.045)},
        "b": {"requests": 2, "calls_per_answer": 4.0, "tokens_per_answer": 6.0},
    }
