"""Training of an any-order model from an unnormalised log probability. arXiv:2310.12920."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from sedd.arrays import at, categorical, fold
from sedd.errors import FieldError, UserError
from sedd.networks.base import Network, read_out
from sedd.objectives.base import Corrupted, DenoisingCrossEntropy
from sedd.types import Array, Float, Int, Params


@dataclass(frozen=True, kw_only=True)
class Energy(DenoisingCrossEntropy):
    """The divergence KL(p ‖ e^(-E)/Z) of the model's own texts, and an error of its marginal head.

    -E(x) is a function of the user. There are no data: each sequence of a batch is drawn from the
    model, token by token in a uniformly random order σ; positions that are not scored are given.
    The loss has two terms. The first is F = log p(x | σ) + E(x), whose mean is KL - log Z. Its
    gradient is estimated by REINFORCE, (F - mean of F in the other sequences)·∇ log p(x | σ), over
    the whole path, which is unbiased.

    The second is ``consistency`` times the sum over the states of the same path, without the first
    one, of (f - log p of the path so far)² / (number of drawn tokens). Here f is the output of the
    marginal head minus that of the first state, which has the given tokens only. The term trains
    the head and the trunk by f; log p is a constant in it. Without the division the late states of
    a path, where the error of f is larger, would count most.

    A text of L tokens takes 2L + 1 network calls, L + 1 of them with a backward pass.
    arXiv:2310.12920. The paper draws by block Gibbs, from a persistent chain, and puts f in the
    place of log p, which saves calls where L is large.

    Args:
        log_prob: maps tokens [B, L] to unnormalised log probabilities [B], inside jit.
    """

    trains_marginal_head = True

    packs = False

    log_prob: Callable[[Array], Array]
    function: str = ""
    """For configurations: ``log_prob`` as file.py:name, a function of JAX from tokens [B, L] to
    numbers [B]. The objective itself calls ``log_prob`` only."""
    consistency: float = 2.0
    """Weight of the consistency of the marginal head with the conditionals."""

    def __post_init__(self):
        super().__post_init__()
        self._require_time_independent()
        if not self.consistency >= 0:
            raise FieldError("consistency", f"must not be negative, got {self.consistency}")

    def check(self, network: Network) -> None:
        """Raise UserError unless the network has a marginal head on a trunk that is trained."""
        super().check(network)
        if network.frozen_trunk:
            raise UserError("trains the trunk as well: give --network.no-freeze")

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        length = x0_BL.shape[1]
        draw_BL = jax.vmap(lambda key: jax.random.permutation(key, length))(fold(keys_B, 0))
        order_BL = jnp.argsort(jnp.where(scored_BL, length + draw_BL, draw_BL), -1)
        masked = self._masked(scored_BL, x0_BL, 1.0, rank_BL=jnp.argsort(order_BL, -1))
        return replace(masked, keys_B=fold(keys_B, 1))

    def nats(self, network, params, corrupted, x0_BL, **kwargs):
        """Return the loss of each sequence, spread evenly over its scored positions, [B, L].

        It is differentiable: its gradient is the estimate, and not the gradient of its value.
        """
        scored_BL = corrupted.weight_BL > 0
        count_B = scored_BL.sum(1)
        x_BL, free_B = self.draw(network, params, corrupted, x0_BL)
        value_SB, log_c_SB = self._along_the_path(network, params, corrupted, x_BL)
        known_S1 = jnp.arange(len(value_SB))[:, None]
        first_B = x0_BL.shape[1] - count_B
        log_c_SB = jnp.where(known_S1 >= first_B, log_c_SB, 0.0)
        others_B = (free_B.sum() - free_B) / max(len(free_B) - 1, 1)
        score_B = (free_B - others_B) * log_c_SB.sum(0)
        # f minus the log probability of the path, both from the given tokens on.
        path_SB = jax.lax.stop_gradient(jnp.cumsum(log_c_SB, 0) - log_c_SB)
        error_SB = value_SB - jnp.take_along_axis(value_SB, first_B[None], 0) - path_SB
        drawn_SB = known_S1 - first_B  # the number of drawn tokens; negative before the first state
        each_SB = jnp.square(error_SB) / jnp.maximum(drawn_SB, 1)
        square_B = jnp.where(drawn_SB > 0, each_SB, 0.0).sum(0)
        total_B = free_B + score_B - jax.lax.stop_gradient(score_B)
        total_B = total_B + self.consistency * square_B
        each_B = total_B / jnp.maximum(count_B, 1)
        return jnp.where(scored_BL, each_B[:, None], 0.0)

    def summed_nats(self, network, params, corrupted, x0_BL, **kwargs):
        """Return the sum of ``nats`` over the batch, whose gradient is the estimate."""
        return self.nats(network, params, corrupted, x0_BL).sum()

    def draw(
        self, network: Network, params: Params, corrupted: Corrupted, x0_BL: Int[Array, "B L"]
    ) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
        """Draw the scored positions from the model, one network call each.

        Args:
            network: the network.
            params: its parameters.
            corrupted: from ``corrupt``: the given tokens, the order and the keys.
            x0_BL: not read where positions are scored.

        Returns:
            The tokens, and F = log p(x | σ) + E(x) of each sequence in nats, without a gradient.
        """
        assert corrupted.rank_BL is not None  # ``corrupt`` returns it
        assert corrupted.keys_B is not None
        keys_B, scored_BL = corrupted.keys_B, corrupted.weight_BL > 0
        params = jax.lax.stop_gradient(params)

        def reveal(known, carry):
            x_BL, log_p_B = carry
            _, log_probs_BN, here_BL = self._call(network, params, corrupted, x_BL, known)
            token_B = jax.vmap(categorical)(fold(keys_B, known), log_probs_BN)
            drawn_BL = here_BL & scored_BL
            log_p_B = log_p_B + jnp.where(drawn_BL.any(1), at(log_probs_BN, token_B), 0.0)
            return jnp.where(drawn_BL, token_B[:, None], x_BL), log_p_B

        start = corrupted.xt_BL, jnp.zeros(len(x0_BL))
        x_BL, log_p_B = jax.lax.fori_loop(0, x0_BL.shape[1], reveal, start)
        return x_BL, jax.lax.stop_gradient(log_p_B - self.log_prob(x_BL))

    def _along_the_path(self, network, params, corrupted, x_BL):
        """f at each state, [L + 1, B], and log c of the next token, 0 at the last state."""

        @jax.checkpoint
        def state(known):
            visible_BL = jnp.where(corrupted.rank_BL < known, x_BL, self.process.mask)
            called = self._call(network, params, corrupted, visible_BL, known)
            hidden_BLD, log_probs_BN, here_BL = called
            next_B = jnp.where(here_BL, x_BL, 0).sum(1)
            log_c_B = jnp.where(here_BL.any(1), at(log_probs_BN, next_B), 0.0)
            return network.log_marginal(params, hidden_BLD, visible_BL), log_c_B

        return jax.lax.map(state, jnp.arange(x_BL.shape[1] + 1))

    def _call(self, network, params, corrupted, x_BL, known):
        """The hidden states, log c of the position that comes next, and where this position is."""
        inputs = self.parameterization.inputs(x_BL, corrupted.attend)
        hidden_BLD = inputs.hidden(network, params)
        here_BL = corrupted.rank_BL == known
        hidden_BD = jnp.where(here_BL[..., None], hidden_BLD, 0).sum(1)
        logits_BN = self.parameterization.masked_logits(read_out(hidden_BD, *network.head(params)))
        return hidden_BLD, jax.nn.log_softmax(logits_BN, -1), here_BL


make = Energy
