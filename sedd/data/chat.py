"""Conversations and prompts with answers as text, by the chat template of a tokenizer.

A chat template is a Jinja template that published models bring along. It writes a list of messages
as one text, with special tokens around each turn. ``render`` gives the text before an answer, which
samplers continue; ``conversation`` gives a whole conversation for training, in which everything but
the answers is given.

A template comes from a stranger, so that it runs in Jinja's sandbox. The text of a message comes
from a stranger too: ``<|im_end|>`` in it must not end the turn. ``_hide`` therefore puts a
character into the special tokens of a message before it is rendered, and ``Tokenizer.encode_spans``
removes it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from sedd.data.tokenizers import HIDDEN, Tokenizer
from sedd.errors import UserError, did_you_mean, first_line

ROLES = ("system", "user", "assistant", "tool")
ANSWERING = "assistant"  # the role whose messages are answers
PROBE = "\ufdd1"  # stands for an answer where only the text around it is wanted

Message = Mapping[str, str]


class Document(NamedTuple):
    """A text, and which of it is given: conditioned on in training, never masked nor scored."""

    text: str
    given: tuple[tuple[int, int], ...]
    """The start and end of each given stretch, in characters, ascending."""


def check_messages(messages: Any) -> None:
    """Check that messages are a list of objects with a known role and text as content.

    Raises:
        UserError: they are not; the message counts messages from 1.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"messages must be a list of messages, got {_json(messages)}")
    for number, message in enumerate(messages, start=1):
        where = f"messages, number {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: expected an object, got {_json(message)}")
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f"{where}: no {key!r}, the keys are {', '.join(message) or 'none'}")
            if not isinstance(message[key], str):
                raise UserError(f"{where}: {key!r} must be a string, got {_json(message[key])}")
        role = message["role"]
        if role not in ROLES:
            hint = did_you_mean(role, ROLES)
            raise UserError(f"{where}: unknown role {role!r}{hint}; there are {', '.join(ROLES)}")


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, answer: bool) -> str:
    """Write messages as one text by the chat template of a tokenizer.

    Args:
        tokenizer: it has the template, and the special tokens that the template may write.
        messages: checked messages (``check_messages``).
        answer: whether the text ends with the beginning of an answer, for a sampler to continue.

    Returns:
        The text for ``Tokenizer.encode_spans``. Special tokens in the messages are hidden.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the messages.
    """
    turns = tokenizer.turns
    if turns.template is None:
        raise UserError(f"tokenizer {tokenizer.name!r} has no chat template")
    hidden = [{**m, "content": _hide(m["content"], tokenizer.specials)} for m in messages]
    try:
        return _compiled(turns.template).render(
            messages=hidden, add_generation_prompt=answer, **dict(turns.variables)
        )
    except Exception as error:  # a template may raise anything
        raise UserError(
            f"the chat template of tokenizer {tokenizer.name!r}: {first_line(error)}"
        ) from error


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, last_only: bool = False
) -> Document:
    """Write a conversation as a document whose answers are not given.

    An answer begins where the text before it ends, rendered with the beginning of an answer. It
    ends with the special token that ends a turn, so that a model learns to stop. The document ends
    with the last answer: what a template writes behind it is left out.

    Args:
        tokenizer: it has the chat template.
        messages: checked messages; the last one must be an answer.
        last_only: whether only the last answer is not given.

    Raises:
        UserError: the last message is no answer, or the text before an answer is not a prefix of
            the whole text, because the template writes a turn differently if later ones follow.
    """
    if messages[-1]["role"] != ANSWERING:
        role = messages[-1]["role"]
        raise UserError(f"the last message must be of the role {ANSWERING}, got {role!r}")
    whole, end_token = render(tokenizer, messages, answer=False), end_of_turn(tokenizer)
    given, after = [], 0
    for number, message in enumerate(messages):
        last = number == len(messages) - 1
        if message["role"] != ANSWERING or (last_only and not last):
            continue
        before = render(tokenizer, messages[:number], answer=True)
        if not whole.startswith(before):
            hint = "" if last else "; score the last answer only (--data.answers last)"
            raise UserError(
                f"the chat template of tokenizer {tokenizer.name!r} writes the text before message "
                f"{number + 1} in another way than within the whole conversation{hint}"
            )
        given.append((after, len(before)))
        place = -1 if end_token is None else whole.find(end_token, len(before))
        if place >= 0:
            after = place + len(end_token or "")
        elif last:
            after = len(whole)
        else:  # a template whose turns end without a special token
            turn = render(tokenizer, messages[: number + 1], answer=False)
            after = len(turn) if whole.startswith(turn) else len(before)
    return Document(whole[:after], tuple(span for span in given if span[0] < span[1]))


def prompt_and_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Document:
    """A text with its continuation as a document; the prompt is given. No template is applied."""
    before, after = (_hide(text, tokenizer.specials) for text in (prompt, completion))
    return Document(before + after, ((0, len(before)),) if before else ())


def end_of_turn(tokenizer: Tokenizer) -> str | None:
    """The special token that the chat template writes behind an answer; None if it writes none.

    It is found by rendering a short conversation.
    """
    messages = [{"role": "user", "content": "a"}, {"role": ANSWERING, "content": PROBE}]
    after = render(tokenizer, messages, answer=False).rpartition(PROBE)[2]
    found = _pattern(tuple(tokenizer.specials)).search(after) if tokenizer.specials else None
    return None if found is None else found[0]


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer: of the end of a turn, of a document, and of padding."""
    token = end_of_turn(tokenizer)
    ids = [] if token is None else [tokenizer.specials[token]]
    ids += [] if tokenizer.eos_id is None else [tokenizer.eos_id, tokenizer.pad_id]
    return tuple(dict.fromkeys([*ids, *tokenizer.end_ids]))


def _hide(text: str, specials: Mapping[str, int]) -> str:
    """Put ``HIDDEN`` behind the first character of each special token in a text.

    ``HIDDEN`` itself is doubled.
    """
    text = text.replace(HIDDEN, HIDDEN * 2)
    if not specials:
        return text
    return _pattern(tuple(specials)).sub(lambda m: m[0][0] + HIDDEN + m[0][1:], text)


@lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds any of the tokens, the longest where several begin."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


class _Generation(jinja2.ext.Extension):
    """The tag ``{% generation %}`` of some templates, which marks answers: its content is shown."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

    def parse(self, parser: Any) -> Any:
        """The content of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compile a template with the settings and functions that chat templates are written for.

    They are those of ``transformers``: blocks take no white space with them, ``raise_exception``
    refuses the messages, ``strftime_now`` gives the date, and ``tojson`` escapes nothing.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _json(value: Any) -> str:
    """A value as JSON, shortened, for messages."""
    return json.dumps(value, ensure_ascii=False, default=repr)[:80]
