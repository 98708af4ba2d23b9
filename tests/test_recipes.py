"""The recipes: each fits together, has the published shape, and can be trained for a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import daily
from tiny_run import ROOT

from sedd.configuration.build import build_parts
from sedd.configuration.config import load_config
from sedd.training.optimizer import make_optimizer
from sedd.training.state import init_state
from sedd.training.step import Step

RECIPES = sorted((ROOT / "configs").glob("*.py"))
NUM_TOKENS = {"gpt2": 50257, "bert-base-uncased": 30522, "text8": 27, "bpe:4096": 4096}
PARAMETERS = {
    "owt_sedd_small": 169_627_218,
    "owt_sedd_medium": 424_477_010,
    "owt_radd_small": 162_265_682,
    "owt_radd_decoder_small": 162_150_144,
    "owt_radd_medium": 405_191_762,
    "owt_any_subset_small": 162_265_682,  # RADD-small's, for --init-from
    "owt_block_small": 162_265_682,
}

EACH_DAY = ("quickstart",)
every = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_there_are_recipes():
    assert PARAMETERS.keys() < {recipe.stem for recipe in RECIPES}


@every
def test_aim(path):
    config = load_config(path)
    assert config.aim
    assert "arXiv:" in config.aim or path.stem == "quickstart"


@every
def test_real_shape(path):
    config = load_config(path)
    num_tokens = NUM_TOKENS[config.data.tokenizer]
    parts = build_parts(config, num_tokens)
    masks = config.process.name != "uniform"
    assert parts.process.num_states == num_tokens + masks
    shapes = jax.eval_shape(parts.network.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == PARAMETERS.get(path.stem, count)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    state = jax.eval_shape(lambda: init_state(parts.network, optimizer, config.seed))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    "path",
    daily(RECIPES, [path for path in RECIPES if path.stem in EACH_DAY]),
    ids=lambda p: p.stem,
)
def test_one_step_of_a_shrunken_copy(path):
    config = load_config(path)
    config = dataclasses.replace(
        config,
        network=dataclasses.replace(
            config.network, hidden_dim=32, num_layers=2, num_heads=2, dtype="float32"
        ),
    )
    num_tokens, batch, length = 11, 4, 16
    parts = build_parts(config, num_tokens)
    step = Step(
        network=parts.network,
        objective=parts.objective,
        optimizer=make_optimizer(config.optimizer, config.training.steps),
        ema_decay=config.optimizer.ema_decay,
        batch_size=batch,
        stratified=config.training.stratified,
    )
    state, frozen = step.first_state(config.seed), parts.network.frozen_trunk
    if frozen or parts.objective.teacher_calls:  # a trained one: its output layer is not 0
        kernel = jax.random.normal(jax.random.key(0), state.params["head"]["kernel"].shape)
        params = state.params | {"head": {"kernel": kernel, "bias": state.params["head"]["bias"]}}
        state = step.first_state(config.seed, params=params)
    x0 = np.random.default_rng(0).integers(0, num_tokens, (1, batch, length), np.int32)
    rows = {"x0": x0, "scored": np.ones(x0.shape, bool), "index": np.arange(batch)[None]}
    after, metrics = jax.jit(step, static_argnames="axis_name")(state, rows, axis_name=None)
    assert np.isfinite(metrics["loss"])
    most = 10 * np.log(num_tokens)
    if config.objective.name == "marginal":  # squared differences along a path of all tokens
        most = (length * most) ** 2
    assert 0 < metrics["loss"] < most
    assert metrics["grad_norm"] > 0
    assert metrics["tokens"] == batch * length
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, after.params)
    # The layers below get a gradient only after this step.
    if "hmm" in moved:
        assert moved["hmm"]["emission"] > 0
        return
    if "head" not in moved:  # it is tied to the embedding
        assert moved["trunk"]["embed"]["embedding"] > 0
        return
    new = next(name for name in ("causal", "marginal", "head") if name in moved)
    assert (moved[new]["out"] if frozen else moved[new])["kernel"] > 0
