"""Distillation of a diffusion model into fewer steps. arXiv:2410.21035, 2506.10892, 2502.15681."""

from dataclasses import dataclass, replace
from typing import get_args

import jax
import jax.numpy as jnp

from sedd.arrays import categorical, fold, position_keys
from sedd.errors import FieldError
from sedd.networks.base import Network, read_out
from sedd.networks.rows import over_chunks, row_sizes
from sedd.objectives.base import Corrupted, Lesson, Objective
from sedd.objectives.divergences import Divergence, f_divergence
from sedd.parameterizations.base import Parameterization
from sedd.types import Array, Bool, Float, Int, Key, Params

LEAST_TIME = 1e-3  # at time 0 nothing is corrupted


@dataclass(frozen=True, kw_only=True)
class SelfDistill(Objective):
    """The divergence of the student at time t from its teacher at less noise, at each position.

    The student starts as a copy of the teacher (--teacher). In round r = 0, 1, … the teacher's
    step is dt = 2^r / ``teacher_steps``. At the end of a round the student's averaged weights
    become the teacher, so that each round halves the number of steps from noise to text.

    On an absorbing process the teacher takes two steps from xt, t to t - 2·dt. The target at a
    masked position is the teacher's distribution in the step that reveals it, and in the second
    step if none does (SDTT, arXiv:2410.21035). On another process x_t and x_(t-dt) are corruptions
    of the same text with the same noise: positions that are wrong at t - dt have the same wrong
    token at t. The target is the teacher's distribution of the clean token at t - dt
    (arXiv:2506.10892, whose path is a Gaussian one).

    The mean is no bound on -log p(x0): validation and ``evaluate`` compute that of the process.

    The student predicts positions independently of each other, so that one call cannot draw
    positions jointly, whatever the divergence (docs/students.md).
    """

    packs = False

    divergence: Divergence = "forward_kl"
    """Divergence of the teacher p and the student q: forward_kl is KL(p‖q), whose minimum is the
    mean of the targets; reverse_kl, js (twice Jensen-Shannon) and hellinger seek the modes of p
    more (arXiv:2502.15681)."""
    rounds: int = 7
    """Rounds; each halves the steps of the student."""
    round_steps: int = 10_000
    """Training steps in a round; --training.steps is their product with the rounds."""
    teacher_steps: int = 1024
    """Steps of the first teacher from noise to text, which the rounds must halve to a whole number.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.process.absorbing and not self.parameterization.normalised:
            raise ValueError(
                "on an absorbing process it needs the parameterization conditional: it cannot "
                "train the scale of a score"
            )
        if self.divergence not in get_args(Divergence):
            names = ", ".join(get_args(Divergence))
            raise FieldError("divergence", f"must be one of {names}, got {self.divergence!r}")
        for name in ("rounds", "round_steps", "teacher_steps"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.teacher_steps % 2**self.rounds:
            halvings = (self.teacher_steps & -self.teacher_steps).bit_length() - 1
            raise FieldError(
                "rounds",
                f"is {self.rounds}, but the {self.teacher_steps} teacher_steps can be halved "
                f"{halvings} times",
            )

    @property
    def teacher_calls(self) -> int:
        """Two steps on an absorbing process, else one prediction."""
        return 2 if self.process.absorbing else 1

    def ends_round(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        return step % self.round_steps == 0

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        """``corrupt_at`` in the first round."""
        return self.corrupt_at(0, keys_B, u_B, x0_BL, scored_BL)

    def corrupt_at(self, step, keys_B, u_B, x0_BL, scored_BL):
        done = jnp.minimum(step // self.round_steps, self.rounds - 1)
        dt = 2.0**done / self.teacher_steps
        t_B = LEAST_TIME + (1 - LEAST_TIME) * u_B
        sigma_B = self.schedule.sigma(t_B)
        xt_BL = jnp.where(scored_BL, self.process.corrupt(keys_B, x0_BL, sigma_B), x0_BL)
        if self.process.absorbing:
            earlier_B = (t_B + jnp.maximum(t_B - 2 * dt, 0)) / 2  # half of what is left, if less
            earlier_sigma_B, x_BL = self.schedule.sigma(earlier_B), xt_BL
        else:
            earlier_sigma_B = self.schedule.sigma(jnp.maximum(t_B - dt, LEAST_TIME))
            # The same keys: a position is touched at t if it is touched earlier, by the same token.
            x_BL = self.process.corrupt(keys_B, x0_BL, earlier_sigma_B)
            x_BL = jnp.where(scored_BL, x_BL, x0_BL)
        path_keys_B = fold(keys_B, 1)
        counts_BL = scored_BL & self.process.can_move(xt_BL)
        return Corrupted(
            xt_BL=xt_BL,
            weight_BL=counts_BL.astype(jnp.float32),
            sigma=sigma_B,
            lesson=Lesson(x_BL=x_BL, sigma_B=earlier_sigma_B, keys_B=path_keys_B),
        )

    def taught(self, network: Network, params: Params, corrupted: Corrupted) -> Corrupted:
        """Call the teacher; of its distributions the hidden states are kept, [B, L, D]."""
        lesson, head = corrupted.lesson, network.head(params)
        assert lesson is not None  # ``corrupt_at`` returns it

        def call(x_BL, sigma_B):
            condition = self.parameterization.condition_of(sigma_B)
            return self.parameterization.inputs(x_BL).hidden(network, params, sigma=condition)

        x_BL = lesson.x_BL
        if not self.process.absorbing:
            hidden_BLD = call(x_BL, lesson.sigma_B)
        else:
            assert corrupted.sigma is not None  # ``corrupt_at`` returns it
            first_BLD = call(x_BL, corrupted.sigma)
            share_B = revealed_share(corrupted.sigma, lesson.sigma_B)
            x_BL = self._revealed(lesson.keys_B, first_BLD, head, corrupted, share_B)
            waits_BL = x_BL == self.process.mask
            hidden_BLD = jnp.where(waits_BL[..., None], call(x_BL, lesson.sigma_B), first_BLD)
        return replace(corrupted, lesson=replace(lesson, hidden_BLD=hidden_BLD, head=head))

    def _revealed(
        self,
        keys_B: Key[Array, " B"],
        hidden_BLD: Float[Array, "B L D"],
        head: tuple[Array, Array],
        corrupted: Corrupted,
        share_B: Float[Array, " B"],
    ) -> Int[Array, "B L"]:
        """Reveal each masked position with probability ``share_B``, and draw its token."""
        xt_BL, counts_BL = corrupted.xt_BL, corrupted.weight_BL > 0
        length = xt_BL.shape[1]
        drawn_BL = counts_BL & jax.vmap(
            lambda key, p: jax.random.bernoulli(key, p, (length,), mode="high")
        )(keys_B, share_B)
        token_keys_B = fold(keys_B, 1)
        return drawn_at(drawn_BL, token_keys_B, xt_BL, hidden_BLD, head, self.parameterization)

    def row_nats(self, raw_RV, x0_R, xt_R, sigma_R, *lesson):
        """The divergence at single positions.

        ``lesson`` has the teacher's hidden states, tokens and total noise there, and the kernel
        and the bias of its output layer.
        """
        hidden_RD, x_R, teacher_sigma_R, kernel_DV, bias_V = lesson
        teacher_RV = read_out(hidden_RD, kernel_DV, bias_V)
        teacher_RN = self._log_clean(teacher_RV, x_R, teacher_sigma_R)
        student_RN = self._log_clean(raw_RV, xt_R, sigma_R)
        return f_divergence(self.divergence, teacher_RN, student_RN)

    def _log_clean(self, raw_RV, x_R, sigma_R):
        """log p(x0 = v | x) of the real tokens at positions that may be wrong."""
        num_tokens = self.process.num_tokens
        if not self.parameterization.normalised:
            log_score_RV = self.parameterization.log_score(raw_RV, x_R, sigma_R)
            return self.process.denoise(log_score_RV, x_R, sigma_R)[..., :num_tokens]
        logits_RN = self.parameterization.masked_logits(raw_RV)
        if not self.process.absorbing:  # a prediction without the token at the position itself
            likelihood_RV = self.process.transition_to(x_R, sigma_R, sigma_R)
            logits_RN = logits_RN + jnp.log(likelihood_RV[..., :num_tokens])
        return jax.nn.log_softmax(logits_RN, -1)

    def _rows(self, network, params, corrupted, x0_BL, *, keys_B=None):
        """The student's rows, the teacher's hidden states beside them, and the teacher's head."""
        rows = super()._rows(network, params, corrupted, x0_BL, keys_B=keys_B)
        hidden_MD, head, weight_M, leaves = rows
        lesson = corrupted.lesson
        assert lesson is not None  # ``corrupt_at`` returns it
        assert lesson.hidden_BLD is not None  # ``taught`` adds it
        assert lesson.head is not None
        taught_MD = lesson.hidden_BLD.reshape(-1, lesson.hidden_BLD.shape[-1])
        sigma_BL = jnp.broadcast_to(lesson.sigma_B[:, None], x0_BL.shape)
        more = taught_MD, jnp.ravel(lesson.x_BL), jnp.ravel(sigma_BL)
        return hidden_MD, head, weight_M, (*leaves, *more), lesson.head


def drawn_at(
    select_BL: Bool[Array, "B L"],
    keys_B: Key[Array, " B"],
    x_BL: Int[Array, "B L"],
    hidden_BLD: Float[Array, "B L D"],
    head: tuple[Array, Array],
    parameterization: Parameterization,
) -> Int[Array, "B L"]:
    """Draw the selected positions, which are masked, independently of each other, in chunks."""
    length = x_BL.shape[1]
    hidden_MD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])

    def chunk(index_R, safe_R, tokens_M):
        raw_RV = read_out(hidden_MD[safe_R], *head)
        keys_R = position_keys(keys_B, safe_R // length, safe_R % length)
        tokens_R = jax.vmap(categorical)(keys_R, parameterization.masked_logits(raw_RV))
        return tokens_M.at[index_R].set(tokens_R.astype(tokens_M.dtype), mode="drop")

    sizes = row_sizes(len(x_BL), length, head[0].shape[1])
    x_M = over_chunks(select_BL.reshape(-1), sizes, chunk, x_BL.reshape(-1))
    return x_M.reshape(x_BL.shape)


def revealed_share(
    sigma: Float[Array, "*b"], earlier_sigma: Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """The probability that a mask at total noise σ is revealed by a step to less noise.

    It is (e^-σ' - e^-σ) / (1 - e^-σ), written without a difference of similar numbers.
    """
    return jnp.exp(-earlier_sigma) * jnp.expm1(earlier_sigma - sigma) / jnp.expm1(-sigma)


make = SelfDistill
