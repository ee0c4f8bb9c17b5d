"""Keep secrets out of the files that a run writes. Never imports torch."""

import os
import re
from typing import Any

HIDDEN = "<hidden>"
_SECRET_NAME = re.compile(
    r"(^|[_.-])(api[_-]?key|secret([_-]?key)?|access[_-]?key|password|passwd|credentials?"
    r"|(api|auth|access|hf|bearer)[_-]?token)$|^token$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"\b(?:(?:sk|pk|hf|gsk|ghp|xai|glpat)[-_][\w-]{12,}|AKIA[0-9A-Z]{12,})")
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$")
_SHORTEST = 8


def redacted(value: Any) -> Any:
    """Copy plain nested values and hide secrets, recognized by name, by form or from the environment."""
    if isinstance(value, dict):
        return {k: HIDDEN if _is_secret(k, v) else redacted(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redacted_text(value) if isinstance(value, str) else value


def redacted_words(args: list[str]) -> list[str]:
    """Hide secrets in a command line, where a flag names the argument after it."""
    result: list[str] = []
    for index, word in enumerate(args):
        name, has_value, value = word.partition("=")
        before = args[index - 1] if index else ""
        if has_value and _is_secret(name.lstrip("-"), value):
            result.append(f"{name}={HIDDEN}")
        elif before.startswith("--") and _is_secret(before.lstrip("-"), word):
            result.append(HIDDEN)
        else:
            result.append(redacted_text(word))
    return result


def redacted_text(text: str) -> str:
    """Hide secrets in free text, such as an error message."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name):
            text = text.replace(value, f"<{name}>")
    text = re.sub(
        r"(?i)([\"']?(?:api[_-]?key|password|secret|(?:api|auth|access|hf)[_-]?token)[\"']?\s*[:=]\s*)[\"']?[^\s\"',}]+[\"']?",
        rf"\1{HIDDEN}",
        text,
    )
    return _SECRET_VALUE.sub(HIDDEN, text)


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and bool(_SECRET_NAME.search(str(name)))
