"""A hidden Markov model on a frozen trunk: tokens of one call drawn jointly (arXiv:2603.00045).

A masked diffusion model draws the tokens of one network call independently, each from the trunk's
conditional c_i. The head is a hidden Markov model p_ω (``sedd.networks.hidden_markov``), which
knows which tokens go together, with no parameter that depends on the text. Their product,

    p̂(x_M | x_t) = p_ω(x) · Π_(i∈M) c_i(x_i) / Z,

is a joint distribution of the masked tokens M of a window, from which tokens are drawn exactly by
dynamic programming (``sedd.constraints.windows``), without a further network call. The objective
``hmm`` trains ω with the trunk and its conditionals fixed.

If p_ω were uniform over texts, p̂ would be the product of the c_i. Otherwise its marginals are not
c_i: p_ω knows token frequencies, and c_i knows them already. Training ω under p̂, and not as a
language model of its own, makes the marginals right on average, since the expected emissions under
p̂ are then those of the data.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.networks.ddit import DDiT
from sedd.networks.hidden_markov import HiddenMarkov
from sedd.networks.shard import whole
from sedd.types import Array, Float, Key, Params

SPREAD = 0.1  # of the logits of random emissions, in which states have to differ to be trained
LIKENESS = 8.0  # factor of the cosine of two columns in the logits of the first emissions
SINKHORN = 100  # iterations


@dataclass(frozen=True, kw_only=True)
class HmmHead(DDiT):
    """The network ddit (the trunk) and a hidden Markov model over its tokens.

    Parameters are ``{"trunk": …, "head": …, "hmm": {"transition", "emission"}}``. The first two are
    those of ``DDiT``, and so are ``hidden`` and ``head``: bounds, and samplers that draw without
    windows, give the results of the trunk, which is never trained. The other two are logits, see
    ``HiddenMarkov``. The last state of the process is the mask. arXiv:2603.00045.

    Raises ``ValueError`` as ``DDiT`` does.
    """

    has_hmm_head = True

    states: int = 64
    """States of the hidden Markov model."""

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "states")
        if self.lora.rank:
            raise FieldError(
                "lora.rank",
                "goes with ddit and decoder: hmm_head trains a head of its own, use it without",
            )

    def init(self, key: Key[Array, ""]) -> Params:
        """Draw fresh float32 parameters; those of the trunk are ``DDiT.init`` with this key."""
        keys = jax.random.split(jax.random.fold_in(key, 1))
        shapes = {
            "transition": (self.states + 1, self.states),
            "emission": (self.states, self.num_states - 1),
        }
        logits = {
            name: SPREAD * jax.random.normal(key, shape, jnp.float32)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return super().init(key) | {"hmm": logits}

    def first_hmm(self, params: Params, log_unigram_N: Float[Array, " N"]) -> Params:
        """Logits of an HMM that changes nothing, with states from which training can start.

        Equal states would have equal gradients for ever. Here each state stands for one of the
        likeliest tokens, and prefers to emit tokens that are like it: those whose columns of the
        output layer are close to its own column. All transitions are equally likely, and the
        emissions are scaled (Sinkhorn's iteration) until each token is emitted equally often; then
        p̂ is the product of the trunk's conditionals.

        Args:
            params: the parameters of the trunk, ``{"trunk": …, "head": …}``.
            log_unigram_N: log frequency of each token.
        """
        tokens = self.num_states - 1
        column_ND = whole(params["head"])["kernel"].T[:tokens].astype(jnp.float32)
        column_ND = column_ND - column_ND.mean(0)
        column_ND = column_ND / (jnp.linalg.norm(column_ND, axis=-1, keepdims=True) + 1e-6)
        own_H = jax.lax.top_k(log_unigram_N, min(self.states, tokens))[1]
        own_H = jnp.resize(own_H, (self.states,))
        logit_HN = LIKENESS * column_ND[own_H] @ column_ND.T

        def scaled(logit_HN, _):
            logit_HN = logit_HN - jax.nn.logsumexp(logit_HN, 0) + math.log(self.states / tokens)
            return jax.nn.log_softmax(logit_HN, -1), None

        logit_HN, _ = jax.lax.scan(scaled, logit_HN, length=SINKHORN)
        zeros_ZH = jnp.zeros((self.states + 1, self.states))
        return {"transition": zeros_ZH, "emission": logit_HN}

    @property
    def frozen_trunk(self) -> bool:
        """True: the objective trains the hidden Markov model only."""
        return True

    def trainable(self, params: Params) -> Params:
        """The hidden Markov model."""
        return {"hmm": params["hmm"]}

    def hmm(self, params: Params) -> HiddenMarkov:
        """The hidden Markov model of these parameters."""
        logits = whole(params["hmm"])
        return HiddenMarkov(
            *(jax.nn.softmax(logits[name], -1) for name in ("transition", "emission"))
        )

    def training_flops(self, length: int, read: float) -> float:
        """Count the FLOPs of training on one sequence; arguments as of ``Network.training_flops``.

        The trunk has no backward pass. The emissions are multiplied with the conditionals of the
        rows, and again for their gradient, which computes the conditionals again.
        """
        head = 2 * self.hidden_dim * self.num_states
        emissions = 2 * self.states * (self.num_states - 1)
        recursions = 2 * 3 * length * 2 * self.states * (self.states + 1)
        return self.flops(length, 0.0) + read * 2 * (head + emissions) + recursions


make = HmmHead
