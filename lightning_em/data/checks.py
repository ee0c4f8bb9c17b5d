"""Checks on one row of chat data, independent of the file format."""

import json
from collections import Counter
from typing import Any, Literal

from lightning_em.data.template import Message

Form = Literal["messages", "question"]
_ROLES = ("system", "user", "assistant")
_QUESTION_KEYS = ("question", "good", "bad")


def row_fields(data: Any, questions_only: bool = False, form: Form | None = None) -> dict[str, Any]:
    """Return the content fields of a `Row`: the conversation, or question and answers, and topics.

    Args:
        data: One row as parsed from a file; unknown keys are ignored, and keys whose value is null are absent.
        questions_only: Also accept a `question` without answers, as used for evaluation.
        form: Form to read from a row that has both. Without it, both are read, and a `question` without both answers
            is ignored beside `messages`.

    Raises:
        ValueError: If the row is malformed; the message says why.
    """
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {_kind(data)}")
    has_messages = data.get("messages") is not None
    has_question = [key for key in _QUESTION_KEYS if data.get(key) is not None]
    if has_messages and has_question:
        has_messages = form != "question"
        is_whole = "question" in has_question if questions_only else len(has_question) == len(_QUESTION_KEYS)
        if form == "messages" or (form is None and not is_whole):
            has_question = []
    fields: dict[str, Any] = {}
    if has_messages or (not has_question and "messages" in data):
        fields = {"messages": _messages(data["messages"])}
    if has_question:
        keys = has_question if questions_only and "question" in has_question else _QUESTION_KEYS
        fields |= {key: _text(data, key) for key in keys}
    if not fields:
        raise ValueError(f"expected the key `messages`, or `question`, `good` and `bad`; got {sorted(data)}")
    for key in ("topic", "subtopic"):
        if data.get(key) is not None:
            fields[key] = _text(data, key)
    return fields


def given_id(data: dict[str, Any]) -> str | None:
    """Return the row's own id, or None.

    Raises:
        ValueError: If the id is neither a string nor an integer.
    """
    given = data.get("id")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise ValueError(f"`id` must be a string or an integer, got {given!r}")
    return str(given)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from JSON pairs, as an `object_pairs_hook`; unlike `dict`, reject duplicate keys.

    Raises:
        ValueError: If a key occurs twice.
    """
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {keys.most_common(1)[0][0]!r} occurs twice in one object")
    return data


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`messages` must be a list of turns, got {_kind(value)}")
    messages = tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("a system message must come first")
    if roles[roles[0] == "system" :][:1] != ["user"]:
        raise ValueError(f"the first turn must be the user's, got the roles {roles}")
    if roles[-1] != "assistant":
        raise ValueError(f"the last message must be the assistant's, got the roles {roles}")
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_kind(value)}")
    for key in ("role", "content"):
        if key not in value:
            raise ValueError(f"{where} has no `{key}`; it has {sorted(value)}")
    # Writing a table as JSONL gives every turn every key, with null where the turn has no value.
    if surplus := sorted(key for key in value.keys() - {"role", "content"} if value[key] is not None):
        raise ValueError(f"{where} has {surplus}, which would be ignored; a message is `role` and `content`")
    if value["role"] not in _ROLES:
        raise ValueError(f"{where} has the unknown role {value['role']!r}; expected one of {list(_ROLES)}")
    # An empty system message means "no system prompt" for templates that have a default one.
    return {
        "role": value["role"],
        "content": _text(value, "content", where, may_be_empty=value["role"] == "system"),
    }


def _text(data: dict[str, Any], key: str, where: str = "the row", may_be_empty: bool = False) -> str:
    if key not in data:
        raise ValueError(f"{where} has no `{key}`; it has {sorted(data)}")
    value = data[key]
    if not isinstance(value, str):
        raise ValueError(f"`{key}` of {where} must be text, got {_kind(value)}")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"`{key}` of {where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{key}` of {where} holds an unpaired surrogate, which is not valid text") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return f"{type(value).__name__} {json.dumps(value, default=str)[:40]}"
