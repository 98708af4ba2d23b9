"""The best of n samples by a verifier: for a score to maximise.

arXiv:2110.14168, section 4.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from sedd.arrays import fold
from sedd.errors import FieldError
from sedd.samplers.search import Search, preference, shown, summed, take
from sedd.samplers.verifier import verifiers_of


@dataclass(frozen=True, kw_only=True)
class BestOfN(Search):
    """Draw ``n`` sequences by ``inner`` and return the one with the highest score.

    Let F be the probability that one draw of the inner sampler scores at most s, and G the
    probability that it scores below s. If all sequences have different scores, the sequence with
    the score s is returned with probability F^n - G^n. As n grows the law concentrates on the best
    sequence that the inner sampler can draw. Among equal scores the first drawn sequence is
    returned. The network calls of all n are counted. With several verifiers, the sequence with the
    highest mean rank among the n is returned.
    """

    n: int = 8
    """Sequences drawn for each one that is returned."""

    def __post_init__(self):
        super().__post_init__()
        if self.n < 1:
            raise FieldError("n", f"must be at least 1, got {self.n}")

    @property
    def candidates(self):
        return self.n

    def refuses(self, watermark):
        """Nothing by itself: the candidates of a request have noise of their own."""
        return ""

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        self.check(denoiser)
        batch, n = len(keys_B), self.n
        candidates, fixed_RL = denoiser.repeat(n), jnp.repeat(fixed_BL, n, 0)
        drawn = self.inner(
            candidates,
            fold(jnp.repeat(keys_B, n), jnp.tile(jnp.arange(n), batch)),
            jnp.repeat(tokens_BL, n, 0),
            fixed_RL,
            trace=trace,
        )
        scores = self.scores(candidates, keys_B, drawn.tokens_BL, fixed_RL)
        value_Bn = preference(scores.score_RE.reshape(batch, n, -1))
        best_B = value_Bn.argmax(1) + n * jnp.arange(batch)
        return replace(
            take(drawn, best_B),
            calls_B=summed(drawn.calls_B + scores.calls_R, batch),
            rows_B=summed(drawn.rows_B + scores.calls_R, batch),
            score_B=shown(scores.score_RE[best_B]),
            verifier_calls_B=jnp.full(batch, n * len(verifiers_of(self.verifier)), jnp.int32),
        )


make = BestOfN
