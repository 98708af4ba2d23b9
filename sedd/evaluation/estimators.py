"""Which estimator of the bound a model has: its name, and the numbers that it takes.

The estimators themselves are those of ``sedd.evaluation.monte_carlo``.
"""

from typing import Literal

from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.evaluation.ordered import Order
from sedd.schedules import NoiseSchedule

Estimator = Literal["auto", "k_dce", "t_dce", "score_entropy", "exact", "ordered"]
REPLICATES = 4  # independent estimates of each sequence's bound; their spread is the draws' error


def resolve(
    estimator: Estimator, denoiser: Denoiser, schedule: NoiseSchedule | None = None
) -> Estimator:
    """Return the estimator that "auto" stands for, or the named one if the model has it.

    With a schedule whose positions differ in their noise, "auto" stands for t_dce where it would
    stand for k_dce.

    Autoregressive models have only "exact"; any other name is replaced by it.

    Raises:
        ValueError: if the model does not have the estimator.
    """
    if denoiser.causal:
        return "exact"
    if denoiser.block is not None and estimator == "score_entropy":
        raise ValueError("estimator score_entropy does not know blocks: use k_dce")
    if denoiser.block == 1 and estimator in ("auto", "exact"):
        return "exact"
    if estimator == "exact":
        raise ValueError("estimator exact needs an autoregressive model, or blocks of one position")
    any_order = denoiser.process.absorbing and denoiser.time_independent
    if estimator == "t_dce" and denoiser.block is not None:
        raise ValueError("estimator t_dce does not know blocks: use k_dce")
    if estimator in ("k_dce", "t_dce", "ordered") and not any_order:
        raise ValueError(f"estimator {estimator} needs a time-independent absorbing model")
    if estimator == "auto" and denoiser.any_subset:
        return "ordered"
    if estimator == "auto" and any_order:
        return "t_dce" if schedule is not None and schedule.by_position else "k_dce"
    if estimator == "auto":
        return "score_entropy"
    return estimator


def is_exact(estimator: Estimator, orders: int = 1) -> bool:
    """Whether a resolved estimator gives the likelihood of one order, without a Monte-Carlo error.

    The order may be a random one, drawn for each sequence.
    """
    return estimator == "exact" or (estimator == "ordered" and orders == 1)


def label_of(estimator: Estimator, order: Order = "forward", orders: int = 1) -> str:
    """The name of a resolved estimator in tables: "k_dce", "forward order", "8 random orders"."""
    if estimator != "ordered":
        return estimator
    return f"{order} order" if orders == 1 else f"{orders} {order} orders"


def check_draws(draws: int) -> None:
    """Raise FieldError unless ``draws`` is a positive multiple of the number of replicates."""
    if draws < REPLICATES or draws % REPLICATES:
        raise FieldError("draws", f"must be a positive multiple of {REPLICATES}, got {draws}")
