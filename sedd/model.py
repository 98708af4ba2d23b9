"""A trained model, and how it is loaded.

A ``Model`` holds everything that a checkpoint defines: parameters, components, configuration and
tokenizer. ``load`` reads one from the directory of a run, or from a published checkpoint. The other
parts of the Python interface take a ``Model``: ``sedd.sampling`` and ``sedd.evaluating``.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from sedd.configuration.build import Parts, build_parts, default_sampler_of
from sedd.configuration.components import Options, options, options_type
from sedd.configuration.config import Config, DataOptions, default_cache_dir
from sedd.constraints.clamp import Clamp, check_prefix
from sedd.data.answer_rows import DEFAULT_PADDING
from sedd.data.tokenizer_sources import build_tokenizer
from sedd.data.tokenizers import Tokenizer, tokenizer_from_json
from sedd.denoiser import Denoiser
from sedd.errors import UserError, first_line
from sedd.evaluation.datasets import TextReader
from sedd.interop import peft
from sedd.interop.hub import fetch
from sedd.interop.layouts import Description, Layout, find_config
from sedd.interop.published import Published, describe_published, load_published
from sedd.networks.base import Network
from sedd.networks.ddit import DDiT
from sedd.networks.mesh import Placement, on_host, put
from sedd.parameterizations.conditional import Normalise
from sedd.training.checkpoint import find_checkpoints
from sedd.training.distributed import leave_libtpu_alone
from sedd.types import Array, Float, Int

GPT2_TOKENS = 50257  # N of GPT-2's tokenizer
TRAIN_COUNTS = "token_counts.npy"  # file in a run's directory: counts of the training tokens
Step = int | Literal["best"]
UNKNOWN = "unknown"  # name of a corpus or tokenizer that a published checkpoint does not state


@dataclass(frozen=True, kw_only=True, repr=False)
class Model:
    """A trained model, as ``load`` returns it.

    Args:
        denoiser: the network with its parameters, which gives log scores and log conditionals.
        parts: the components of the model, built from the configuration.
        config: the configuration of the run, or one that describes a published checkpoint.
        tokenizer: the tokenizer; None for a published checkpoint without one.
        source: path or address of the checkpoint, for messages.
        step: training step of the checkpoint; None for a published one.
        train_counts: occurrences of each token in the training text, [N]; None if unknown.
        layout: the layout of a published checkpoint; None for a run.
    """

    denoiser: Denoiser
    parts: Parts
    config: Config
    tokenizer: Tokenizer | None
    source: str
    step: int | None = None
    train_counts: np.ndarray | None = None
    layout: Layout | None = None

    @property
    def network_config(self):
        """The options of the network."""
        return self.config.network

    @property
    def process(self):
        """The forward process."""
        return self.parts.process

    @property
    def schedule(self):
        """The noise schedule."""
        return self.parts.schedule

    @property
    def time_independent(self) -> bool:
        """Whether the network takes no noise level."""
        return self.denoiser.time_independent

    @property
    def length(self) -> int:
        """Tokens in a training sequence, L."""
        return self.config.data.length

    @cached_property
    def digest(self) -> str:
        """A hash of the parameters and of the configuration without data, training and sampler."""
        digest = hashlib.blake2b(digest_size=16)
        config = {**self.config.to_json(), "data": None, "training": None, "sampler": None}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for leaf in jax.tree.leaves(self.denoiser.params):
            digest.update(on_host(leaf).tobytes())
        return digest.hexdigest()

    @property
    def text_reader(self) -> TextReader:
        """A reader that tokenises and cuts text as in the model's training.

        Raises:
            UserError: if the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                f"checkpoint {self.source}: it has no tokenizer to read text with; put its "
                "tokenizer.json beside its config.json"
            )
        data = self.config.data
        return TextReader(
            tokenizer=self.tokenizer,
            length=data.length,
            wrap=data.wrap,
            padding=data.padding or DEFAULT_PADDING,
            answers=data.answers,
            corpus=data.corpus,
            cache_dir=Path(data.cache_dir).expanduser(),
        )

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.denoiser.params))
        names = ("process", "schedule", "parameterization", "network", "objective")
        parts = ", ".join(f"{name} {getattr(self.config, name).name}" for name in names)
        tokens = "no tokenizer" if self.tokenizer is None else f"tokenizer {self.tokenizer.name}"
        return (
            f"Model({self.source!r}: {count:,} parameters, length {self.length}, {tokens},\n"
            f"      {parts})"
        )

    def check_ids(self, ids: Any, *, mask: bool = False) -> None:
        """Raise UserError if an id is not the id of a real token.

        ``mask`` also allows the id of the mask. Traced arrays have no values and are not checked.
        """
        if isinstance(ids, Tracer) or not np.size(ids):
            return
        ids, size = np.asarray(ids), self.process.num_states if mask else self.process.num_tokens
        bad = ids[(ids < 0) | (ids >= size)]
        if len(bad):
            raise UserError(f"token id {bad[0]}: the ids of this model are 0 to {size - 1}")

    def check_given(self, clamp: Clamp) -> None:
        """Raise UserError if the model cannot draw the free tokens of a clamp given the others.

        An autoregressive model sees no token behind a free one. A shifted model predicts a token at
        the row before it, and there is no row before the first token.
        """
        if self.denoiser.causal:
            check_prefix(clamp)
        if getattr(self.denoiser.parameterization, "shift", False) and not clamp.fixed_L[0]:
            raise UserError(
                "this model predicts a token at the row before it, and nothing predicts the first "
                "one: begin with given text (a prompt)"
            )

    def log_score(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"]
    ) -> Float[Array, "B L V"]:
        """Log score of each token at each position; see ``Denoiser.log_score``.

        Args:
            x_BL: token ids, masks included.
            sigma_B: total noise of each sequence, above 0.

        Raises:
            UserError: if an id is out of range.
            ValueError: if the model is autoregressive, which has no score.

        Example:
            >>> import numpy as np, sedd
            >>> model = sedd.load("runs/tiny")
            >>> x_BL = np.zeros((2, 12), np.int32)
            >>> log_score_BLV = model.log_score(x_BL, np.array([0.5, 1.0], np.float32))
            >>> log_score_BLV.shape == (2, 12, model.process.num_states)
            True
        """
        self.check_ids(x_BL, mask=True)
        return _log_score(self.denoiser, jnp.asarray(x_BL), jnp.asarray(sigma_B))

    def log_conditional(
        self, x_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"] | None = None
    ) -> Float[Array, "B L N"]:
        """Log p(x0 at i | x) of each real token; see ``Denoiser.log_conditional``.

        Args:
            x_BL: token ids, masks included.
            sigma_B: total noise of each sequence; only a time-dependent model needs it.

        Raises:
            UserError: if an id is out of range.
            ValueError: if the process is not absorbing, or a time-dependent model gets no noise.

        Example:
            >>> import jax, numpy as np, sedd
            >>> model = sedd.load("runs/tiny")
            >>> x_BL = np.full((1, 12), model.process.mask_id)
            >>> log_probs_BLN = model.log_conditional(x_BL)
            >>> bool(abs(jax.nn.logsumexp(log_probs_BLN, -1)).max() < 1e-5)
            True
        """
        self.check_ids(x_BL, mask=True)
        sigma_B = None if sigma_B is None else jnp.asarray(sigma_B)
        return _log_conditional(self.denoiser, jnp.asarray(x_BL), sigma_B)


_log_score = jax.jit(Denoiser.log_score)
_log_conditional = jax.jit(Denoiser.log_conditional)


def load(
    path: str | Path,
    *,
    step: Step | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    mask_id: int | None = None,
    normalise: Normalise | None = None,
    block: int | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Load a trained model with its averaged (EMA) parameters.

    Args:
        path: the directory of a run or of a published checkpoint, or ``hf://OWNER/NAME`` or
            ``hf://OWNER/NAME@REVISION`` for a checkpoint on the Hugging Face hub. A directory of
            PEFT's adapters gives their base model, a published one, with the adapters.
        step: which checkpoint of a run: a training step, or ``"best"`` for the lowest validation
            bound. Default: the newest one that is complete.
        dtype: the compute type of the network. Default: that of the run, float32 for published
            SEDD, RADD, MDLM and GIDD, and the type of the parameters for other published models.
            The parameters keep their type.
        mask_id: id of the mask in a published model's own vocabulary, if its files do not state it.
        normalise: which entries of the raw output the softmax at a mask is over: "real" for the
            tokens, "all" for all rows of the vocabulary, as published samplers compute confidences.
            Default: that of the run, and "real" for published models.
        block: tokens in a block, for a published masked model that was trained by blocks and whose
            configuration does not say so.
        mesh: the devices on which to evaluate and sample, from ``sedd.device_mesh``. With several
            processes all of them make the same calls. The parameters of a run are read straight
            into the parts that its devices hold. By default one device samples, and evaluations
            copy the parameters to all devices of the process.

    Raises:
        UserError: if there is no checkpoint, it is damaged, or it does not fit its configuration;
            if ``step`` is given for a published checkpoint, or is "best" for a run that was never
            validated; if a published model does not state its mask, and ``mask_id`` is missing.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/tiny")  # sequences of 12 tokens
        >>> model.length, model.time_independent
        (12, True)
    """
    source = str(path)
    leave_libtpu_alone()
    path = _directory(source)
    if (path / peft.CONFIG).is_file():
        _refuse({"--step": step}, f"{source} holds adapters, without steps")
        return _from_adapters(path, source, dtype, mask_id, normalise, block, mesh)
    if find_config(path) is not None:
        _refuse({"--step": step}, f"checkpoint {source} is a published one, without steps")
        published = load_published(path, dtype=dtype, mask_id=mask_id, mesh=mesh)
        return _from_published(published, path, source, normalise, block)
    _refuse(
        {"--mask-id": mask_id, "--trained-block": block},
        f"checkpoint {source} is a run; the flag is for published models",
    )
    return _from_run(path, source, step, dtype, normalise, mesh)


def _refuse(flags: Mapping[str, Any], why: str) -> None:
    """Raise UserError if one of the flags, which a kind of checkpoint does not have, is given."""
    for flag, value in flags.items():
        if value is not None:
            raise UserError(f"{flag} {value}: {why}")


def _from_run(
    path: Path,
    source: str,
    step: Step | None,
    dtype: str | None,
    normalise: Normalise | None,
    mesh: Mesh | None,
) -> Model:
    """Build the model of a run from its directory; the arguments are those of ``load``."""
    config = _config_of_run(path)
    if dtype is not None:
        network = dataclasses.replace(config.network, dtype=dtype)  # pyright: ignore
        config = dataclasses.replace(config, network=network)
    reading = _normalised(config.parameterization, normalise)
    config = dataclasses.replace(config, parameterization=reading)
    tokenizer = read_tokenizer(path)
    parts = build_parts(config, tokenizer.num_tokens)
    expected = jax.eval_shape(parts.network.init, jax.random.key(0))
    checkpoints = find_checkpoints(path)
    if step == "best":
        step = checkpoints.best()
        if step is None:
            raise UserError(f"checkpoint {path}: none was validated, so there is no best one")
    shardings = None
    if mesh is not None:
        shardings = Placement.on(mesh, expected, parts.network.stacked).shardings(expected)
    found, params = checkpoints.restore_step(step, abstract_params=expected, shardings=shardings)
    return Model(
        denoiser=parts.denoiser(jax.device_put(params) if mesh is None else params),
        parts=parts,
        config=config,
        tokenizer=tokenizer,
        source=source,
        step=found,
        train_counts=read_train_counts(path, tokenizer.num_tokens),
    )


def _normalised(reading: Options, normalise: Normalise | None) -> Options:
    """The options of a parameterization with this ``normalise``; UserError if it has none."""
    if normalise is None:
        return reading
    if not hasattr(reading, "normalise"):
        raise UserError(
            f"--normalise {normalise}: the parameterization {reading.name} has one normalisation "
            "only; conditional and block have two"
        )
    return dataclasses.replace(reading, normalise=normalise)  # pyright: ignore[reportCallIssue]


def _from_adapters(
    path: Path,
    source: str,
    dtype: Literal["float32", "bfloat16"] | None,
    mask_id: int | None,
    normalise: Normalise | None,
    block: int | None,
    mesh: Mesh | None,
) -> Model:
    """The model of a directory of PEFT: its base model, a published one, with the adapters."""
    base = load(
        peft.base_of(path),
        dtype=dtype,
        mask_id=mask_id,
        normalise=normalise,
        block=block,
        mesh=mesh,
    )
    layout, params = base.layout, base.denoiser.params
    if layout is None or layout.constant_sigma is not None:
        what = "a run" if layout is None else f"of {layout.name}, whose gates are folded"
        raise UserError(
            f"{path / peft.CONFIG}: the base model {base.source} is {what}: adapters are read for "
            "other published models"
        )
    blocks = params["trunk"]["blocks"]
    kernels = {name: layer["kernel"].shape for name, layer in blocks.items() if "kernel" in layer}
    lora, adapters = peft.load_adapters(path, layout.tensors, kernels)
    network = dataclasses.replace(base.config.network, lora=lora)  # pyright: ignore
    config = dataclasses.replace(base.config, network=network, init_from=base.source)
    parts = build_parts(config, base.process.num_tokens)
    placement = Placement.of(params, parts.network.stacked)
    if placement is None:
        adapters = jax.device_put(adapters)
    else:
        expected = jax.eval_shape(parts.network.init, jax.random.key(0))
        placed = Placement.on(placement.mesh, expected, parts.network.stacked)
        adapters = jax.tree.map(put, adapters, placed.shardings(expected)["adapters"])
    denoiser = parts.denoiser(params | {"adapters": adapters})
    return dataclasses.replace(base, denoiser=denoiser, parts=parts, config=config, source=source)


def describe(path: str | Path, *, mask_id: int | None = None) -> tuple[Config, bool]:
    """Read the configuration of a checkpoint, without its tensors.

    Args:
        path: as for ``load``. A checkpoint on the hub is downloaded.
        mask_id: as for ``load``.

    Returns:
        The configuration of a run, or one that describes a published checkpoint, and whether the
        checkpoint is published.

    Raises:
        UserError: as ``load``, but for mistakes in the tensors.
    """
    source = str(path)
    path = _directory(source)
    if (path / peft.CONFIG).is_file():
        return describe(peft.base_of(path), mask_id=mask_id)
    if find_config(path) is None:
        return _config_of_run(path), False
    layout, _, tokenizer = describe_published(path, mask_id=mask_id)
    network: Any = layout.network
    if layout.constant_sigma is not None:  # see ``at_constant_sigma``
        network = dataclasses.replace(network, time_conditioned=False, norm_bias=True)
    tokenizer = _published_tokenizer(path, layout.description.num_tokens, tokenizer)
    return published_config(network, layout.description, tokenizer), True


def _directory(source: str) -> Path:
    """The directory of a checkpoint, downloaded if it is on the hub; UserError if there is none."""
    path = fetch(source)
    if not path.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", source) and not path.parent.is_dir()
        hint = f"; for a checkpoint of the Hugging Face hub write hf://{source}" if hub else ""
        raise UserError(f"checkpoint {path}: no such directory{hint}")
    return path


def _config_of_run(path: Path) -> Config:
    """The configuration of the run in a directory; UserError if it is none."""
    config = read_config(path)
    if config is None:
        above = [p for p in path.absolute().parents[:2] if (p / "config.json").exists()]
        hint = f"; did you mean {above[0]}?" if above else ""
        raise UserError(f"checkpoint {path}: not a run's directory (it has no config.json){hint}")
    return config


def _from_published(
    published: Published,
    path: Path,
    source: str,
    normalise: Normalise | None,
    block: int | None,
) -> Model:
    """Build a model from a published checkpoint, with a configuration that describes it."""
    what = published.description
    if block is not None:
        if what.parameterization != "conditional" or what.block not in (None, block):
            kind = f"has blocks of {what.block}" if what.block else f"is {what.parameterization}"
            raise UserError(f"--trained-block {block}: checkpoint {source} {kind}")
        what = dataclasses.replace(what, block=block)
    tokenizer = _published_tokenizer(path, what.num_tokens, published.tokenizer)
    if what.block is not None and published.network.time_conditioned:
        raise UserError(
            f"checkpoint {source}: a model of blocks whose network takes a noise level "
            "(time_conditioning) is not supported"
        )
    config = published_config(published.network, what, tokenizer)
    reading = _normalised(config.parameterization, normalise)
    config = dataclasses.replace(config, parameterization=reading)
    parts = build_parts(config, what.num_tokens)
    return Model(
        denoiser=parts.denoiser(published.params),
        parts=parts,
        config=config,
        tokenizer=tokenizer,
        source=source,
        layout=published.layout,
    )


def published_config(
    network: Network, what: Description, tokenizer: Tokenizer | None = None
) -> Config:
    """The configuration that describes a published model.

    Args:
        network: its network, which is not conditioned on the noise level if the model runs at a
            constant one.
        what: the rest of the model.
        tokenizer: its tokenizer, if it has one.
    """
    timed = network.time_conditioned
    if what.block is not None:
        reading = options("parameterizations", "block", block=what.block, shift=what.shift)
        objective = "block"
    elif what.parameterization == "conditional":
        reading = options(
            "parameterizations", "conditional", time_independent=not timed, shift=what.shift
        )
        objective = "mdlm" if timed else "lambda_dce"
    elif what.parameterization == "mean":
        reading = options("parameterizations", "mean", condition=what.condition)
        objective = "score_entropy"
    elif what.parameterization == "autoregressive":
        reading = options("parameterizations", "autoregressive", first=_first(what, tokenizer))
        objective = "autoregressive"
    else:
        reading, objective = options("parameterizations", "score"), "score_entropy"
    name = "ddit" if isinstance(network, DDiT) else "decoder"
    fields = [field.name for field in dataclasses.fields(options_type("networks", name))]
    schedule = dict(what.schedule)
    config = Config(
        data=DataOptions(
            corpus=what.corpus or UNKNOWN,
            tokenizer=UNKNOWN if tokenizer is None else tokenizer.name,
            length=what.length,
        ),
        process=options("processes", what.process, **what.process_options),
        schedule=options("schedules", schedule.pop("name"), **schedule),
        parameterization=reading,
        network=options("networks", name, **{name: getattr(network, name) for name in fields}),
        objective=options("objectives", objective),
    )
    if reading.name in ("autoregressive", "block", "mean"):  # others can be drawn by any sampler
        sampler = options("samplers", default_sampler_of(config))
        config = dataclasses.replace(config, sampler=sampler)
    return config


def _first(what: Description, tokenizer: Tokenizer | None) -> int | None:
    """The token that opens the texts of an autoregressive model; None for the mask."""
    if what.first is not None and what.first <= what.num_tokens:
        return None if what.first == what.num_tokens else what.first
    return None if tokenizer is None else tokenizer.bos_id


def _published_tokenizer(
    path: Path, num_tokens: int, tokenizer: Tokenizer | None = None
) -> Tokenizer | None:
    """The tokenizer of a published checkpoint, which may have been read already.

    Without one in its directory, a vocabulary of GPT-2's size means GPT-2's tokenizer, and any
    other size gives None.
    """
    file = path / "tokenizer.json"
    if tokenizer is None and num_tokens == GPT2_TOKENS:
        tokenizer = build_tokenizer("gpt2", None, cache_dir=Path(default_cache_dir()).expanduser())
    if tokenizer is None:
        return None
    if tokenizer.num_tokens != num_tokens:
        raise UserError(
            f"{file}: it has {tokenizer.num_tokens} tokens, and the checkpoint {num_tokens} beside "
            "the mask: it is not the tokenizer that the model was trained with"
        )
    return tokenizer


def read_config(workdir: Path) -> Config | None:
    """Read the configuration of a run; None if the directory has no ``config.json``.

    Raises:
        UserError: if the file is damaged, or is not the configuration of a run.
    """
    path = workdir / "config.json"
    return _read_json(path, _run_config) if path.exists() else None


def _run_config(data: dict[str, Any]) -> Config:
    """The configuration of a run; UserError if no key is one of a run's configuration."""
    if data and not data.keys() & {field.name for field in dataclasses.fields(Config)}:
        raise UserError(
            f"an unknown layout, with the keys {', '.join(data)}: expected the configuration of a "
            "run, or that of a published model"
        )
    return Config.from_json(data)


def read_tokenizer(workdir: Path) -> Tokenizer:
    """Read the tokenizer of a run; UserError if the file is missing or damaged."""
    return _read_json(workdir / "tokenizer.json", tokenizer_from_json)


def read_train_counts(workdir: Path, num_tokens: int) -> np.ndarray | None:
    """Read the occurrences of each token in the training text of a run, [N]; None if not saved.

    Raises:
        UserError: if the file is damaged, or does not hold ``num_tokens`` counts.
    """
    path = workdir / TRAIN_COUNTS
    if not path.exists():
        return None
    try:
        counts_N = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not readable as an array ({first_line(error)})") from error
    if counts_N.shape != (num_tokens,):
        raise UserError(f"{path}: must hold {num_tokens} counts, has shape {counts_N.shape}")
    return counts_N


def _read_json(path: Path, reader: Callable[[Any], Any]) -> Any:
    """``reader`` of the JSON object in a file; UserError that begins with the path."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the run's directory is incomplete") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold an object, got {type(data).__name__}")
    try:
        return reader(data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
