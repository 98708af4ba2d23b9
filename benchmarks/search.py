"""Searches with a verifier: the score, a score that was not searched for, and diversity by calls.

The verifier is a character trigram model of the training text; a score is its log probability per
character. The held-out score is minus the bound of the model itself in nats per token, which no
search sees. With ``--verifier self`` the two change places. All searches draw ``num`` texts from
the same seeds, by event_jump with ``steps``. The columns:

- ``calls``, ``verifier``: network calls and scored texts for each returned text, on average.
- ``score``, ``held-out``: of the returned texts, with standard errors over texts.
- ``distinct-2``: the share of distinct pairs of tokens among the pairs of all returned texts;
  ``entropy``: that of the frequencies of a text's own tokens, in nats.
- ``gain``: the score minus that of random search at as many calls, network and verifier calls
  added, on average over the seeds; random search is interpolated between its rows in the logarithm
  of the calls, and beyond the last one extended along a straight line. ``± gain`` is its standard
  error.

    python benchmarks/search.py --checkpoint runs/quickstart --plot docs/images/search.png
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib as mpl
import numpy as np
from report import report, save_plot, start

import sedd
from sedd.data.baselines import CharacterTrigram
from sedd.data.corpora import open_corpus
from sedd.evaluation import Protocol
from sedd.evaluation.diversity import measure_diversity

mpl.use("Agg")
from matplotlib import pyplot as plt

EMPTY = -20.0  # score of a text without characters, below that of any other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the searches and the number of texts."""

    checkpoint: Path = Path("runs/quickstart")
    num: int = 32
    """Texts for each row."""
    batch_size: int = 8
    """Requests that are drawn together."""
    steps: int = 16
    """Steps of event_jump, the inner sampler."""
    budgets: tuple[int, ...] = (8, 32)
    """Numbers of draws, multiples of 4; the searches over paths have half as many branches."""
    neighbours: int = 4
    """Draws in a round of zero_order, which divides the budgets."""
    verifier: Literal["trigram", "self"] = "trigram"
    """What is searched for; the other one is held out."""
    rho: float = 0.1
    """Share of new noise of zero_order."""
    tilt: float = 32.0
    """Tilt of zero_order as a Markov chain, and of particle."""
    draws: int = 64
    """Network calls for the bound of a returned text."""
    seed: int = 0
    plot: Path | None = None
    """Draw the figures against the calls, and write the plot to this file."""


def searches(settings: Settings) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield the label, the setting, the sampler and its options of each row."""
    near = {"neighbours": settings.neighbours, "rho": settings.rho}
    for n in settings.budgets:
        yield "random search", f"n {n}", "best_of_n", {"n": n}
    for n in settings.budgets:
        given = near | {"rounds": n // settings.neighbours}
        yield "zero_order, greedy", f"rounds {given['rounds']}", "zero_order", given
    for n in settings.budgets:
        given = near | {"rounds": n // settings.neighbours, "tilt": settings.tilt}
        yield "zero_order, Metropolis", f"rounds {given['rounds']}", "zero_order", given
    for n in settings.budgets:
        paths = max(n // 8, 1)
        given = {"paths": paths, "branches": n // 2 // paths}
        yield "search_paths", f"paths {paths}", "search_paths", given
    for n in settings.budgets:
        given = {"particles": n, "tilt": settings.tilt, "resample_every": settings.steps // 4}
        yield "particle", f"particles {n}", "particle", given


def trigram_scores(model: CharacterTrigram, texts: list[str]) -> np.ndarray:
    """Log probabilities per character."""
    return np.array([-model.nats([text])[0] / len(text) if text else EMPTY for text in texts])


def self_scores(model: sedd.Model, tokens_SL: np.ndarray, draws: int) -> np.ndarray:
    """Minus the bound of each text under the model, in nats per token."""
    result = sedd.evaluate(model, tokens_SL, protocol=Protocol(draws=draws))
    assert result.sequence_nats is not None
    return -result.sequence_nats / tokens_SL.shape[1]


def drawn(
    model: sedd.Model, settings: Settings, sampler: str, options: dict[str, Any], verifier: Any
) -> dict[str, np.ndarray]:
    """Tokens, texts and counts of all requests."""
    inner = sedd.samplers.options("event_jump", steps=settings.steps)
    found: dict[str, list[Any]] = {}
    for first in range(0, settings.num, settings.batch_size):
        seeds = np.arange(first, min(first + settings.batch_size, settings.num))
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(settings.seed)))(seeds)
        result = sedd.sample(
            model, keys, sampler=sampler, inner=inner, verifier=verifier, **options
        )
        for name in ("tokens", "text", "calls", "verifier_calls"):
            found.setdefault(name, []).extend(getattr(result, name))
    return {name: np.array(values) for name, values in found.items()}


def measured(
    texts: dict[str, np.ndarray], scores: dict[str, Callable[..., np.ndarray]], settings: Settings
) -> tuple[dict[str, Any], np.ndarray]:
    """The figures of some texts, and the searched score of each."""
    other = "self" if settings.verifier == "trigram" else "trigram"
    score_S, held_S = scores[settings.verifier](texts), scores[other](texts)
    diversity = measure_diversity(list(texts["tokens"]), tokenization="")
    return {
        "score": float(score_S.mean()),
        "± score": error(score_S),
        "held-out": float(held_S.mean()),
        "± held-out": error(held_S),
        "distinct-2": diversity.distinct[1],
        "entropy": diversity.entropy.value,
    }, score_S


def error(values_S: np.ndarray) -> float:
    """The standard error of the mean."""
    return float(values_S.std(ddof=1) / len(values_S) ** 0.5)


def gain(calls: float, score_S: np.ndarray, random: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """The scores minus those of random search at as many calls, seed by seed."""
    log_calls = np.log([each for each, _ in random])
    scores_RS = np.array([scores for _, scores in random])
    by_seed = np.array([np.interp(np.log(calls), log_calls, column) for column in scores_RS.T])
    beyond = np.log(calls) - log_calls[-1]
    if beyond > 0 and len(random) > 1:
        by_seed += beyond * (scores_RS[-1] - scores_RS[-2]) / (log_calls[-1] - log_calls[-2])
    return score_S - by_seed


def main(settings: Settings) -> None:
    """Draw with every search at every budget, print and plot the figures."""
    model = sedd.load(settings.checkpoint)
    cache_dir = Path(model.config.data.cache_dir).expanduser()
    corpus = open_corpus(model.config.data.corpus, cache_dir=cache_dir)
    trigram = CharacterTrigram.fit("\n".join(corpus.documents("train")))
    own = functools.partial(trigram_scores, trigram)
    scores: dict[str, Callable[..., np.ndarray]] = {
        "trigram": lambda texts: own(texts["text"].tolist()),
        "self": lambda texts: self_scores(model, texts["tokens"], settings.draws),
    }
    verifier = own if settings.verifier == "trigram" else "self"
    rows: list[dict[str, Any]] = []
    random: list[tuple[float, np.ndarray]] = []
    for label, setting, sampler, options in searches(settings):
        texts = drawn(model, settings, sampler, options, verifier)
        calls, checked = float(texts["calls"].mean()), float(texts["verifier_calls"].mean())
        figures, score_S = measured(texts, scores, settings)
        if sampler == "best_of_n":
            random.append((calls + checked, score_S))
        gain_S = gain(calls + checked, score_S, random)
        rows.append(
            {
                **{"search": label, "setting": setting, "calls": calls, "verifier": checked},
                **figures,
                "gain": float(gain_S.mean()),
                "± gain": error(gain_S),
            }
        )
        print(f"{label}, {setting}: {calls:.0f} calls, {figures['score']:.3f}", flush=True)
    about = dataclasses.asdict(settings)
    report("search", rows, **{k: v for k, v in about.items() if k not in ("plot", "checkpoint")})
    if settings.plot is not None:
        plot(rows, settings.plot)
        print(f"wrote {settings.plot}")


def plot(rows: list[dict], path: Path) -> None:
    """Plot score, held-out score and distinct-2 against all calls, with a line for each search."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(11.0, 3.8), layout="constrained")
    labels = list(dict.fromkeys(row["search"] for row in rows))
    for axis, name, title in (
        (axes[0], "score", "score that is searched for"),
        (axes[1], "held-out", "held-out score"),
        (axes[2], "distinct-2", "distinct pairs among all texts"),
    ):
        for i, label in enumerate(labels):
            own = [row for row in rows if row["search"] == label]
            calls, values = (
                np.array([row["calls"] + row["verifier"] for row in own]),
                np.array([row[name] for row in own]),
            )
            axis.plot(
                calls, values, "-", marker="osD^v"[i], ms=4, lw=1.4, color=f"C{i}", label=label
            )
            if name != "distinct-2":
                errors = np.array([row[f"± {name}"] for row in own])
                axis.fill_between(
                    calls, values - errors, values + errors, color=f"C{i}", alpha=0.12, lw=0
                )
        axis.set_xlabel("network and verifier calls a text")
        axis.set_title(title, loc="left", fontsize=9.5)
    save_plot(figure, axes, path)


if __name__ == "__main__":
    start(main, Settings, __doc__)
