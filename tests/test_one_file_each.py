"""A new process, network, layout or sampler is one file, put into its package's folder."""

import importlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_run
from oracle import f32, i32, keys
from scipy.linalg import expm

from sedd.configuration.build import build_sampler
from sedd.configuration.components import build, makers, options
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.monte_carlo import sequence_nats
from sedd.interop.layouts.base import Description, layout_for, layouts
from sedd.interop.published import load_published, save_published
from sedd.networks.base import Network
from sedd.networks.ddit import DDiT
from sedd.objectives.lambda_dce import LambdaDCE
from sedd.objectives.t_dce import TDCE
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.mean import Mean
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.samplers.event_jump import EventJump
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear
from sedd.training.flops import step_flops


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Put one file into a package: ``add("processes", "name", source)``; returns its module."""
    added = []

    def forget():
        makers.cache_clear()
        layouts.cache_clear()

    def one(family, name, source):
        package = importlib.import_module(f"sedd.{family}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        added.append(f"sedd.{family}.{name}")
        importlib.invalidate_caches()
        forget()
        return importlib.import_module(added[-1])

    yield one
    for module in added:
        del sys.modules[module]
    forget()


# ---------------------------------------------------------------- a process

MASK_AND_UNIFORM = '''
    """Tokens jump to the mask, and to uniformly drawn tokens: visible tokens may be wrong."""

    from dataclasses import dataclass

    import jax
    import jax.numpy as jnp
    from jax.scipy.special import xlogy

    from sedd.arrays import along, put
    from sedd.processes.base import Process


    @dataclass(frozen=True, kw_only=True)
    class MaskAndUniform(Process):
        """Rate ``mask_share`` to the mask, which absorbs, and the rest to a uniform token."""

        absorbing = False

        mask_share: float = 0.6

        @property
        def mask_id(self):
            return self.num_tokens

        def _kernel(self, sigma):
            """[..., V, V]: the transition matrix; also at a negative sigma, where it inverts."""
            sigma = jnp.asarray(sigma)[..., None, None]
            visible = jnp.exp(-self.mask_share * sigma)
            kept = jnp.exp(-(1 - self.mask_share) * sigma)
            state = jnp.arange(self.num_states)
            token = state < self.num_tokens
            same = state[:, None] == state[None]
            tokens = visible * (kept * same + (1 - kept) / self.num_tokens)
            row = jnp.where(token[None], tokens, 1 - visible)
            return jnp.where(token[:, None], row, 1.0 * same)

        def _rates(self):
            token = jnp.arange(self.num_states) < self.num_tokens
            row = jnp.where(token, (1 - self.mask_share) / self.num_tokens, self.mask_share)
            return jnp.where(token[:, None], row[None] - jnp.eye(self.num_states), 0.0)

        def transition(self, x, sigma):
            rows = self._kernel(jnp.broadcast_to(along(sigma, x), x.shape))
            return jnp.take_along_axis(rows, x[..., None, None], -2)[..., 0, :]

        def transition_to(self, x, sigma, dsigma):
            rows = self._kernel(jnp.broadcast_to(along(dsigma, x), x.shape))
            return jnp.take_along_axis(rows, x[..., None, None], -1)[..., 0]

        def corrupt(self, keys_B, x0_BL, sigma):
            sigma_BL = jnp.broadcast_to(along(sigma, x0_BL), x0_BL.shape)
            log_row = jnp.log(self.transition(x0_BL, sigma_BL))
            draw = lambda key, row: jax.random.categorical(key, row, mode="high")
            return jax.vmap(draw)(keys_B, log_row).astype(x0_BL.dtype)

        def sample_prior(self, keys_B, length, sigma):
            return jnp.full((len(keys_B), length), self.mask_id, jnp.int32)

        def prior_kl(self, sigma):
            # To (1 - a) mask + a uniform, a = exp(-mask_share sigma), as for the absorbing process.
            n, visible = self.num_tokens, jnp.exp(-self.mask_share * sigma)
            kept = jnp.exp(-(1 - self.mask_share) * sigma)
            own, other = kept + (1 - kept) / n, (1 - kept) / n
            return visible * (xlogy(own, n * own) + (n - 1) * xlogy(other, n * other))

        def can_move(self, x):
            return jnp.ones(x.shape, bool)

        def reverse_rate(self, log_score, x, sigma):
            away = put(self._rates().T[x] * jnp.exp(log_score), x, jnp.zeros(x.shape))
            return put(away, x, -away.sum(-1))

        def staggered_score(self, log_score, sigma, dsigma):
            inverse = self._kernel(-along(dsigma, log_score[..., 0]))
            return (jnp.exp(log_score)[..., None] * inverse).sum(-2)

        def score_entropy(self, log_score, x, x0, sigma):
            p = self.transition(x0, sigma)
            ratio = p / jnp.take_along_axis(p, x[..., None], -1)
            terms = jnp.exp(log_score) - ratio * log_score + xlogy(ratio, ratio) - ratio
            weight = put(self._rates().T[x], x, jnp.zeros(x.shape))
            return (weight * terms).sum(-1)


    make = MaskAndUniform
'''
JOINT = np.array([[0.5, 0.1], [0.05, 0.35]])  # of two tokens at two positions
LOG_LINEAR = LogLinear()


class ExactRatios(Network):
    """log p_t(x with y at i) - log p_t(x) of ``params["joint"]`` under any process; and a shift."""

    def __init__(self, process):
        self.__dict__ |= {"process": process, "num_states": process.num_states}
        self.__dict__ |= {"time_conditioned": True}

    def __hash__(self):
        return hash(self.process)

    def __eq__(self, other):
        return self.process == other.process

    def init(self, key):
        raise NotImplementedError

    def flops(self, length, read):
        raise NotImplementedError

    def head(self, params):
        return jnp.eye(self.num_states), jnp.zeros(self.num_states)

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        clean = jnp.pad(params["joint"], (0, self.num_states - len(params["joint"])))

        def one(x_L, sigma):
            kernel = self.process.transition(jnp.arange(self.num_states), sigma)
            p = kernel.T @ clean @ kernel
            rows = jnp.stack([p[:, x_L[1]], p[x_L[0]]])
            return jnp.log(rows) - jnp.log(p[x_L[0], x_L[1]]) + params["shift"]

        return jax.vmap(one)(tokens_BL, sigma_B)


def reverse_likelihood(denoiser, t_min, steps=200):
    """[N, N]: the law of the reverse process from the bound's prior, by matrix exponentials."""
    process, size = denoiser.process, denoiser.process.num_states
    states = oracle.all_states(size, 2)
    x_SL = i32(states)
    times = t_min ** np.linspace(0, 1, steps + 1)
    middle = (times[1:] + times[:-1]) / 2

    def score(t):
        return denoiser.log_score(x_SL, jnp.full(len(states), LOG_LINEAR.sigma(t)))

    def rate(t):
        return process.reverse_rate(score(t), x_SL, LOG_LINEAR.sigma(t)) * LOG_LINEAR.rate(t)

    rates = np.asarray(jax.jit(lambda t: jax.lax.map(rate, t))(f32(middle)), np.float64)
    to = oracle.neighbours(states, size)  # the state with y at position i, for each x, i and y
    visible = np.exp(-process.mask_share * float(LOG_LINEAR.sigma(jnp.float32(1.0))))
    one = np.append(np.full(process.num_tokens, visible / process.num_tokens), 1 - visible)
    law = np.outer(one, one).ravel()
    for rate_SLV, length in zip(rates, times[:-1] - times[1:], strict=True):
        generator = np.zeros((len(states), len(states)))
        np.add.at(generator, (np.arange(len(states))[:, None, None], to), rate_SLV)
        law = law @ expm(generator * length)
    last = jax.jit(lambda t: process.denoise(score(t), x_SL, LOG_LINEAR.sigma(t)))
    clean = np.exp(np.asarray(last(f32(t_min)), np.float64))
    return np.einsum("s,sa,sb->ab", law, clean[:, 0, :2], clean[:, 1, :2])


def test_a_process_with_a_mask_and_wrong_visible_tokens(add):
    add("processes", "mask_and_uniform", MASK_AND_UNIFORM)
    process = options("processes", "mask_and_uniform", mask_share=0.5).build(num_tokens=2)
    assert (process.mask_id, process.num_states, process.absorbing) == (2, 3, False)
    states = jnp.arange(3)
    rates = np.array([[-0.75, 0.25, 0.5], [0.25, -0.75, 0.5], [0, 0, 0]])
    for sigma in (0.1, 2.0):
        rows = jax.jit(process.transition)(states, f32(sigma))
        np.testing.assert_allclose(rows, expm(sigma * rates), atol=1e-6)
        columns = jax.jit(process.transition_to)(states, f32(sigma), f32(sigma))
        np.testing.assert_allclose(columns, rows.T, atol=1e-7)

    # What relies on certain visible tokens refuses it, though it has a mask.
    with pytest.raises(ValueError, match="absorbing"):
        Conditional(process=process)
    with pytest.raises(ValueError, match=r"noise does not depend on the token.*got maskanduniform"):
        Mean(process=process)
    score = Score(process=process)
    for objective in (LambdaDCE, TDCE):
        with pytest.raises(ValueError, match="absorbing"):
            objective(schedule=LOG_LINEAR, parameterization=score)

    t_min, copies = 1e-2, 1000
    network = ExactRatios(process)
    nats = jax.jit(
        lambda denoiser, keys_B, x0_BL: sequence_nats(
            denoiser, LOG_LINEAR, keys_B, x0_BL, x0_BL >= 0, draws=8, t_min=t_min
        )
    )
    gaps = {}
    for name, shift in (("exact", 0.0), ("distorted", 0.5)):
        params = {"joint": f32(JOINT), "shift": f32([[0.0, shift, -shift]] * 2)}
        denoiser = Denoiser(params=params, network=network, parameterization=score)
        with pytest.raises(UserError, match="absorbing"):
            EventJump(schedule=LOG_LINEAR).check(denoiser)
        likelihood = reverse_likelihood(denoiser, t_min)
        np.testing.assert_allclose(likelihood.sum(), 1, atol=1e-3)
        x0_BL = i32(np.repeat(oracle.all_states(2, 2), copies, 0))
        terms = nats(denoiser, keys(0, len(x0_BL)), x0_BL)
        each = terms.prior_B[:, None] + terms.diffusion_BR + terms.reconstruction_BR
        each = np.asarray(each, np.float64).mean(1).reshape(4, copies)
        error = each.std(1) / copies**0.5
        gaps[name] = each.mean(1) + np.log(likelihood.ravel())
        assert (gaps[name] > -4 * error).all(), (gaps[name], error)
    # The control: the bound is nearly tight at the exact score, and is not where it is distorted.
    assert np.abs(gaps["exact"]).max() < 0.1
    assert (JOINT.ravel() * gaps["distorted"]).sum() > (JOINT.ravel() * gaps["exact"]).sum() + 0.02

    fixed_BL = jnp.zeros((4000, 2), bool)
    drawn = jax.jit(Tweedie(schedule=LOG_LINEAR, steps=64))(
        denoiser_of(network, score),
        keys(1, 4000),
        i32(np.zeros((4000, 2))),
        fixed_BL,
    )
    counts = oracle.counts_of(drawn.tokens_BL, 2)  # no mask is left
    assert oracle.total_variation(counts / 4000, JOINT.ravel()) < 0.05


def denoiser_of(network, parameterization):
    params = {"joint": f32(JOINT), "shift": jnp.zeros((2, 3))}
    return Denoiser(params=params, network=network, parameterization=parameterization)


# ---------------------------------------------------------------- a network

BAG = '''
    """A network that sees the mean of the embeddings: the smallest one that mixes positions."""

    from dataclasses import dataclass

    import jax
    import jax.numpy as jnp

    from sedd.networks.base import Network


    @dataclass(frozen=True, kw_only=True)
    class Bag(Network):
        """tanh((own embedding + mean embedding) · W)."""

        width: int = 8

        def init(self, key):
            shapes = {"embed": (self.num_states, self.width), "mix": (self.width, self.width)}
            shapes |= {"head": (self.width, self.num_states)}
            split = zip(shapes.items(), jax.random.split(key, 3), strict=True)
            return {name: jax.random.normal(k, shape) for (name, shape), k in split}

        def hidden(
            self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
        ):
            h_BLD = params["embed"][tokens_BL]
            return jnp.tanh((h_BLD + h_BLD.mean(1, keepdims=True)) @ params["mix"])

        def head(self, params):
            return params["head"], jnp.zeros(self.num_states)

        def flops(self, length, read):
            return 2 * self.width * (self.width * length + self.num_states * read)


    make = Bag
'''


def test_a_network(add):
    add("networks", "bag", BAG)
    reading = Conditional(process=Absorbing(num_tokens=5))
    network = options("networks", "bag", width=4).build(num_states=6, time_conditioned=False)
    objective = LambdaDCE(schedule=LOG_LINEAR, parameterization=reading)
    x0_BL = i32([[0, 1, 2], [3, 4, 0]])
    corrupted = objective.corrupt(keys(0, 2), f32([0.3, 0.1]), x0_BL, x0_BL >= 0)
    params = network.init(jax.random.key(0))
    gradient = jax.grad(lambda p: objective.summed_nats(network, p, corrupted, x0_BL))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    denoiser = Denoiser(params=params, network=network, parameterization=reading)
    drawn = EventJump(schedule=LOG_LINEAR)(denoiser, keys(1, 2), x0_BL, x0_BL < 0)
    assert (drawn.tokens_BL < 5).all()
    assert step_flops(network, 2, 3, read=4) == 3 * 2 * 2 * 4 * (4 * 3 + 6 * 2)


def test_a_network_without_memory_is_refused_before_training(add, tmp_path):
    add("networks", "bag", BAG)
    outcome = tiny_run.call(
        *("train", *tiny_run.RECIPE, "--workdir", tmp_path / "run", "--network", "bag"),
        *("--parameterization", "any_subset", "--objective", "any_subset"),
        *("--sampler", "speculative"),
    )
    assert outcome.code == 2
    assert outcome.errors == [
        "error: sampler 'speculative' needs a network with a memory of rows to draw from an "
        "any-subset model, got Bag: ddit and decoder have (ordered needs none)"
    ]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- a sampler

EVENS_FIRST = '''
    """Even positions in one call, odd ones in the next."""

    from dataclasses import dataclass

    import jax.numpy as jnp

    from sedd.samplers.reveal import Revealing


    @dataclass(frozen=True, kw_only=True)
    class EvensFirst(Revealing):
        """Two calls, or one with ``together``."""

        together: bool = False

        def make_plan(self, keys_B, free_BL):
            odd_L = jnp.arange(free_BL.shape[1]) % 2 * (not self.together)
            return jnp.broadcast_to(odd_L, free_BL.shape)

        def choose(self, state, masked_BL, prediction):
            return state.plan == state.round_B[:, None]


    make = EvensFirst
'''


def test_a_sampler(add):
    add("samplers", "evens_first", EVENS_FIRST)
    world = oracle.Oracle("absorbing", seed=3)
    sampler = build_sampler("evens_first", LOG_LINEAR, together=False)
    drawn = oracle.draw(sampler, world.conditional_denoiser(), 4000)
    assert (drawn.calls_B == 2).all()
    even_L = np.arange(oracle.L) % 2 == 0
    law = oracle.masked_start(world, oracle.NOTHING_FIXED)
    for group_L in (even_L, ~even_L):
        law = law @ oracle.reveal_kernel(world, np.broadcast_to(1.0 * group_L, (1, oracle.L)))
    assert oracle.chi_square_p(oracle.counts_of(drawn.tokens_BL, world.V), law) > 1e-4
    assert oracle.chi_square_p(oracle.counts_of(drawn.tokens_BL, world.V), world.clean_law()) < 1e-4


# ---------------------------------------------------------------- a layout

TOY = '''
    """A layout with names of its own for a conditional model with a narrow MLP."""

    from sedd.interop.layouts.base import Description, Layout
    from sedd.interop.layouts.ddit import TENSORS
    from sedd.networks.ddit import DDiT

    NAME, CODE, NETWORK = "TOY", "nothing else", DDiT
    KEYS = {
        "num_states": ("vocab", "size"),
        "hidden_dim": ("width", "size"),
        "num_layers": ("depth", "size"),
        "num_heads": ("heads", "size"),
    }


    def matches(config, names):
        return config.has("architectures") and config.data["architectures"] == ["Toy"]


    def read(config):
        values = config.read(length=("context", "size"), **KEYS)
        length = values.pop("length")
        network = config.build(DDiT, time_conditioned=False, mlp_ratio=2, **values)
        description = Description(
            process="absorbing",
            parameterization="conditional",
            schedule={"name": "log_linear"},
            num_tokens=network.num_states - 1,
            length=length,
            corpus=None,
        )
        names = tensors(network)
        return Layout(name=NAME, network=network, description=description, tensors=names)


    def refusals(network, description):
        if network.mlp_ratio != 2 or network.time_conditioned:
            return None
        return [] if description.parameterization == "conditional" else ["only conditional"]


    def tensors(network):
        return {ours: "toy." + ours.replace("blocks/", "h/{}/") for ours in TENSORS}


    def write(network, description):
        sizes = {theirs: getattr(network, ours) for ours, (theirs, _) in KEYS.items()}
        return {"architectures": ["Toy"], "context": description.length, **sizes}
'''


def test_a_layout(add, tmp_path):
    network = DDiT(
        num_states=7, time_conditioned=False, hidden_dim=8, num_layers=2, num_heads=2, mlp_ratio=2
    )
    params = jax.tree.map(
        lambda leaf: np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape),
        network.init(jax.random.key(0)),
    )
    description = Description(
        process="absorbing",
        parameterization="conditional",
        schedule={"name": "log_linear"},
        num_tokens=6,
        length=5,
        corpus=None,
    )
    with pytest.raises(UserError, match=r"RADD cannot hold this model: network\.mlp_ratio"):
        layout_for(network, description)
    add("interop.layouts", "toy", TOY)
    layout = layout_for(network, description)
    save_published(tmp_path / "out", layout, params, beside={})
    published = load_published(tmp_path / "out")
    assert (published.network.num_layers, published.description) == (2, description)
    jax.tree.map(np.testing.assert_array_equal, published.params, params)
    (tmp_path / "out/config.json").write_text('{"architectures": ["Toy"], "vocab": 7}')
    with pytest.raises(UserError, match="the key context is missing"):
        load_published(tmp_path / "out")


# ---------------------------------------------------------------- a parameterization

SHIFTED = '''
    """A conditional whose position i is read one row earlier, as models made of causal ones do."""

    from dataclasses import dataclass

    import jax.numpy as jnp

    from sedd.parameterizations.base import Inputs
    from sedd.parameterizations.conditional import Conditional


    @dataclass(frozen=True, kw_only=True)
    class Shifted(Conditional):
        """Row i holds token i; the distribution of position i is read at row i - 1."""

        def inputs(self, x_BL, attend=None):
            row_BL = jnp.broadcast_to(jnp.arange(x_BL.shape[1]) - 1, x_BL.shape)
            return Inputs(tokens_BM=x_BL, attend=attend, read_BL=jnp.maximum(row_BL, 0))


    make = Shifted
'''


def test_a_parameterization_that_reads_other_rows(add):
    """Samplers and losses read position i where ``Inputs`` says, and know nothing else of it."""
    add("parameterizations", "shifted", SHIFTED)
    process = Absorbing(num_tokens=3)
    plain = Conditional(process=process)
    shifted = build("parameterizations", "shifted", process=process)
    network = oracle.ConstantNetwork(num_states=4, time_conditioned=False)
    raw_BLV = jax.random.normal(jax.random.key(0), (1, 4, 4))
    x_BL = i32([[3, 3, 3, 3]])

    def of(reading):
        return Denoiser(params=raw_BLV, network=network, parameterization=reading)

    before = np.asarray(of(plain).log_conditional(x_BL))[0]
    after = np.asarray(of(shifted).log_conditional(x_BL))[0]
    np.testing.assert_array_equal(after, before[[0, 0, 1, 2]])

    def nats(reading):
        objective = LambdaDCE(schedule=LOG_LINEAR, parameterization=reading)
        corrupted = objective.corrupt(keys(0, 1), f32([0.0]), x_BL % 3, x_BL >= 0)
        return np.asarray(objective.nats(network, raw_BLV, corrupted, x_BL % 3))[0]

    np.testing.assert_allclose(nats(shifted), nats(plain)[[0, 0, 1, 2]], rtol=1e-6)
