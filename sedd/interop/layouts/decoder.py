"""What the layouts of Llama-class models share: keys, tensor names, and how they are read.

LLaDA, Dream, SDAR, Fast-dLLM v2, A2D and others are the network ``Decoder`` with few differences,
which are the fields of ``DecoderLayout``. A layout matches by the ``architectures`` of a
configuration, never by its ``model_type``: LLaDA's mixture of experts and DreamReasoner have the
``model_type`` of other networks. The published code that a configuration names under ``auto_map``
is never run.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sedd.errors import UserError
from sedd.interop.layouts.base import Description, Layout, PublishedConfig
from sedd.networks.base import Network
from sedd.networks.decoder import Decoder
from sedd.networks.rotary import RopeScaling

# Texts have this length unless the user gives another one: a configuration states the longest text
# of the network, often far above what the diffusion model was trained with.
LENGTH = 1024

# Our parameter: its name in transformers' Llama, Qwen2 and Qwen3, with {} for the layer.
TENSORS = {
    "trunk/embed/embedding": "model.embed_tokens.weight",
    "trunk/blocks/norm_attention/scale": "model.layers.{}.input_layernorm.weight",
    "trunk/blocks/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "trunk/blocks/query/bias": "model.layers.{}.self_attn.q_proj.bias",
    "trunk/blocks/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "trunk/blocks/key/bias": "model.layers.{}.self_attn.k_proj.bias",
    "trunk/blocks/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "trunk/blocks/value/bias": "model.layers.{}.self_attn.v_proj.bias",
    "trunk/blocks/norm_query/scale": "model.layers.{}.self_attn.q_norm.weight",
    "trunk/blocks/norm_key/scale": "model.layers.{}.self_attn.k_norm.weight",
    "trunk/blocks/attention_out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "trunk/blocks/attention_out/bias": "model.layers.{}.self_attn.o_proj.bias",
    "trunk/blocks/norm_mlp/scale": "model.layers.{}.post_attention_layernorm.weight",
    "trunk/blocks/mlp_gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "trunk/blocks/mlp_up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "trunk/blocks/mlp_down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "trunk/norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

# Field of the network: (key, kind, default), as ``PublishedConfig.read`` takes them. Widths of 0
# stand for those that ``Decoder`` derives from the others.
KEYS = {
    "num_states": ("vocab_size", "size"),
    "hidden_dim": ("hidden_size", "size"),
    "num_layers": ("num_hidden_layers", "size"),
    "num_heads": ("num_attention_heads", "size"),
    "num_kv_heads": ("num_key_value_heads", "size", 0),
    "head_dim": ("head_dim", "size", 0),
    "mlp_dim": ("intermediate_size", "size"),
    "norm_eps": ("rms_norm_eps", float, 1e-6),
    "tied": ("tie_word_embeddings", bool, False),
}
# Keys whose other values change the network in a way that is not supported.
REQUIRED = {
    "hidden_act": ["silu"],
    "mlp_bias": [False],
    "use_sliding_window": [False],
    "use_mrope": [False],
    "partial_rotary_factor": [1, 1.0],
    "quantization_config": [],
    "layer_norm_eps": [],
}
# Keys without influence on what the network computes, or read elsewhere.
WITHOUT_EFFECT = frozenset(
    """_name_or_path architectures attention_dropout attn_implementation auto_map bos_token_id
    eos_token_id id2label initializer_range label2id max_window_layers model_type pad_token_id
    pretraining_tp resid_pdrop return_dict sliding_window torch_dtype dtype transformers_version
    use_cache layer_types rope_scaling rope_parameters rope_theta attention_bias mask_token_id
    max_position_embeddings""".split()  # noqa: SIM905
)
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class DecoderLayout:
    """A published layout whose network is ``Decoder``.

    Args:
        name: the name of the layout.
        code: a phrase that names the published code.
        architectures: the classes that a configuration may name.
        autoregressive: whether it is an autoregressive model; others are conditional ones.
        biases: the layers of the attention with a bias: "none", "qkv", or "stated" for what the key
            ``attention_bias`` says of all four.
        qk_norm: whether queries and keys are normed.
        shift: whether position i is read at row i - 1.
        block: of a block diffusion model, the key of its block size and the default.
        keys: keys of the configuration, by fields of ``Decoder``.
        required: the values that other keys may have.
        length_key: the key of the longest text.
        without_effect: further keys that do not change what the network computes.
        names: the names of the tensors, by our parameters.
        exports: whether models that were not read from this layout may be written in it.
    """

    name: str
    code: str
    architectures: tuple[str, ...]
    autoregressive: bool = False
    biases: Literal["none", "qkv", "stated"] = "stated"
    qk_norm: bool = False
    shift: bool = False
    block: tuple[str, int] | None = None
    keys: Mapping[str, tuple] = field(default_factory=lambda: KEYS)
    required: Mapping[str, list] = field(default_factory=lambda: REQUIRED)
    length_key: str = "max_position_embeddings"
    without_effect: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=lambda: TENSORS)
    exports: bool = False

    @property
    def NAME(self) -> str:  # noqa: N802, as the modules of layouts name it
        """The name of the layout."""
        return self.name

    @property
    def CODE(self) -> str:  # noqa: N802
        """A phrase that names the published code."""
        return self.code

    @property
    def NETWORK(self) -> type[Network]:  # noqa: N802
        """The class of its networks."""
        return Decoder

    def matches(self, config: PublishedConfig, names: Collection[str]) -> bool:
        """Whether the configuration names one of the classes of this layout."""
        return any(name in self.architectures for name in config.architectures)

    def read(self, config: PublishedConfig) -> Layout:
        """Read the configuration; ``num_tokens`` and the mask are settled with the tokenizer.

        Raises:
            UserError: if keys are missing or have values that are not supported; lists them.
        """
        check_required(config, self.required)
        values = config.read(**self.keys)
        notes = []
        if values["tied"] and self.names["head/kernel"] in config.names:
            values["tied"] = False
            notes.append(
                f"the embedding is tied by the configuration, but {self.names['head/kernel']} is "
                "saved too: it is read as an output layer of its own"
            )
        values |= self._biases(config)
        rest = config.read(
            length=(self.length_key, "size", LENGTH),
            mask_id=("mask_token_id", "id", None),
            first=("bos_token_id", "id", None),
            eos=("eos_token_id", None, None),
        )
        dtype = config.data.get("dtype") or config.data.get("torch_dtype")
        dtype = dtype if dtype in DTYPES else None
        computed = "bfloat16" if dtype == "bfloat16" else "float32"
        network = config.build(
            Decoder,
            **values,
            time_conditioned=False,
            qk_norm=self.qk_norm,
            rope_theta=rope_theta(config),
            rope_scaling=rope_scaling(config),
            dtype=computed,
            param_dtype=computed,
        )
        block = None
        if self.block is not None:
            key, default = self.block
            block = config.read(block=(key, "size", default))["block"]
        first = rest["first"] if rest["first"] is not None else _first_of(rest["eos"])
        return Layout(
            name=self.name,
            network=network,
            description=Description(
                process="absorbing",
                parameterization="autoregressive" if self.autoregressive else "conditional",
                schedule={"name": "log_linear"},
                num_tokens=network.num_states,
                length=min(rest["length"], LENGTH),
                corpus=None,
                mask_id=None if self.autoregressive else rest["mask_id"],
                shift=self.shift,
                block=block,
                first=first if self.autoregressive else None,
                dtype=dtype,
            ),
            tensors=self.tensors(network),
            notes=tuple(notes),
        )

    def _biases(self, config: PublishedConfig) -> dict[str, bool]:
        """Which layers of the attention have a bias."""
        if self.biases == "qkv":
            return {"qkv_bias": True, "output_bias": False}
        stated = False
        if self.biases == "stated":
            stated = config.read(stated=("attention_bias", bool, False))["stated"]
        return {"qkv_bias": stated, "output_bias": stated}

    def not_understood(self, config: Mapping[str, Any]) -> list[str]:
        """The keys of a configuration that nothing reads, and whose effect is not known."""
        known = {key[0] for key in self.keys.values()} | set(self.required) | WITHOUT_EFFECT
        known |= self.without_effect | {self.length_key}
        if self.block is not None:
            known.add(self.block[0])
        return sorted(config.keys() - known)

    def refusals(self, network: Decoder, description: Description) -> list[str] | None:
        """Why this layout cannot hold a model; None if the model is of another kind."""
        if not self.exports or self.qk_norm != network.qk_norm:
            return None
        kind = "autoregressive" if self.autoregressive else "conditional"
        if (description.parameterization, description.shift) != (kind, self.shift):
            return None
        if self.biases == "qkv":
            fits = network.qkv_bias and not network.output_bias
        else:
            fits = network.qkv_bias == network.output_bias
        if not fits:
            return None
        if description.block is not None:
            return [f"it has blocks of {description.block} tokens"]
        return []

    def tensors(self, network: Decoder) -> dict[str, str]:
        """A dictionary from our parameters to published names, with {} for the layer."""
        return dict(self.names)

    def write(self, network: Decoder, description: Description) -> dict[str, Any]:
        """The content of the ``config.json``."""
        values = dataclasses.asdict(network)
        values["num_states"] = network.num_states + network.spare_rows
        config: dict[str, Any] = {
            "architectures": [self.architectures[0]],
            **{key: values[ours] for ours, (key, *_) in self.keys.items()},
            self.length_key: description.length,
            "hidden_act": "silu",
            "torch_dtype": network.param_dtype,
            "rope_theta": network.rope_theta,
            "rope_scaling": written_scaling(network.rope_scaling),
        }
        if self.biases == "stated":
            config["attention_bias"] = network.qkv_bias
        if self.autoregressive:
            first = description.first
            config["bos_token_id"] = description.num_tokens if first is None else first
        else:
            mask_id = description.mask_id
            config["mask_token_id"] = description.num_tokens if mask_id is None else mask_id
        return config


def renamed(*pairs: tuple[str, str], names: Mapping[str, str] = TENSORS) -> dict[str, str]:
    """Names of tensors with each beginning replaced by another one; the first that fits counts."""

    def replaced(name: str) -> str:
        for old, new in pairs:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return {ours: replaced(name) for ours, name in names.items()}


def check_required(config: PublishedConfig, required: Mapping[str, list]) -> None:
    """Raise UserError for keys whose value is not supported; missing and null ones are fine."""
    problems = []
    for key, allowed in required.items():
        value = config.data.get(key)
        if value is not None and value not in allowed:
            choices = " or ".join(map(repr, allowed)) or "null"
            problems.append(f"{key} must be {choices}, got {value!r}")
    kinds = config.data.get("layer_types") or []
    if isinstance(kinds, list) and (others := sorted(set(map(str, kinds)) - {"full_attention"})):
        problems.append(f"layer_types must be full_attention, got {', '.join(others)}")
    if "use_sliding_window" not in config.data and config.data.get("sliding_window") is not None:
        problems.append(f"sliding_window must be null, got {config.data['sliding_window']!r}")
    if problems:
        raise UserError(f"{config.path}: {'; '.join(problems)}")


def rope_theta(config: PublishedConfig) -> float:
    """The base of the rotary frequencies: a key, or an entry of ``rope_parameters``."""
    nested = "rope_parameters.rope_theta"
    name = nested if config.has(nested) else "rope_theta"
    return config.read(theta=(name, float, 1e4))["theta"]


def rope_scaling(config: PublishedConfig) -> RopeScaling:
    """The scaling of the rotary frequencies, in ``rope_parameters`` or ``rope_scaling``.

    The two are the forms of transformers 5 and 4.

    Raises:
        UserError: for a kind of scaling that is not supported.
    """
    where = next((k for k in ("rope_parameters", "rope_scaling") if config.data.get(k)), None)
    if where is None:
        return RopeScaling()
    scaling = config.data[where]
    if not isinstance(scaling, dict):
        raise UserError(f"{config.path}: {where} must be an object, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind not in ("llama3", "yarn"):
        raise UserError(
            f"{config.path}: {where}.rope_type must be default, llama3 or yarn, got {kind!r}"
        )

    def number(name: str, default: Any = ...) -> tuple:
        return (f"{where}.{name}", float, *(() if default is ... else (default,)))

    values = config.read(
        factor=number("factor"),
        original_length=(f"{where}.original_max_position_embeddings", "size"),
    )
    if kind == "llama3":
        values |= config.read(
            low_turns=number("low_freq_factor"), high_turns=number("high_freq_factor")
        )
        return config.build(RopeScaling, kind="llama3", **values)
    values |= config.read(
        low_turns=number("beta_slow", 1.0),
        high_turns=number("beta_fast", 32.0),
        attention_factor=number("attention_factor", None),
        query_growth=number("llama_4_scaling_beta", 0.0),
        truncate=(f"{where}.truncate", bool, True),
    )
    scales = config.read(one=number("mscale", 0.0), all=number("mscale_all_dim", 0.0))
    if values["attention_factor"] is None and scales["one"] and scales["all"]:
        growth = 0.1 * math.log(max(values["factor"], 1.0))
        values["attention_factor"] = (1 + scales["one"] * growth) / (1 + scales["all"] * growth)
    return config.build(RopeScaling, kind="yarn", **values)


def written_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    """``rope_scaling`` as ``rope_scaling`` reads it; None without scaling."""
    if scaling.kind == "none":
        return None
    names = {"factor": "factor", "original_length": "original_max_position_embeddings"}
    if scaling.kind == "llama3":
        names |= {"low_turns": "low_freq_factor", "high_turns": "high_freq_factor"}
    else:
        names |= {
            "low_turns": "beta_slow",
            "high_turns": "beta_fast",
            "attention_factor": "attention_factor",
            "query_growth": "llama_4_scaling_beta",
            "truncate": "truncate",
        }
    values = dataclasses.asdict(scaling)
    return {"rope_type": scaling.kind, **{key: values[ours] for ours, key in names.items()}}


def _first_of(ids: Any) -> int | None:
    """An id, or the first of a list of ids; None for anything else."""
    one = ids[0] if isinstance(ids, list) and ids else ids
    return one if type(one) is int else None
