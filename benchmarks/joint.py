"""Samples of few network calls, with tokens drawn independently and jointly, under a judge.

The judge is an n-gram model of tokens (``NgramJudge``), counted on the training split.
It prefers repetitive text, so that the entropy of the samples stands beside it: a setting is better
only where one of the two is better and the other is no worse. The columns:

- ``draws``: ``independent``, each token from its own conditional; at temperatures below 1 as well,
  which trade entropy for the judge's nats; ``window W, below γ``, jointly by the HMM head.
- ``calls``: network calls of a sample.
- ``nats``: −log p of the samples under the judge, per token, with the standard error over samples.
- ``entropy``: of the frequencies of a sample's own tokens, in nats, likewise.

    python benchmarks/joint.py --checkpoint runs/hmm --plot docs/images/joint.png
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from judged import NatsOf, entropies, error_of, judge_and_text, mark_held_out
from report import report, save_plot, start

import sedd

mpl.use("Agg")
from matplotlib import pyplot as plt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, and what is drawn."""

    checkpoint: Path
    """A run with an HMM head."""
    calls: tuple[int, ...] = (4, 8, 16, 32)
    """Network calls of a sample; the positions of a call are a random subset."""
    window: int = 32
    below: tuple[float, ...] = (0.7, 1.0)
    """Largest shares of masked tokens at which tokens are drawn jointly."""
    temperatures: tuple[float, ...] = (0.9,)
    """Temperatures of further independent draws."""
    num: int = 256
    """Samples for each row."""
    order: int = 3
    """The order n of the judge's n-grams."""
    seed: int = 0
    plot: Path | None = None
    """Draw the figures against the network calls, and write the plot to this file."""


def main(settings: Settings) -> None:
    """Draw every setting with the same keys, score the samples, print and plot the figures."""
    model = sedd.load(settings.checkpoint)
    nats_of, real = judge_and_text(model, settings.checkpoint, settings.order)
    results = [figures("held-out text", None, real, nats_of)]
    draws: dict[str, dict[str, Any]] = {"independent": {}}
    draws |= {f"independent, temperature {t}": {"temperature": t} for t in settings.temperatures}
    draws |= {
        f"window {settings.window}, below {below}": {"window": settings.window, "below": below}
        for below in settings.below
    }
    for label, options in draws.items():
        # A temperature for each sequence, also of 1: settings then share their programs.
        temperature = [options.get("temperature", 1.0)] * settings.num
        given: dict[str, Any] = {**options, "temperature": temperature}
        for calls in settings.calls:
            key = jax.random.key(settings.seed)
            drawn = sedd.sample(
                model,
                key,
                num=settings.num,
                sampler="ordered",
                order="random",
                steps=calls,
                **given,
            )
            results.append(figures(label, float(drawn.calls.mean()), drawn.tokens, nats_of))
    report("joint", results, judge=f"{settings.order}-gram", samples=settings.num)
    if settings.plot is not None:
        plot(results, list(draws), settings.plot)
        print(f"wrote {settings.plot}")


def figures(
    label: str,
    calls: float | None,
    tokens_SL: np.ndarray,
    nats_of: NatsOf,
) -> dict:
    """A row of the table."""
    row = {"draws": label, "calls": calls}
    for name, values in (("nats", nats_of(tokens_SL)), ("entropy", entropies(tokens_SL))):
        row |= {name: float(values.mean()), f"± {name}": error_of(values)}
    return row


def plot(results: list[dict], labels: list[str], path: Path) -> None:
    """Plot nats and entropy against network calls, with a line for each kind of draws."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    for axis, name, title in (
        (axes[0], "nats", "judged nats per token (lower is better)"),
        (axes[1], "entropy", "unigram entropy of a sample, nats"),
    ):
        for number, label in enumerate(labels):
            points = [
                (row["calls"], row[name], row[f"± {name}"])
                for row in results
                if row["draws"] == label
            ]
            calls, values, errors = map(np.array, zip(*points, strict=True))
            style = {"marker": "osD^vP"[number % 6], "ms": 4, "lw": 1.4, "color": f"C{number}"}
            axis.errorbar(calls, values, errors, capsize=2, label=label, **style)
        mark_held_out(axis, results[0][name])
        axis.set_title(title, loc="left", fontsize=9.5)
    save_plot(figure, axes, path)


if __name__ == "__main__":
    start(main, Settings, __doc__)
