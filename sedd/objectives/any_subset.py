"""Any-subset training: the likelihood of generated tokens in an order, given a random prompt."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.objectives.base import DenoisingCrossEntropy
from sedd.parameterizations.any_subset import AnySubset as Parameterization

Order = Literal["forward", "random"]


@dataclass(frozen=True, kw_only=True)
class AnySubset(DenoisingCrossEntropy):
    """The loss -(n/m)·Σ log p(x0_i | lower ranks) over m generated of n scored positions.

    A rate r is drawn uniformly from (min_rate, max_rate] for each sequence. The generated positions
    are a uniformly random set of m = ⌈r·n⌉ scored positions; all others are the prompt, which has
    no loss. One network call gives the terms of all generated positions. arXiv:2504.20456, section
    4, and its published code, which draws one rate and one set for a micro-batch.

    The mean over draws is n times the mean nats per generated token, each rate counting equally, as
    in the published code. It is **not** a bound on -log p(x0): a large prompt makes tokens easier.
    With min_rate = max_rate = 1 there is no prompt but the positions that are not scored, and the
    loss is -log p(x0 | order) itself.

    The published models have start_rate .15 or .9, min_rate .9, max_rate .99 and ramp 5000 for
    text, start_rate .15, min_rate .6, max_rate .75 and ramp 2500 for infilling, and start_rate .01,
    min_rate .05, max_rate .25 and ramp 2500 for code.

    Raises ``ValueError`` unless the parameterization is ``any_subset``, and ``FieldError`` for
    rates out of their range.
    """

    min_rate: float = 0.0
    """Lower end of the rates, in [0, 1]; each sequence has at least one generated position."""
    max_rate: float = 1.0
    """Upper end of the rates, in (0, 1]. Beside the L rows of content the network gets ⌈R·L⌉ query
    rows, rounded up to an even number but at most L; R is the larger of max_rate and start_rate."""
    start_rate: float | None = None
    """The rate of all sequences in the first step, in (0, 1]; from there both ends move
    linearly. None starts with the final range."""
    ramp: int = 0
    """Steps until the rates have their final range; goes with start_rate."""
    order: Order = "forward"
    """Order of the generated positions. forward: from left to right, one order for each prompt (the
    binary lattice of arXiv:2205.13554). random: uniformly random, which is harder to learn."""

    packs = False

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.parameterization, Parameterization):
            name = type(self.parameterization).__name__.lower()
            raise ValueError(
                f"it trains the parameterization any_subset only, got {name}; lambda_dce and k_dce "
                "train conditional"
            )
        for name, value in (("max_rate", self.max_rate), ("start_rate", self.start_rate)):
            if value is not None and not 0 < value <= 1:
                raise FieldError(name, f"must be in (0, 1], got {value}")
        if not 0 <= self.min_rate <= 1:
            raise FieldError("min_rate", f"must be in [0, 1], got {self.min_rate}")
        if self.min_rate > self.max_rate:
            raise FieldError(
                "min_rate", f"must be at most max_rate {self.max_rate}, got {self.min_rate}"
            )
        if self.ramp < 0:
            raise FieldError("ramp", f"must be at least 0 updates, got {self.ramp}")
        if (self.start_rate is None) != (self.ramp == 0):
            raise FieldError(
                "ramp", f"goes with start_rate, got {self.ramp} with start_rate {self.start_rate}"
            )
        if self.order not in get_args(Order):
            raise FieldError(
                "order", f"must be one of {', '.join(get_args(Order))}, got {self.order!r}"
            )

    def num_queries(self, length: int) -> int:
        """Query rows of the network for sequences of this length: ⌈largest rate · length⌉.

        The number is rounded up to an even one, which cuDNN's attention needs under a mask, but is
        at most ``length``.
        """
        # Rounding must not add a row: 0.29 · 100 is 28.999999999999996 or 29.000000000000004.
        count = math.ceil(max(self.max_rate, self.start_rate or 0) * length - 1e-6)
        return min(count + count % 2, length)

    def rows(self, length):
        return length + self.num_queries(length)

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        return self.corrupt_at(self.ramp, keys_B, u_B, x0_BL, scored_BL)

    def corrupt_at(self, step, keys_B, u_B, x0_BL, scored_BL):
        low, high = self.min_rate, self.max_rate
        if self.start_rate is not None:
            share = jnp.minimum(step / self.ramp, 1.0)
            low, high = (self.start_rate + share * (end - self.start_rate) for end in (low, high))
        length = x0_BL.shape[1]
        total_B = scored_BL.sum(-1)
        size_B = jnp.ceil((high - (high - low) * u_B) * total_B - 1e-4).astype(jnp.int32)
        # In float32 the size may be rounded up by one; there must be a query row for each.
        size_B = jnp.clip(size_B, 1, self.num_queries(length))
        size_B = jnp.minimum(size_B, total_B)
        # Ranks of a random permutation; float32 uniform draws would tie in long sequences.
        place_BL = jax.vmap(lambda key: jax.random.permutation(key, length))(keys_B)
        place_BL = jnp.where(scored_BL, place_BL, length)
        place_BL = jnp.argsort(jnp.argsort(place_BL, -1), -1)
        generated_BL = scored_BL & (place_BL < size_B[:, None])
        rank_BL = jnp.cumsum(generated_BL, -1) if self.order == "forward" else place_BL + 1
        corrupted = self._masked(generated_BL, x0_BL, total_B / jnp.maximum(size_B, 1))
        return replace(corrupted, rank_BL=jnp.where(generated_BL, rank_BL, 0))

    def _inputs(self, corrupted, x0_BL):
        """Content rows of all tokens, and a query row for each generated position."""
        assert corrupted.rank_BL is not None  # ``corrupt`` returns it
        length = x0_BL.shape[1]
        generated_BL = corrupted.rank_BL > 0
        # Generated positions first, from left to right; rows that are left over query the prompt.
        query_BK = jnp.argsort(~generated_BL, axis=1, stable=True)[:, : self.num_queries(length)]
        query_rank_BK = jnp.take_along_axis(corrupted.rank_BL, query_BK, 1)
        parameterization = self.parameterization
        assert isinstance(parameterization, Parameterization)
        inputs = parameterization.in_order(
            x0_BL, corrupted.rank_BL, query_BK, query_rank_BK, attend=corrupted.attend
        )
        row_BL = length - 1 + jnp.cumsum(generated_BL, -1)
        # The prompt has no loss: its positions are read at any row.
        return replace(inputs, read_BL=jnp.where(generated_BL, row_BL, 0))


make = AnySubset
