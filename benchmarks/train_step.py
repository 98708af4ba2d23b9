"""The speed, the memory and the compile time of a training step, beside the plain form of the loss.

Three forms of the step are compared, with the same network and batch:

- ``sedd``: the library's step. It computes logits only where there is a loss, in chunks.
- ``plain``: computes all logits of the batch, takes optax's softmax cross entropy of them, and
  clips the gradient with optax's ``clip_by_global_norm``.
- ``plain loss``: the loss of ``plain`` with the library's clipping.

The forms take one step in turn, so that other work of the machine slows all of them alike. The
columns:

- ``s/step``, ``median``: the shortest and the median time of a step.
- ``tokens/s``, ``TFLOP/s``, ``MFU``: from the shortest step. MFU needs a device of known peak.
- ``temporaries MB``: the intermediate arrays of the compiled step.
- ``speed``: the shortest step of ``plain`` divided by that of the form.

With ``--depths`` only the compile time is measured; ``ratio`` is relative to the first depth.

    python benchmarks/train_step.py                    # width 256, 6 layers, 2,048 tokens
    python benchmarks/train_step.py --shape gpt2-small --batch-size 4 --length 256
    python benchmarks/train_step.py --depths 4 12 48   # compile time
"""

import dataclasses
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import report, start

from sedd.configuration.build import Parts, build_parts
from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions, TrainingOptions
from sedd.networks.base import read_out
from sedd.objectives.autoregressive import Autoregressive
from sedd.objectives.lambda_dce import LambdaDCE
from sedd.objectives.score_entropy import ScoreEntropy
from sedd.training.flops import peak_flops, step_flops
from sedd.training.optimizer import OptimizerOptions, make_optimizer
from sedd.training.state import init_state
from sedd.training.step import Step

SHAPES = {  # hidden_dim, layers, heads, tokens
    "small": (256, 6, 8, 2048),
    "gpt2-small": (768, 12, 12, 50257),
}
LOSSES = {"lambda_dce": LambdaDCE, "score_entropy": ScoreEntropy, "autoregressive": Autoregressive}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The shape and the kind of the step."""

    shape: Literal["small", "gpt2-small"] = "small"
    objective: Literal["lambda_dce", "score_entropy", "autoregressive"] = "lambda_dce"
    process: Literal["absorbing", "uniform"] = "absorbing"
    length: int = 256
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    steps: int = 5
    """Timed steps of each form, after one step that is not timed."""
    depths: tuple[int, ...] = ()
    """Measure the compile time at these numbers of layers, and nothing else."""


def config_of(settings: Settings, num_layers: int) -> Config:
    """The configuration of a run of this shape."""
    hidden_dim, _, heads, _ = SHAPES[settings.shape]
    parameterization = {
        "lambda_dce": "conditional",
        "score_entropy": "score",
        "autoregressive": "autoregressive",
    }[settings.objective]
    autoregressive = settings.objective == "autoregressive"
    return Config(
        data=DataOptions(length=settings.length),
        process=options("processes", settings.process),
        parameterization=options("parameterizations", parameterization),
        objective=options("objectives", settings.objective),
        network=options(
            "networks",
            "ddit",
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_heads=heads,
            norm_bias=True,
            dropout=0.0,
            dtype=settings.dtype,
            remat=settings.remat,
        ),
        sampler=options("samplers", "ordered" if autoregressive else "euler"),
        training=TrainingOptions(batch_size=settings.batch_size),
    )


def parts_of(settings: Settings, num_layers: int) -> Parts:
    """The components of a run of this shape."""
    return build_parts(config_of(settings, num_layers), SHAPES[settings.shape][3])


def plain(kind):
    """A subclass of the objective that computes the logits of all positions at once."""

    class Plain(kind):
        def summed_nats(self, network, params, corrupted, x0_BL, **kwargs):
            rows = self._rows(network, params, corrupted, x0_BL, **kwargs)
            hidden_MD, head, weight_M, (x0_M, xt_M, *sigma) = rows
            raw_MV = read_out(hidden_MD, *head)
            if kind is ScoreEntropy:
                nats_M = self.row_nats(raw_MV, x0_M, xt_M, *sigma)
                nats_M = jnp.where(weight_M > 0, nats_M, 0.0)
            else:
                logits_MN = self.parameterization.masked_logits(raw_MV)
                nats_M = optax.softmax_cross_entropy_with_integer_labels(logits_MN, x0_M)
            return (weight_M * nats_M).sum()

    return Plain


def plain_optimizer() -> optax.GradientTransformation:
    """The library's optimizer with optax's clipping, which keeps a second gradient."""
    rest = make_optimizer(OptimizerOptions(clip_norm=None), 1000)
    return optax.chain(optax.clip_by_global_norm(1.0), rest)


def compiled_step(settings: Settings, parts: Parts, objective, optimizer=None):
    """The step, compiled ahead, with its state, its batch, and the seconds that compiling took."""
    optimizer = optimizer or make_optimizer(OptimizerOptions(), 1000)
    step = Step(
        network=parts.network,
        objective=objective,
        optimizer=optimizer,
        ema_decay=0.9999,
        batch_size=settings.batch_size,
    )
    state = init_state(parts.network, optimizer, 0)
    shape = (1, settings.batch_size, settings.length)
    tokens = np.random.default_rng(0).integers(0, parts.process.num_tokens, shape, np.int32)
    batch = {
        "x0": jnp.asarray(tokens),
        "scored": jnp.ones(shape, bool),
        "index": jnp.arange(settings.batch_size)[None],
    }
    lowered = jax.jit(lambda s, b: step(s, b, axis_name=None), donate_argnums=0).lower(state, batch)
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled, state, batch, time.perf_counter() - start


def main(settings: Settings) -> None:
    """Print the table of the speeds, or of the compile times."""
    if settings.depths:
        rows = []
        for depth in settings.depths:
            parts = parts_of(settings, depth)
            *_, seconds = compiled_step(settings, parts, parts.objective)
            rows.append({"layers": depth, "compile s": seconds})
        for row in rows:
            row["ratio"] = row["compile s"] / rows[0]["compile s"]
        report("compile time of a training step", rows, **about(settings))
        return
    depth = SHAPES[settings.shape][1]
    parts = parts_of(settings, depth)
    kind = LOSSES[settings.objective]
    fields = {f.name: getattr(parts.objective, f.name) for f in dataclasses.fields(kind)}
    plain_loss = plain(kind)(**fields)
    forms = {
        "sedd": (parts.objective, None),
        "plain loss": (plain_loss, None),
        "plain": (plain_loss, plain_optimizer()),
    }
    programs, states, memory = {}, {}, {}
    for name, (objective, optimizer) in forms.items():
        compiled, state, batch, _ = compiled_step(settings, parts, objective, optimizer)
        programs[name], states[name] = compiled, state
        memory[name] = compiled.memory_analysis()
    times = {name: [] for name in forms}
    for i in range(settings.steps + 1):
        for name, compiled in programs.items():
            start = time.perf_counter()
            states[name], metrics = compiled(states[name], batch)
            jax.block_until_ready(metrics["loss"])
            if i:
                times[name].append(time.perf_counter() - start)
    tokens = settings.batch_size * settings.length
    flops = step_flops(parts.network, settings.batch_size, settings.length, read=tokens / 2)
    if settings.objective == "autoregressive" or settings.process == "uniform":
        flops = step_flops(parts.network, settings.batch_size, settings.length, read=tokens)
    peak = peak_flops()
    rows = []
    for name in forms:
        seconds = min(times[name])
        rows.append(
            {
                "form": name,
                "s/step": seconds,
                "median": float(np.median(times[name])),
                "tokens/s": tokens / seconds,
                "TFLOP/s": flops / seconds / 1e12,
                "MFU": None if peak is None else flops / seconds / peak,
                "temporaries MB": memory[name].temp_size_in_bytes / 1e6,
                "speed": min(times["plain"]) / seconds,
            }
        )
    report("training step", rows, **about(settings))


def about(settings: Settings) -> dict:
    """The settings, for the caption."""
    hidden_dim, layers, _, num_tokens = SHAPES[settings.shape]
    shape = {"d": hidden_dim, "layers": layers, "N": num_tokens}
    return shape | {k: v for k, v in vars(settings).items() if k not in ("shape", "depths")}


if __name__ == "__main__":
    start(main, Settings, __doc__)
