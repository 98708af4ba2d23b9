"""The Monte-Carlo variance of the bound under different ways of spreading its noise levels.

All rows use the same number of network calls. The variance is that of one sequence's estimate over
``repeats`` repetitions, averaged over sequences. The columns:

- ``estimator``: k_dce or score_entropy (``sedd.evaluation.monte_carlo``).
- ``draws are``: how the noise levels of one estimate are spread. ``tiles``: the masks of
  neighbouring levels cover the sequence one after the other. The last row is the library's bound.
- ``mean, nats/token``: the mean of all estimates; the same for all rows of an estimator, up to
  noise.
- ``s.d. of a sequence``: the square root of the variance, in nats.
- ``gain``: the variance of independent draws divided by the variance of the row.

    python benchmarks/bound_variance.py --checkpoint runs/quickstart
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from report import report, start

import sedd
from sedd.configuration.build_data import ValidationRows, pack_split
from sedd.evaluation.monte_carlo import sequence_nats
from sedd.evaluation.stratified import level, tile, toward_few_masks
from sedd.samplers.noise import random_rank

SCHEMES = {  # levels, and whether the masks of neighbouring levels tile the sequence
    "independent": ("independent", False),
    "one shift for all strata": ("shifted", False),
    "pairs": ("pairs", False),
    "pairs, density 1/(2√u)": ("density", False),
    "pairs, density 1/(2√u), tiles": ("density", True),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the sequences and the number of estimates."""

    checkpoint: Path
    """A run of a time-independent absorbing model, of log-linear noise with eps 1e-3."""
    data: str = "sotu"
    """The corpus whose validation split is scored."""
    sequences: int = 8
    """Validation sequences, evenly spread over the split."""
    repeats: int = 32
    """Estimates of each sequence."""
    draws: int = 16
    """Network calls of one estimate. The library's bound runs with 4 times as many draws, because
    it divides them among 4 replicates."""


def levels(kind, keys_B, draws):
    """Draw noise levels u and their weights, both [draws, B]; u is in [0, 1) and ascending.

    ``kind`` is "independent", "shifted" (one shift of evenly spaced levels), "pairs", or "density"
    (pairs with the density 1/(2√u)).
    """
    shared_B = jax.vmap(jax.random.uniform)(keys_B)
    strata = jnp.arange(draws)[:, None]
    if kind == "independent":
        u = jax.vmap(lambda key: jax.random.uniform(key, (draws,)), out_axes=1)(keys_B)
    elif kind == "shifted":
        u = (shared_B + strata / draws) % 1.0
    else:
        u = jax.vmap(lambda k: level(shared_B, k, draws))(jnp.arange(draws))
    u = jnp.sort(u, 0)
    return toward_few_masks(u) if kind == "density" else (u, jnp.ones_like(u))


@partial(jax.jit, static_argnames=("kind", "tiled", "estimator", "draws"))
def estimate(denoiser, key, x0_BL, *, kind, tiled, estimator, draws):
    """Estimate the diffusion term of each sequence once, in nats, [B].

    Args:
        denoiser: the model.
        key: determines levels and masks.
        x0_BL: the sequences.
        kind: how the levels are spread, see ``levels``.
        tiled: whether the masks of neighbouring levels tile the sequence.
        estimator: "k_dce" or "score_entropy".
        draws: the number of levels, each with one network call.
    """
    num, length = x0_BL.shape
    u_key, place_key = jax.random.split(key)
    u_DB, density_DB = levels(kind, jax.random.split(u_key, num), draws)

    def places(key):
        keys_B = jax.random.split(key, num)
        if estimator == "k_dce":
            return random_rank(keys_B, x0_BL >= 0)
        return jax.vmap(lambda k: jax.random.uniform(k, (length,)))(keys_B)

    shared_BL = places(place_key)

    def draw(carry, inputs):
        total_B, begin_B = carry
        k, u_B, density_B = inputs
        if estimator == "k_dce":
            size_B, period = jnp.minimum(1 + jnp.floor(u_B * length), length), float(length)
            weight_B = length / size_B
        else:
            t_B, period = 1e-3 + (1 - 1e-3) * u_B, 1.0
            size_B, weight_B = (1 - 1e-3) * t_B, 1 / t_B
        place_BL = shared_BL if tiled else places(jax.random.fold_in(place_key, k))
        masked_BL = tile(place_BL, jnp.full(num, period), begin_B, size_B)
        log_probs_BLN = denoiser.log_conditional(jnp.where(masked_BL, denoiser.mask_id, x0_BL))
        nats_BL = -jnp.take_along_axis(log_probs_BLN, x0_BL[..., None], -1)[..., 0]
        nats_B = weight_B * jnp.where(masked_BL, nats_BL, 0).sum(-1)
        return (total_B + density_B * nats_B, (begin_B + size_B) % period), None

    start = (jnp.zeros(num), jnp.zeros(num))
    (total_B, _), _ = jax.lax.scan(draw, start, (jnp.arange(draws), u_DB, density_DB))
    return total_B / draws


def main(settings: Settings) -> None:
    """Measure every scheme and the library's own bound, for both estimators."""
    model = sedd.load(settings.checkpoint)
    if model.tokenizer is None:
        raise sedd.UserError(f"{settings.checkpoint} has no tokenizer")
    cache_dir = Path(model.config.data.cache_dir).expanduser()
    data = model.config.data
    packed, _ = pack_split(settings.data, "validation", model.tokenizer, data, cache_dir=cache_dir)
    held_out = ValidationRows(
        parts=[packed], max_sequences=settings.sequences, batch_size=settings.sequences
    )
    x0_BL = jnp.asarray(next(iter(held_out))[0])
    library = jax.jit(
        lambda keys_B, estimator: (
            sequence_nats(
                model.denoiser,
                model.schedule,
                keys_B,
                x0_BL,
                x0_BL >= 0,
                draws=4 * settings.draws,
                estimator=estimator,
            ).diffusion_BR
        ),
        static_argnums=1,
    )
    rows = []
    for estimator in ("k_dce", "score_entropy"):
        first = None
        for name, (kind, tiled) in [*SCHEMES.items(), ("the library's bound", (None, None))]:
            if kind is None:
                keys = jax.random.split(jax.random.key(2), (settings.repeats // 4, len(x0_BL)))
                parts = [np.asarray(library(k, estimator), np.float64).T for k in keys]
                estimates = np.concatenate(parts)
            else:
                run = partial(estimate, kind=kind, tiled=tiled, estimator=estimator)
                keys = jax.random.split(jax.random.key(1), settings.repeats)
                estimates = np.stack(
                    [np.asarray(run(model.denoiser, k, x0_BL, draws=settings.draws)) for k in keys]
                ).astype(np.float64)
            variance = float(estimates.var(0, ddof=1).mean())
            first = first or variance
            rows.append(
                {
                    "estimator": estimator,
                    "draws are": name,
                    "mean, nats/token": float(estimates.mean() / x0_BL.shape[1]),
                    "s.d. of a sequence": variance**0.5,
                    "gain": first / variance,
                }
            )
    report(
        "The bound's Monte-Carlo error",
        rows,
        sequences=len(x0_BL),
        repeats=settings.repeats,
        draws=settings.draws,
    )


if __name__ == "__main__":
    start(main, Settings, __doc__)
