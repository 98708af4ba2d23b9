"""A run small enough to repeat: 8 positions of 6 tokens, and a network of a few hundred weights.

As a script it trains, for the tests that need a process of their own:
``training_toy.py WORKDIR STEPS [FILE_SIZE_LIMIT]``.
"""

import json
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sedd.errors import UserError
from sedd.networks.base import Network
from sedd.networks.mesh import on_host
from sedd.networks.shard import whole
from sedd.objectives.t_dce import TDCE
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear
from sedd.training.checkpoint import Checkpoints
from sedd.training.loop import Cadence, Run, train
from sedd.training.metrics import read_metrics
from sedd.training.optimizer import OptimizerOptions, make_optimizer, make_schedule
from sedd.training.parallel import DataParallel, FullySharded
from sedd.training.step import Step
from sedd.training.storage import quiet_orbax

N, L, BATCH = 6, 8, 8
SGD = OptimizerOptions(name="sgd", learning_rate=0.02, warmup_steps=0, ema_decay=0.99)
ADAMW = OptimizerOptions(learning_rate=1e-2, warmup_steps=10, ema_decay=0.99)


@dataclass(frozen=True, kw_only=True)
class Toy(Network):
    num_states: int = N + 1
    time_conditioned: bool = False
    width: int = 16
    dropout: float = 0.2

    def init(self, key):
        a, b, c = jax.random.split(key, 3)
        return {
            "embed": jax.random.normal(a, (self.num_states, self.width)) * 0.3,
            "mix": jax.random.normal(b, (self.width, self.width)) * 0.3,
            "head": {
                "kernel": jax.random.normal(c, (self.width, self.num_states)) * 0.3,
                "bias": jnp.zeros(self.num_states),
            },
        }

    def hidden(
        self, params, tokens_BL, *, positions_BL=None, attend=None, sigma_B=None, keys_B=None
    ):
        params = whole(params)
        h_BLD = params["embed"][tokens_BL]
        h_BLD = jnp.tanh(h_BLD + jnp.roll(h_BLD, 1, axis=1) @ params["mix"])
        if keys_B is not None and self.dropout:
            keep_BLD = jax.vmap(
                lambda key: jax.random.bernoulli(key, 1 - self.dropout, h_BLD.shape[1:])
            )(keys_B)
            h_BLD = jnp.where(keep_BLD, h_BLD / (1 - self.dropout), 0.0)
        return h_BLD

    def head(self, params):
        head = whole(params["head"])
        return head["kernel"], head["bias"]

    def flops(self, length, read):
        return 2 * self.width * (self.width * length + self.num_states * read)


class ToyBatches:
    """Runs of increasing tokens; the last positions of some rows are padding."""

    def __init__(self, start_step=0, batch_size=BATCH):
        self.next_step, self.batch_size = start_step, batch_size

    def __next__(self):
        step, self.next_step = self.next_step, self.next_step + 1
        draws = np.random.default_rng(step).integers(0, N, (self.batch_size, 2))
        x0_BL = (draws[:, :1] + np.arange(L)) % N
        scored_BL = np.arange(L) < L - draws[:, 1:] // 2
        index_B = np.arange(self.batch_size, dtype=np.int32)
        x0_BL = x0_BL.astype(np.int32)
        return {"step": step, "x0": x0_BL, "scored": scored_BL, "index": index_B}

    def state(self):
        return {"next_step": self.next_step}


def to_host(state):
    """The whole state as numpy arrays, the key as its data; processes call it together."""
    if jax.dtypes.issubdtype(state.key.dtype, jax.dtypes.prng_key):
        state = replace(state, key=jax.random.key_data(state.key))
    return jax.tree.map(np.array, on_host(state))


def objective():
    parameterization = Conditional(process=Absorbing(num_tokens=N))
    return TDCE(schedule=LogLinear(), parameterization=parameterization)


def setup(
    options=SGD,
    *,
    steps=300,
    devices=1,
    accumulate=1,
    network=None,
    batch_size=BATCH,
    fsdp=None,
    objective=objective,
    skip_nonfinite=False,
):
    """(state, parallel) at step 0; ``fsdp`` is the size of that axis, None replicates."""
    network = network or Toy()
    optimizer = make_optimizer(options, steps)
    step = Step(
        network=network,
        objective=objective(),
        optimizer=optimizer,
        ema_decay=options.ema_decay,
        batch_size=batch_size,
        stratified=True,
        skip_nonfinite=skip_nonfinite,
    )
    some = {"accumulate": accumulate, "devices": jax.devices()[:devices]}
    parallel = FullySharded(step, fsdp=fsdp, **some) if fsdp else DataParallel(step, **some)
    return step.first_state(0), parallel


def history(num_steps, options=SGD, **kwargs):
    """The metrics of the first steps, name → [num_steps], and the last state."""
    state, parallel = setup(options, **kwargs)
    state = parallel.place(state)
    batches, seen = ToyBatches(), []
    for _ in range(num_steps):
        state, metrics = parallel(state, next(batches))
        seen.append({name: float(value) for name, value in metrics.items()})
    return {name: np.array([m[name] for m in seen]) for name in seen[0]}, state


def run(
    workdir,
    steps,
    options=ADAMW,
    *,
    cadence=None,
    devices=1,
    batches=None,
    keep=3,
    of_steps=None,
    network=None,
    objective=objective,
    skip_nonfinite=False,
    fsdp=None,
    **kwargs,
):
    """Train in ``workdir``, from its checkpoint if it holds one."""
    state, parallel = setup(
        options,
        steps=of_steps or steps,
        devices=devices,
        network=network,
        objective=objective,
        skip_nonfinite=skip_nonfinite,
        fsdp=fsdp,
    )
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", keep=keep)
    abstract = jax.eval_shape(lambda: state)
    restored = checkpoints.restore_latest(abstract, parallel.shardings)
    state = restored.state if restored else parallel.place(state)
    batches = batches or ToyBatches()
    batches.next_step = int(state.step)
    run = Run(
        workdir=workdir,
        parallel=parallel,
        batches=batches,
        checkpoints=checkpoints,
        steps=steps,
        cadence=cadence or Cadence(log_every=7, eval_every=20, checkpoint_every=25),
        learning_rate=make_schedule(options, of_steps or steps),
        **kwargs,
    )
    return train(run, state, pending=restored.pending if restored else None)


def fake_validation(params):
    """Deterministic in the parameters."""
    return {
        "nats_per_token": float(np.square(params["mix"]).mean()),
        "standard_error": 0.01,
    }


SPEEDS = ("tokens_per_second", "steps_per_second", "waiting_for_data")


def records(workdir):
    """The lines of metrics.jsonl without what the clock wrote, as text."""
    lines = read_metrics(workdir)
    return [json.dumps({k: v for k, v in line.items() if k not in SPEEDS}) for line in lines]


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # a limit on files would cut what Python caches, for good
    workdir, steps, *limit = sys.argv[1:]

    class Limited(ToyBatches):
        def __next__(self):
            if limit and self.next_step == 30:
                while not (Path(workdir) / "checkpoints" / "25").exists():
                    time.sleep(0.05)
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit[0]), int(limit[0])))
            return super().__next__()

    quiet_orbax()  # as the commands do
    try:
        print("ready", flush=True)
        network = Toy(width=64)  # arrays larger than the logs
        run(workdir, int(steps), batches=Limited(), validate=fake_validation, network=network)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
