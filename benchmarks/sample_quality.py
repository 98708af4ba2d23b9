"""The quality of samples against the number of network calls.

A judge scores the samples: an n-gram model of tokens (``NgramJudge``), counted on the training
split. The judge prefers repetitive text, so the entropy of the samples is printed as well. The
first row is held-out text, whose figures good samples should have. The columns:

- ``setting``: the option of the sampler that is varied, and its value.
- ``calls``: network calls of a sample, on average.
- ``nats/token``: −log p of the samples under the judge, per token; ``± s.e.`` is its standard error
  over samples.
- ``entropy``: of the frequencies of a sample's own tokens, in nats, averaged over samples. It
  is low for repetitive text.

A model whose visible tokens may be wrong (uniform or hybrid noise, with the parameterization mean)
gets two other tables: the texts of ``self_correct`` before, during and after the revision, and
their change in nats with its error over texts; and the revised texts beside those of ``tweedie`` at
the temperature at which it has the same entropy.

    python benchmarks/sample_quality.py --checkpoint runs/quickstart --plot docs/images/quality.png
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
from sedd.evaluation.frontier import JudgedPoint, at_entropy

mpl.use("Agg")
from matplotlib import pyplot as plt

SWEEPS = {  # label: (sampler, the varied option, its values, other options)
    "tweedie": ("tweedie", "steps", (8, 16, 32, 64, 128, 256), {}),
    "event_jump": ("event_jump", "steps", (8, 16, 32, 64, 128, 256, None), {}),
    "ordered, random": ("ordered", "steps", (8, 16, 32, 64, None), {"order": "random"}),
    "confidence": ("confidence", "steps", (8, 16, 32, 64, None), {}),
    "entropy_bounded": ("entropy_bounded", "gamma", (16.0, 4.0, 1.0, 0.3, 0.1), {}),
    "token_confidence": ("token_confidence", "steps", (8, 16, 32, 64, None), {}),
    "remdm": ("remdm", "steps", (16, 32, 64, 128, 256), {}),
}
REVISIONS = {  # label: options of self_correct, for models whose visible tokens may be wrong
    "likeliest": {},
    "random": {"positions": "random", "correction_temperature": 1.0},
}
FRAMES = (0, 8, 32, 64, 128)  # calls of the revision
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of tweedie, for its texts of equal entropy
STEP = 0.01  # of the entropy, for the slope of a curve
INNER = 32  # steps of tweedie before a revision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the judge and the number of samples."""

    checkpoint: Path = Path("runs/quickstart")
    num: int = 64
    """Samples for each row."""
    order: int = 3
    """The order n of the judge's n-grams."""
    seed: int = 0
    plot: Path | None = None
    """Draw the figures against the network calls, and write the plot to this file."""


def main(settings: Settings) -> None:
    """Draw with every sampler at every setting, score the samples, print and plot the figures."""
    model = sedd.load(settings.checkpoint)
    nats_of, real = judge_and_text(model, settings.checkpoint, settings.order)
    results = [
        {
            "sampler": "held-out text",
            "setting": "",
            "calls": None,
            "nats/token": float(nats_of(real).mean()),
            "± s.e.": error_of(nats_of(real)),
            "entropy": float(entropies(real).mean()),
        }
    ]
    revisions = {} if model.process.absorbing else drawn_revisions(model, settings)
    if revisions:
        results += revised(revisions, nats_of)
    else:
        results += swept(model, nats_of, settings)
    columns = dict.fromkeys(name for row in results for name in row)
    results = [{name: row.get(name) for name in columns} for row in results]
    about = {"judge": f"{settings.order}-gram", "samples": settings.num, "length": model.length}
    report("sample quality", results, **about)
    if revisions:
        rows = at_equal_entropy(model, revisions, nats_of, settings)
        report("at equal entropy", rows, **about)
    if settings.plot is not None:
        plot(results, settings.plot)
        print(f"wrote {settings.plot}")


def swept(model: sedd.Model, nats_of: NatsOf, settings: Settings) -> list[dict]:
    """A row for every sampler at every setting."""
    rows = []
    for label, (sampler, what, values, options) in SWEEPS.items():
        for value in values:
            key = jax.random.key(settings.seed)
            options = options | {what: value}
            drawn = sedd.sample(model, key, num=settings.num, sampler=sampler, **options)
            nats = nats_of(drawn.tokens)
            rows.append(
                {
                    "sampler": label,
                    "setting": f"{what} {'none' if value is None else value}",
                    "calls": float(drawn.calls.mean()),
                    "nats/token": float(nats.mean()),
                    "± s.e.": error_of(nats),
                    "entropy": float(entropies(drawn.tokens).mean()),
                }
            )
    return rows


def drawn_revisions(model: sedd.Model, settings: Settings) -> dict[str, sedd.SampleResult]:
    """Texts of ``INNER`` steps of tweedie, revised by self_correct, with their traces."""
    inner = sedd.samplers.options("tweedie", steps=INNER)
    return {
        label: sedd.sample(
            model,
            jax.random.key(settings.seed),
            num=settings.num,
            sampler="self_correct",
            inner=inner,
            steps=FRAMES[-1],
            trace=True,
            **options,
        )
        for label, options in REVISIONS.items()
    }


def revised(revisions: dict[str, sedd.SampleResult], nats_of: NatsOf) -> list[dict]:
    """The texts of tweedie, and the same texts after some calls of self_correct.

    ``change`` is the mean difference of a text to itself before, and ``± change`` its error.
    """
    rows = []
    for label, drawn in revisions.items():
        assert drawn.trace is not None
        before = nats_of(drawn.trace[0])
        for calls in FRAMES:
            tokens = drawn.trace[min(calls, len(drawn.trace) - 1)]
            nats, entropy = nats_of(tokens), entropies(tokens)
            rows.append(
                {
                    "sampler": f"self_correct, {label}",
                    "setting": f"{calls} calls",
                    "calls": float(np.minimum(drawn.calls, INNER + 1 + calls).mean()),
                    "nats/token": float(nats.mean()),
                    "± s.e.": error_of(nats),
                    "entropy": float(entropy.mean()),
                    "± entropy": error_of(entropy),
                    "change": float((nats - before).mean()),
                    "± change": error_of(nats - before),
                    "changed": float((tokens != drawn.trace[0]).mean()),
                }
            )
    return rows


def at_equal_entropy(
    model: sedd.Model,
    revisions: dict[str, sedd.SampleResult],
    nats_of: NatsOf,
    settings: Settings,
) -> list[dict[str, Any]]:
    """Compare revised texts with tweedie at the temperature at which it has the same entropy.

    Tweedie has the calls of both parts. ``difference`` is that of the judged nats of the revised
    texts to those of tweedie, which are interpolated between temperatures; the error contains that
    of the entropy. Both are None where no temperature reaches the entropy.
    """

    def judged(drawn, temperature=1.0):
        length = drawn.tokens.shape[1]
        return JudgedPoint(
            nats_S=nats_of(drawn.tokens) * length,
            tokens_S=np.full(settings.num, length),
            entropy_S=entropies(drawn.tokens),
            temperature=temperature,
            calls=float(drawn.calls.mean()),
        )

    def tweedie(temperature):
        return sedd.sample(
            model,
            jax.random.key(settings.seed),
            num=settings.num,
            sampler="tweedie",
            steps=INNER + FRAMES[-1],
            temperature=temperature,
        )

    curve = [judged(tweedie(each), each) for each in TEMPERATURES]
    rows = []
    for label, drawn in revisions.items():
        revised = judged(drawn)
        entropy = revised.entropy.value
        near = [at_entropy(curve, entropy + change) for change in (-STEP, 0.0, STEP)]
        row = {
            "sampler": f"self_correct, {label}",
            "calls": revised.calls,
            "entropy": entropy,
            "nats/token": revised.nats.value,
            "± s.e.": revised.nats.error,
            "tweedie": near[1] and near[1].nats,
            "difference": None,
            "± of it": None,
        }
        if all(near):
            low, same, high = (each for each in near if each is not None)
            slope = (high.nats - low.nats) / (2 * STEP)
            nats_S, entropy_S = revised.shares()
            row["difference"] = revised.nats.value - same.nats
            row["± of it"] = error_of(nats_S - slope * entropy_S - same.share_S)
        rows.append(row)
    return rows


def plot(results: list[dict], path: Path) -> None:
    """Plot nats per token and entropy against network calls, with a line for each sampler."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    real = results[0]
    for axis, name, title in (
        (axes[0], "nats/token", "judged nats per token (lower is better)"),
        (axes[1], "entropy", "unigram entropy of a sample, nats"),
    ):
        for i, label in enumerate(dict.fromkeys(r["sampler"] for r in results[1:])):
            points = sorted(
                (r["calls"], r[name], r["± s.e."]) for r in results if r["sampler"] == label
            )
            calls, values, errors = map(np.array, zip(*points, strict=True))
            axis.plot(
                calls, values, "-", marker="osD^vPX"[i], ms=4, lw=1.4, color=f"C{i}", label=label
            )
            if name == "nats/token":
                axis.fill_between(
                    calls, values - errors, values + errors, color=f"C{i}", alpha=0.12, lw=0
                )
        mark_held_out(axis, real[name])
        axis.set_title(title, loc="left", fontsize=9.5)
    save_plot(figure, axes, path)


if __name__ == "__main__":
    start(main, Settings, __doc__)
