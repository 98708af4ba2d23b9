"""A network, its parameters and its parameterization as one callable: what samplers call."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from sedd.arrays import along
from sedd.constraints.base import Constraint, Read
from sedd.networks.base import Attend, Network, read_out
from sedd.networks.rows import Rows, over_chunks, row_sizes
from sedd.parameterizations.base import Parameterization
from sedd.processes.base import Process
from sedd.reshape import Reshape
from sedd.types import Array, Bool, Float, Int, Key, Params, Shaped


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A model that samplers and bounds call; a pytree, so that jit traces its parameters.

    One network call gives ``hidden``, and the output layer then gives the distributions of the
    positions that are wanted: as a log score, the currency of τ-leaping, or as a log conditional of
    clean tokens, that of the samplers of absorbing processes.

    ``attend`` says which positions see which, in a batch with padding. ``reshape`` changes the
    conditionals, and its guidance masks ``given_BL`` in a second call. ``constraint`` draws the
    tokens of the positions that it governs, through ``propose``.
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
            raise ValueError("this needs a process with a mask")
        return self.process.mask_id

    @property
    def time_independent(self) -> bool:
        return self.parameterization.time_independent

    @property
    def causal(self) -> bool:
        """Whether it models p(x_i | x_<i): its NLL takes one call, and sampling one order."""
        return self.parameterization.causal

    @property
    def guided(self) -> bool:
        """Whether ``hidden`` makes two network calls: with the given tokens, and without them."""
        return self.reshape is not None and self.given_BL is not None

    @property
    def calls_each(self) -> Int[Array, " B"] | int:
        """Network calls of one prediction: 2 for a guided sequence with given tokens, else 1."""
        if self.reshape is None or self.given_BL is None:
            return 1
        return 1 + (self.given_BL.any(1) & (jnp.asarray(self.reshape.guidance_B) > 0))

    def log_score(
        self, x_BL: Int[Array, "B L"], sigma: Float[Array, "..."]
    ) -> Float[Array, "B L V"]:
        """log p_t(x with y at i) / p_t(x) for every position i and state y; 0 at y = x_i.

        ``sigma`` is the total noise, [B] or [B, L]. All positions at once: programs for large
        vocabularies use ``log_score_rows`` in ``map_rows``.
        """
        rows = Rows.at(all_positions(x_BL))
        log_score_RV = self.log_score_rows(self.hidden(x_BL, sigma), x_BL, sigma, rows)
        return log_score_RV.reshape(*x_BL.shape, -1)

    def log_conditional(
        self, x_BL: Int[Array, "B L"], sigma: Float[Array, "..."] | None = None
    ) -> Float[Array, "B L N"]:
        """log p(x0_i = y | x), normalised over the real tokens; of a causal model, given x_<i.

        A visible position is 0 at its token and -1e6 elsewhere. Raises ValueError unless the
        process is absorbing, and without ``sigma`` on a time-dependent model. All positions at
        once: programs for large vocabularies use ``log_conditional_rows`` in ``map_rows``.
        """
        return self.log_conditional_at(self.hidden(x_BL, sigma), x_BL, all_positions(x_BL))

    def hidden(
        self, x_BL: Int[Array, "B L"], sigma: Float[Array, "..."] | None = None
    ) -> tuple[Float[Array, "B L D"], ...]:
        """The network call: the hidden states that the other methods read, as often as needed.

        Under guidance there is a second array, of x with the given tokens masked.
        """
        if self.time_independent:
            sigma = None
        elif sigma is None:
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
                    sigma_B=sigma,
                )
            )
            for call in calls
        )

    def map_rows(
        self, select_BL: Bool[Array, "B L"], function: Callable[[Rows], Array], dtype
    ) -> Shaped[Array, "B L"]:
        """``function(rows) -> [R]`` at the selected positions, a chunk of rows at a time; else 0.

        ``function`` may hold a few arrays [R, V], such as those of ``log_conditional_rows``: the
        number of rows R is chosen so that they fit into ``sedd.networks.rows.CHUNK_BYTES``.
        """
        batch, length = select_BL.shape

        def body(index_R, safe_R, values_M):
            rows = Rows(sequence_R=safe_R // length, position_R=safe_R % length)
            return values_M.at[index_R].set(function(rows).astype(dtype), mode="drop")

        sizes = row_sizes(batch, length, self.network.num_states)
        zeros_M = jnp.zeros(batch * length, dtype)
        return over_chunks(select_BL.reshape(-1), sizes, body, zeros_M).reshape(select_BL.shape)

    def log_score_rows(
        self,
        hidden: tuple[Float[Array, "B L D"], ...],
        x_BL: Int[Array, "B L"],
        sigma: Float[Array, "..."],
        rows: Rows,
    ) -> Float[Array, "R V"]:
        """``log_score`` of some rows; ``hidden`` is what ``hidden(x_BL, sigma)`` returned.

        A reshaped conditional leaves the total score of a masked position as it was, and with it
        the rate at which the position is revealed.
        """
        x_R = rows.pick(x_BL)
        sigma_R = rows.pick(jnp.broadcast_to(along(sigma, x_BL), x_BL.shape))
        raw_RV = read_out(rows.pick(hidden[0]), *self.network.head(self.params))
        log_score_RV = self.parameterization.log_score(raw_RV, x_R, sigma_R)
        if self.reshape is None:
            return log_score_RV
        num_tokens = self.process.num_tokens
        total_R1 = jax.nn.logsumexp(log_score_RV[:, :num_tokens], -1, keepdims=True)
        shaped_RN = self.log_conditional_rows(hidden, x_BL, rows) + total_R1
        shaped_RV = jnp.concatenate([shaped_RN, log_score_RV[:, num_tokens:]], -1)
        return jnp.where((x_R == self.process.mask_id)[:, None], shaped_RV, log_score_RV)

    def log_conditional_rows(
        self, hidden: tuple[Float[Array, "B L D"], ...], x_BL: Int[Array, "B L"], rows: Rows
    ) -> Float[Array, "R N"]:
        """``log_conditional`` of some rows; ``hidden`` is what ``hidden(x_BL, sigma)`` returned."""
        head = self.network.head(self.params)
        x_R = rows.pick(x_BL)
        log_probs_RN, *without = (
            self.parameterization.log_conditional(read_out(rows.pick(h_BLD), *head), x_R)
            for h_BLD in hidden
        )
        if self.reshape is None:
            return log_probs_RN
        # To the reshape, each row is a sequence of which one position is read.
        reshape = self.reshape.take(rows.sequence_R)
        shaped_R1N = log_probs_RN[:, None]
        if without:
            shaped_R1N = reshape.guide(shaped_R1N, without[0][:, None])
        governed_R1 = None
        if self.constraint is not None:
            governed_R1 = rows.pick(self.constraint.inside(x_BL.shape[1]))[:, None]
        shaped_R1N = reshape(
            shaped_R1N,
            x_BL[rows.sequence_R],
            rows.position_R[:, None],
            drawn_jointly_BK=governed_R1,
        )
        masked_R1 = (x_R == self.process.mask_id)[:, None]
        return jnp.where(masked_R1, shaped_R1N[:, 0], log_probs_RN)

    def log_conditional_at(
        self,
        hidden: tuple[Float[Array, "B L D"], ...],
        x_BL: Int[Array, "B L"],
        positions_BK: Int[Array, "B K"],
    ) -> Float[Array, "B K N"]:
        """``log_conditional_rows`` at K positions of each sequence."""
        log_probs_RN = self.log_conditional_rows(hidden, x_BL, Rows.at(positions_BK))
        return log_probs_RN.reshape(*positions_BK.shape, -1)

    def propose(
        self,
        keys_B: Key[Array, " B"],
        x_BL: Int[Array, "B L"],
        commit_BL: Bool[Array, "B L"],
        read: Read,
        otherwise_BL: Int[Array, "B L"],
    ) -> Int[Array, "B L"]:
        """The constraint's tokens at the positions that it governs, ``otherwise_BL`` elsewhere.

        ``read(positions)`` gives the log conditionals to draw from; see ``Constraint.propose``.
        """
        if self.constraint is None:
            return otherwise_BL
        tokens_BL = self.constraint.propose(keys_B, x_BL, commit_BL, read, self.mask_id)
        return jnp.where(self.constraint.inside(x_BL.shape[1]), tokens_BL, otherwise_BL)

    def repeat(self, count: int) -> "Denoiser":
        """The denoiser of a batch in which each sequence is repeated ``count`` times in a row."""
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
