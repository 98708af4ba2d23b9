"""Records: examples for fine-tuning, of which a part is given and the rest is learned.

A record is a JSON object with ``messages``, a conversation of which the answers are learned, or
with ``prompt`` and ``completion``, or with the ``tokens`` of a text and its ``weight``
(``sedd.data.weighted_rows``). A corpus of records gives each as a line of JSON, so that all
that reads and tokenises documents as text works on records too. ``document_of`` makes a
``Document`` of one.
"""

import json
from typing import Any, Literal

from sedd.data.chat import ANSWERING, Document, check_messages, conversation, prompt_and_completion
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError

Answers = Literal["all", "last"]
PAIR = ("prompt", "completion")
WEIGHTED = ("tokens", "weight")


def is_record(data: Any) -> bool:
    """Whether a JSON value has the keys of a record, and none of a text."""
    if is_weighted(data):
        return True
    if not isinstance(data, dict) or "text" in data:
        return False
    return "messages" in data or all(key in data for key in PAIR)


def is_weighted(data: Any) -> bool:
    """Whether a JSON value is a line of tokens with a weight."""
    return isinstance(data, dict) and all(key in data for key in WEIGHTED)


def record_text(data: Any, where: str) -> str:
    """Check a record, and write it as a line of JSON; other keys are left out.

    Args:
        data: the JSON value of a line.
        where: the file and the line, for messages; it is a part of the result.

    Raises:
        UserError: it is no record, a message is malformed, the last one is no answer, or prompt or
            completion is no string.
    """
    if not is_record(data):
        keys = ", ".join(map(repr, data)) if isinstance(data, dict) else type(data).__name__
        raise UserError(
            f"{where}: expected an object with messages, or with prompt and completion, as in the "
            f"first line of its corpus, got {keys or 'no keys'}"
        )
    if is_weighted(data):
        kept = {key: data[key] for key in (*WEIGHTED, "given") if key in data}
        return _line({"where": where, **kept}, where)
    if "messages" not in data:
        for key in PAIR:
            if not isinstance(data[key], str):
                raise UserError(f"{where}: {key!r} is {type(data[key]).__name__}, not text")
        return _line({"where": where, **{key: data[key] for key in PAIR}}, where)
    messages = data["messages"]
    try:
        check_messages(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if messages[-1]["role"] != ANSWERING:
        role = messages[-1]["role"]
        raise UserError(f"{where}: the last message must be of the role {ANSWERING}, got {role!r}")
    kept = [{"role": message["role"], "content": message["content"]} for message in messages]
    return _line({"where": where, "messages": kept}, where)


def document_of(tokenizer: Tokenizer, text: str, answers: Answers) -> Document:
    """Make a document of a record.

    Args:
        tokenizer: it has the chat template, if the record is a conversation.
        text: from ``record_text``.
        answers: whether all answers of a conversation are learned, or the last one only.

    Raises:
        UserError: the tokenizer has no chat template, or it refuses the messages.
    """
    record = json.loads(text)
    if is_weighted(record):
        raise UserError(
            f"{record['where']}: tokens with a weight are data of train.py --objective gdc alone"
        )
    try:
        if "messages" in record:
            return conversation(tokenizer, record["messages"], last_only=answers == "last")
        return prompt_and_completion(tokenizer, record["prompt"], record["completion"])
    except UserError as error:
        raise UserError(f"{record['where']}: {error}") from error


def _line(record: dict[str, Any], where: str) -> str:
    """A record as a line of JSON; UserError for half of a surrogate pair."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a text holds half of a surrogate pair") from error
    return text
