"""Find the characters of each assistant turn in a rendered conversation."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_em.data.differences import TurnDiffersError, explain_later, explain_prompt, shared_length
from lightning_em.data.template import ChatTemplate, Message
from lightning_em.data.thoughts import ends_in_empty_thought, leading_empty_thought, without_thought

_MARKER = "the-end-of-the-answer-1f4b9c"
NO_STOP = (
    "the chat template ends an assistant turn without a special token, so the model would never learn to stop; add "
    "one to the template or register it as a special token of the tokenizer."
)


class _Written(NamedTuple):
    """A conversation that ends in an answer, as the template writes it."""

    text: str  # up to the end of the answer, without white space after it
    closing: str  # everything after the answer


class TurnFinder:
    """Find where assistant turns begin and end, from several renderings of a conversation.

    Args:
        template: The chat template.
        added_tokens_in: Function that returns the characters of each visible added token in a text.
        train_empty_thoughts: Whether an empty thought before an answer belongs to the turn, not to its prompt.

    Attributes:
        notes: Number of thoughts that the template has added or left out so far; see `ChatEncoder`.
    """

    def __init__(
        self,
        template: ChatTemplate,
        added_tokens_in: Callable[[str], list[tuple[int, int]]],
        train_empty_thoughts: bool,
    ) -> None:
        self.template, self.added_tokens_in = template, added_tokens_in
        self.train_empty_thoughts = train_empty_thoughts
        self.notes: Counter[str] = Counter()
        self._ends_of_turn: dict[str, str] = {}

    def end_of_turn(self) -> str:
        """Return the text that the template writes after an answer, up to the end of the token that ends the turn.

        Raises:
            ValueError: If the template ends answers without an added token.
        """
        before: list[Message] = [{"role": "user", "content": "Hello."}]
        return self._end_of_turn(before, "Hello.", self._written(before, "Hello.").closing)

    def span(self, messages: list[Message], turn: int, text: str) -> tuple[int, int]:
        """Return the characters of a turn that are trained: from the end of the prompt to the token that ends it.

        Args:
            messages: Conversation.
            turn: Index of the answer.
            text: Whole conversation as rendered.

        Raises:
            TurnDiffersError: If the template writes the turn in two ways.
            ValueError: If the answer is empty, left out or changed, or no added token ends the turn.
        """
        before, content = messages[:turn], messages[turn]["content"]
        if not content.strip():
            raise ValueError(f"the assistant's answer in message {turn} is empty.")
        prompt = self.template.render(before, generation_prompt=True)
        written = self._written(before, content)
        start, answer_end = len(prompt), len(written.text)
        kept = without_thought(content) if turn + 1 < len(messages) else None
        if kept and text.startswith(prompt) and not text.startswith(written.text):
            # Thinking templates leave out the thoughts of earlier turns on purpose.
            answer_start = start + len(leading_empty_thought(text[start:]))
            if text.startswith(kept, answer_start):
                self.notes["dropped thoughts"] += 1
                start = start if self.train_empty_thoughts else answer_start
                end = self._turn_end(before, content, written.closing, text, answer_start + len(kept))
                return start, end
        if not written.text.startswith(prompt):
            raise TurnDiffersError(turn, *explain_prompt(messages, turn, prompt, written.text))
        if not text.startswith(written.text):
            raise TurnDiffersError(turn, *explain_later(messages, turn, written.text, text))
        opening = _opening(prompt, written.text, content)
        if opening is None:
            raise ValueError(f"the chat template changes the answer in message {turn}: {content[:60]!r}.")
        if opening and ends_in_empty_thought(prompt + opening):
            self.notes["empty thoughts"] += 1
            start += 0 if self.train_empty_thoughts else len(opening)
        return start, self._turn_end(before, content, written.closing, text, answer_end)

    def empty_thought_after(self, messages: Sequence[Message], prompt: str, answer: str) -> str:
        """Return the empty thought that the template writes between the generation prompt and the answer, if any."""
        try:
            written = self._written(messages, answer).text
        except ValueError:
            return ""
        opening = _opening(prompt, written, answer) if written.startswith(prompt) else None
        is_prompt = opening and not self.train_empty_thoughts and ends_in_empty_thought(prompt + opening)
        return opening if opening and is_prompt else ""

    def _written(self, before: Sequence[Message], content: str) -> _Written:
        """Render a conversation that ends in an answer, with a marker at the end of the answer."""
        # The answer stays in place, because templates look for thoughts in it.
        shown = self.template.render([*before, {"role": "assistant", "content": content.rstrip() + _MARKER}])
        text, found, closing = shown.partition(_MARKER)
        if not found:
            raise ValueError(
                f"the chat template leaves out the answer in message {len(before)}: {content[:60]!r}."
            )
        return _Written(text, closing)

    def _turn_end(
        self, before: Sequence[Message], content: str, closing: str, text: str, answer_end: int
    ) -> int:
        """Return the position after the token that ends the turn."""
        end_of_turn = self._end_of_turn(before, content, closing)
        # Many templates strip white space; the longer variant found in the text is what the template wrote.
        for space in (content[len(content.rstrip()) :], ""):
            if text.startswith(space + end_of_turn, answer_end):
                return answer_end + len(space + end_of_turn)
        # gpt-oss ends the last answer with another token than those before it.
        rest = text[answer_end:]
        tokens = self.added_tokens_in(rest)
        if not tokens or rest[: tokens[0][0]].strip() or _goes_on_with_text(rest, tokens[0][1], tokens):
            raise ValueError(NO_STOP)
        return answer_end + tokens[0][1]

    def _end_of_turn(self, before: Sequence[Message], content: str, closing: str) -> str:
        """Return the text after an answer up to the end of the token that ends the turn.

        Two tokens may close an answer, and a template may write an end-of-text token after the last turn or the
        header of a next one. What ends the turn is the last token that stands there whether the conversation ends or a
        user turn follows.
        """
        if closing in self._ends_of_turn:
            return self._ends_of_turn[closing]
        tokens = self.added_tokens_in(closing)
        following = self._text_before_next_user(before, content)
        if following is not None:
            shared = shared_length(closing, following)
            inside = [(start, end) for start, end in tokens if end <= shared]
            # The first template of Llama 3 always writes the header of a next answer: the last shared token opens it
            # if the name of the role follows directly.
            if inside and inside[-1][1] == shared and _goes_on_with_text(closing, shared, tokens):
                tokens = inside[:-1]
            else:
                tokens = inside or tokens
        if not tokens:
            raise ValueError(NO_STOP)
        self._ends_of_turn[closing] = closing[: tokens[-1][1]]
        return self._ends_of_turn[closing]

    def _text_before_next_user(self, before: Sequence[Message], content: str) -> str | None:
        """Return the text between an answer and the next user message; None if the template refuses one."""
        following = f"next-{_MARKER}"
        try:
            text = self.template.render(
                [
                    *before,
                    {"role": "assistant", "content": content.rstrip() + _MARKER},
                    {"role": "user", "content": following},
                ]
            )
        except ValueError:
            return None
        between, found, _ = text.partition(_MARKER)[2].partition(following)
        return between if found else None


def _goes_on_with_text(text: str, end: int, tokens: Sequence[tuple[int, int]]) -> bool:
    """Tell whether plain text follows at a place directly, without white space or another added token."""
    return text[end : end + 1].strip() != "" and all(start != end for start, _ in tokens)


def _opening(prompt: str, written: str, content: str) -> str | None:
    """Return what the template writes between the generation prompt and the answer; None if it changes the answer.

    Args:
        prompt: Generation prompt.
        written: The prompt and everything up to the end of the answer.
        content: The answer.
    """
    answer, kept = written[len(prompt) :], content.strip()
    if answer.endswith(kept):
        return answer.removesuffix(content.rstrip() if answer.endswith(content.rstrip()) else kept)
    # The prompt may open a thought that the answer begins with.
    if answer and written.endswith(kept) and kept.endswith(answer):
        return ""
    # Templates that know thoughts write their own white space around them.
    compact = ["".join(part.split()) for part in (answer, written, kept)]
    after_thought = without_thought(content)
    if after_thought and answer.endswith(after_thought):
        is_same = compact[1].endswith(compact[2]) and compact[2].endswith(compact[0])
        return "" if is_same else None
    return None
