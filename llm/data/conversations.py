"""Rows to chat messages: lists of turns, or a prompt and its response. Imports no reader."""

from collections.abc import Mapping
from typing import Any

from llm.data.config import SourceConfig

Messages = tuple[dict[str, str], ...]  # {"role", "content"}

ROLES = ("system", "user", "assistant")
# What other formats call them: ShareGPT's "human" and "gpt" among them.
_OTHER_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant"}


class ConversationError(ValueError):
    """A row is not a conversation that can be learnt from; the message is a reason for a report."""


def conversation_fields(config: SourceConfig) -> tuple[str, ...]:
    """Return the fields of a row that its messages are made of."""
    if config.format == "messages":
        return (config.messages_field,)
    if config.format == "feedback":
        return ()
    fields = (config.prompt_field, config.context_field, config.response_field)
    return tuple(field for field in fields if field)


def read_conversation(
    fields: Mapping[str, Any], config: SourceConfig, *, answered: bool = True
) -> Messages:
    """Return a row's messages, with the config's system message before them where they have none.

    Raises:
      ConversationError: fields are missing, of another kind or empty, or nobody answers.
    """
    if config.format == "messages":
        messages = check_messages(_field(fields, config.messages_field))
    else:
        prompt = _text(fields, config.prompt_field)
        context = _text(fields, config.context_field) if config.context_field else ""
        messages = check_messages(
            [
                {"role": "user", "content": "\n\n".join(filter(None, (prompt, context)))},
                {"role": "assistant", "content": _text(fields, config.response_field)},
            ]
        )
    if config.system_message and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": config.system_message}, *messages)
    if answered and all(message["role"] != "assistant" for message in messages):
        raise ConversationError("no assistant turn: there is nothing to learn")
    return messages


def check_messages(turns: Any) -> Messages:
    """Return turns as messages with our roles; {"from", "value"} serve as {"role", "content"}.

    Raises:
      ConversationError: something else than a list of turns, an unknown role, or an empty turn.
    """
    if isinstance(turns, Mapping):
        turns = _turns_of_columns(turns)
    if not isinstance(turns, list | tuple) or not turns:
        raise ConversationError(f"the conversation is {_shown(turns)}, not a list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise ConversationError(f"turn {number} is {_shown(turn)}, not an object")
        role = _decoded(turn.get("role", turn.get("from")))
        content = _decoded(turn.get("content", turn.get("value")))
        role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ConversationError(f"turn {number} has the role {role!r}, not {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ConversationError(f"turn {number} has {_shown(content)} for content, not text")
        if not content.strip() and role != "system":
            raise ConversationError(f"turn {number}, of the {role}, is empty")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _turns_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a dict of lists, as which TFDS gives a sequence of dicts."""
    try:
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
    except (TypeError, ValueError) as error:
        raise ConversationError("the conversation is an object, not a list of turns") from error
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ConversationError(f"no field {name!r}")
    return fields[name]


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = _decoded(_field(fields, name))
    if not isinstance(value, str):
        raise ConversationError(f"field {name!r} is {_shown(value)}, not text")
    return value


def _decoded(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversationError(f"invalid UTF-8, byte {error.start}") from error


def _shown(value: Any) -> str:
    return "empty" if value in ([], (), {}) else f"of type {type(value).__name__}"
