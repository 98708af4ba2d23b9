"""Monte-Carlo errors of the metrics of evaluation tasks, and sums over their requests.

Tasks are those of lm-eval (``sedd.harness``), which this module does not import: it calls a task's
own functions again, with scores that other draws might have given.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

REPLICATES = 64  # draws of all scores, from which the errors of metrics are estimated
SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")  # output types of tasks


def score_errors(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int, int], float]:
    """The standard error of each score, by the task and the numbers of document and request."""
    return {
        (record["task"], record["doc_id"], record["idx"]): record["nats_error"]
        for record in records
        if "nats_error" in record
    }


def metric_errors(
    task: Any, error_of: Mapping[tuple[str, int, int], float], seed: int
) -> dict[str, float]:
    """Estimate the Monte-Carlo errors of a task's metrics: what other draws would change.

    The metrics are computed ``REPLICATES`` times from scores to which normal noise is added, each
    score with its own standard error; their spread is returned. This is an approximation (a
    parametric bootstrap): its scores are twice as noisy as the real ones, which averages out if
    the differences between scores are spread evenly on the scale of their errors.

    Args:
        task: an evaluated task of lm-eval; without likelihoods it has no such errors.
        error_of: from ``score_errors``; it may hold other tasks too.
        seed: the seed of the noise.

    Returns:
        The errors by the names that they have in the results, such as ``acc_mc_stderr,none``.
    """
    if task.OUTPUT_TYPE not in SCORED:
        return {}
    rng = np.random.default_rng(seed)
    documents: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        documents[instance.doc_id].append(instance)
    values: dict[str, list[list[Any]]] = defaultdict(lambda: [[] for _ in range(REPLICATES)])
    for doc_id, instances in documents.items():
        instances.sort(key=lambda instance: instance.idx)
        errors = np.array([error_of[i.task_name, doc_id, i.idx] for i in instances])
        noise_RI = rng.standard_normal((REPLICATES, len(errors))) * errors
        scores = [instance.resps[0] for instance in instances]
        once = None if errors.any() else task.process_results(instances[0].doc, scores)
        for replicate, noise_I in enumerate(noise_RI):
            metrics = once
            if metrics is None:
                moved = [_moved(score, n) for score, n in zip(scores, noise_I, strict=True)]
                metrics = task.process_results(instances[0].doc, moved)
            for metric, value in metrics.items():
                values[metric][replicate].append(value)
    aggregate = task.aggregation()
    spread = {}
    for metric, replicates in values.items():
        each = [aggregate[metric](one) for one in replicates] if metric in aggregate else []
        if each and all(isinstance(value, int | float | np.number) for value in each):
            same = all(value == each[0] for value in each)  # whose spread would be rounding
            spread[f"{metric}_mc_stderr,none"] = 0.0 if same else float(np.std(each, ddof=1))
    return spread


def _moved(score: Any, noise: float) -> Any:
    """A result of the harness with noise added to its log likelihood."""
    return (score[0] + noise, *score[1:]) if isinstance(score, tuple) else score + noise


def summary(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sum up the records of each task.

    Returns:
        For each task the number of requests; of scores the share that are exact and the root mean
        square of their errors in nats; of answers the mean tokens and network calls.
    """
    tasks: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        tasks[record["task"]].append(record)
    result = {}
    for name, each in tasks.items():
        figures: dict[str, Any] = {"requests": len(each)}
        scored = [record for record in each if "nats" in record]
        drawn = [record for record in each if "calls" in record]
        if scored:
            figures["exact"] = sum(record["exact"] for record in scored) / len(scored)
            squares = [record["nats_error"] ** 2 for record in scored]
            figures["nats_error"] = math.sqrt(sum(squares) / len(squares))
        if drawn:
            figures["calls_per_answer"] = sum(record["calls"] for record in drawn) / len(drawn)
            figures["tokens_per_answer"] = sum(record["tokens"] for record in drawn) / len(drawn)
        result[name] = figures
    return result
