"""The validation of ``sedd train``: the figures of a model, by its objective."""

import math
from functools import partial
from typing import Any

import jax
import numpy as np

from sedd.commands.train_control import control_validator
from sedd.configuration.build import Parts
from sedd.configuration.build_data import ValidationRows
from sedd.configuration.config import Config
from sedd.data.tokenizers import Tokenizer
from sedd.evaluating.bound import text_counter
from sedd.evaluation.block_levels import least_variance
from sedd.evaluation.bound import evaluate_bound
from sedd.evaluation.energy import free_energy
from sedd.evaluation.estimators import REPLICATES
from sedd.evaluation.joint_heads import joint_nats
from sedd.evaluation.marginals import log_marginals
from sedd.evaluation.measured import mean_of
from sedd.objectives.block import Block
from sedd.objectives.energy import Energy
from sedd.objectives.hmm import Hmm
from sedd.objectives.latent_distill import LatentDistill
from sedd.objectives.marginal import Marginal
from sedd.objectives.self_speculative import SelfSpeculative
from sedd.types import Params


def validator(config: Config, parts: Parts, tokenizer: Tokenizer, held_out: ValidationRows):
    """Make the loop's ``validate``: a function from averaged parameters to the bound's figures.

    Every validation uses the same rows and the same noise, so that its figures differ by the
    parameters alone.

    Args:
        config: for the number of draws and the seed.
        parts: the components of the model.
        tokenizer: to count characters and bytes, for bits per character and per byte.
        held_out: the rows to validate on.
    """
    if parts.objective.weighted:
        return control_validator(config, parts, held_out)
    if isinstance(parts.objective, SelfSpeculative | Hmm | LatentDistill):
        return partial(validate_joint_head, config, parts, parts.objective, held_out)
    if isinstance(parts.objective, Marginal):
        return partial(validate_marginal_head, config, parts, held_out)
    if isinstance(parts.objective, Energy):
        return partial(validate_energy, config, parts, parts.objective, held_out)
    count_text = text_counter(tokenizer)

    def validate(params) -> dict[str, Any]:
        result = evaluate_bound(
            parts.denoiser(params),
            parts.schedule,
            jax.random.key(config.seed),
            held_out,
            draws=config.evaluation.draws,
            count_text=count_text,
        )
        wanted = ("nats_per_token", "standard_error", "standard_error_draws", "perplexity")
        figures = {name: getattr(result, name) for name in wanted}
        figures |= {k: v for k, v in result.to_json().items() if k.startswith("bits") and v}
        return figures | levels_of_blocks(config, parts, held_out, params)

    return validate


def levels_of_blocks(
    config: Config, parts: Parts, held_out: ValidationRows, params: Params
) -> dict[str, float]:
    """The range of levels in which the loss of a block model varies least; none for other models.

    Arguments are those of ``validator``, and the averaged parameters.
    """
    if not isinstance(parts.objective, Block):
        return {}
    low, high, ratio = least_variance(
        parts.denoiser(params),
        parts.objective,
        jax.random.key(config.seed),
        held_out,
        draws=max(config.evaluation.draws // REPLICATES, 1),
    )
    return {"least_variance_from": low, "least_variance_to": high, "variance_ratio": ratio}


def validate_joint_head(
    config: Config,
    parts: Parts,
    objective: SelfSpeculative | Hmm | LatentDistill,
    held_out: ValidationRows,
    params: Params,
) -> dict[str, Any]:
    """The nats per masked token of tokens predicted jointly, and how many fewer than independently.

    Arguments are those of ``validator``, and the averaged parameters.
    """
    joint, _, gain = joint_nats(
        parts.denoiser(params),
        objective,
        jax.random.key(config.seed),
        held_out,
        draws=config.evaluation.draws,
    )
    return {
        "nats_per_token": joint.value,
        "standard_error": joint.error or 0.0,  # unknown for a single sequence
        "gain": gain.value,
        "gain_error": gain.error or 0.0,
    }


def validate_marginal_head(
    config: Config, parts: Parts, held_out: ValidationRows, params: Params
) -> dict[str, Any]:
    """The errors of a marginal head against the log likelihoods in two random orders of each text.

    ``nats_per_token`` is their root mean square, which holds the spread of the orders as well, and
    ``bias`` is their mean. Arguments are those of ``validator``, and the averaged parameters.
    """
    found = log_marginals(parts.denoiser(params), jax.random.key(config.seed), held_out, orders=1)
    error_SK = (found.log_marginal_S[:, None] - found.log_probs_SK) / found.known_S[:, None]
    square, bias = mean_of(np.square(error_SK).mean(1)), mean_of(error_SK.mean(1))
    root = math.sqrt(square.value)
    return {
        "nats_per_token": root,
        "standard_error": (square.error or 0.0) / (2 * root or 1.0),
        "bias": bias.value,
        "bias_error": bias.error or 0.0,
    }


def validate_energy(
    config: Config, parts: Parts, objective: Energy, held_out: ValidationRows, params: Params
) -> dict[str, Any]:
    """The free energy of texts that the model draws, and log Z by their importance weights.

    Arguments are those of ``validator``, and the averaged parameters.
    """
    found = free_energy(parts.denoiser(params), objective, jax.random.key(config.seed), held_out)
    length = config.data.length
    return {
        "nats_per_token": found.free.value / length,
        "standard_error": (found.free.error or 0.0) / length,
        "free_energy": found.free.value,
        "free_energy_error": found.free.error or 0.0,
        "log_z": found.log_z.value,
        "log_z_error": found.log_z.error or 0.0,
        "effective_texts": found.effective,
        "texts": found.texts,
    }
