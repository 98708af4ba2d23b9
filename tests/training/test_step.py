"""The step: the same losses whatever divides the batch, and the optimizer as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import nightly
from training_toy import (
    ADAMW,
    BATCH,
    SGD,
    L,
    N,
    Toy,
    ToyBatches,
    history,
    objective,
    setup,
    to_host,
)

from sedd.errors import UserError
from sedd.networks import mesh
from sedd.networks.ddit import DDiT
from sedd.networks.decoder import Decoder
from sedd.objectives.base import draw_uniform
from sedd.training.optimizer import (
    OptimizerOptions,
    clip_by_global_norm,
    make_optimizer,
    make_schedule,
)
from sedd.training.parallel import DataParallel, check_batch_size
from sedd.training.state import ema_decay_at, from_host, init_state, update_ema
from sedd.training.step import Step, sum_over_devices, where_tree


def leaves(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def on_one_device():
    return history(300, SGD, devices=1)


@pytest.mark.parametrize("devices", [nightly(2), 4])
def test_losses_do_not_depend_on_the_number_of_devices(on_one_device, devices):
    one, one_state = on_one_device
    many, many_state = history(300, SGD, devices=devices)
    # Reordered float32 sums; SGD does not amplify them.
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5)
    np.testing.assert_allclose(leaves(many_state.params), leaves(one_state.params), atol=1e-5)
    np.testing.assert_allclose(
        leaves(many_state.ema_params), leaves(one_state.ema_params), atol=1e-5
    )
    assert one["loss"][:20].mean() > one["loss"][-20:].mean()  # it trains


@pytest.fixture
def tiny_parts(monkeypatch):
    """Arrays of a toy's size are split too."""
    monkeypatch.setattr(mesh, "LEAST_SPLIT", 16)


@pytest.mark.nightly
@pytest.mark.usefixtures("tiny_parts")
def test_losses_are_the_same_with_a_part_of_the_state_on_each_device(on_one_device):
    one, one_state = on_one_device
    many, many_state = history(300, SGD, devices=4, fsdp=2, accumulate=2)
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5)
    np.testing.assert_allclose(leaves(many_state.params), leaves(one_state.params), atol=1e-5)
    for tree in (many_state.params, many_state.ema_params):
        for leaf in jax.tree.leaves(tree):
            parts = 2 if leaf.size >= 16 else 1
            assert leaf.addressable_data(0).size == leaf.size // parts


def test_losses_do_not_depend_on_the_number_of_devices_under_adamw():
    one, _ = history(50, ADAMW, devices=1)
    many, _ = history(50, ADAMW, devices=4)
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulated_gradients_are_those_of_the_large_batch(on_one_device, devices):
    one, _ = on_one_device
    many, _ = history(40, SGD, devices=devices, accumulate=4)
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(many[name], one[name][:40], rtol=1e-5)


@pytest.mark.nightly
@pytest.mark.usefixtures("tiny_parts")
@pytest.mark.parametrize(
    ("kind", "options"),
    [(DDiT, {"dropout": 0.1}), (Decoder, {"num_kv_heads": 1, "tied": True})],
)
def test_the_transformer_is_the_same_on_four_devices(kind, options):
    network = kind(
        num_states=N + 1,
        time_conditioned=False,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        **options,
    )
    one, _ = history(12, SGD, devices=1, network=network)
    for fsdp in (None, 2):
        many, _ = history(12, SGD, devices=4, network=network, fsdp=fsdp)
        np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(many["grad_norm"], one["grad_norm"], rtol=1e-5)


@pytest.mark.usefixtures("tiny_parts")
def test_the_gradient_is_that_of_the_mean_of_sums():
    """Against the objective written out; a wrong reduction is N× too large on N devices."""
    network, batch = Toy(), next(ToyBatches())
    state, _ = setup(SGD)
    times, corruption, dropout = jax.random.split(jax.random.fold_in(state.key, 0), 3)
    index_B = jnp.arange(BATCH)
    fold = jax.vmap(jax.random.fold_in, (None, 0))

    def mean_of_sums(params):
        u_B = draw_uniform(times, index_B, BATCH, stratified=True)
        corrupted = objective().corrupt(
            fold(corruption, index_B), u_B, batch["x0"], batch["scored"]
        )
        keys_B = fold(dropout, index_B)
        raw_BLV = network.raw(params, corrupted.xt_BL, keys_B=keys_B)
        nats_BL = corrupted.weight_BL * objective().row_nats(
            raw_BLV, batch["x0"], corrupted.xt_BL, None
        )
        return nats_BL.sum(-1).mean(), nats_BL.sum() / batch["scored"].sum()

    gradient = jax.jit(jax.value_and_grad(mean_of_sums, has_aux=True))
    (_, loss), grads = gradient(state.params)
    # Unclipped SGD: the parameters move by the gradient itself.
    for devices, fsdp in ((1, None), (4, None), (4, 2)):
        options = OptimizerOptions(
            name="sgd", learning_rate=0.5, warmup_steps=0, clip_norm=None, ema_decay=0
        )
        seen, after = history(1, options, devices=devices, fsdp=fsdp)
        moved = jax.tree.map(lambda a, b: (a - b) / 0.5, state.params, after.params)
        np.testing.assert_allclose(leaves(moved), leaves(grads), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(seen["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
        np.testing.assert_allclose(seen["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(leaves(after.ema_params), leaves(after.params))


@pytest.mark.parametrize(("devices", "fsdp"), [(1, None), (2, None), (2, 2)])
def test_a_placed_state_shares_no_memory(devices, fsdp):
    """A step donates it: neither its source nor another replica may be in the same memory."""
    state, runner = setup(devices=devices, fsdp=fsdp)
    before = leaves(to_host(state).params)
    for source in (state, from_host(to_host(state))):
        placed = runner.place(source)
        for leaf in jax.tree.leaves(placed.params):
            addresses = [s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards]
            assert len(set(addresses)) == devices
        jax.block_until_ready(runner(placed, next(ToyBatches())))
        np.testing.assert_array_equal(leaves(source.params), before)


@pytest.mark.parametrize("fsdp", [None, 2])
def test_the_first_state_is_made_in_place(fsdp):
    """Inside a compiled program whose results are the placed arrays: no array is copied to them."""
    state, runner = setup(devices=2, fsdp=fsdp)
    traced = []

    def make():
        made = init_state(Toy(), make_optimizer(SGD, 300), 0)
        traced.append(isinstance(made.step, jax.core.Tracer))
        return made

    placed = runner.init(make)
    assert traced == [True]
    np.testing.assert_array_equal(leaves(placed.params), leaves(state.params))
    new, _ = runner(placed, next(ToyBatches()))
    assert int(new.step) == 1


def test_a_reduction_in_the_wrong_place_would_be_noticed():
    """The negative control: without the sum over devices each keeps its own quarter."""
    x = jnp.arange(4.0)
    summed = jax.pmap(lambda x: sum_over_devices(x, "d"), axis_name="d")(x)
    np.testing.assert_array_equal(summed, 6.0)
    assert float(sum_over_devices(x, None)[1]) == 1.0


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"4 × 3 = 12, got 32; the nearest that is: 36") as caught:
        check_batch_size(32, 4, 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nearest that is: 4"):
        setup(batch_size=1, devices=4)
    with pytest.raises(UserError, match="accumulate must be at least 1, got 0"):
        check_batch_size(8, 1, 0)
    check_batch_size(24, 4, 3)


def test_a_state_can_be_used_after_it_was_replicated():
    state, parallel = setup(devices=2)
    before = leaves(state.params)
    parallel(parallel.place(state), next(ToyBatches()))
    np.testing.assert_array_equal(leaves(state.params), before)


def test_index_is_the_place_in_the_global_batch():
    _, parallel = setup(devices=2, accumulate=2)
    parts = parallel.shard(next(ToyBatches()))
    assert parts["x0"].shape == (2, 2, 2, L)
    np.testing.assert_array_equal(parts["index"].ravel(), np.arange(BATCH))
    np.testing.assert_array_equal(parts["x0"].reshape(BATCH, L), next(ToyBatches())["x0"])


def test_clipping_bounds_the_update():
    options = OptimizerOptions(name="sgd", learning_rate=1.0, warmup_steps=0, clip_norm=0.1)
    optimizer = make_optimizer(options, 10)
    params = {"w": jnp.zeros(3)}
    for scale, norm in ((1e-3, 5e-3), (1.0, 0.1)):
        grads = {"w": scale * jnp.array([3.0, 0.0, 4.0])}
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        np.testing.assert_allclose(optax.tree.norm(updates), norm, rtol=1e-5)
        np.testing.assert_allclose(updates["w"] / -norm, [0.6, 0, 0.8], rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6, jnp.inf, jnp.nan])
def test_clipping_is_that_of_optax(scale):
    ours, theirs = clip_by_global_norm(2.0), optax.clip_by_global_norm(2.0)
    key = jax.random.key(0)
    grads = {"w": scale * jax.random.normal(key, (3, 4)), "b": jnp.array(scale)}
    mine, _ = ours.update(grads, ours.init(grads))
    other, _ = theirs.update(grads, theirs.init(grads))
    if jnp.isfinite(scale):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, other)
    else:
        assert jnp.isnan(optax.tree.norm(mine))


def test_muon_turns_every_direction_of_a_kernel_equally_fast():
    options = OptimizerOptions(name="muon", learning_rate=0.1, warmup_steps=0, clip_norm=None)
    rng = np.random.default_rng(0)
    steep = np.geomspace(1, 1e-2, 8)[:, None]  # directions that differ a hundredfold
    grads = {"kernel": steep * rng.standard_normal((3, 8, 16)), "bias": np.ones((3, 16))}
    grads = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), grads)
    optimizer = make_optimizer(options, 10)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    singular = np.linalg.svd(np.asarray(updates["kernel"]), compute_uv=False)
    # Five Newton-Schulz steps bring singular values to 0.7 … 1.2; 0.1 · 0.2 · sqrt(16) scales them.
    assert (singular > 0.5 * 0.08).all()
    assert (singular < 1.3 * 0.08).all()
    raw = np.linalg.svd(np.asarray(grads["kernel"]), compute_uv=False)
    assert (raw[:, -1] / raw[:, 0] < 0.05).all()  # control: the gradient itself is not like that
    # Elsewhere it is Adam with Nesterov's momentum.
    adam = optax.nadamw(0.1, b1=options.beta1, b2=options.beta2, weight_decay=0.0)
    expected, _ = adam.update(grads["bias"], adam.init(grads["bias"]), grads["bias"])
    np.testing.assert_allclose(updates["bias"], expected, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_adamw_is_optax_adamw(weight_decay):
    options = OptimizerOptions(
        learning_rate=1e-2, warmup_steps=0, clip_norm=None, weight_decay=weight_decay
    )
    ours, theirs = make_optimizer(options, 10), optax.adamw(1e-2, weight_decay=weight_decay)
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    states = [ours.init(params), theirs.init(params)]
    for seed in range(5):
        grads = {"w": jax.random.normal(jax.random.key(seed), (3,))}
        (mine, states[0]), (other, states[1]) = (
            ours.update(grads, states[0], params),
            theirs.update(grads, states[1], params),
        )
        np.testing.assert_allclose(mine["w"], other["w"], rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)],
)
def test_the_schedule(schedule, middle, last):
    options = OptimizerOptions(
        learning_rate=2.0, warmup_steps=10, schedule=schedule, final_fraction=0.2
    )
    rate = make_schedule(options, 110)
    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [0.2, 1.0, 2.0], rtol=1e-5)
    np.testing.assert_allclose([rate(60), rate(110)], [2 * middle, 2 * last], rtol=1e-5)
    values = [float(rate(n)) for n in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_the_average_forgets_its_start_quickly():
    decays = [float(ema_decay_at(jnp.int32(n), 0.9999)) for n in (1, 2, 10, 10**7)]
    np.testing.assert_allclose(decays, [2 / 11, 3 / 12, 11 / 20, 0.9999], rtol=1e-6)
    ema = update_ema({"w": jnp.array(1.0)}, {"w": jnp.array(12.0)}, jnp.int32(1), 0.9999)
    np.testing.assert_allclose(ema["w"], 2 / 11 * 1 + 9 / 11 * 12, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("beta1", 1.0),
        ("ema_decay", -0.1),
        ("final_fraction", 2.0),
        ("clip_norm", 0.0),
        ("name", "adam"),
        ("schedule", "step"),
    ],
)
def test_options_name_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*{value}") as caught:
        OptimizerOptions(**{field: value})
    assert "\n" not in str(caught.value)


def test_stratified_draws_can_be_turned_off():
    network, optimizer = Toy(), make_optimizer(SGD, 10)
    losses = []
    for stratified in (True, False):
        step = Step(
            network=network,
            objective=objective(),
            optimizer=optimizer,
            ema_decay=0.9,
            batch_size=BATCH,
            stratified=stratified,
        )
        parallel = DataParallel(step, devices=jax.devices()[:1])
        state = parallel.place(init_state(network, optimizer, 0))
        losses.append(float(parallel(state, next(ToyBatches()))[1]["loss"]))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("finite", [True, False])
def test_where_tree_takes_one_of_two_trees(finite):
    new = {"a": jnp.array([1.0, jnp.nan]), "key": jax.random.key(1), "n": jnp.int32(3)}
    old = {"a": jnp.array([4.0, 5.0]), "key": jax.random.key(2), "n": jnp.int32(2)}
    kept = jax.jit(where_tree)(jnp.array(finite), new, old)
    expected = new if finite else old
    for name in expected:
        np.testing.assert_array_equal(
            *(jax.random.key_data(x) if name == "key" else x for x in (kept[name], expected[name]))
        )
