"""The best of n samples by a verifier: for a score to maximise.

arXiv:2110.14168, section 4.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.samplers.base import Sampler, Samples
from sedd.samplers.noise import fold
from sedd.samplers.verifier import Verifier, verify


@dataclass(frozen=True, kw_only=True)
class BestOfN(Sampler):
    """Draw ``n`` sequences by ``inner`` and return the one with the highest score.

    Let F be the probability that one draw of the inner sampler scores at most s, and G the
    probability that it scores below s. If all sequences have different scores, the sequence with
    the score s is returned with probability F^n - G^n. As n grows the law concentrates on the best
    sequence that the inner sampler can draw. Among equal scores the first drawn sequence is
    returned. The network calls of all n are counted.
    """

    inner: Sampler
    verifier: Verifier
    """Scores tokens; ``text_verifier`` makes one from a function on texts."""
    n: int = 8
    """Sequences drawn for each one that is returned."""

    def __post_init__(self):
        if self.n < 1:
            raise FieldError("n", f"must be at least 1, got {self.n}")
        if hasattr(self.inner, "verifier"):
            raise FieldError(
                "inner",
                "must not be best_of_n or particle, which have a verifier of their own",
            )

    @property
    def caveat(self):
        return self.inner.caveat

    @property
    def by_block(self):
        return self.inner.by_block

    @property
    def width(self):
        return self.n * self.inner.width

    def refuses(self, watermark):
        """Nothing by itself: the candidates of a request have noise of their own."""
        return ""

    def check(self, denoiser):
        super().check(denoiser)
        self.inner.check(denoiser)

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        # The inner sampler draws a batch in which row b·n + i is candidate i of request b.
        self.check(denoiser)
        batch, n = len(keys_B), self.n
        candidates = denoiser.repeat(n)
        drawn = self.inner(
            candidates,
            fold(jnp.repeat(keys_B, n), jnp.tile(jnp.arange(n), batch)),
            jnp.repeat(tokens_BL, n, 0),
            jnp.repeat(fixed_BL, n, 0),
            trace=trace,
        )
        score_Bn = verify(self.verifier, candidates, drawn.tokens_BL).reshape(batch, n)
        best_B = score_Bn.argmax(1) + n * jnp.arange(batch)
        return Samples(
            tokens_BL=drawn.tokens_BL[best_B],
            calls_B=drawn.calls_B.reshape(batch, n).sum(1),
            rows_B=drawn.rows_B.reshape(batch, n).sum(1),
            trace_TBL=None if drawn.trace_TBL is None else drawn.trace_TBL[:, best_B],
            rounds=drawn.rounds,
            times_T=drawn.times_T,
            score_B=score_Bn.max(1),
            log_prob_B=None if drawn.log_prob_B is None else drawn.log_prob_B[best_B],
        )


make = BestOfN
