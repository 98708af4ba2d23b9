"""The loss of a marginal head: its values agree with the conditionals. arXiv:2310.12920."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.errors import FieldError, UserError
from sedd.networks.base import Network
from sedd.objectives.base import Corrupted, DenoisingCrossEntropy
from sedd.objectives.rows import row_nats
from sedd.types import Array, Float, Int, Params


@dataclass(frozen=True, kw_only=True)
class Marginal(DenoisingCrossEntropy):
    """The squared difference of the marginal head f and the conditionals c along a random path.

    A path reveals the tokens of a text in a uniformly random order σ. Its states are x_S for S the
    first 0, 1, …, L positions of σ, and one step of it is log c(x_σ(d+1) | x_σ(1), …, x_σ(d)). If f
    is the log probability of each state, f(b) - f(a) is the sum of the steps from state a to state
    b. The loss takes W + 1 consecutive states, the first of which is uniform, and is L times the
    mean of (f(b) - f(a) - Σ steps)² over all pairs of them, in nats². L is the number of tokens.

    With one step (W = 1) this is the paper's loss, for which two network calls give one equation.
    All W steps need W + 1 calls, since a call at a state gives both f and the next step. A
    whole path (W = L) compares f with 0, its value for no tokens; single steps compare neighbours.

    If f is free, and c are the conditionals of one distribution, the minimum is its log
    probability of every x_S, for every W. For any c the mean of f over the texts of the data is the
    mean log probability of a text over random orders, which is minus the k-DCE bound.

    Only f is trained. The mean of this loss is no bound on -log p(x0). The paper takes half of the
    texts from the data and draws the others from the model; here all are from the data.
    arXiv:2310.12920.
    """

    trains_marginal_head = True

    packs = False

    window: int = 64
    """Steps W of a path, at most L; a text takes one network call more than steps."""

    def __post_init__(self):
        super().__post_init__()
        self._require_time_independent()
        if self.window < 1:
            raise FieldError("window", f"must be at least 1, got {self.window}")

    def check(self, network: Network) -> None:
        """Raise UserError unless the network has a marginal head on a frozen trunk."""
        super().check(network)
        if not network.frozen_trunk:
            raise UserError("trains the head of a frozen trunk: leave out --network.no-freeze")

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        length, total_B = x0_BL.shape[1], scored_BL.sum(-1)
        steps_B = jnp.minimum(self.window, total_B)
        choices_B = total_B - steps_B + 1
        first_B = jnp.minimum(jnp.floor(u_B * choices_B).astype(jnp.int32), choices_B - 1)
        first_B = length - total_B + first_B
        # A random permutation; float32 uniform draws would tie in long sequences.
        draw_BL = jax.vmap(lambda key: jax.random.permutation(key, length))(keys_B)
        order_BL = jnp.argsort(jnp.where(scored_BL, length + draw_BL, draw_BL), -1)
        rank_BL = jnp.argsort(order_BL, -1)
        inside_BL = (rank_BL >= first_B[:, None]) & (rank_BL < (first_B + steps_B)[:, None])
        weight_B = 2 * total_B / jnp.maximum(steps_B, 1)
        return Corrupted(
            xt_BL=jnp.where(rank_BL < first_B[:, None], x0_BL, self.process.mask),
            weight_BL=jnp.where(inside_BL, weight_B[:, None], 0.0),
            rank_BL=rank_BL,
        )

    def nats(self, network, params, corrupted, x0_BL, **kwargs):
        """Return the loss of each sequence, divided among its positions, [B, L], in nats².

        Only the sum over the positions has a meaning.
        """
        residual_SB = self.residuals(network, params, corrupted, x0_BL)
        rank_BL, steps_B, first_B = _window(corrupted)
        state_S1 = jnp.arange(len(residual_SB))[:, None]
        inside_SB = state_S1 <= steps_B
        mean_B = jnp.where(inside_SB, residual_SB, 0.0).sum(0) / (steps_B + 1)
        square_SB = jnp.where(inside_SB, jnp.square(residual_SB - mean_B), 0.0)
        # The mean over pairs of states is 2/W times the sum of squares around the mean. The first
        # state is reached by no step of the window: its square is divided among all steps.
        step_BL = jnp.clip(rank_BL - first_B[:, None] + 1, 0, len(residual_SB) - 1)
        each_BL = jnp.take_along_axis(square_SB.T, step_BL, 1)
        each_BL = each_BL + square_SB[0][:, None] / jnp.maximum(steps_B, 1)[:, None]
        return corrupted.weight_BL * jnp.where(corrupted.weight_BL > 0, each_BL, 0.0)

    def summed_nats(self, network, params, corrupted, x0_BL, **kwargs):
        """Return the sum of ``nats`` over the batch; differentiable in the head's parameters."""
        return self.nats(network, params, corrupted, x0_BL).sum()

    def residuals(
        self, network: Network, params: Params, corrupted: Corrupted, x0_BL: Int[Array, "B L"]
    ) -> Float[Array, "S B"]:
        """Compute f minus the sum of the steps so far at each state of the window.

        A text with fewer scored tokens than the window has copies of x0 behind its last state.

        Args:
            network: has a marginal head.
            params: its parameters; the result is differentiable in those of f.
            corrupted: from ``corrupt``.
            x0_BL: clean tokens.
        """
        rank_BL, _, first_B = _window(corrupted)
        rows_B, ones_B = jnp.arange(len(x0_BL)), jnp.ones(len(x0_BL))

        def state(number):
            known_B = first_B + number
            x_BL = jnp.where(rank_BL < known_B[:, None], x0_BL, self.process.mask)
            inputs = self.parameterization.inputs(x_BL, corrupted.attend)
            hidden_BLD = inputs.hidden(network, params)
            next_B = jnp.argmax(rank_BL == known_B[:, None], 1)
            leaves = x0_BL[rows_B, next_B], jnp.full(len(x0_BL), self.process.mask)
            hidden_BD = jax.lax.stop_gradient(hidden_BLD[rows_B, next_B])
            head = jax.lax.stop_gradient(network.head(params))
            nats_B = row_nats(self._nats_of, hidden_BD, head, ones_B, leaves)
            return network.log_marginal(params, hidden_BLD, x_BL), nats_B

        states = min(self.window, x0_BL.shape[1]) + 1
        value_SB, nats_SB = jax.lax.map(state, jnp.arange(states))
        return value_SB + jnp.cumsum(nats_SB, 0) - nats_SB


def _window(corrupted: Corrupted) -> tuple[Array, Array, Array]:
    """The rank of each position, the number of steps, and the number of tokens before the first."""
    assert corrupted.rank_BL is not None  # ``corrupt`` returns it
    inside_BL = corrupted.weight_BL > 0
    before_BL = jnp.where(inside_BL, corrupted.rank_BL, corrupted.rank_BL.shape[1])
    return corrupted.rank_BL, inside_BL.sum(-1), before_BL.min(-1)


make = Marginal
