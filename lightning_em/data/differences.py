"""Explain where a chat template writes the same turn in two ways, and find out what would help."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_em.data.template import Message

_SHOWN = 40
_FALLBACK = "save a chat_template.jinja beside the tokenizer files that writes both alike."


class Difference(NamedTuple):
    """A difference between two renderings of one turn, and which remedies are worth trying."""

    text: str
    moved: int | None  # message that stands in another place
    opened: str  # what the generation prompt opens and the conversation does not have
    is_later: bool  # the turn changes once the conversation goes on


class TurnDiffersError(ValueError):
    """A template writes a turn in two ways, so it is not certain which tokens are the answer."""

    def __init__(self, turn: int, text: str, moved: int | None, opened: str, is_later: bool) -> None:
        super().__init__(text)
        self.turn, self.moved, self.opened, self.is_later = turn, moved, opened, is_later

    def advice(
        self,
        variables: Iterable[str],
        messages: Sequence[Message],
        encodes: Callable[[Mapping[str, Any], Sequence[Message]], bool],
    ) -> str:
        """Return what would help. Each remedy is tried on this conversation, so that none is named that does not help.

        Args:
            variables: Names of the variables that the template reads.
            messages: Conversation that could not be encoded.
            encodes: Function of further template variables and a conversation that tells whether it can be encoded.
        """
        names = [name for name in variables if "think" in name or "reason" in name]
        for name, value in ((name, value) for name in sorted(names) for value in (False, True)):
            if encodes({name: value}, messages):
                return f"Set template_kwargs {name}: {str(value).lower()}."
        if self.opened:
            thought = f"{self.opened}...\n</think>\n\n"
            changed: list[Message] = [
                {"role": each["role"], "content": thought * (each["role"] == "assistant") + each["content"]}
                for each in messages
            ]
            if "think" in self.opened and encodes({}, changed):
                return f"Begin every answer with its thought, as in {thought!r}."
        if self.moved is not None and messages[self.moved]["role"] == "system":
            first = messages[self.moved + 1]
            merged: Message = {
                "role": first["role"],
                "content": f"{messages[self.moved]['content']}\n\n{first['content']}",
            }
            if encodes({}, [merged, *messages[self.moved + 2 :]]):
                return "Write the text of the system message into the first user message."
        if self.is_later and encodes({}, messages[: self.turn + 1]):
            return "Train on rows with one answer each."
        return f"To use such rows, {_FALLBACK}"


def shared_length(first: str, second: str) -> int:
    """Return the number of characters that two texts have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def explain_prompt(messages: Sequence[Message], turn: int, prompt: str, written: str) -> Difference:
    """Compare the generation prompt with what the template writes before the answer in a conversation.

    Args:
        messages: Conversation.
        turn: Index of the answer.
        prompt: Generation prompt for the answer.
        written: Conversation up to the end of the answer.
    """
    in_prompt, in_conversation = _beyond_shared(prompt, written)
    moved = _moved(messages[:turn], prompt, written)
    start = f"the chat template writes the conversation before message {turn} differently once the answer follows: "
    if moved is not None:
        what = _moved_text(
            messages, moved, prompt, written, "in the generation prompt", "in the conversation"
        )
        return Difference(f"{start}{what}.", moved, "", is_later=False)
    space = ""
    if not in_prompt.strip() or "".join(in_prompt.split()) == "".join(in_conversation.split()):
        space = " The white space is the template's own, not the answer's."
    text = (
        f"{start}the generation prompt continues with {in_prompt[:_SHOWN]!r}, the conversation with "
        f"{in_conversation[:_SHOWN]!r}, so it is not certain which tokens are the answer.{space}"
    )
    return Difference(text, None, "" if space else in_prompt, is_later=False)


def explain_later(messages: Sequence[Message], turn: int, written: str, text: str) -> Difference:
    """Compare a turn at the end of a conversation with the same turn when the conversation goes on.

    Args:
        messages: Conversation.
        turn: Index of the answer.
        written: Conversation up to the end of the answer, rendered without what follows it.
        text: Whole conversation.
    """
    as_last, in_whole = _beyond_shared(written, text)
    moved = _moved(messages[:turn], written, text)
    start = (
        f"the chat template writes the conversation before message {turn + 1} differently once it goes on: "
    )
    if moved is not None:
        what = _moved_text(messages, moved, written, text, "up to there", "in the whole conversation")
        return Difference(f"{start}{what}.", moved, "", is_later=True)
    told = (
        f"{start}as the last message, message {turn} continues with {as_last[:_SHOWN]!r}, in the whole conversation "
        f"with {in_whole[:_SHOWN]!r}, so it is not certain which tokens are the answer."
    )
    return Difference(told, None, "", is_later=True)


def _beyond_shared(first: str, second: str) -> tuple[str, str]:
    shared = shared_length(first, second)
    return first[shared:], second[shared:]


def _moved(messages: Sequence[Message], first: str, second: str) -> int | None:
    """Return the first message that stands in one text only, or in another order among the messages."""
    places = [
        [text.find(message["content"].strip()) for message in messages if message["content"].strip()]
        for text in (first, second)
    ]
    orders = [sorted(range(len(found)), key=found.__getitem__) for found in places]
    for index, (here, there) in enumerate(zip(*places, strict=True)):
        if (here < 0) != (there < 0) or orders[0].index(index) != orders[1].index(index):
            return index
    return None


def _moved_text(
    messages: Sequence[Message], index: int, first: str, second: str, here: str, there: str
) -> str:
    role, content = messages[index]["role"], messages[index]["content"]
    name = f"message {index} ({role}, {content[:_SHOWN]!r})"
    if content.strip() not in second:
        return f"{name} stands {here} only"
    if content.strip() not in first:
        return f"{name} stands {there} only"
    return f"{name} stands in another place {there} than {here}"
