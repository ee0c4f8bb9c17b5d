"""Render a chat template: the same text on every day, with every message in it."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, TypedDict

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

# The date that the templates of Llama 3.1 and later write if they are given none.
DEFAULT_TEMPLATE_DATE = "2024-07-26"
_RESERVED = frozenset(
    {"add_generation_prompt", "continue_final_message", "messages", "return_dict", "strftime_now", "tokenize"}
)
_MARKER = "the-end-of-message-1f4b9c"


class Message(TypedDict):
    """One turn of a conversation, as chat templates expect it."""

    role: str
    content: str


class ChatTemplate:
    """The chat template of a tokenizer, with fixed variables and a fixed date.

    Args:
        tokenizer: Tokenizer with a chat template.
        variables: Variables for the template, such as `enable_thinking`.
        template_date: Date and time in ISO format. It is what the template gets when it asks for the clock with
            `strftime_now`, and its `date_string` unless `variables` has another one.

    Raises:
        ValueError: If the template, a variable or the date is not valid.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any], template_date: str
    ) -> None:
        if reserved := sorted(_RESERVED & variables.keys()):
            raise ValueError(
                f"template_kwargs must not set {reserved}: the encoder sets them itself (the date is "
                "data.template_date)."
            )
        try:
            now = datetime.fromisoformat(template_date)
        except ValueError:
            raise ValueError(
                f"data.template_date must be a date like {DEFAULT_TEMPLATE_DATE}, got {template_date!r}."
            ) from None
        chosen = {key: _plain(value, key) for key, value in variables.items()}
        source = tokenizer.get_chat_template(chosen.pop("chat_template", None))
        try:
            # apply_chat_template of transformers 5.23 replaces functions among its variables with text, so it cannot
            # be given another clock. A variable of this name hides the global that reads the clock.
            self._compiled: jinja2.Template = _compile_jinja_template(source)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path or 'this model'!r} cannot be compiled: {error}; "
                "correct the chat_template.jinja beside the tokenizer files."
            ) from error
        self._source = source
        self._variables = {
            "tools": None,
            "documents": None,
            **tokenizer.special_tokens_map,
            "date_string": now.strftime("%d %b %Y"),
            **chosen,
            "strftime_now": now.strftime,
        }

    def variable_names(self) -> frozenset[str]:
        """Return the names of all variables that the template reads."""
        parsed = self._compiled.environment.parse(self._source)
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Return the conversation as text.

        Raises:
            ValueError: If the template raises an error, for instance because of a system turn or two user turns in a
                row.
        """
        if not messages:
            raise ValueError("a conversation must not begin with an assistant turn.")
        try:
            return self._compiled.render(
                messages=[{"role": message["role"], "content": message["content"]} for message in messages],
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        # A template is a program of the model's author and may raise anything.
        except Exception as error:
            roles = [message["role"] for message in messages]
            kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
            raise ValueError(f"the chat template refuses the roles {roles}: {kind}{error}") from error

    def refuse_left_out(
        self, messages: Sequence[Message], text: str, generation_prompt: bool = False
    ) -> None:
        """Check that the template has written every system and user message.

        Args:
            messages: Conversation; answers are not checked here, since the encoder looks for each in its own place.
            text: The conversation as rendered.
            generation_prompt: Whether it was rendered with a generation prompt.

        Raises:
            ValueError: If a message is missing or was rewritten; the message names it.
        """
        # A marker in each message, because the text of one message may also stand in another.
        markers = {
            index: f"{_MARKER}-{index}."
            for index, message in enumerate(messages)
            if message["role"] != "assistant" and message["content"].strip()
        }
        marked = self.render(_with_markers(messages, markers), generation_prompt)
        for index, marker in markers.items():
            role, content = messages[index]["role"], messages[index]["content"]
            if marker not in marked or content.strip() not in text:
                when = "" if generation_prompt else self._when_left_out(messages, markers, index)
                raise ValueError(
                    f"the chat template leaves out or rewrites message {index} ({role}){when}: {content[:60]!r}; "
                    "put its text where the template writes it as it is, or use another template."
                )

    def _when_left_out(self, messages: Sequence[Message], markers: Mapping[int, str], index: int) -> str:
        """Return the condition under which a message is left out, if the prompt for the next answer has it."""
        end = next((i for i, each in enumerate(messages) if i > index and each["role"] == "assistant"), None)
        prompt = self.render(_with_markers(messages[:end], markers), generation_prompt=True)
        return " as soon as an answer follows" if markers[index] in prompt else ""


def _with_markers(messages: Sequence[Message], markers: Mapping[int, str]) -> list[Message]:
    return [
        {"role": message["role"], "content": message["content"] + markers.get(index, "")}
        for index, message in enumerate(messages)
    ]


def _plain(value: Any, key: str) -> Any:
    """Return a variable as text, numbers, lists and mappings; a date object would give the template the clock."""
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {name: _plain(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, key) for each in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ValueError(
        f"template_kwargs.{key} must be text, a number, a truth value, or lists and mappings of them, got {value!r}."
    )
