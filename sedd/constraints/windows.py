"""Joint draws over windows of positions, by a hidden Markov model (arXiv:2603.00045).

The network hmm_head makes of the conditionals c_i of one network call the joint distribution

    p̂(x_M | x_t) = p_ω(x) · Π_(i∈M) c_i(x_i) / Z

of the masked tokens M of a window; the visible tokens of the window are given. A draw is exact:
the factors of all masked positions, a backward pass over the window, the states from left to right,
and then each token in proportion to B(v | z_i) c_i(v). A sampler reveals some of the drawn tokens;
the others are summed out, since nobody sees them. Windows are independent of each other, given c.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.arrays import fold, position_keys
from sedd.errors import FieldError
from sedd.networks.base import Network
from sedd.networks.hidden_markov import HiddenMarkov, unwindowed, windows
from sedd.networks.rows import Rows
from sedd.types import Array, Bool, Float, Int, Key, Keys

BELOW = 0.7  # the largest share of masked tokens, if a user names none


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Windows:
    """Which tokens of a network call are drawn jointly.

    Those that a sampler reveals in the same window of ``width`` positions, in sequences of which at
    most the share ``below_B`` is masked. A token that is revealed alone in its window is drawn from
    its conditional, which is the trained one.

    Attributes:
        width: W, positions of a window; the first one begins at position 0.
        below_B: the largest share of masked positions of each sequence, in (0, 1]. A hidden Markov
            model knows which tokens go together, but not what the text is about.
    """

    width: int = field(metadata={"static": True})
    below_B: Float[Array, " B"]

    def several(self, select_BL: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
        """The selected positions that are not the only one of their window."""
        count_BK = windows(select_BL, self.width).sum(-1)
        counts_BKW = jnp.broadcast_to(count_BK[..., None], (*count_BK.shape, self.width))
        return select_BL & (unwindowed(counts_BKW, select_BL.shape[1]) > 1)

    def covers(
        self, masked_BL: Bool[Array, "B L"], real_BL: Bool[Array, "B L"]
    ) -> Bool[Array, "B L"]:
        """The masked positions of sequences of which few enough are masked."""
        share_B = masked_BL.sum(1) / jnp.maximum(real_BL.sum(1), 1)
        return masked_BL & (share_B <= self.below_B)[:, None]

    def states(
        self,
        hmm: HiddenMarkov,
        keys_B: Keys,
        x_BL: Int[Array, "B L"],
        factor_BLH: Float[Array, "B L H"],
        masked_BL: Bool[Array, "B L"],
        real_BL: Bool[Array, "B L"],
    ) -> Int[Array, "B L"]:
        """Draw the state of each position, given the visible tokens.

        Args:
            hmm: the hidden Markov model.
            keys_B: keys of the draws.
            x_BL: current tokens.
            factor_BLH: the log factors of masked positions (``HiddenMarkov.log_factors``).
            masked_BL: the masked positions.
            real_BL: which positions are no padding. Padding is summed out.
        """
        batch, length = x_BL.shape
        factor_BLH = jnp.where(masked_BL[..., None], factor_BLH, hmm.log_factors_of(x_BL))
        factor_BLH = jnp.where(real_BL[..., None], factor_BLH, 0.0)
        rows = Rows.at(jnp.broadcast_to(jnp.arange(length), x_BL.shape))
        size = factor_BLH.shape[-1]
        noise_RH = jax.vmap(lambda key: jax.random.gumbel(key, (size,), mode="high"))(
            _row_keys(keys_B, rows, 0)
        )
        noise_BLH = noise_RH.reshape(batch, length, size)
        draw = jax.vmap(jax.vmap(hmm.draw_states))
        state_BKW = draw(windows(factor_BLH, self.width), windows(noise_BLH, self.width))
        return unwindowed(state_BKW, length)

    def repeat(self, count: int) -> "Windows":
        """The windows of a batch in which each sequence is repeated ``count`` times in a row."""
        return replace(self, below_B=jnp.repeat(self.below_B, count, 0))


class Joint(NamedTuple):
    """The numbers of a user for ``Windows``."""

    window: int
    """Tokens of a window, at least 2."""
    below: float = BELOW
    """The largest share of masked tokens of a sequence, in (0, 1]."""

    def check(self, network: Network, source: str) -> None:
        """Raise FieldError if a number is out of its range, or the network has no HMM head."""
        if not 0 < self.below <= 1:
            raise FieldError("below", f"must be in (0, 1], got {self.below}")
        if not network.has_hmm_head:
            raise FieldError(
                "window",
                f"is {self.window}, and {source} has no HMM head to draw windows by: train one on "
                "it with --network hmm_head --objective hmm --init-from",
            )

    def windows(self, rows: int) -> Windows:
        """The windows of a batch of so many sequences."""
        return Windows(width=self.window, below_B=jnp.full(rows, self.below, jnp.float32))


def check_window(width: int, length: int) -> None:
    """Raise FieldError unless windows of this many tokens fit a sequence, with two tokens each."""
    if not 2 <= width <= length:
        raise FieldError("window", f"must be in 2..{length}, the tokens of a sequence, got {width}")


def token_keys(keys_B: Keys, rows: Rows) -> Key[Array, " R"]:
    """The keys with which tokens are drawn once their states are; others drew the states."""
    return _row_keys(keys_B, rows, 1)


def _row_keys(keys_B: Keys, rows: Rows, number: int) -> Key[Array, " R"]:
    """A key for each row, with its position and a number folded in."""
    keys_R = position_keys(keys_B, rows.sequence_R, rows.position_R)
    return fold(keys_R, number)


def mixed_rows(
    hmm: HiddenMarkov, log_probs_RN: Float[Array, "R N"], state_R: Int[Array, " R"]
) -> Float[Array, "R N"]:
    """Log probabilities of the tokens of some rows, given their states: ∝ B(v | z) c(v)."""
    return jax.nn.log_softmax(log_probs_RN + jnp.log(hmm.emission_HN)[state_R], -1)
