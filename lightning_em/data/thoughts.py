"""Thoughts before an answer, as reasoning models write them."""

import re

_EMPTY = (
    r"(?:<(think|thinking|thought|reasoning|seed:think)>\s*</\1>|\[THINK\]\s*\[/THINK\]"
    r"|<\|START_THINKING\|>\s*<\|END_THINKING\|>|<\|channel>thought\s*<channel\|>)\s*"
)
_AT_THE_END = re.compile(_EMPTY + r"\Z")
_AT_THE_START = re.compile(r"\s*" + _EMPTY)
# Templates look for the last end of a thought; prompts of R1 and its relatives open the thought already.
_THOUGHT = re.compile(r"\A.*</(?:think|thinking|thought|reasoning|seed:think)>", re.DOTALL)


def ends_in_empty_thought(text: str) -> bool:
    """Tell whether a text ends in a thought without content."""
    return _AT_THE_END.search(text) is not None


def leading_empty_thought(text: str) -> str:
    """Return the thought without content that a text begins with, with the white space around it; empty if none."""
    found = _AT_THE_START.match(text)
    return found.group() if found else ""


def without_thought(answer: str) -> str | None:
    """Return an answer without its thought and without white space around it; None if it has no thought."""
    found = _THOUGHT.match(answer)
    return answer[found.end() :].strip() if found else None
