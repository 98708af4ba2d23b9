"""Self-distillation: its divergences, the law of its targets, its fixed points."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, Oracle, f32, i32, keys, state_index
from scipy import special
from tiers import daily

from sedd.errors import FieldError
from sedd.objectives.base import Corrupted, Lesson
from sedd.objectives.divergences import f_divergence
from sedd.objectives.self_distill import SelfDistill, revealed_share
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.mean import Mean
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.uniform import Uniform
from sedd.schedules import LogLinear

MASK = N
WORLD = Oracle("absorbing", seed=1)
TABLE = f32(np.pad(np.log(np.maximum(WORLD.conditional(), 1e-30)), [(0, 0), (0, 0), (0, 1)]))
NETWORK = oracle.TableNetwork(num_states=N + 1, time_conditioned=False)
READING = Conditional(process=Absorbing(num_tokens=N))
KINDS = ("forward_kl", "reverse_kl", "js", "hellinger")


def distil(**options):
    options = {"rounds": 1, "round_steps": 1, "teacher_steps": 2} | options
    return SelfDistill(schedule=LogLinear(), parameterization=READING, **options)


# ---------------------------------------------------------------- divergences, in float64

F = {
    "forward_kl": lambda r: r * jnp.log(r),
    "reverse_kl": lambda r: -jnp.log(r),
    "js": lambda r: r * jnp.log(r) - (1 + r) * jnp.log((1 + r) / 2),
    "hellinger": lambda r: (1 - jnp.sqrt(r)) ** 2,
}
RHO = {
    "forward_kl": lambda r: -r,
    "reverse_kl": lambda r: -jnp.log(r),
    "js": lambda r: -jnp.log((1 + r) / 2),
    "hellinger": lambda r: 1 - jnp.sqrt(r),
}
H = {
    "forward_kl": lambda r: r,
    "reverse_kl": lambda r: jnp.ones_like(r),
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: jnp.sqrt(r) / 2,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_its_gradient_and_its_weight(kind):
    """D = Σ q·f(r); ∇D = E_q[ρ(r)·∇ log q]; h = r²·f'' = -dρ/d log r."""
    with jax.enable_x64(True):
        logits_p, logits_q = 2 * np.random.default_rng(0).standard_normal((2, 5, 7))
        log_p = jax.nn.log_softmax(logits_p)

        def value(logits):
            return f_divergence(kind, log_p, jax.nn.log_softmax(logits)).sum()

        q = special.softmax(logits_q, -1)
        r = np.exp(log_p) / q
        found, gradient = jax.value_and_grad(value)(logits_q)
        np.testing.assert_allclose(found, (q * F[kind](r)).sum(), rtol=1e-10)
        rho = np.asarray(RHO[kind](r))
        # ∇ log q_v in the logits is one-hot(v) - q.
        expected = q * rho - q * (q * rho).sum(-1, keepdims=True)
        np.testing.assert_allclose(gradient, expected, atol=1e-12)
        assert np.abs(gradient).max() > 0.1
        second = jax.vmap(jax.grad(jax.grad(F[kind])))(r.ravel())
        np.testing.assert_allclose(r.ravel() ** 2 * second, H[kind](r.ravel()), rtol=1e-10)
        slope = jax.vmap(jax.grad(lambda s: RHO[kind](jnp.exp(s))))(np.log(r.ravel()))
        np.testing.assert_allclose(-slope, H[kind](r.ravel()), rtol=1e-10)
        assert value(logits_p) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("kind", "of"), [("forward_kl", "mean"), ("reverse_kl", "geometric")])
def test_what_minimises_the_mean_divergence_from_several_targets(kind, of):
    """KL(p‖q) has the mean of the targets; KL(q‖p) their geometric mean, which is sharper."""
    with jax.enable_x64(True):
        log_p = special.log_softmax(2 * np.random.default_rng(1).standard_normal((4, 5)), -1)
        means = {
            "mean": special.logsumexp(log_p, 0) - np.log(4),
            "geometric": special.log_softmax(log_p.mean(0)),
        }

        def loss(logits):
            log_q = jnp.broadcast_to(jax.nn.log_softmax(logits), log_p.shape)
            return f_divergence(kind, log_p, log_q).mean()

        for name, log_q in means.items():
            largest = np.abs(jax.grad(loss)(log_q)).max()
            assert largest < 1e-12 if name == of else largest > 1e-2
        entropy = {name: -(np.exp(log_q) * log_q).sum() for name, log_q in means.items()}
        assert entropy["geometric"] < entropy["mean"]


# ---------------------------------------------------------------- targets on masks, enumerated


def mean_targets(x_L, share):
    """[L, N]: the mean target of the exact model at each mask of x, by enumeration."""
    conditional = WORLD.conditional()
    p = conditional[state_index(x_L, N + 1)]
    masked = np.flatnonzero(x_L == MASK)
    total = np.zeros((L, N))
    for size in range(len(masked) + 1):
        for drawn in itertools.combinations(masked, size):
            weight = share**size * (1 - share) ** (len(masked) - size)
            for tokens in itertools.product(range(N), repeat=size):
                after_L = x_L.copy()
                after_L[list(drawn)] = tokens
                each = weight * np.prod(p[list(drawn), list(tokens)])
                waits = after_L == MASK
                total[waits] += each * conditional[state_index(after_L, N + 1)][waits]
                total[list(drawn)] += each * p[list(drawn)]
    return total


STATES = {
    "one mask": (0, MASK, 2, 1),
    "two masks": (MASK, 1, MASK, 0),
    "three masks": (MASK, 1, MASK, MASK),
    "all masks": (MASK,) * 4,
}


def corrupted_at(x_L, sigma, earlier, seed, count):
    x_BL = i32(np.tile(x_L, (count, 1)))
    return Corrupted(
        xt_BL=x_BL,
        weight_BL=f32(np.asarray(x_BL) == MASK),
        sigma=jnp.full(count, sigma),
        lesson=Lesson(x_BL=x_BL, sigma_B=jnp.full(count, earlier), keys_B=keys(seed, count)),
    )


@functools.cache
def gradients_at(name, sigma, earlier, count=20_000):
    """Targets [count, L, N] of the exact teacher, and the gradient in the row of an exact student.

    The gradient of one draw in the logits is q - p for the student q and the target p.
    """
    x_L = np.array(STATES[name])
    corrupted = corrupted_at(x_L, sigma, earlier, 3, count)

    @jax.jit
    def run(corrupted):
        taught = distil().taught(NETWORK, {"table": TABLE}, corrupted)
        assert taught.lesson is not None
        return jax.nn.softmax(taught.lesson.hidden_BLD[..., :N], -1)

    @jax.jit
    def gradient(corrupted):
        taught = distil().taught(NETWORK, {"table": TABLE}, corrupted)
        return jax.grad(lambda t: distil().summed_nats(NETWORK, {"table": t}, taught, x_BL))(TABLE)

    x_BL = corrupted.xt_BL
    row_LV = gradient(corrupted)[state_index(x_L, N + 1)] / count
    return np.asarray(run(corrupted), np.float64), np.asarray(row_LV)[:, :N]


@pytest.mark.parametrize("name", daily(STATES, ["all masks"]))
def test_targets_and_gradient_follow_the_enumerated_law(name):
    x_L, sigma, earlier = np.array(STATES[name]), 1.2, 0.3
    targets, gradient = gradients_at(name, sigma, earlier)
    share = float(revealed_share(jnp.float32(sigma), jnp.float32(earlier)))
    expected = mean_targets(x_L, share)
    masked = x_L == MASK
    error = targets.std(0)[masked] / np.sqrt(len(targets)) + 1e-6
    z = (targets.mean(0) - expected)[masked] / error
    assert np.abs(z).max() < 4.5
    # The student has the table of the teacher, so that its gradient is q minus the mean target.
    own = WORLD.conditional()[state_index(x_L, N + 1)]
    np.testing.assert_allclose(gradient[masked], (own - targets.mean(0))[masked], atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_an_exact_model_is_a_fixed_point_if_a_step_reveals_one_token(share):
    """With two masks no target follows two draws. With more masks draws miss their correlation."""
    conditional = WORLD.conditional()
    off = {}
    for name, x in STATES.items():
        x_L = np.array(x)
        own = conditional[state_index(x_L, N + 1)]
        off[name] = np.abs(mean_targets(x_L, share) - own)[x_L == MASK].max()
    assert max(off["one mask"], off["two masks"]) < 1e-12
    assert min(off["three masks"], off["all masks"]) > 1e-3 * share


def test_the_minimiser_goes_to_the_model_as_its_steps_become_short():
    """The error is that of two tokens in one step: it falls with the square of their share."""
    x_L = np.array(STATES["all masks"])
    own = WORLD.conditional()[state_index(x_L, N + 1)]
    errors = [np.abs(mean_targets(x_L, share) - own).max() for share in (0.1, 0.01, 0.001)]
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 50


def test_many_steps_leave_the_student_where_the_teacher_is():
    """The loss of a copy of the teacher: a share of the tokens is revealed between its calls."""
    x0_BL = i32(np.random.default_rng(0).integers(0, N, (512, L)))

    @functools.partial(jax.jit, static_argnums=0)
    def loss(objective, keys_B, u_B):
        corrupted = objective.corrupt(keys_B, u_B, x0_BL, jnp.ones(x0_BL.shape, bool))
        corrupted = objective.taught(NETWORK, {"table": TABLE}, corrupted)
        return objective.summed_nats(NETWORK, {"table": TABLE}, corrupted, x0_BL) / x0_BL.size

    given = keys(1, 512), (jnp.arange(512) + 0.5) / 512
    steps = [float(loss(distil(teacher_steps=2**k), *given)) for k in (1, 5, 20)]
    assert steps[0] > 0.02
    assert 0 < steps[1] < steps[0] / 4
    assert steps[2] < 1e-6


def test_given_positions_are_never_drawn():
    x0_BL, scored_BL = jnp.zeros((64, L), jnp.int32), jnp.arange(L)[None] % 2 == jnp.zeros((64, 1))
    corrupted = distil().corrupt(keys(0, 64), jnp.full(64, 0.99), x0_BL, scored_BL)
    assert (np.asarray(corrupted.xt_BL)[~np.asarray(scored_BL)] == 0).all()
    assert (np.asarray(corrupted.weight_BL)[~np.asarray(scored_BL)] == 0).all()
    assert (np.asarray(corrupted.xt_BL) == MASK).mean() > 0.4


# ---------------------------------------------------------------- the uniform process

SCORE = Score(process=Uniform(num_tokens=N))
UNIFORM = Oracle("uniform", seed=2)


def consistent(**options):
    return SelfDistill(schedule=LogLinear(), parameterization=SCORE, rounds=1, **options)


def test_corruptions_of_one_text_are_nested():
    """Both levels have their law; what is wrong at t - dt has the same wrong token at t."""
    count, u = 40_000, 0.6
    objective = consistent(teacher_steps=4)
    x0_BL = i32(np.tile(np.arange(L) % N, (count, 1)))
    drawn = jax.jit(objective.corrupt)(
        keys(0, count), jnp.full(count, u), x0_BL, jnp.ones(x0_BL.shape, bool)
    )
    assert drawn.lesson is not None
    x0, late, early = map(np.asarray, (x0_BL, drawn.xt_BL, drawn.lesson.x_BL))
    sigmas = float(drawn.sigma[0]), float(drawn.lesson.sigma_B[0])
    assert sigmas[0] > sigmas[1] + 0.1
    for x, sigma in ((late, sigmas[0]), (early, sigmas[1])):
        law = oracle.transition_matrix("uniform", sigma)
        for i in range(L):
            counts = np.bincount(x[:, i], minlength=N)
            assert oracle.chi_square_p(counts, law[x0[0, i]]) > 1e-4
    wrong = early != x0
    assert (late[wrong] == early[wrong]).all()
    moved = late != early
    assert (early[moved] == x0[moved]).all()
    assert moved.mean() > 0.05


def leave_one_out(sigma):
    """[N^L, L, N]: p(x0_i | x at all other positions) of the exact model at total noise σ."""
    kernel = oracle.transition_matrix("uniform", sigma)
    states = oracle.all_states(N)
    each_XSL = kernel[states[:, None, :], states[None, :, :]]  # x0, x
    found = []
    for i in range(L):
        like_XS = np.prod(np.delete(each_XSL, i, -1), -1) * UNIFORM.joint.ravel()[:, None]
        found.append(np.einsum("xs,xn->sn", like_XS / like_XS.sum(0), np.eye(N)[states[:, i]]))
    return np.stack(found, 1)


def test_a_mean_is_compared_through_its_posterior():
    """The divergence of the exact model at two noise levels, on all states."""
    reading = Mean(process=Uniform(num_tokens=N))
    objective = SelfDistill(schedule=LogLinear(), parameterization=reading, rounds=1)
    early, late = 0.4, 1.1
    x_R = i32(oracle.all_states(N).ravel())
    raw = {s: f32(np.log(leave_one_out(s)).reshape(-1, N)) for s in (early, late)}
    sigma_R = jnp.ones(len(x_R))
    head = jnp.eye(N), jnp.zeros(N)
    found_R = objective.row_nats(
        *(raw[late], x_R, x_R, late * sigma_R, raw[early], x_R, early * sigma_R, *head)
    )
    p, q = posterior(early), posterior(late)
    expected = (special.xlogy(p, p) - special.xlogy(p, q)).sum(-1)
    np.testing.assert_allclose(found_R.reshape(expected.shape), expected, atol=1e-5)
    assert expected.max() > 0.1


@functools.cache
def posterior(sigma):
    """[N^L, L, N]: p(x0_i | x) of the exact model at total noise σ."""
    kernel = oracle.transition_matrix("uniform", sigma)
    states = oracle.all_states(N)
    like_XS = np.prod(kernel[states[:, None, :], states[None, :, :]], -1)  # x0, x
    post_XS = UNIFORM.joint.ravel()[:, None] * like_XS
    post_XS /= post_XS.sum(0)
    hot_XLN = np.eye(N)[states]
    return np.einsum("xs,xln->sln", post_XS, hot_XLN)


def nested_loss(x0_L, sigma, earlier):
    """The mean KL of the exact model at both levels, over nested corruptions of x0."""
    late, early, total = posterior(sigma), posterior(earlier), 0.0
    p_early, p_late = -np.expm1(-earlier), -np.expm1(-sigma)
    choices = []
    for token in x0_L:
        each = {}
        for k in range(N):
            for probability, pair in (
                (p_early / N, (k, k)),
                ((p_late - p_early) / N, (token, k)),
                ((1 - p_late) / N, (token, token)),
            ):
                each[pair] = each.get(pair, 0) + probability
        choices.append(list(each.items()))
    for combination in itertools.product(*choices):
        weight = np.prod([probability for _, probability in combination])
        pairs = np.array([pair for pair, _ in combination])
        p, q = early[state_index(pairs[:, 0], N)], late[state_index(pairs[:, 1], N)]
        total += weight * (special.xlogy(p, p) - special.xlogy(p, q)).sum()
    return total


def test_the_loss_of_an_exact_model_is_its_enumeration():
    """On the uniform process, from the score through the posterior of both levels."""
    count = 4000
    objective = consistent(teacher_steps=4)
    network = oracle.ExactScoreNetwork(num_states=N, time_conditioned=True, kind="uniform")
    params = {"joint": f32(UNIFORM.joint)}
    x0_L = np.array([0, 2, 1, 1])
    x0_BL = i32(np.tile(x0_L, (count, 1)))

    @jax.jit
    def run(keys_B):
        corrupted = objective.corrupt(
            keys_B, jnp.full(count, 0.6), x0_BL, jnp.ones(x0_BL.shape, bool)
        )
        corrupted = objective.taught(network, params, corrupted)
        return corrupted, objective.nats(network, params, corrupted, x0_BL).sum(1)

    corrupted, nats_B = run(keys(5, count))
    expected = nested_loss(x0_L, float(corrupted.sigma[0]), float(corrupted.lesson.sigma_B[0]))
    nats_B = np.asarray(nats_B, np.float64)
    assert abs(nats_B.mean() - expected) < 4.5 * nats_B.std() / np.sqrt(count)
    assert nats_B.std() / np.sqrt(count) < 0.05 * expected


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 3, "teacher_steps": 100}, "the 100 teacher_steps can be halved 2 times"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"round_steps": 0}, "round_steps must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(FieldError, match=message):
        distil(**options)


def test_a_score_on_masks_is_refused():
    with pytest.raises(ValueError, match="it needs the parameterization conditional"):
        SelfDistill(schedule=LogLinear(), parameterization=Score(process=Absorbing(num_tokens=N)))
