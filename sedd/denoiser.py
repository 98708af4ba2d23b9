"""A network, its parameters and their reading, as one callable."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from sedd.constraints.base import Constraint, Read
from sedd.networks.base import Attend, Network, read_out
from sedd.parameterizations.base import Parameterization
from sedd.processes.base import Process
from sedd.reshape import Reshape
from sedd.types import Array, Bool, Float, Int, Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """What samplers and bounds call. A pytree: it goes through jit with its parameters traced.

    ``attend`` says which positions see which, for batches with padding. With ``reshape`` the
    conditional of clean tokens is another one than the model's; guidance hides ``given_BL``. A
    ``constraint`` has its own way of drawing clean tokens, which ``propose`` applies.
    """

    params: Params
    network: Network = field(metadata={"static": True})
    parameterization: Parameterization = field(metadata={"static": True})
    attend: Attend | None = None
    reshape: Reshape | None = None
    given_BL: Bool[Array, "B L"] | None = None
    constraint: Constraint | None = None

    @property
    def process(self) -> Process:
        return self.parameterization.process

    @property
    def mask_id(self) -> int:
        """The id of the mask; ValueError on a process without one."""
        if self.process.mask_id is None:
            raise ValueError("this takes a mask, which the absorbing process has and this one not")
        return self.process.mask_id

    @property
    def time_independent(self) -> bool:
        return self.parameterization.time_independent

    @property
    def causal(self) -> bool:
        """Whether it is p(x_i | x_<i): it has one order, and its likelihood takes one call."""
        return self.parameterization.causal

    @property
    def guided(self) -> bool:
        """Whether a reading takes two network calls: with what is given, and without."""
        return self.reshape is not None and self.given_BL is not None

    @property
    def calls_each(self) -> Int[Array, " B"] | int:
        """Network calls of a reading: two for a sequence of which something is given, if guided."""
        if self.reshape is None or self.given_BL is None:
            return 1
        return 1 + (self.given_BL.any(1) & (jnp.asarray(self.reshape.guidance_B) > 0))

    def log_score(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"]
    ) -> Float[Array, "B L V"]:
        """log p_t(x with y at i) / p_t(x) for every position i and state y; 0 at x itself.

        A reshaped conditional leaves the total score of a masked position, and with it the rate at
        which the position is revealed, as it was.
        """
        hidden = self.hidden(x_BL, sigma_B)
        raw_BLV = read_out(hidden[0], *self.network.head(self.params))
        log_score_BLV = self.parameterization.log_score(raw_BLV, x_BL, sigma_B[:, None])
        if self.reshape is None:
            return log_score_BLV
        num_tokens = self.process.num_tokens
        total_BL1 = jax.nn.logsumexp(log_score_BLV[..., :num_tokens], -1, keepdims=True)
        shaped_BLN = self.log_conditional_at(hidden, x_BL, all_positions(x_BL)) + total_BL1
        masked_BL1 = (x_BL == self.process.mask_id)[..., None]
        shaped_BLV = jnp.concatenate([shaped_BLN, log_score_BLV[..., num_tokens:]], -1)
        return jnp.where(masked_BL1, shaped_BLV, log_score_BLV)

    def log_conditional(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"] | None = None
    ) -> Float[Array, "B L N"]:
        """log p(x0_i = y | x), normalised over the real tokens; of a causal model, given x_<i.

        A revealed position is 0 at its token and -1e6 elsewhere. Raises ValueError on a process
        without a mask, and without ``sigma_B`` on a time-dependent model.
        """
        return self.log_conditional_at(self.hidden(x_BL, sigma_B), x_BL, all_positions(x_BL))

    def hidden(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B L D"], ...]:
        """The network call: what ``log_conditional_at`` reads, as often as one likes.

        One array of hidden states, and where guidance is on a second one, of x without what is
        given.
        """
        if self.time_independent:
            sigma_B = None
        elif sigma_B is None:
            raise ValueError("this model depends on the time: sigma_B is required")
        each = [x_BL]
        if self.guided and self.given_BL is not None:
            each.append(jnp.where(self.given_BL, self.mask_id, x_BL))
        calls = [self.parameterization.inputs(tokens_BL, self.attend) for tokens_BL in each]
        return tuple(
            call.read(
                self.network.hidden(
                    self.params,
                    call.tokens_BM,
                    positions_BL=call.positions_BM,
                    attend=call.attend,
                    sigma_B=sigma_B,
                )
            )
            for call in calls
        )

    def log_conditional_at(
        self,
        hidden: tuple[Float[Array, "B L D"], ...],
        x_BL: Int[Array, "B L"],
        positions_BK: Int[Array, "B K"],
    ) -> Float[Array, "B K N"]:
        """``log_conditional`` at some positions of each sequence: the output layer of those alone.

        ``hidden`` is what ``hidden(x_BL)`` returned.
        """
        head = self.network.head(self.params)
        x_BK = jnp.take_along_axis(x_BL, positions_BK, 1)
        log_probs, *without = (
            self.parameterization.log_conditional(
                read_out(jnp.take_along_axis(h_BLD, positions_BK[..., None], 1), *head), x_BK
            )
            for h_BLD in hidden
        )
        if self.reshape is None:
            return log_probs
        shaped = self.reshape.guide(log_probs, without[0]) if without else log_probs
        governed_BK = None
        if self.constraint is not None:
            governed_BL = self.constraint.inside(x_BL.shape[1])
            governed_BK = jnp.take_along_axis(governed_BL, positions_BK, 1)
        shaped = self.reshape(shaped, x_BL, positions_BK, drawn_jointly_BK=governed_BK)
        return jnp.where((x_BK == self.process.mask_id)[..., None], shaped, log_probs)

    def propose(
        self,
        keys_B: Key[Array, " B"],
        x_BL: Int[Array, "B L"],
        commit_BL: Bool[Array, "B L"],
        read: Read,
        otherwise_BL: Int[Array, "B L"],
    ) -> Int[Array, "B L"]:
        """The constraint's tokens where it governs, and the others elsewhere.

        ``read(positions)`` are the log conditionals to draw from; see ``Constraint.propose``.
        """
        if self.constraint is None:
            return otherwise_BL
        tokens_BL = self.constraint.propose(keys_B, x_BL, commit_BL, read, self.mask_id)
        return jnp.where(self.constraint.inside(x_BL.shape[1]), tokens_BL, otherwise_BL)

    def repeat(self, count: int) -> "Denoiser":
        """For a batch in which each sequence stands ``count`` times in a row."""
        constraint = None if self.constraint is None else self.constraint.repeat(count)
        attend, given_BL = jax.tree.map(
            lambda rows: jnp.repeat(rows, count, 0), (self.attend, self.given_BL)
        )
        reshape = None if self.reshape is None else self.reshape.repeat(count)
        return replace(
            self, attend=attend, given_BL=given_BL, constraint=constraint, reshape=reshape
        )


def all_positions(x_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """0..L-1 for each sequence."""
    return jnp.broadcast_to(jnp.arange(x_BL.shape[1]), x_BL.shape)
