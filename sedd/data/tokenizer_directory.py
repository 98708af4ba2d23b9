"""The tokenizer of a published model, from the files beside its weights.

==============================  ====================================================================
``tokenizer.json``              vocabulary, merges and added tokens
``vocab.json``, ``merges.txt``  the same without ``tokenizer.json``, for tokenizers of Qwen's kind
``tokenizer_config.json``       the names of special tokens, further added tokens, a chat template
``special_tokens_map.json``     names of special tokens that ``tokenizer_config.json`` leaves out
``added_tokens.json``           ids of added tokens, in older directories
``chat_template.jinja``         the chat template; it replaces that of ``tokenizer_config.json``
``generation_config.json``      ids that end an answer
``config.json``                 the family of the model, for settings of its chat template
==============================  ====================================================================

Code that such a directory may hold is never run.
"""

import json
import re
from pathlib import Path
from typing import Any

from sedd.data.tokenizers import Pretrained, Turns
from sedd.errors import UserError, first_line

VOCABULARY = "tokenizer.json"
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token")
# The pattern of Qwen2's tokenizer, which those of Dream and Fast-dLLM v2 share.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Tokens of this form are special in every published model, also where its files do not say so.
CONTROL = re.compile(r"<\|.*\|>")
QWEN_KINDS = ("Qwen2Tokenizer", "DreamTokenizer")


def read_tokenizer_directory(
    folder: Path, *, mask: int | None = None, **settings: Any
) -> Pretrained | None:
    """Read the tokenizer of a published model.

    Args:
        folder: the directory of the model.
        mask: id of the mask in the files, see ``Pretrained``. The files may name one themselves:
            ``Pretrained.named_mask``. A directory that is read without ``mask`` has the ids of its
            files, whether or not they name a mask.
        settings: further variables of the chat template, such as ``enable_thinking=False``.

    Returns:
        The tokenizer; None if the directory holds none.

    Raises:
        UserError: a file is damaged, or an added token does not get the id that the files state.
    """
    config = _read(folder / "tokenizer_config.json")
    source = _vocabulary(folder, config)
    if source is None:
        return None
    tokens = {**_read(folder / "special_tokens_map.json"), **config}
    named = {name: _text(tokens[name]) for name in NAMED if tokens.get(name)}
    added = _added(folder, config, set(named.values()))
    present = {token["content"] for token in source.get("added_tokens", [])}
    missing = [token for token in added if token["content"] not in present]
    if missing:
        source["added_tokens"] = source.get("added_tokens", []) + missing
    for token in source.get("added_tokens", []):
        control = CONTROL.fullmatch(token["content"]) is not None
        token["special"] = token["special"] or control or token["content"] in named.values()
    turns = Turns(
        template=_template(folder, config),
        variables=tuple({**named, **_family_settings(folder), **settings}.items()),
        end_ids=_end_ids(folder),
    )
    try:
        tokenizer = Pretrained.of(VOCABULARY, json.dumps(source), mask=mask, turns=turns)
    except UserError as error:
        raise UserError(f"{folder / VOCABULARY}: {error}") from error
    for token in missing:
        content, wanted = token["content"], token["id"]
        if (got := tokenizer.backend.token_to_id(content)) != wanted:
            raise UserError(
                f"{folder}: the added token {content!r} has the id {wanted} in its files, and gets "
                f"the id {got} behind the vocabulary"
            )
    return tokenizer


def _family_settings(folder: Path) -> dict[str, Any]:
    """The variables that the code of a family sets for its templates.

    The code of A2D, of the project dllm, turns off the thoughts of Qwen3's template.
    """
    architectures = _read(folder / "config.json").get("architectures") or [""]
    return {"enable_thinking": False} if str(architectures[0]).startswith("A2D") else {}


def _vocabulary(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The content of ``tokenizer.json``, or the same made from ``vocab.json`` and ``merges.txt``.

    None without these files; UserError if the latter are of a tokenizer of another kind.
    """
    if (folder / VOCABULARY).is_file():
        return _read(folder / VOCABULARY)
    files = folder / "vocab.json", folder / "merges.txt"
    if not all(file.is_file() for file in files):
        return None
    kind = str(config.get("tokenizer_class"))
    if kind.removesuffix("Fast") not in QWEN_KINDS:
        raise UserError(
            f"{folder}: it has vocab.json and merges.txt of a {kind}, whose pattern is not known "
            f"here: write its {VOCABULARY} with transformers (use_fast=True)"
        )
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        backend: Any = Tokenizer(models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: {first_line(error)}") from error
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return json.loads(backend.to_str())


def _added(folder: Path, config: dict[str, Any], named: set[str]) -> list[dict[str, Any]]:
    """The added tokens of ``tokenizer_config.json`` and ``added_tokens.json``, in order of id.

    Tokens of the latter are special if they are among ``named``.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    found = {
        int(index): {**plain, **token, "id": int(index)}
        for index, token in config.get("added_tokens_decoder", {}).items()
    }
    for token in found.values():
        token.pop("__type", None)
        token.setdefault("special", token["content"] in named)
    extra = {_text(token) for token in config.get("additional_special_tokens", [])}
    for content, index in _read(folder / "added_tokens.json").items():
        special = content in named | extra
        found.setdefault(index, {**plain, "id": index, "content": content, "special": special})
    return [found[index] for index in sorted(found)]


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template; of several, the one called default. None without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    return template


def _end_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer by ``generation_config.json``."""
    ids = _read(folder / "generation_config.json").get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _text(token: Any) -> str:
    """The text of a token that is written as a string, or as an object with further fields."""
    return token["content"] if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty without the file. UserError if it is no object."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold an object, got {type(data).__name__}")
    return data
