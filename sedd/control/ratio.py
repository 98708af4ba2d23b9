"""The weights of texts that another model proposes: the ratio of two laws, where it is known."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.ordered import follow_order
from sedd.model import Model
from sedd.samplers.base import Sampler
from sedd.samplers.ordered import Ordered
from sedd.samplers.orders import order_ranks


class LogRatio:
    """log a(x)/q(x) of texts that the sampler ``ordered`` draws from one model, q.

    a is the law of the same sampler with another model. Both are products of conditionals in the
    order of the sampler, and take a network call for each token.

    Args:
        base: the model of a.
        proposal: the model of q, which draws the texts.
        sampler: the sampler.
        batch_size: texts at the same time.

    Raises:
        UserError: the law of the sampler is not known, or the models have other tokens.
    """

    def __init__(self, base: Model, proposal: Model, sampler: Sampler, batch_size: int):
        if not isinstance(sampler, Ordered) or sampler.steps or sampler.order == "random":
            raise UserError(
                "the weight of a text that another model proposes needs the sampler ordered, with "
                "a fixed order and one position a call: the law of others is not known"
            )
        for model in (base, proposal):
            if not model.process.absorbing or not model.denoiser.time_independent:
                raise UserError(
                    f"checkpoint {model.source}: only a time-independent model on the absorbing "
                    "process has likelihoods of an order"
                )
        tokens = [
            None if model.tokenizer is None else model.tokenizer.token_bytes()
            for model in (base, proposal)
        ]
        if base.process.num_tokens != proposal.process.num_tokens or tokens[0] != tokens[1]:
            raise UserError(
                f"{base.source} has another vocabulary than {proposal.source}, which proposes"
            )
        self._denoisers = base.denoiser, proposal.denoiser
        self._order, self._batch_size = sampler.order, batch_size

    def __call__(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Compute log a(x)/q(x) of each text, [K], from its tokens [L]."""
        tokens_KL = np.stack(texts)
        ratios = []
        for first in range(0, len(tokens_KL), self._batch_size):
            rows_B = np.arange(first, first + self._batch_size).clip(max=len(tokens_KL) - 1)
            nats = [
                _nats(each, jnp.asarray(tokens_KL[rows_B]), self._order) for each in self._denoisers
            ]
            ratios.append(np.asarray(nats[1], float) - np.asarray(nats[0], float))
        return np.concatenate(ratios)[: len(tokens_KL)]


@partial(jax.jit, static_argnames="order")
def _nats(denoiser: Denoiser, x_BL, order: str):
    """-log p of whole sequences in a fixed order, [B], in nats."""
    all_BL = jnp.ones(x_BL.shape, bool)
    rank_BL = order_ranks(order, jax.random.split(jax.random.key(0), len(x_BL)), all_BL)
    return follow_order(denoiser, jnp.argsort(rank_BL, axis=1), x_BL, all_BL)[0]


def proposal_ratio(
    base: Model, proposal: Model, options: Mapping[str, Any], batch_size: int
) -> LogRatio:
    """The ``LogRatio`` of texts that ``sedd.sample`` draws with these options.

    Raises:
        UserError: with the options the law of the texts is not that of the model in one order.
    """
    for name in options:
        if name not in ("sampler", "order", "steps", "length"):
            raise UserError(
                f"{name}: with base= the law of the texts must be known: give sampler='ordered', "
                "order and length alone"
            )
    chosen = {name: options[name] for name in ("order", "steps") if name in options}
    name = options.get("sampler", "event_jump")
    if name != "ordered":
        raise UserError(
            f"sampler {name!r}: with base= the law of the texts must be known: give 'ordered'"
        )
    sampler = Ordered(schedule=proposal.schedule, **chosen)
    return LogRatio(base, proposal, sampler, batch_size)
