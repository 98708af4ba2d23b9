"""The base of training objectives: a corruption, and a loss in nats for each position.

The loss of a sequence is the sum over its positions of weight · nats. ``corrupt`` draws the
corrupted tokens and decides the weights, ``row_nats`` gives the nats of a position from the raw
output there, and ``summed_nats`` evaluates the network and sums. Losses are not averaged here: the
training step divides the sum by the batch size, once, and an evaluation by the number of tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import along, fold
from sedd.errors import UserError
from sedd.networks.base import Attend, Network
from sedd.objectives.rows import row_nats, summed_nats
from sedd.parameterizations.base import Inputs, Parameterization
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key, Params

GOLDEN = (5**0.5 - 1) / 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a teacher predicts for a corrupted batch.

    Args:
        x_BL: the tokens of the teacher's first call.
        sigma_B: the total noise of its last call.
        keys_B: keys of what it draws.
        hidden_BLD: the hidden states from which it predicts each position; None before it was
            called (``Objective.taught``).
        head: its output layer.
    """

    x_BL: Int[Array, "B L"]
    sigma_B: Float[Array, " B"]
    keys_B: Key[Array, " B"]
    hidden_BLD: Float[Array, "B L D"] | None = None
    head: tuple[Float[Array, "D V"], Float[Array, " V"]] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """A corrupted batch.

    Args:
        xt_BL: the corrupted tokens.
        weight_BL: the weight of each position's loss; 0 where the position has no loss.
        sigma: total noise, [B] or [B, L]; None if the objective has no time.
        rank_BL: the order of generation. For ``any_subset`` it is 0 in the prompt, and 1, 2, … at
            the generated positions. For ``self_speculative``, ``marginal`` and ``energy`` it is a
            permutation of 0..L-1, in which the visible positions come first. None for all other
            objectives.
        attend: the segments of rows with padding or several texts; positions of different segments
            do not see each other. None if all positions see each other.
        keys_B: keys of further draws: those of ``energy`` from the model, and those of
            ``latent_distill`` from its teacher and of latents; None for all other objectives.
        drawn_BL: the text that the teacher of ``latent_distill`` has drawn; None before it was
            called (``Objective.taught``), and for all other objectives.
        latent_BZ: a latent of each sequence, for a network that takes one; None is the latent 0.
        lesson: what the teacher of ``self_distill`` predicts; None for all other objectives.
    """

    xt_BL: Int[Array, "B L"]
    weight_BL: Float[Array, "B L"]
    sigma: Float[Array, "..."] | None = None
    rank_BL: Int[Array, "B L"] | None = None
    attend: Attend | None = None
    keys_B: Key[Array, " B"] | None = None
    lesson: Lesson | None = None
    drawn_BL: Int[Array, "B L"] | None = None
    latent_BZ: Float[Array, "B Z"] | None = None


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A training loss in nats.

    Its mean over draws is a bound on -log p(x0), or one of the terms of such a bound, times a
    factor that the subclass states. A subclass whose mean is another quantity says so.

    Positions that are not scored are conditioned on: they are never corrupted and have no loss.

    Args:
        schedule: the noise schedule, σ(t) and its derivative.
        parameterization: the meaning of the network's raw output; it holds the process.

    Raises:
        ValueError: if the objective cannot train the parameterization. Subclasses check more.
    """

    schedule: NoiseSchedule
    parameterization: Parameterization
    causal: ClassVar[bool] = False
    """Whether the objective trains causal parameterizations, and only these."""
    packs: ClassVar[bool] = True
    """Whether a row may hold several texts as segments (``corrupt_segments``)."""
    weighted: ClassVar[bool] = False
    """Whether the objective trains on rows with weights, and only on these."""
    by_position: ClassVar[bool] = False
    """Whether the objective takes schedules with a noise of its own for each position."""
    trains_causal_head: ClassVar[bool] = False
    """Whether the objective trains networks with a causal head, and only these."""
    trains_marginal_head: ClassVar[bool] = False
    """Whether the objective trains networks with a marginal head, and only these."""
    trains_hmm_head: ClassVar[bool] = False
    """Whether the objective trains networks with an HMM head, and only these."""
    trains_latent: ClassVar[bool] = False
    """Whether the objective trains networks that take a latent, and only these."""

    @property
    def teacher_calls(self) -> int:
        """Calls of a frozen teacher for each sequence; 0 for an objective without a teacher."""
        return 0

    def __post_init__(self):
        if self.causal and not self.parameterization.causal:
            raise ValueError(
                "the autoregressive objective needs the autoregressive parameterization"
            )
        if self.parameterization.causal and not self.causal:
            raise ValueError(
                "it corrupts tokens anywhere, but the parameterization autoregressive sees only "
                "those before a position: train it with the objective autoregressive"
            )

    def check(self, network: Network) -> None:
        """Raise UserError if the objective cannot train the network."""
        for kind, trains, has, objective in (
            ("causal", self.trains_causal_head, network.has_causal_head, "self_speculative"),
            ("marginal", self.trains_marginal_head, network.has_marginal_head, "marginal"),
            ("hmm", self.trains_hmm_head, network.has_hmm_head, "hmm"),
        ):
            if trains and not has:
                article = "an" if kind == "hmm" else "a"
                raise UserError(
                    f"trains {article} {kind} head, and this network has none: use {kind}_head"
                )
            if has and not trains:
                raise UserError(f"does not train the {kind} head of the network: use {objective}")
        if self.trains_latent and not network.has_latent:
            raise UserError("trains a network with a latent, and this one has none: use latent")
        if network.has_latent and not self.trains_latent:
            raise UserError("does not train the latent of the network: use latent_distill")

    @property
    def process(self):
        """The forward process, which the parameterization holds."""
        return self.parameterization.process

    @abstractmethod
    def corrupt(
        self,
        keys_B: Key[Array, " B"],
        u_B: Float[Array, " B"],
        x0_BL: Int[Array, "B L"],
        scored_BL: Bool[Array, "B L"],
    ) -> Corrupted:
        """Corrupt a batch and weight its positions.

        Args:
            keys_B: one key a sequence, for the corruption.
            u_B: uniform draws in [0, 1), which determine the noise levels.
            x0_BL: clean tokens.
            scored_BL: positions that may be corrupted and have a loss.
        """

    def corrupt_at(
        self,
        step: Int[Array, ""] | int,
        keys_B: Key[Array, " B"],
        u_B: Float[Array, " B"],
        x0_BL: Int[Array, "B L"],
        scored_BL: Bool[Array, "B L"],
    ) -> Corrupted:
        """``corrupt`` in training, after ``step`` steps, those with a skipped update included.

        It differs from ``corrupt`` only in an objective that changes while the model is trained.
        """
        return self.corrupt(keys_B, u_B, x0_BL, scored_BL)

    def corrupt_segments(
        self,
        step: Int[Array, ""] | int,
        keys_B: Key[Array, " B"],
        u_B: Float[Array, " B"],
        x0_BL: Int[Array, "B L"],
        scored_BL: Bool[Array, "B L"],
        segment_BL: Int[Array, "B L"],
    ) -> Corrupted:
        """``corrupt_at`` for rows of several texts, each with a noise level and noise of its own.

        Text s of a row has the draw u + s·φ mod 1, φ the golden ratio, which spreads the draws of
        a row evenly. The noise level itself is not returned: no network may depend on it.

        Args:
            step: as for ``corrupt_at``, like the next ones.
            keys_B: one key a sequence.
            u_B: uniform draws in [0, 1).
            x0_BL: clean tokens.
            scored_BL: positions that may be corrupted and have a loss.
            segment_BL: 1, 2, … for the texts of a row, and 0 for padding.
        """

        def add(number, so_far):
            here_BL = segment_BL == number
            one = self.corrupt_at(
                step,
                fold(keys_B, number),
                (u_B + number * GOLDEN) % 1.0,
                x0_BL,
                scored_BL & here_BL,
            )
            return jnp.where(here_BL, one.xt_BL, so_far[0]), so_far[1] + one.weight_BL

        start = x0_BL, jnp.zeros(x0_BL.shape)
        xt_BL, weight_BL = jax.lax.fori_loop(1, segment_BL.max() + 1, add, start)
        return Corrupted(xt_BL=xt_BL, weight_BL=weight_BL, attend=Attend(segment_BL=segment_BL))

    def taught(self, network: Network, params: Params, corrupted: Corrupted) -> Corrupted:
        """Call the teacher, and add what it predicts to a corrupted batch.

        The training step calls this method if there are ``teacher_calls``.

        Args:
            network: the network, which teacher and student have in common.
            params: the parameters of the teacher.
            corrupted: from ``corrupt_at``.
        """
        return corrupted

    def ends_round(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether the student's averaged weights become the teacher after ``step`` steps."""
        return False

    def rows(self, length: int) -> int:
        """The rows of a sequence of this length, for counts of FLOPs.

        The copies of ``latent_distill`` with other latents, and the further calls of ``marginal``
        and ``energy``, are not in it.
        """
        return length

    @abstractmethod
    def row_nats(
        self,
        raw_RV: Float[Array, "*r V"],
        x0_R: Int[Array, "*r"],
        xt_R: Int[Array, "*r"],
        sigma_R: Float[Array, "*r"] | None,
    ) -> Float[Array, "*r"]:
        """Return the unweighted nats of single positions (rows) from the raw output there.

        Args:
            raw_RV: the raw output of the network.
            x0_R: the clean tokens.
            xt_R: the corrupted tokens.
            sigma_R: the total noise that ``corrupt`` returned; None if it returned none.
        """

    def nats(self, network: Network, params: Params, corrupted: Corrupted, x0_BL, **kwargs):
        """Return the weighted nats of every position, [B, L]; not differentiable.

        The sum over L is the loss of a sequence. ``keys_B``, one key a sequence, turns on dropout.
        """
        rows = self._rows(network, params, corrupted, x0_BL, **kwargs)
        return row_nats(self._nats_of, *rows).reshape(x0_BL.shape)

    def summed_nats(self, network: Network, params: Params, corrupted: Corrupted, x0_BL, **kwargs):
        """Return the sum of ``nats`` over the batch; differentiable in ``params``."""
        return summed_nats(self._nats_of, *self._rows(network, params, corrupted, x0_BL, **kwargs))

    def _nats_of(self, raw_RV: Array, leaves: tuple[Array, ...]) -> Array:
        """``row_nats`` with the arguments of ``RowNats``."""
        x0_R, xt_R, *more = leaves
        return self.row_nats(raw_RV, x0_R, xt_R, *(more or [None]))

    def _inputs(self, corrupted: Corrupted, x0_BL: Int[Array, "B L"]) -> Inputs:
        """The network call for a corrupted batch."""
        return self.parameterization.inputs(corrupted.xt_BL, corrupted.attend)

    def _rows(
        self,
        network: Network,
        params: Params,
        corrupted: Corrupted,
        x0_BL: Int[Array, "B L"],
        *,
        keys_B: Key[Array, " B"] | None = None,
    ):
        """Run the network, and return the arguments of ``rows.summed_nats`` for all positions."""
        xt_BL, sigma = corrupted.xt_BL, corrupted.sigma
        inputs = self._inputs(corrupted, x0_BL)
        hidden_BLD = inputs.hidden(
            network,
            params,
            sigma=self.parameterization.condition_of(sigma),
            keys_B=keys_B,
            latent_BZ=corrupted.latent_BZ,
        )
        leaves = [x0_BL, xt_BL]
        if sigma is not None:
            leaves.append(jnp.broadcast_to(along(sigma, xt_BL), x0_BL.shape))
        return (
            hidden_BLD.reshape(-1, hidden_BLD.shape[-1]),
            network.head(params),
            jnp.ravel(corrupted.weight_BL),
            tuple(jnp.ravel(leaf) for leaf in leaves),
        )


def draw_uniform(
    key: Key[Array, ""], index_B: Int[Array, " B"], total: int, *, stratified: bool
) -> Float[Array, " B"]:
    """Draw a number in [0, 1) for each example of a batch.

    Stratified draws are (u + index / total) mod 1 with one u for the batch. Each draw is uniform,
    and together they cover the interval evenly, which reduces the variance of the batch's loss.

    Args:
        key: the key of the global batch.
        index_B: each example's place in the global batch.
        total: the size of the global batch.
        stratified: whether the draws are stratified, or independent.
    """
    if not stratified:
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index_B)
    return (jax.random.uniform(key) + index_B / total) % 1.0


@dataclass(frozen=True, kw_only=True)
class DenoisingCrossEntropy(Objective):
    """The base of losses -log p(x0_i | xt) at masked positions; a subclass decides the weights.

    A subclass implements ``corrupt`` alone, usually with ``_masked``.
    """

    def __post_init__(self):
        super().__post_init__()
        if not self.process.absorbing:
            raise ValueError(
                "a denoising cross entropy needs an absorbing process; the objective "
                "score_entropy works on any"
            )
        if not self.parameterization.normalised:
            raise ValueError(
                "a cross entropy needs the parameterization conditional: it cannot train the "
                "scale of a score; the objective score_entropy can"
            )

    def row_nats(self, raw_RV, x0_R, xt_R, sigma_R):
        logits_RN = self.parameterization.masked_logits(raw_RV)
        picked_R = jnp.take_along_axis(logits_RN, x0_R[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits_RN, -1) - picked_R

    def _masked(self, masked_BL, x0_BL, weight, sigma=None, rank_BL=None) -> Corrupted:
        """Mask the chosen positions, and give them their weight, [B] or [B, L]."""
        return Corrupted(
            xt_BL=jnp.where(masked_BL, self.process.mask, x0_BL),
            weight_BL=jnp.where(masked_BL, along(weight, x0_BL), 0.0),
            sigma=sigma,
            rank_BL=rank_BL,
        )

    def _require_time_independent(self) -> None:
        """Raise ValueError if the network needs a noise level; the objective draws none."""
        if not self.parameterization.time_independent:
            raise ValueError(
                "this objective draws no noise level: the parameterization must be "
                "time-independent (time_independent=True)"
            )
