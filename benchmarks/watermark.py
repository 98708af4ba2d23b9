"""How many tokens it takes to detect a watermark, and what the watermark green costs.

Texts of ``length`` tokens are drawn without a prompt, with a watermark, and their first n tokens
are tested for it. Each column of the table is a watermark, each row a number of tokens n, and each
entry the share of the texts whose p-value is below ``threshold``. The columns "other secret" test
the same texts with another secret: their shares, with a threshold of 0.01, are those of false
alarms. The caption has the median p-value of the whole texts, the entropy of the frequencies of a
text's own tokens in nats, and for green the nats by which the watermark moves the distribution of
a token from the model's, KL(q ‖ p), on average over drawn texts with a uniformly random number of
masks. For gumbel it is 0 over secrets.

    python benchmarks/watermark.py --checkpoint runs/quickstart --plot watermark.png
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from report import report, start

import sedd
from sedd.evaluation.diversity import measure_diversity
from sedd.watermark.detection import detect
from sedd.watermark.scheme import Kind, Scheme

SETTINGS: list[tuple[str, Kind, float]] = [  # the kind, and the temperature
    ("gumbel", "gumbel", 1.0),
    ("gumbel, temperature 0.5", "gumbel", 0.5),
    ("green", "green", 1.0),
]
SECRET, OTHER = b"a secret of the benchmark", b"another secret"
FALSE = 0.01  # the threshold of false alarms


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the texts and the test."""

    checkpoint: str = "runs/quickstart"
    num: int = 200
    """Texts for each row."""
    batch_size: int = 50
    """Texts that are drawn together."""
    length: int = 128
    """Tokens in a text."""
    steps: int = 16
    """Steps of event_jump."""
    prefixes: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    """Numbers of tokens that are tested, from the beginning of each text."""
    threshold: float = 1e-6
    """p-value below which a text counts as detected."""
    seed: int = 0
    plot: Path | None = None
    """Write the shares of detected texts to this image."""


def drawn(
    model: sedd.Model, settings: Settings, scheme: Scheme, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of all texts [S, L], and the nonces of their watermarks [S]."""
    results = []
    for first in range(0, settings.num, settings.batch_size):
        count = min(settings.batch_size, settings.num - first)
        results.append(
            sedd.sample(
                model,
                jax.random.fold_in(jax.random.key(settings.seed), first),
                num=count,
                length=settings.length,
                sampler="event_jump",
                steps=settings.steps,
                watermark=scheme,
                temperature=[temperature] * count,
            )
        )
    tokens_SL = np.concatenate([result.tokens for result in results])
    return tokens_SL, np.concatenate([result.nonces for result in results])


def p_values(tokens_SL: np.ndarray, nonce_S: np.ndarray, secret: bytes, kind: Kind) -> np.ndarray:
    """The p-value of each text."""
    texts = zip(tokens_SL, nonce_S, strict=True)
    return np.array(
        [detect(text, secret, kind=kind, nonces=[int(nonce)]).p_value for text, nonce in texts]
    )


def moved(model: sedd.Model, scheme: Scheme, tokens_SL: np.ndarray, seed: int, batch: int = 8):
    """Mean and standard error over texts of KL(q ‖ p) at masked positions of drawn texts."""
    rng, found = np.random.default_rng(seed), []

    @jax.jit
    def divergence(denoiser, watermark, x_BL):
        marked = dataclasses.replace(denoiser, watermark=watermark).log_conditional(x_BL)
        return (jnp.exp(marked) * (marked - denoiser.log_conditional(x_BL))).sum(-1)

    for first in range(0, min(len(tokens_SL), 5 * batch) // batch * batch, batch):
        text_BL = tokens_SL[first : first + batch]
        rank_BL = rng.random(text_BL.shape).argsort(1)
        masked_BL = rank_BL < rng.integers(1, text_BL.shape[1] + 1, (batch, 1))
        x_BL = np.where(masked_BL, model.denoiser.mask_id, text_BL)
        watermark = scheme.batch(np.zeros(batch), np.ones(text_BL.shape, bool))
        kl_BL = np.asarray(divergence(model.denoiser, watermark, x_BL))
        found += list(np.where(masked_BL, kl_BL, 0).sum(1) / masked_BL.sum(1))
    return float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5)


def main(settings: Settings) -> None:
    """Draw with every watermark, test the texts, and print a table."""
    model = sedd.load(settings.checkpoint)
    prefixes = [n for n in settings.prefixes if n <= settings.length]
    shares: dict[str, dict[int, float]] = {}
    about: dict[str, Any] = {}
    for label, kind, temperature in SETTINGS:
        scheme = Scheme(secret=SECRET, kind=kind)
        tokens_SL, nonce_S = drawn(model, settings, scheme, temperature)
        for name, secret, threshold in (
            (label, SECRET, settings.threshold),
            (f"{label}, other secret", OTHER, FALSE),
        ):
            of_n = {n: p_values(tokens_SL[:, :n], nonce_S, secret, kind) for n in prefixes}
            shares[name] = {n: float((p < threshold).mean()) for n, p in of_n.items()}
            about[f"median p of {name}"] = f"{np.median(of_n[prefixes[-1]]):.2g}"
        entropy = measure_diversity(list(tokens_SL), tokenization="").entropy.value
        about[f"entropy of {label}"] = f"{entropy:.3f}"
        if kind == "green":
            kl, error = moved(model, scheme, tokens_SL, settings.seed)
            about[f"KL of {label}"] = f"{kl:.3f} ± {error:.3f}"
    rows = [{"tokens": n, **{name: share[n] for name, share in shares.items()}} for n in prefixes]
    given = {name: getattr(settings, name) for name in ("num", "length", "steps", "threshold")}
    report("watermark", rows, **given, **about)
    if settings.plot is not None:
        plot({label: shares[label] for label, *_ in SETTINGS}, settings)
        print(f"wrote {settings.plot}")


def plot(shares: dict[str, dict[int, float]], settings: Settings) -> None:
    """Plot the share of detected texts against the number of tokens."""
    assert settings.plot is not None
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for i, (label, points) in enumerate(shares.items()):
        axis.plot(*zip(*points.items(), strict=True), marker="osD^v"[i % 5], ms=4, label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("tokens that are tested")
    axis.set_title(f"share of texts with p < {settings.threshold:g}", loc="left", fontsize=9.5)
    axis.grid(axis="y", color="0.92", lw=0.8)
    figure.legend(loc="outside right center", frameon=False)
    settings.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.plot, dpi=130)


if __name__ == "__main__":
    start(main, Settings, __doc__)
