"""``--objective gdc``: its data, and how far the model is from the control's law.

For texts x of the starting model a, held out and weighted by w = p/a,

    KL(p‖π) = E_a[w·log w] + E_a[w·(log a(x) - log π(x))].

The first term is KL(p‖a), the divergence at the start. In the second one the bounds of both models
stand for their likelihoods, with the same masks. The result is no bound, and may fall below 0: a
model that is trained on texts of its own has a tighter bound on all of them. E_a[log π(x)
- log a(x)], which is at most 0 for likelihoods, shows by how much.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import sedd
from sedd.configuration.build import Parts
from sedd.configuration.build_data import Data, ValidationRows
from sedd.configuration.config import Config
from sedd.errors import FieldError, UserError
from sedd.evaluation.bound import evaluate_bound
from sedd.evaluation.measured import mean_of, ratio_of
from sedd.types import Params


def control_validator(
    config: Config, parts: Parts, held_out: ValidationRows
) -> Callable[[Params], dict[str, Any]]:
    """Make the loop's ``validate`` for rows with weights.

    Its figures are the weighted bound in nats per token, and in nats per text ``divergence``,
    KL(p‖π) as the module describes, ``divergence_at_start``, KL(p‖a), and ``divergence_fall``,
    their difference, and ``unweighted_fall``, the same without the weights. Without --init-from
    there is no starting model, and no divergence.

    Args:
        config: for the number of draws, the seed and the starting model.
        parts: the components of the model.
        held_out: the rows to validate on.
    """
    weight_S = held_out.weights()
    weight_S = weight_S / weight_S.mean()
    log_weight_S = np.log(np.where(weight_S > 0, weight_S, 1.0))
    tokens_S = np.concatenate([scored_BL.sum(-1) for _, scored_BL, *_ in held_out])

    def nats(denoiser) -> np.ndarray:
        result = evaluate_bound(
            denoiser,
            parts.schedule,
            jax.random.key(config.seed),
            held_out,
            draws=config.evaluation.draws,
        )
        assert result.sequence_nats is not None
        return result.sequence_nats

    start_S: list[np.ndarray] = []

    def validate(params: Params) -> dict[str, Any]:
        if not start_S and config.init_from is not None:
            start_S.append(nats(starting_model(config).denoiser))
        nats_S = nats(parts.denoiser(params))
        per_token = ratio_of(weight_S * nats_S, weight_S * tokens_S)
        figures = {
            "nats_per_token": per_token.value,
            "standard_error": per_token.error or 0.0,
            "perplexity": float(np.exp(min(per_token.value, 700))),
        }
        if start_S:
            fall_S = start_S[0] - nats_S
            for name, each_S in (
                ("divergence", log_weight_S - fall_S),
                ("divergence_at_start", log_weight_S),
                ("divergence_fall", fall_S),
            ):
                found = mean_of(weight_S * each_S)
                figures |= {name: found.value, f"{name}_error": found.error or 0.0}
            slack = mean_of(fall_S)
            figures |= {"unweighted_fall": slack.value, "unweighted_fall_error": slack.error or 0.0}
        return figures

    return validate


def check_weights(config: Config, parts: Parts, data: Data) -> None:
    """Check that rows have weights if the objective uses them, and only then.

    Raises:
        FieldError: an objective would ignore the weights of the data, or needs weights.
    """
    weighted = [packed.name for packed, _ in data.train if packed.weights is not None]
    if weighted and not parts.objective.weighted:
        raise FieldError(
            "objective",
            f"{config.objective.name} ignores the weights of {weighted[0]}: use gdc",
        )
    if parts.objective.weighted and not weighted:
        raise FieldError(
            "data.corpus",
            f": the objective {config.objective.name} needs texts with weights, as sample.py "
            "--features … --method weigh writes them",
        )


def starting_model(config: Config) -> sedd.Model:
    """Load the model of --init-from.

    Raises:
        UserError: it is gone.
    """
    assert config.init_from is not None
    try:
        return sedd.load(config.init_from, mask_id=config.mask_id)
    except UserError as error:
        raise UserError(
            f"--init-from {config.init_from}: {error}; gdc compares with the starting model"
        ) from error


def divergence_line(record: dict[str, Any]) -> str:
    """A line on the divergence in a record of ``metrics.jsonl``; empty if it has none."""
    if record.get("validation_divergence") is None:
        return ""
    names = ("divergence", "divergence_at_start", "divergence_fall", "unweighted_fall")
    now, start, fall, slack = (
        f"{record[f'validation_{name}']:.4f} ± {record[f'validation_{name}_error']:.4f}"
        for name in names
    )
    return (
        f"  KL(controlled law‖model) by bounds, nats per text: {now}\n"
        f"    at the start {start}; it fell by {fall}\n"
        f"    without the weights the bound fell by {slack}: above 0 it has become tighter"
    )
