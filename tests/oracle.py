"""A world small enough to enumerate: 3 tokens, 4 positions, and a random joint p(x0).

Everything here is float64 numpy from the formulas, independent of sedd, except the networks, which
wrap exact (or random) tables so that the library can be run on them under jit.
"""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from sedd.denoiser import Denoiser
from sedd.networks.base import Network
from sedd.networks.hidden_markov import HiddenMarkov
from sedd.parameterizations.autoregressive import Autoregressive
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.mean import Mean
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.base import Process
from sedd.processes.hybrid import Hybrid
from sedd.processes.uniform import Uniform

N, L = 3, 4
SHARE = 0.4  # of uniform tokens in the hybrid noise
PROCESSES = {
    "absorbing": Absorbing,
    "uniform": Uniform,
    "hybrid": functools.partial(Hybrid, uniform=SHARE),
}


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def f32(array):
    return jnp.asarray(np.asarray(array), jnp.float32)


def i32(array):
    return jnp.asarray(np.asarray(array), jnp.int32)


# ---------------------------------------------------------------- states, rates, tests of a law


def all_states(num_states, length=L):
    """[V^L, L]: every sequence, in the order of `state_index`."""
    return np.array(list(itertools.product(range(num_states), repeat=length)))


def state_index(x_BL, num_states):
    """The row of each sequence in `all_states`."""
    x_BL = np.asarray(x_BL)
    return x_BL @ num_states ** np.arange(x_BL.shape[-1])[::-1]


def num_states(kind, num_tokens=N):
    return num_tokens + (kind != "uniform")


def rate_matrix(kind, num_tokens=N):
    """Q[a, b] = rate a → b: rate 1 to the mask, to a uniformly drawn token, or to one of both."""
    target = target_of(kind, num_tokens)
    return np.outer(np.ones(len(target)), target) - np.eye(len(target))


def target_of(kind, num_tokens=N):
    """[V]: the distribution of a token that has moved."""
    share = {"absorbing": 0.0, "uniform": 1.0, "hybrid": SHARE}[kind]
    target = np.full(num_tokens, share / num_tokens)
    return target if kind == "uniform" else np.append(target, 1 - share)


def transition_matrix(kind, sigma, num_tokens=N):
    """P_σ[a, b] = Pr(b | a) = exp(σQ), where Q + 1 is a projection: see the test against expm."""
    identity = np.eye(num_states(kind, num_tokens))
    return identity - np.expm1(-sigma) * rate_matrix(kind, num_tokens)


def chi_square_p(counts, law):
    """p-value of the counts under the law; cells that expect fewer than 5 are merged into one."""
    counts, law = np.asarray(counts, float), np.asarray(law, float)
    law = law / law.sum()
    expected = law * counts.sum()
    if (counts[law == 0] > 0).any():
        return 0.0
    counts, expected = counts[law > 0], expected[law > 0]
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    merged = max(int((expected < 5).sum()), int((np.cumsum(expected) < 5).sum()) + 1)
    counts = np.append(counts[merged:], counts[:merged].sum())
    expected = np.append(expected[merged:], expected[:merged].sum())
    if len(counts) == 1:
        return 1.0  # a certain outcome
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(stats.chi2.sf(statistic, len(counts) - 1))


def total_variation(law_a, law_b):
    return 0.5 * np.abs(np.asarray(law_a) - np.asarray(law_b)).sum()


# ---------------------------------------------------------------- the exact model


@dataclass
class Oracle:
    """A joint over N^L, seen through a process. `spread` is the s.d. of log p(x0)."""

    kind: str
    seed: int = 0
    spread: float = 1.5

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        weights = np.exp(self.spread * rng.standard_normal([N] * L))
        self.joint = weights / weights.sum()  # [N, N, N, N]
        self.V = num_states(self.kind)
        self.mask_id = None if self.kind == "uniform" else N
        self.states = all_states(self.V)
        self.process = PROCESSES[self.kind](num_tokens=N)

    def clean_law(self):
        """[V^L]: the joint, as a law on all states."""
        law = np.zeros([self.V] * L)
        law[(slice(0, N),) * L] = self.joint
        return law.ravel()

    def marginal(self, sigma):
        """[V^L]: p_t; `sigma` may be one a position."""
        law = self.clean_law().reshape([self.V] * L)
        for axis, own_sigma in enumerate(np.broadcast_to(sigma, L)):
            kernel = transition_matrix(self.kind, own_sigma)
            law = np.moveaxis(np.tensordot(law, kernel, (axis, 0)), -1, axis)
        return law.ravel()

    def log_score(self, sigma):
        """[V^L, L, V]: log p_t(x with y at i) / p_t(x)."""
        p = self.marginal(sigma)
        return np.log(p[neighbours(self.states, self.V)]) - np.log(p)[:, None, None]

    def conditional(self):
        """[V^L, L, N]: p(x0_i = y | the revealed tokens of x); absorbing only."""
        out = np.zeros((len(self.states), L, N))
        for row, x in enumerate(self.states):
            joint = self.joint[tuple(slice(None) if t == N else slice(t, t + 1) for t in x)]
            for i in range(L):
                p = joint.sum(tuple(j for j in range(L) if j != i))
                if x[i] == N:
                    out[row, i] = p / p.sum()
                else:
                    out[row, i, x[i]] = 1.0
        return out

    def score_denoiser(self):
        """Score parameterization over a network that computes p_t at the sigma it is given."""
        network = ExactScoreNetwork(num_states=self.V, time_conditioned=True, kind=self.kind)
        return Denoiser(
            params={"joint": f32(self.joint)},
            network=network,
            parameterization=Score(process=self.process),
        )

    def conditional_denoiser(self):
        """Conditional parameterization over a table of the exact conditionals."""
        table = np.log(np.maximum(self.conditional(), 1e-30))
        return table_denoiser(np.concatenate([table, np.zeros((*table.shape[:2], 1))], -1), N)

    def autoregressive_denoiser(self):
        """Its factors p(x_i | x_<i), read from the table of the exact conditionals."""
        exact = self.conditional_denoiser()
        return Denoiser(
            params=exact.params,
            network=PrefixNetwork(num_states=self.V, time_conditioned=False),
            parameterization=Autoregressive(process=self.process),
        )


def neighbours(states, size):
    """[V^L, L, V]: the index of each sequence with y put at position i."""
    stride = size ** np.arange(states.shape[1])[::-1]
    index = state_index(states, size)
    base = index[:, None] - states * stride
    return base[..., None] + np.arange(size) * stride[:, None]


# ---------------------------------------------------------------- networks


@dataclass(frozen=True, kw_only=True)
class _Direct(Network):
    """A network whose hidden states are its outputs."""

    def init(self, key):
        raise NotImplementedError("these tables are given, not initialised")

    def head(self, params):
        return jnp.eye(self.num_states), jnp.zeros(self.num_states)

    def flops(self, length, read):
        raise NotImplementedError("a look-up has no products")

    def _index(self, tokens_BL):
        stride = self.num_states ** jnp.arange(tokens_BL.shape[1])[::-1]
        return (tokens_BL * stride[None]).sum(-1)


@dataclass(frozen=True, kw_only=True)
class TableNetwork(_Direct):
    """Raw output looked up by the sequence; `slope`·sin(log σ) is added where it sees time."""

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        if (sigma_B is not None) != self.time_conditioned:
            raise ValueError("sigma_B goes with time_conditioned")
        index_B = self._index(tokens_BL)
        raw_BLV = params["table"][index_B]
        if sigma_B is not None:
            raw_BLV = raw_BLV + params["slope"][index_B] * jnp.sin(jnp.log(sigma_B))[:, None, None]
        return raw_BLV


@dataclass(frozen=True, kw_only=True)
class PrefixNetwork(_Direct):
    """The table's row i of (x_<i, masks), from tokens that are shifted by one: [mask, x_0, …]."""

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        assert attend is not None
        assert attend.kind == "causal"
        place_L, mask = jnp.arange(tokens_BL.shape[1]), self.num_states - 1
        x_BL = jnp.roll(tokens_BL, -1, axis=1)
        before_1LL = (place_L[None, :] < place_L[:, None])[None]
        index_BL = jax.vmap(self._index, 1, 1)(jnp.where(before_1LL, x_BL[:, None], mask))
        return params["table"][index_BL, place_L[None]]


@dataclass(frozen=True, kw_only=True)
class ConstantNetwork(_Direct):
    """The same raw output [B, L, V] (B may be 1) whatever it is given."""

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        repeated = jnp.tile(params, (-(-len(tokens_BL) // len(params)), 1, 1))
        return repeated[: len(tokens_BL)]


@dataclass(frozen=True, kw_only=True)
class WithCausalHead(ConstantNetwork):
    """The same, with a new causal head: it changes nothing."""

    has_causal_head = True

    def causal_hidden(self, params, hidden_BLD, tokens_BL, order_BL, *, keys_B=None):
        return hidden_BLD


@dataclass(frozen=True, kw_only=True)
class WithMarginalHead(ConstantNetwork):
    """The same, with a marginal head: the sum of the raw outputs of the visible tokens."""

    has_marginal_head = True

    def log_marginal(self, params, hidden_BLD, tokens_BL):
        own_BL = jnp.take_along_axis(hidden_BLD, tokens_BL[..., None], -1)[..., 0]
        return jnp.where(tokens_BL < self.num_states - 1, own_BL, 0.0).sum(1)


@dataclass(frozen=True, kw_only=True)
class WithLatent(ConstantNetwork):
    """The same, with a latent of two numbers that is added to the first two raw outputs."""

    has_latent = True
    latents = 2

    def hidden(self, params, tokens_BL, *, latent_BZ=None, **options):
        raw_BLV = super().hidden(params, tokens_BL, **options)
        return raw_BLV if latent_BZ is None else raw_BLV.at[..., :2].add(latent_BZ[:, None])


@dataclass(frozen=True, kw_only=True)
class WithHmmHead(ConstantNetwork):
    """The same, with an HMM whose two states emit by the first two positions' raw outputs."""

    has_hmm_head = True

    def hmm(self, params):
        emission_HN = jax.nn.softmax(params[0, :2, :-1], -1)
        return HiddenMarkov(jnp.array([[0.8, 0.2], [0.3, 0.7], [0.5, 0.5]]), emission_HN)


@dataclass(frozen=True, kw_only=True)
class HmmTable(TableNetwork):
    """A table, and an HMM with the logits ``params["hmm"]``."""

    has_hmm_head = True
    frozen_trunk = True

    def hmm(self, params):
        return HiddenMarkov(*(jax.nn.softmax(logits, -1) for logits in params["hmm"]))


@dataclass(frozen=True, kw_only=True)
class MarginalTable(TableNetwork):
    """A table, and f by another one, ``params["marginal"]``; 0 where all positions are masked."""

    has_marginal_head = True
    frozen_trunk = True

    def init(self, key):
        return {}  # all of them are given

    def trainable(self, params):
        return {"marginal": params["marginal"]}

    def log_marginal(self, params, hidden_BLD, tokens_BL):
        index_B = self._index(tokens_BL)
        last = len(params["marginal"]) - 1
        return jnp.where(index_B == last, 0.0, params["marginal"][index_B])


@dataclass(frozen=True, kw_only=True)
class ExactScoreNetwork(_Direct):
    """The exact log score of params["joint"], shifted so that `Score` gives it back."""

    kind: str

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        joint, size = params["joint"], self.num_states
        length, num_tokens = joint.ndim, joint.shape[0]
        clean = jnp.pad(joint, [(0, size - num_tokens)] * length)
        target = f32(target_of(self.kind, num_tokens))

        def log_marginal(sigma):
            p = clean
            for axis in range(length):
                shape = [1] * length
                shape[axis] = size
                moved = p.sum(axis, keepdims=True) * target.reshape(shape)
                p = jnp.exp(-sigma) * p - jnp.expm1(-sigma) * moved
            return jnp.log(p.ravel())

        log_p_BS = jax.vmap(log_marginal)(sigma_B)
        stride = size ** jnp.arange(length)[::-1]
        own_B = self._index(tokens_BL)
        base_BL = own_B[:, None] - tokens_BL * stride[None]
        index_BLV = base_BL[..., None] + jnp.arange(size)[None, None, :] * stride[None, :, None]
        rows = jnp.take_along_axis(log_p_BS, index_BLV.reshape(len(own_B), -1), 1)
        log_score = (
            rows.reshape(index_BLV.shape)
            - jnp.take_along_axis(log_p_BS, own_B[:, None], 1)[..., None]
        )
        if "shift" in params:  # a distortion [V^L, L, V]
            log_score += params["shift"][own_B]
        score = Score(process=PROCESSES[self.kind](num_tokens=num_tokens))
        return log_score - score.log_score(jnp.zeros_like(log_score), tokens_BL, sigma_B)


@dataclass(frozen=True, kw_only=True)
class LeaveOneOutNetwork(_Direct):
    """log p(x0_i = y | the noisy tokens at other positions) of params["joint"], under any process.

    params["shift"] [V^L, L, V] is added, if there is one: a network that is wrong.
    """

    process: Process

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        joint = params["joint"]
        length, num_tokens = joint.ndim, joint.shape[0]

        def one(x_L, sigma):
            kernel = self.process.transition(jnp.arange(num_tokens), sigma)
            like_LN = kernel[:, x_L].T  # of each position's noisy token, given the clean one
            rows = []
            for i in range(length):
                p = joint
                for j in (j for j in range(length) if j != i):
                    p = p * like_LN[j].reshape([-1 if k == j else 1 for k in range(length)])
                rows.append(p.sum(tuple(j for j in range(length) if j != i)))
            return jnp.log(jnp.stack(rows))

        raw_BLN = jax.vmap(one)(tokens_BL, sigma_B)
        pad = self.num_states - num_tokens
        raw_BLV = jnp.pad(raw_BLN, ((0, 0), (0, 0), (0, pad)))
        if "shift" in params:
            raw_BLV += params["shift"][self._index(tokens_BL)]
        return raw_BLV


def mean_denoiser(process, joint, shift=None):
    """The mean parameterization over the exact leave-one-out predictions, or wrong ones."""
    params = {"joint": f32(joint)} | ({} if shift is None else {"shift": f32(shift)})
    return Denoiser(
        params=params,
        network=LeaveOneOutNetwork(
            num_states=process.num_states, time_conditioned=True, process=process
        ),
        parameterization=Mean(process=process),
    )


def table_denoiser(table, num_tokens, *, kind="absorbing", slope=None):
    """A denoiser of fixed tables [V^L, L, V]: conditional without `slope`, score with it."""
    process = PROCESSES[kind](num_tokens=num_tokens)
    params = {"table": f32(table)}
    if slope is not None:
        params["slope"] = f32(slope)
    timed = slope is not None
    network = TableNetwork(num_states=table.shape[-1], time_conditioned=timed)
    parameterization = (Score if timed else Conditional)(process=process)
    return Denoiser(params=params, network=network, parameterization=parameterization)


def random_table(kind="absorbing", seed=0, scale=1.0):
    size = num_states(kind)
    return scale * np.random.default_rng(seed).standard_normal((size**L, L, size))


# ---------------------------------------------------------------- laws of samplers, by enumeration


def clip_normalise(probs):
    probs = np.maximum(probs, 0)
    return probs / probs.sum(-1, keepdims=True)


def product_kernel(probs, states):
    """[V^L, V^L]: every position moves by itself; probs [V^L, L, V] are rows that sum to 1."""
    kernel = np.ones((len(states), 1))
    for i in range(states.shape[1]):
        kernel = (kernel[:, :, None] * probs[:, i, None, :]).reshape(len(states), -1)
    return kernel


def euler_probs(score, states, kind, dsigma):
    """δ(y = x) + Δσ·Q(y, x)·e^s_y, the diagonal so that rows sum to 1; unclipped."""
    column = rate_matrix(kind)[:, states]  # [V, S, L]: Q(y, x)
    probs = dsigma * np.moveaxis(column, 0, -1) * score
    own = np.eye(score.shape[-1], dtype=bool)[states]
    probs[own] = 0
    probs[own] = 1 - probs.sum(-1).ravel()
    return probs


def tweedie_probs(score, states, kind, dsigma):
    """[(P_Δσ⁻¹)ᵀ e^s]_y · P_Δσ(y, x); unclipped, unnormalised."""
    inverse = transition_matrix(kind, -dsigma)
    column = np.moveaxis(transition_matrix(kind, dsigma)[:, states], 0, -1)
    return np.einsum("ba,slb->sla", inverse, score) * column


def tau_leaping_law(oracle, schedule, steps, rule, *, fixed=None, t_min=1e-5):
    """[V^L]: the exact law of `steps` leaps and the denoising step on the exact score.

    `schedule` is a pair of float64 functions (sigma, rate), `rule` is "euler" or "tweedie", `fixed`
    holds a token for each clamped position and -1 elsewhere.
    """
    kind, states = oracle.kind, oracle.states
    fixed = np.full(L, -1) if fixed is None else np.asarray(fixed)
    sigma, rate = schedule

    def held(probs):
        probs = probs.copy()
        for i in np.flatnonzero(fixed >= 0):
            probs[:, i] = np.eye(oracle.V)[states[:, i]]
        return probs

    prior = rate_matrix(kind)[0] + np.eye(oracle.V)[0]
    law = product_kernel(held(np.broadcast_to(prior, (len(states), L, oracle.V))), states)
    start = state_index(np.where(fixed >= 0, fixed, 0), oracle.V)
    law = law[start]
    times = np.linspace(1, t_min, steps + 1)
    for t, s in itertools.pairwise(times):
        score = np.exp(oracle.log_score(sigma(t)))
        if rule == "euler":
            probs = euler_probs(score, states, kind, (t - s) * rate(t))
        else:
            probs = tweedie_probs(score, states, kind, sigma(t) - sigma(s))
        law = law @ product_kernel(held(clip_normalise(probs)), states)
    probs = tweedie_probs(np.exp(oracle.log_score(sigma(t_min))), states, kind, sigma(t_min))
    if oracle.mask_id is not None:
        probs[..., oracle.mask_id] = 0
    return law @ product_kernel(held(clip_normalise(probs)), states)


SCHEDULES = {  # (sigma, rate) in float64
    "log_linear": (
        lambda t: -np.log1p(-(1 - 1e-3) * t),
        lambda t: (1 - 1e-3) / (1 - (1 - 1e-3) * t),
    ),
    "geometric": (
        lambda t: 1e-4 * (20 / 1e-4) ** t,
        lambda t: 1e-4 * (20 / 1e-4) ** t * np.log(20 / 1e-4),
    ),
}


# ---------------------------------------------------------------- laws of revealing samplers

NOTHING_FIXED = (-1,) * L


def counts_of(tokens_BL, size):
    """[V^L]: how often each state was drawn."""
    return np.bincount(state_index(tokens_BL, size), minlength=size ** np.shape(tokens_BL)[1])


def conditional_joint(oracle, fixed):
    """[V^L]: the joint given the tokens of `fixed` (-1 is free)."""
    fixed = np.asarray(fixed)
    held = fixed >= 0
    law = np.where((oracle.states[:, held] == fixed[held]).all(-1), oracle.clean_law(), 0)
    return law / law.sum()


def masked_start(oracle, fixed):
    """[V^L]: certainly the clamped tokens and masks elsewhere."""
    fixed = np.asarray(fixed)
    law = np.zeros(len(oracle.states))
    law[state_index(np.where(fixed >= 0, fixed, oracle.mask_id), oracle.V)] = 1
    return law


def reveal_kernel(oracle, reveal, remask=0.0, conditional=None):
    """[V^L, V^L]: each position by itself, given the state that all of them start from.

    Masks are revealed with probability `reveal`, tokens masked with `remask`; both broadcast to
    [V^L, L]. Tokens come from `conditional` [V^L, L, N], the exact one by default.
    """
    states, mask = oracle.states, oracle.mask_id
    conditional = oracle.conditional() if conditional is None else conditional
    tokens = np.concatenate([conditional, np.zeros((*states.shape, 1))], -1)
    is_mask, own = states == mask, np.eye(oracle.V)[states]
    leaves = np.where(is_mask, reveal, remask)[..., None]
    moved = np.where(is_mask[..., None], tokens, np.eye(oracle.V)[mask])
    return product_kernel((1 - leaves) * own + leaves * moved, states)


# ---------------------------------------------------------------- draws


# These programs run for milliseconds and compile for seconds, most of them spent optimising.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
# These are small and draw millions of numbers.
THOROUGHLY = {"xla_backend_optimization_level": 2, "xla_cpu_use_fusion_emitters": True}


# A program that draws for more than some seconds is compiled for twice as long, and runs three
# times as fast.
LONGER = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}


def _sample(sampler, denoiser, keys_B, tokens_BL, fixed_BL, trace):
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL, trace=trace)


sample = jax.jit(_sample, static_argnames=("sampler", "trace"), compiler_options=QUICKLY)
sample_long = jax.jit(_sample, static_argnames=("sampler", "trace"), compiler_options=LONGER)


def draw(sampler, denoiser, count, *, seed=0, fixed=NOTHING_FIXED, trace=True, sample=sample):
    """Samples where `fixed` [L] or [count, L] is -1; one compilation a sampler and count."""
    fixed = np.broadcast_to(np.asarray(fixed), (count, L))
    tokens_BL, fixed_BL = i32(np.maximum(fixed, 0)), jnp.asarray(fixed >= 0)
    return sample(sampler, denoiser, keys(seed, count), tokens_BL, fixed_BL, trace=trace)
