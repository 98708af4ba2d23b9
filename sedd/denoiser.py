"""A network, its parameters and its parameterization as one object, which samplers and bounds call.

A ``Denoiser`` computes two quantities. The log score, log(p_t(y) / p_t(x)), serves τ-leaping on any
process. The log conditional, log p(x0 | x) of the clean tokens, serves the samplers of absorbing
processes. ``Reshape`` (temperature, guidance, …), constraints and watermarks act here, so that no
sampler has to know them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from sedd.arrays import along, categorical, fold
from sedd.constraints.base import Constraint, Read
from sedd.constraints.windows import Windows, mixed_rows, token_keys
from sedd.networks.base import Attend, Memory, Network, read_out
from sedd.networks.mesh import anywhere
from sedd.networks.rows import Rows, over_chunks, row_sizes
from sedd.parameterizations.any_subset import UNKNOWN, AnySubset
from sedd.parameterizations.base import Parameterization
from sedd.parameterizations.block import Block
from sedd.processes.base import Process
from sedd.reshape import Reshape
from sedd.types import Array, Bool, Float, Int, Key, Keys, Params, Shaped
from sedd.watermark.base import Watermark


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A model as a pytree: its parameters and arrays are traced, its components are static.

    Use it in two steps. ``hidden`` is the network call. ``log_score_rows`` and
    ``log_conditional_rows`` then apply the output layer to some positions of the result, and
    ``map_rows`` reduces their results to one value a position, in chunks. ``log_score`` and
    ``log_conditional`` are the two steps in one, for all positions; they hold [B, L, V].

    Args:
        params: parameters of the network.
        network: maps tokens to raw output.
        parameterization: gives the raw output its meaning.
        attend: which positions see which, for a batch with padding.
        reshape: changes the conditionals of masked positions on absorbing processes, and on others
            the predictions of the parameterization mean at all positions.
        given_BL: which positions hold given tokens. If set, guidance makes a second network call,
            in which these are masked.
        constraint: draws the tokens of some positions jointly, through ``propose``.
        windows: draws the tokens that are revealed in one call jointly, through ``propose`` too, by
            the hidden Markov model of the network.
        watermark: replaces the noise with which tokens are drawn, or changes the conditionals.
        latent_keys_B: a key for each sequence, for networks that take a latent; without keys it is
            the latent 0. The number of masks is folded in, so that each call that reveals
            something has a latent of its own.
        called: the hidden states of the current tokens, if the caller has made the network call
            already, with a memory; ``hidden`` then returns them.
    """

    params: Params
    network: Network = field(metadata={"static": True})
    parameterization: Parameterization = field(metadata={"static": True})
    attend: Attend | None = None
    reshape: Reshape | None = None
    given_BL: Bool[Array, "B L"] | None = None
    constraint: Constraint | None = None
    windows: Windows | None = None
    watermark: Watermark | None = None
    latent_keys_B: Key[Array, " B"] | None = None
    called: tuple[Float[Array, "B L D"], ...] | None = None

    @property
    def process(self) -> Process:
        """The forward process that the model reverses."""
        return self.parameterization.process

    @property
    def mask_id(self) -> int:
        """The id of the mask; ValueError for a process without a mask."""
        if self.process.mask_id is None:
            kind = type(self.process).__name__.lower()
            raise ValueError(f"the {kind} process of this model has no mask")
        return self.process.mask_id

    @property
    def time_independent(self) -> bool:
        """Whether the network takes no noise level."""
        return self.parameterization.time_independent

    @property
    def causal(self) -> bool:
        """Whether the model is autoregressive, p(x_i | x_<i), with only one order of sampling."""
        return self.parameterization.causal

    @property
    def any_subset(self) -> bool:
        """Whether one pass gives all conditionals of an order (``hidden_in_order``)."""
        return isinstance(self.parameterization, AnySubset)

    @property
    def block(self) -> int | None:
        """Positions in a block of a block model; None for other models."""
        return self.parameterization.block if isinstance(self.parameterization, Block) else None

    @property
    def guided(self) -> bool:
        """Whether ``hidden`` makes two network calls, with and without the given tokens."""
        return self.reshape is not None and self.given_BL is not None

    @property
    def calls_each(self) -> Int[Array, " B"] | int:
        """Network calls that one prediction needs: 2 for a guided sequence, else 1.

        A sequence is guided if it has given tokens and a guidance weight above 0. In a mixed batch
        the second call runs for all sequences, but counts for the guided ones only.
        """
        if self.reshape is None or self.given_BL is None:
            return 1
        return 1 + (self.given_BL.any(1) & (jnp.asarray(self.reshape.guidance_B) > 0))

    def anywhere(self, flags: Bool[Array, "*"]) -> Bool[Array, ""]:
        """Whether any flag is set, also on devices with other parts of the parameters.

        Such devices must make the same network calls, because a call gathers the parameters from
        all of them. A loop or a branch that depends on the sequences of a device, and calls the
        network, must therefore depend on this value.
        """
        return anywhere(self.params, flags)

    def log_score(
        self, x_BL: Int[Array, "B L"], sigma: Float[Array, "..."]
    ) -> Float[Array, "B L V"]:
        """log(p_t(x with y at i) / p_t(x)) for every position i and state y; 0 at y = x_i.

        Args:
            x_BL: tokens.
            sigma: total noise, [B] or [B, L].

        Raises:
            ValueError: if the model is autoregressive, which has no score.

        The array [B, L, V] is held at once. For large vocabularies use ``log_score_rows`` in
        ``map_rows``.
        """
        rows = Rows.at(all_positions(x_BL))
        log_score_RV = self.log_score_rows(self.hidden(x_BL, sigma), x_BL, sigma, rows)
        return log_score_RV.reshape(*x_BL.shape, -1)

    def log_conditional(
        self, x_BL: Int[Array, "B L"], sigma: Float[Array, "..."] | None = None
    ) -> Float[Array, "B L N"]:
        """log p(x0_i = y | x) of every real token y.

        It is normalised over y, unless the parameterization is ``Conditional`` with ``normalise``
        set to "all".

        At a masked position i a causal model conditions on x_<i only. At a visible position the
        entry is 0 for the visible token and -1e6 for the others, also for a causal model.

        Args:
            x_BL: tokens.
            sigma: total noise, [B] or [B, L]; only a time-dependent model needs it.

        Raises:
            ValueError: if the process is not absorbing, or ``sigma`` is missing.

        The array [B, L, N] is held at once. For large vocabularies use ``log_conditional_rows`` in
        ``map_rows``.
        """
        return self.log_conditional_at(self.hidden(x_BL, sigma), x_BL, all_positions(x_BL))

    def hidden(
        self, x_BL: Int[Array, "B L"], sigma: Float[Array, "..."] | None = None
    ) -> tuple[Float[Array, "B L D"], ...]:
        """Call the network, and return the hidden states from which the output layer predicts x_i.

        Args:
            x_BL: tokens.
            sigma: total noise, [B] or [B, L]; ignored by a time-independent model.

        Returns:
            A tuple with one array [B, L, D], whose entry i belongs to position i. Under guidance a
            second array follows, for which the given tokens are masked.

        Raises:
            ValueError: if a time-dependent model gets no ``sigma``.
        """
        if self.called is not None:
            return self.called
        if sigma is None and not self.time_independent:
            raise ValueError(
                "sigma is missing: this model depends on the noise level; pass the total noise of "
                "each sequence, [B] or [B, L], as model.schedule.sigma(t) gives it"
            )
        each = [x_BL]
        if self.guided and self.given_BL is not None:
            each.append(jnp.where(self.given_BL, self.mask_id, x_BL))
        calls = [self.parameterization.inputs(tokens_BL, self.attend) for tokens_BL in each]
        latent_BZ, condition = self._latent(x_BL), self.parameterization.condition_of(sigma)
        return tuple(
            call.hidden(self.network, self.params, sigma=condition, latent_BZ=latent_BZ)
            for call in calls
        )

    def _latent(self, x_BL: Int[Array, "B L"]) -> Float[Array, "B Z"] | None:
        """The latent of each sequence for a call on these tokens; None for the latent 0."""
        if self.latent_keys_B is None:
            return None
        masks_B = (x_BL == self.mask_id).sum(1)
        keys_B = fold(self.latent_keys_B, masks_B)
        network: Any = self.network  # one that takes a latent
        shape = (network.latents,)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)

    def log_marginal(self, x_BL: Int[Array, "B L"]) -> Float[Array, " B"]:
        """Approximate the log probability of the visible tokens, with all others summed out.

        One network call for any number of visible tokens. It is the value of a marginal head, which
        is 0 if all positions are masked; it is no normalised log probability.

        Args:
            x_BL: tokens, and masks at the positions that are summed out.

        Raises:
            UserError: if the network has no marginal head.
        """
        return self.network.log_marginal(self.params, self.hidden(x_BL)[0], x_BL)

    def hidden_in_order(
        self,
        x_BL: Int[Array, "B L"],
        rank_BL: Int[Array, "B L"],
        query_BK: Int[Array, "B K"],
        query_rank_BK: Int[Array, "B K"],
    ) -> Float[Array, "B K D"]:
        """Call the network of an any-subset model once, for K predictions at any stage of an order.

        Args:
            x_BL: tokens.
            rank_BL: 0 in the prompt, 1, 2, … at generated positions in their order, and ``UNKNOWN``
                (``sedd.parameterizations.any_subset``) where the token is not known yet.
            query_BK: the positions to predict; a position may occur more than once.
            query_rank_BK: the rank of each prediction: it is conditioned on the lower ranks.

        Returns:
            The hidden state of each prediction, for ``log_conditional_in_order``.

        Raises:
            ValueError: if the model is no any-subset model.
        """
        call = self._any_subset.in_order(x_BL, rank_BL, query_BK, query_rank_BK, attend=self.attend)
        return call.hidden(self.network, self.params)

    def extend(
        self,
        memory: Memory,
        tokens_BC: Int[Array, "B C"],
        positions_BC: Int[Array, "B C"],
        rank_BC: Int[Array, "B C"],
        query_BK: Int[Array, "B K"],
        query_rank_BK: Int[Array, "B K"],
    ) -> tuple[Float[Array, "B K D"], Memory]:
        """``hidden_in_order`` with a memory: compute C new content rows and K predictions only.

        The content rows are written to the memory first, and the predictions see them. A row may be
        overwritten: write the position again. Rows of a draft that was rejected do no harm as long
        as they are overwritten before a query of a higher rank is asked.

        Args:
            memory: from ``self.network.memory(batch, length)``, or from an earlier call.
            tokens_BC: tokens to write.
            positions_BC: their positions, each at most once.
            rank_BC: their ranks, as in ``hidden_in_order``; a row of rank ``UNKNOWN`` is not
                written. Write the whole prompt in one call, since its rows see each other. A padded
                position must never be written.
            query_BK: the positions to predict.
            query_rank_BK: the rank of each prediction.

        Returns:
            The hidden state of each prediction, and the new memory.

        Raises:
            UserError: if the network has no memory.
            ValueError: if the model is no any-subset model.
        """
        call = self._any_subset.in_order(
            tokens_BC, rank_BC, query_BK, query_rank_BK, positions_BC=positions_BC
        )
        assert call.attend is not None
        assert call.attend.rank_q_BL is not None
        assert call.positions_BM is not None
        hidden_BMD, memory = self.network.extend(
            self.params,
            call.tokens_BM,
            memory,
            positions_BM=call.positions_BM,
            rank_BM=call.attend.rank_q_BL,
            write_BM=jnp.pad(rank_BC < UNKNOWN, ((0, 0), (0, query_BK.shape[1]))),
        )
        return call.read(hidden_BMD), memory

    def extend_block(
        self,
        memory: Memory,
        x_BL: Int[Array, "B L"],
        block_BW: Int[Array, "B W"],
        needed_B: Bool[Array, " B"],
        before_BM: Int[Array, "B M"] | None = None,
        missing_BM: Bool[Array, "B M"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Memory]:
        """Call the network of a block model on the rows of a block, given earlier ones in a memory.

        The result at the positions of the block is that of ``hidden``, if the rows of all earlier
        blocks are in the memory or among the new rows. The new rows are written to the memory.
        Those of a block that still has masks are to be written again when it has none.

        Args:
            memory: from ``self.network.memory(batch, length)``, or from an earlier call.
            x_BL: all tokens.
            block_BW: the positions of a block of each sequence; those outside of the text, and
                padding, are left out.
            needed_B: the sequences whose result is needed; for the others nothing is written.
            before_BM: the positions of further rows, of earlier blocks.
            missing_BM: which of them are to be written; these are distinct.

        Returns:
            The hidden states [B, L, D], 0 at positions outside of the block, and the new memory.

        Raises:
            UserError: if the network has no memory.
        """
        assert isinstance(self.parameterization, Block)
        batch, length = x_BL.shape
        positions, written = [block_BW], [jnp.broadcast_to(needed_B[:, None], block_BW.shape)]
        if self.parameterization.shift:  # the row before the block is read, and is written already
            positions.insert(0, block_BW[:, :1] - 1)
            written.insert(0, jnp.zeros((batch, 1), bool))
        num_read = sum(each.shape[1] for each in positions)
        if before_BM is not None and missing_BM is not None:
            positions.insert(0, before_BM)
            written.insert(0, missing_BM & needed_B[:, None])
        positions_BM, written_BM = jnp.concatenate(positions, 1), jnp.concatenate(written, 1)
        written_BM = written_BM & (positions_BM >= 0) & (positions_BM < length)
        positions_BM = jnp.clip(positions_BM, 0, length - 1)
        if self.attend is not None and self.attend.segment_BL is not None:
            real_BL = jnp.broadcast_to(self.attend.segment_BL > 0, x_BL.shape)
            written_BM = written_BM & jnp.take_along_axis(real_BL, positions_BM, 1)
        hidden_BMD, memory = self.network.extend(
            self.params,
            jnp.take_along_axis(x_BL, positions_BM, 1),
            memory,
            positions_BM=positions_BM,
            rank_BM=positions_BM // self.parameterization.block,
            write_BM=written_BM,
        )
        hidden_BWD = hidden_BMD[:, -num_read:][:, : block_BW.shape[1]]
        hidden_BLD = jnp.zeros((batch, length, hidden_BWD.shape[-1]), hidden_BWD.dtype)
        sequence_B1 = jnp.arange(batch)[:, None]
        return hidden_BLD.at[sequence_B1, block_BW].set(hidden_BWD, mode="drop"), memory

    def log_conditional_in_order(
        self,
        hidden_BKD: Float[Array, "B K D"],
        x_BL: Int[Array, "B L"],
        query_BK: Int[Array, "B K"],
    ) -> Float[Array, "B K N"]:
        """The log conditionals of K predictions, changed by ``reshape`` if there is one.

        Guidance and constraints are left out: a caller must refuse them.

        Args:
            hidden_BKD: from ``hidden_in_order`` or ``extend``.
            x_BL: current tokens, for a logit processor.
            query_BK: the position of each prediction.
        """
        raw_BKV = read_out(hidden_BKD, *self.network.head(self.params))
        masks_BK = jnp.full(query_BK.shape, self.mask_id)
        log_probs_BKN = self.parameterization.log_conditional(raw_BKV, masks_BK)
        if self.reshape is None:
            return log_probs_BKN
        return self.reshape(log_probs_BKN, x_BL, query_BK)

    @property
    def _any_subset(self) -> AnySubset:
        """The parameterization of an any-subset model; ValueError for another model."""
        if not isinstance(self.parameterization, AnySubset):
            kind = type(self.parameterization).__name__.lower()
            raise ValueError(
                f"the parameterization {kind} has no pass over an order; any_subset has"
            )
        return self.parameterization

    def map_rows(
        self,
        select_BL: Bool[Array, "B L"],
        function: Callable[[Rows], Array],
        dtype,
        shape: tuple[int, ...] = (),
        copies: int = 1,
    ) -> Shaped[Array, "B L *s"]:
        """Compute one value for each selected position, in chunks of rows; the others are 0.

        Args:
            select_BL: the positions to compute.
            function: maps R rows to values [R, *shape]. It may hold a few arrays [R, V], such as
                the result of ``log_conditional_rows``: R is chosen so that these fit into
                ``sedd.networks.rows.CHUNK_BYTES``.
            dtype: type of the result.
            shape: the shape of a row's value, by default one number.
            copies: 2 for a function that holds more than four arrays [R, V] at once.
        """
        batch, length = select_BL.shape

        def body(index_R, safe_R, values_M):
            rows = Rows(sequence_R=safe_R // length, position_R=safe_R % length)
            return values_M.at[index_R].set(function(rows).astype(dtype), mode="drop")

        # A watermark in the conditionals reads the two neighbours of each row as well.
        copies *= 1 if self.watermark is None or self.watermark.replaces_noise else 2
        sizes = row_sizes(batch, length, copies * self.network.num_states)
        zeros_M = jnp.zeros((batch * length, *shape), dtype)
        values_M = over_chunks(select_BL.reshape(-1), sizes, body, zeros_M)
        return values_M.reshape(*select_BL.shape, *shape)

    def log_score_rows(
        self,
        hidden: tuple[Float[Array, "B L D"], ...],
        x_BL: Int[Array, "B L"],
        sigma: Float[Array, "..."],
        rows: Rows,
    ) -> Float[Array, "R V"]:
        """The log scores of some rows, given ``hidden = self.hidden(x_BL, sigma)``.

        With a ``reshape``, the scores of a masked position are its reshaped conditional times the
        sum of its unchanged scores. The rate at which the position is revealed stays the same. On a
        process that is not absorbing they are the scores of the reshaped predictions.
        """
        x_R = rows.pick(x_BL)
        sigma_R = rows.pick(jnp.broadcast_to(along(sigma, x_BL), x_BL.shape))
        raw_RV = read_out(rows.pick(hidden[0]), *self.network.head(self.params))
        if self.reshape is not None and not self.process.absorbing:
            log_mean_RN = self.log_mean_rows(hidden, x_BL, rows)
            raw_RV = raw_RV.at[:, : self.process.num_tokens].set(log_mean_RN)
        log_score_RV = self.parameterization.log_score(raw_RV, x_R, sigma_R)
        if self.reshape is None or not self.process.absorbing:
            return log_score_RV
        num_tokens = self.process.num_tokens
        total_R1 = jax.nn.logsumexp(log_score_RV[:, :num_tokens], -1, keepdims=True)
        shaped_RN = self.log_conditional_rows(hidden, x_BL, rows) + total_R1
        shaped_RV = jnp.concatenate([shaped_RN, log_score_RV[:, num_tokens:]], -1)
        return jnp.where((x_R == self.process.mask_id)[:, None], shaped_RV, log_score_RV)

    def log_mean_rows(
        self, hidden: tuple[Float[Array, "B L D"], ...], x_BL: Int[Array, "B L"], rows: Rows
    ) -> Float[Array, "R N"]:
        """log x_θ of some rows, the prediction of the parameterization mean for the clean tokens.

        It is a leave-one-out prediction: training aims at p(x0_i | the tokens at all other
        positions), in which the token at position i has no part. Visible positions have a
        prediction as well. ``reshape`` is applied, without guidance.
        """
        raw_RV = read_out(rows.pick(hidden[0]), *self.network.head(self.params))
        log_probs_RN = self.parameterization.log_probs(raw_RV)
        if self.reshape is None:
            return log_probs_RN
        # Each row is passed to the reshape as a sequence of its own with K = 1 positions.
        shaped_R1N = self.reshape.take(rows.sequence_R)(
            log_probs_RN[:, None], x_BL[rows.sequence_R], rows.position_R[:, None]
        )
        return shaped_R1N[:, 0]

    def log_conditional_rows(
        self, hidden: tuple[Float[Array, "B L D"], ...], x_BL: Int[Array, "B L"], rows: Rows
    ) -> Float[Array, "R N"]:
        """The log conditionals of some rows, given ``hidden = self.hidden(x_BL, sigma)``.

        At masked positions they are guided, and changed by ``reshape`` and ``watermark``, if the
        denoiser has these.
        """
        return self._marked(self._unmarked_rows(hidden, x_BL, rows), hidden, x_BL, rows)

    def scored_rows(
        self,
        hidden: tuple[Float[Array, "B L D"], ...],
        x_BL: Int[Array, "B L"],
        rows: Rows,
        *,
        unsharpened: bool = False,
    ) -> tuple[Float[Array, "R N"], Float[Array, "R N"]]:
        """``log_conditional_rows``, and the log conditionals by which rows are to be ranked.

        The second are the first, but without temperature, top-k, top-p and watermark where
        ``unsharpened`` is set or the temperature is 0 (all its distributions would tie).
        """
        guided_RN = self._guided_rows(hidden, x_BL, rows)
        shaped_RN = self._reshaped(guided_RN, x_BL, rows, self.reshape)
        shaped_RN = self._marked(shaped_RN, hidden, x_BL, rows)
        if self.reshape is None:
            return shaped_RN, shaped_RN
        plain_RN = self._reshaped(guided_RN, x_BL, rows, self.reshape.unsharpened())
        zero_R = self.reshape.take(rows.sequence_R).temperature_B == 0
        plain_R = jnp.broadcast_to(jnp.asarray(zero_R) | unsharpened, rows.position_R.shape)
        return shaped_RN, jnp.where(plain_R[:, None], plain_RN, shaped_RN)

    def _unmarked_rows(
        self, hidden: tuple[Float[Array, "B L D"], ...], x_BL: Int[Array, "B L"], rows: Rows
    ) -> Float[Array, "R N"]:
        """The log conditionals of some rows, guided and reshaped, without the watermark."""
        return self._reshaped(self._guided_rows(hidden, x_BL, rows), x_BL, rows, self.reshape)

    def _marked(
        self,
        log_probs_RN: Float[Array, "R N"],
        hidden: tuple[Float[Array, "B L D"], ...],
        x_BL: Int[Array, "B L"],
        rows: Rows,
    ) -> Float[Array, "R N"]:
        """Apply the watermark to log conditionals of some rows, at masked positions."""
        if self.watermark is None:
            return log_probs_RN
        masked_R1 = (rows.pick(x_BL) == self.process.mask_id)[:, None]

        def neighbours(distance: int) -> Float[Array, "R N"]:
            position_R = rows.position_R + distance
            there_R = (position_R >= 0) & (position_R < x_BL.shape[1])
            if distance > 0 and self.causal:
                there_R = jnp.zeros_like(there_R)
            elif distance > 0 and self.block is not None:  # later blocks are not seen
                there_R = there_R & (position_R % self.block != 0)
            near = replace(rows, position_R=jnp.clip(position_R, 0, x_BL.shape[1] - 1))
            probs_RN = jnp.exp(self._unmarked_rows(hidden, x_BL, near))
            return jnp.where(there_R[:, None], probs_RN, 0.0)

        marked_RN = self.watermark.marked(log_probs_RN, rows, neighbours)
        return jnp.where(masked_R1, marked_RN, log_probs_RN)

    def _guided_rows(
        self, hidden: tuple[Float[Array, "B L D"], ...], x_BL: Int[Array, "B L"], rows: Rows
    ) -> Float[Array, "R N"]:
        """The log conditionals of some rows, guided at masked positions."""
        head = self.network.head(self.params)
        x_R = rows.pick(x_BL)
        log_probs_RN, *without = (
            self.parameterization.log_conditional(read_out(rows.pick(h_BLD), *head), x_R)
            for h_BLD in hidden
        )
        if self.reshape is None or not without:
            return log_probs_RN
        # Each row is passed to the reshape as a sequence of its own with K = 1 positions.
        reshape = self.reshape.take(rows.sequence_R)
        guided_R1N = reshape.guide(log_probs_RN[:, None], without[0][:, None])
        return jnp.where((x_R == self.process.mask_id)[:, None], guided_R1N[:, 0], log_probs_RN)

    def _reshaped(
        self,
        log_probs_RN: Float[Array, "R N"],
        x_BL: Int[Array, "B L"],
        rows: Rows,
        reshape: Reshape | None,
    ) -> Float[Array, "R N"]:
        """Apply a reshape to guided log conditionals of some rows, at masked positions."""
        if reshape is None:
            return log_probs_RN
        governed_R1 = None
        if self.constraint is not None:
            governed_R1 = rows.pick(self.constraint.inside(x_BL.shape[1]))[:, None]
        shaped_R1N = reshape.take(rows.sequence_R)(
            log_probs_RN[:, None],
            x_BL[rows.sequence_R],
            rows.position_R[:, None],
            drawn_jointly_BK=governed_R1,
        )
        masked_R1 = (rows.pick(x_BL) == self.process.mask_id)[:, None]
        return jnp.where(masked_R1, shaped_R1N[:, 0], log_probs_RN)

    def log_conditional_at(
        self,
        hidden: tuple[Float[Array, "B L D"], ...],
        x_BL: Int[Array, "B L"],
        positions_BK: Int[Array, "B K"],
    ) -> Float[Array, "B K N"]:
        """The log conditionals at K positions of each sequence; see ``log_conditional_rows``."""
        log_probs_RN = self.log_conditional_rows(hidden, x_BL, Rows.at(positions_BK))
        return log_probs_RN.reshape(*positions_BK.shape, -1)

    def propose(
        self,
        keys_B: Keys,
        x_BL: Int[Array, "B L"],
        commit_BL: Bool[Array, "B L"],
        read: Read,
        otherwise_BL: Int[Array, "B L"],
        hidden: tuple[Float[Array, "B L D"], ...],
    ) -> Int[Array, "B L"]:
        """Draw the positions under the constraint, or the windows of positions, jointly.

        Args:
            keys_B: a key for each sequence.
            x_BL: current tokens.
            commit_BL: masked positions that the sampler is going to reveal.
            read: log conditionals at given positions; see ``Constraint.propose``.
            otherwise_BL: tokens of the other positions.
            hidden: the result of ``hidden`` for ``x_BL``.

        Returns:
            The tokens that are drawn jointly, and ``otherwise_BL`` elsewhere.
        """
        if self.windows is not None:
            return self._draw_windows(keys_B, x_BL, commit_BL, otherwise_BL, hidden)
        if self.constraint is None:
            return otherwise_BL
        tokens_BL = self.constraint.propose(keys_B, x_BL, commit_BL, read, self.mask_id)
        return jnp.where(self.constraint.inside(x_BL.shape[1]), tokens_BL, otherwise_BL)

    def _draw_windows(
        self,
        keys_B: Keys,
        x_BL: Int[Array, "B L"],
        commit_BL: Bool[Array, "B L"],
        otherwise_BL: Int[Array, "B L"],
        hidden: tuple[Float[Array, "B L D"], ...],
    ) -> Int[Array, "B L"]:
        """``propose`` by the hidden Markov model of the network.

        The states are drawn given the guided conditionals. ``reshape`` then changes the
        distribution of each token given its state: a low temperature sharpens these, and leaves the
        choice between the states as it is.
        """
        assert self.windows is not None
        hmm = self.network.hmm(self.params)
        real_BL = jnp.ones(x_BL.shape, bool)
        if self.attend is not None and self.attend.segment_BL is not None:
            real_BL = real_BL & (self.attend.segment_BL > 0)
        masked_BL = (x_BL == self.mask_id) & real_BL
        covered_BL = self.windows.covers(masked_BL, real_BL)
        drawn_BL = self.windows.several(covered_BL & commit_BL)
        factor_BLH = self.map_rows(
            covered_BL,
            lambda rows: hmm.log_factors(self._guided_rows(hidden, x_BL, rows)),
            jnp.float32,
            (len(hmm.emission_HN),),
        )
        state_BL = self.windows.states(hmm, keys_B, x_BL, factor_BLH, masked_BL, real_BL)

        def tokens(rows):
            log_probs_RN = self._guided_rows(hidden, x_BL, rows)
            log_probs_RN = mixed_rows(hmm, log_probs_RN, rows.pick(state_BL))
            log_probs_RN = self._reshaped(log_probs_RN, x_BL, rows, self.reshape)
            return jax.vmap(categorical)(token_keys(keys_B, rows), log_probs_RN)

        tokens_BL = self.map_rows(drawn_BL, tokens, otherwise_BL.dtype)
        return jnp.where(drawn_BL, tokens_BL, otherwise_BL)

    def repeat(self, count: int) -> "Denoiser":
        """The denoiser for a batch with ``count`` consecutive copies of each sequence."""
        constraint = None if self.constraint is None else self.constraint.repeat(count)
        attend, given_BL = jax.tree.map(
            lambda rows: jnp.repeat(rows, count, 0), (self.attend, self.given_BL)
        )
        reshape = None if self.reshape is None else self.reshape.repeat(count)
        windows = None if self.windows is None else self.windows.repeat(count)
        latent_keys_B = self.latent_keys_B
        if latent_keys_B is not None:
            copy_B = jnp.tile(jnp.arange(count), len(latent_keys_B))
            repeated_B = jnp.repeat(latent_keys_B, count, 0)
            latent_keys_B = fold(repeated_B, copy_B)
        watermark = None if self.watermark is None else self.watermark.repeat(count)
        return replace(
            self,
            attend=attend,
            given_BL=given_BL,
            constraint=constraint,
            windows=windows,
            latent_keys_B=latent_keys_B,
            reshape=reshape,
            watermark=watermark,
        )


def all_positions(x_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The positions 0..L-1 of each sequence."""
    return jnp.broadcast_to(jnp.arange(x_BL.shape[1]), x_BL.shape)
