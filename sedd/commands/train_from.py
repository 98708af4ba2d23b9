"""What a run takes from the model that it starts from (``--init-from``, ``--teacher``).

``started_from`` completes the configuration before the flags are read, so that a published model
needs no further flags, and flags that contradict it are mistakes, which ``source_of`` reports.
``first_params`` makes the first parameters.

``--convert`` makes a diffusion model of an autoregressive one. The row of the vocabulary after the
tokens becomes the mask; published models have spare rows there. Its embedding is the mean of all
tokens'. Position i is read at row i - 1 (``shift``), where the autoregressive model has learned to
predict it, as in Dream (arXiv:2508.15487). What changes is which rows see which: all, or those of
their own and earlier blocks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import sedd
from sedd.commands.cli import take
from sedd.configuration.build import default_sampler_of
from sedd.configuration.components import Options, maker, options, values
from sedd.configuration.config import Config, converted_block
from sedd.errors import UserError
from sedd.model import describe
from sedd.networks.base import Network
from sedd.networks.hmm_head import HmmHead
from sedd.networks.lora import Lora, merged
from sedd.training.named_arrays import kinds_of, require_same
from sedd.types import Array, Float, Params

# Options of a network that change neither the number nor the shape of its parameters, apart from
# adapters: --init-from accepts weights of a network that differs in these.
FREE = ("dropout", "remat", "dtype", "param_dtype", "attention", "freeze", "lora")


def started_from(arguments: Sequence[str], recipe: Config, *, named: bool) -> Config:
    """Complete the configuration of a run that starts from a model.

    A published model determines process, tokenizer and network, and the options ``shift`` and
    ``normalise`` of the parameterization; without a recipe also all other components and the
    length. A run determines all of these if there is no recipe; a recipe has to fit it.

    Args:
        arguments: the command line, which may have --init-from, --teacher, --convert and --lora.
        recipe: the configuration before.
        named: whether it is the recipe of --config.

    Raises:
        UserError: the model cannot be read, or cannot be converted.
    """
    flags = ("--init-from", recipe.init_from), ("--teacher", recipe.teacher)
    named_models = ((flag, take(arguments, flag)[0] or saved) for flag, saved in flags)
    flag, name = next((each for each in named_models if each[1]), ("", None))
    if name is None:
        return recipe
    given = str(take(arguments, "--mask-id")[0] or recipe.mask_id)
    try:
        # What is no number is reported when all flags are read.
        source, published = describe(name, mask_id=int(given) if given.isdecimal() else None)
    except UserError as error:
        raise UserError(f"{flag} {name}: {error}") from None
    convert = take(arguments, "--convert")[0] or recipe.convert
    if convert is not None:
        source = converted(name, convert, source)
    elif named and (not published or _adds_a_head(recipe)):
        return recipe
    adapters = lora_of(recipe.network).rank > 0 or any(
        take(arguments, flag)[0] not in (None, "0") for flag in ("--lora", "--network.lora.rank")
    )
    network = first_network(recipe.network, source.network, named=named, adapters=adapters)
    reading = source.parameterization
    if named and convert is None and reading.name != recipe.parameterization.name:
        same = (
            values(recipe.parameterization).keys() & {"shift", "normalise"} & values(reading).keys()
        )
        reading = dataclasses.replace(
            recipe.parameterization, **{name: getattr(reading, name) for name in same}
        )
    config = dataclasses.replace(
        recipe,
        process=source.process,
        parameterization=reading,
        network=network,
        data=dataclasses.replace(recipe.data, tokenizer=source.data.tokenizer),
    )
    if not named:
        length = dataclasses.replace(config.data, length=source.data.length)
        config = dataclasses.replace(config, data=length, schedule=source.schedule)
    if not named or convert is not None:
        config = dataclasses.replace(config, objective=source.objective)
        config = dataclasses.replace(
            config, sampler=options("samplers", default_sampler_of(config))
        )
    return config


def _adds_a_head(recipe: Config) -> bool:
    """Whether the network of a recipe is a trunk with a further head."""
    network = maker("networks", recipe.network.name)
    heads = network.has_causal_head, network.has_marginal_head, network.has_hmm_head
    return any(heads) or network.has_latent


def first_network(recipe: Options, source: Options, *, named: bool, adapters: bool) -> Options:
    """The options of the network: the source's, and those of a recipe that change no parameters.

    Args:
        recipe: the options of the recipe.
        source: those of the model to start from.
        named: whether there is a recipe.
        adapters: whether adapters alone are trained. All other parameters then keep their type.
    """
    changes: dict[str, Any] = {"lora": Lora()} if hasattr(source, "lora") else {}
    if named and recipe.name == source.name:
        free = ("dropout", "remat", "attention", "lora")
        changes |= {key: value for key, value in values(recipe).items() if key in free}
    if hasattr(source, "param_dtype") and not adapters:
        changes["param_dtype"] = "float32"
    return dataclasses.replace(source, **changes)


def converted(name: str, convert: str, source: Config) -> Config:
    """The configuration of a diffusion model with the weights of an autoregressive one.

    Args:
        name: the autoregressive model, for messages.
        convert: ``full``, or ``block:SIZE``.
        source: its configuration.

    Raises:
        UserError: it is not autoregressive, or ``convert`` has another form.
    """
    block = converted_block(convert)
    if source.parameterization.name != "autoregressive":
        raise UserError(
            f"--convert {convert}: {name} is not autoregressive, its parameterization is "
            f"{source.parameterization.name}: start from it without --convert"
        )
    if block is None:
        reading = options("parameterizations", "conditional", shift=True)
        objective = options("objectives", "lambda_dce")
    else:
        reading = options("parameterizations", "block", block=block, shift=True)
        objective = options("objectives", "block")
    return dataclasses.replace(source, parameterization=reading, objective=objective)


def source_of(config: Config) -> sedd.Model:
    """Load the model of ``--init-from`` or ``--teacher``: a run or a published checkpoint.

    Raises:
        UserError: it cannot be loaded, its tokenizer is another one, its network is of another kind
            or differs in an option that changes the parameters, or its output is read at another
            row. A frozen trunk must also have the same parameterization, and a teacher process and
            length as well.
    """
    where = config.start_flag
    assert config.start is not None
    try:
        source = sedd.load(config.start, mask_id=config.mask_id)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    there = source.config.data.tokenizer
    if source.tokenizer is None:
        raise UserError(
            f"{where}: it has no tokenizer; put its tokenizer.json beside its config.json"
        )
    if there != config.data.tokenizer:
        raise UserError(
            f"{where}: its tokenizer is {there}, and --data.tokenizer is {config.data.tokenizer}; "
            "weights can be used only with the tokenizer that they were trained with"
        )
    reading, needed = source.config.parameterization, config.parameterization
    if trains_a_part(config.network) and reading.name != needed.name:
        raise UserError(
            f"{where}: its parameterization is {reading.name}; the frozen trunk of a network "
            f"{config.network.name} must have {needed.name}"
        )
    if config.convert is None:
        check_reading(where, reading, needed)
    if config.teacher is not None:
        check_teacher(source.config, config)
    kinds = [maker("networks", each.network.name) for each in (source.config, config)]
    if not (issubclass(kinds[0], kinds[1]) or issubclass(kinds[1], kinds[0])):
        raise UserError(
            f"{where}: its network is {source.config.network.name}, and --network is "
            f"{config.network.name}, which has other parameters; start from a model of that kind"
        )
    here = values(config.network)
    other = [
        f"its network.{name} is {value} and --network.{name.replace('_', '-')} is {here[name]}"
        for name, value in values(source.config.network).items()
        if name in here and here[name] != value and name not in FREE
    ]
    if other:
        raise UserError(f"{where} is of another configuration: {'; '.join(other)}")
    return source


def check_teacher(teacher: Config, config: Config) -> None:
    """Raise UserError if a teacher has another process, parameterization or length."""
    for field in ("process", "parameterization"):
        there, here = getattr(teacher, field), getattr(config, field)
        if there != here:
            raise UserError(
                f"{config.start_flag}: its {field} is {spelt(there)}, and that of the student "
                f"{spelt(here)}; a teacher has the same"
            )
    if teacher.data.length != config.data.length:
        raise UserError(
            f"{config.start_flag}: its length is {teacher.data.length}, and --data.length is "
            f"{config.data.length}; a teacher has the same"
        )


def spelt(component: Options) -> str:
    """A component with its options, for messages: ``conditional (shift=True)``."""
    given = ", ".join(f"{name}={value}" for name, value in values(component).items())
    return f"{component.name} ({given})" if given else component.name


def trains_a_part(network: Options) -> bool:
    """Whether the options are those of a network that trains a head on a frozen trunk."""
    return getattr(network, "freeze", maker("networks", network.name).has_hmm_head)


def check_reading(where: str, source: Options, config: Options) -> None:
    """Raise UserError if a model's output would be read at another row than it was trained at."""
    causal = [reading.name == "autoregressive" for reading in (source, config)]
    if causal == [True, False]:
        raise UserError(
            f"{where}: it is autoregressive, and --parameterization is {config.name}: --convert "
            "full or --convert block:32 make a diffusion model of it"
        )
    shifts = [getattr(reading, "shift", None) for reading in (source, config)]
    if None not in shifts and shifts[0] != shifts[1]:
        raise UserError(
            f"{where}: its parameterization.shift is {shifts[0]}, and --parameterization.shift is "
            f"{shifts[1]}"
        )


def first_params(where: str, source: sedd.Model, network: Network, *, convert: bool) -> Params:
    """The parameters of ``source`` for a network that may have other adapters, or a further head.

    Adapters of the source are kept if the network has the same, and are merged otherwise. Entries
    that the source lacks are left out: they are new. The frequencies of a new marginal head are
    those that the source predicts without any visible token, and a new HMM begins with the
    likeliest tokens of these.

    Args:
        where: the flag that names the source, for messages.
        source: the model to start from.
        network: the network to be trained.
        convert: whether the row after the tokens becomes the mask.

    Raises:
        UserError: an array is missing or has another shape.
    """
    params = source.denoiser.params
    if lora_of(source.denoiser.network) != lora_of(network):
        _, params = merged(source.denoiser.network, params)
    expected = jax.eval_shape(network.init, jax.random.key(0))
    heads = ("causal", "adapters", "marginal", "unigram", "hmm", "latent")
    new = [name for name in heads if name in expected and name not in params]
    expected = {name: tree for name, tree in expected.items() if name not in new}
    here = kinds_of(expected)
    there = {
        name: (here.get(name, kind)[0], kind[1]) for name, kind in kinds_of(params).items()
    }  # types may differ
    require_same(where, there, here)
    params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, expected)
    if "unigram" in new:
        params = params | {"unigram": {"log_prob": log_unigram(source)}}
    if isinstance(network, HmmHead) and "hmm" in new:
        params = params | {"hmm": jax.jit(network.first_hmm)(params, log_unigram(source))}
    return with_mask(params, source.process.num_tokens) if convert else params


def log_unigram(source: sedd.Model) -> Float[Array, " N"]:
    """Log of the mean prediction at up to 64 positions of a text in which all are masked, [N]."""
    length = source.length
    x_1L = jnp.full((1, length), source.denoiser.mask_id, jnp.int32)
    count = min(64, length)
    positions_1K = (jnp.arange(count) * length // count)[None]

    @jax.jit
    def predicted(denoiser):
        log_probs_1KN = denoiser.log_conditional_at(denoiser.hidden(x_1L), x_1L, positions_1K)
        return jax.nn.logsumexp(log_probs_1KN[0], 0) - jnp.log(count)

    return predicted(source.denoiser)


def with_mask(params: Params, num_tokens: int) -> Params:
    """Replace row ``num_tokens`` of the embedding, the mask, by the mean of the tokens' rows."""
    embedding_VD = jnp.asarray(params["trunk"]["embed"]["embedding"])
    mean_D = embedding_VD[:num_tokens].mean(0, dtype=jnp.float32)
    embedding_VD = embedding_VD.at[num_tokens].set(mean_D.astype(embedding_VD.dtype))
    return params | {"trunk": params["trunk"] | {"embed": {"embedding": embedding_VD}}}


def lora_of(network: Any) -> Lora:
    """The adapters of a network or of its options; those of rank 0 if it can have none."""
    return getattr(network, "lora", Lora())
