"""Tokenize conversations with the tokenizer's chat template and mask the assistant's tokens."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_em.data.differences import TurnDiffersError
from lightning_em.data.template import DEFAULT_TEMPLATE_DATE, ChatTemplate, Message
from lightning_em.data.turns import NO_STOP, TurnFinder


class EncodedChat(NamedTuple):
    """Token ids of a conversation; the mask is True on assistant tokens, including the stop token."""

    input_ids: list[int]
    response_mask: list[bool]


class ChatEncoder:
    """Tokenize conversations and mark the tokens of every assistant turn.

    The template is rendered to text turn by turn. The whole text is tokenized once, with character offsets
    and without adding special tokens, so the ids equal those of `apply_chat_template`. A turn runs from the
    end of its generation prompt to the last added token that closes it, whether another turn follows or not.
    All closing tokens are therefore trained; a newline or end-of-text token that some templates write after
    them is not. An empty thought that the template writes before an answer belongs to the prompt.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        template_kwargs: Variables for the template, such as `enable_thinking`.
        template_date: Date in ISO format for templates that write one; the clock is never read.
        train_empty_thoughts: Whether an empty thought that the template writes before an answer is trained.
        system_prompt: System prompt of conversations that do not begin with one; what the template writes there
            by itself if not given. Messages count from it.

    Attributes:
        settings: The arguments beside the tokenizer, by name.
        template: The template.
        notes: Number of answers seen so far before which the template writes an empty thought
            (`empty thoughts`), and of earlier answers whose thought it leaves out (`dropped thoughts`).

    Raises:
        ValueError: If the tokenizer has no chat template or gives no character offsets, or a setting is not valid.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None = None,
        template_date: str = DEFAULT_TEMPLATE_DATE,
        train_empty_thoughts: bool = False,
        system_prompt: str | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'!r} has no chat template, so "
                "conversations cannot be formatted; use an instruction-tuned model in model.base.path, or save a "
                "chat_template.jinja next to the tokenizer files."
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets, which the response mask is computed "
                "from; use a model folder with a tokenizer.json (a fast tokenizer)."
            )
        self.tokenizer, self.template_kwargs = tokenizer, dict(template_kwargs or {})
        self.train_empty_thoughts, self.system_prompt = train_empty_thoughts, system_prompt
        self.settings: dict[str, Any] = {
            "template_kwargs": self.template_kwargs,
            "template_date": template_date,
            "train_empty_thoughts": train_empty_thoughts,
            "system_prompt": system_prompt,
        }
        self.template = ChatTemplate(tokenizer, self.template_kwargs, template_date)
        added = tokenizer.added_tokens_decoder
        # Gemma, for example, has line breaks among its added tokens, which templates write as ordinary text.
        blank = {index for index, token in added.items() if not token.content.strip()}
        self._added_ids = (frozenset(added) | frozenset(tokenizer.all_special_ids)) - blank
        control = {token.content for token in added.values() if token.special and token.content}
        self._control_token = re.compile(
            "|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)"
        )
        self._turns = TurnFinder(self.template, self._added_tokens_in, train_empty_thoughts)
        self.notes = self._turns.notes

    def with_kwargs(self, template_kwargs: Mapping[str, Any] | None) -> "ChatEncoder":
        """Return an encoder that differs only in the variables for the template."""
        return ChatEncoder(self.tokenizer, **{**self.settings, "template_kwargs": template_kwargs})

    @cached_property
    def stop_id(self) -> int:
        """Id of the token that ends a trained answer; sampling has to stop at it.

        Raises:
            ValueError: If the template ends answers without an added token.
        """
        ids: list[int] = self.tokenizer(self._turns.end_of_turn(), add_special_tokens=False)["input_ids"]
        return ids[-1]

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Tokenize a conversation and mark every assistant turn.

        Raises:
            ValueError: If there is no assistant turn, an answer is empty, a message contains a control
                token, the template refuses the conversation or leaves out a message, or the answer's tokens
                cannot be identified with certainty.
        """
        messages = self._with_system_prompt(messages)
        try:
            return self._encode(messages)
        except TurnDiffersError as error:
            advice = error.advice(self.template.variable_names(), messages, self._encodes)
            raise ValueError(f"{error} {advice}") from None

    def encode_prompt(self, messages: Sequence[Message], answer: str | None = None) -> list[int]:
        """Return the token ids after which the model writes the next assistant turn, as in training.

        Args:
            messages: The conversation before the answer.
            answer: The answer that training puts there, if it is known: an answer with a thought of its own
                gets no empty thought before it.

        Raises:
            ValueError: If a message contains a control token, or the template refuses the conversation or
                leaves out a message.
        """
        messages = self._with_system_prompt(messages)
        self._refuse_control_tokens(messages)
        text = self.render(messages, generation_prompt=True)
        self.template.refuse_left_out(messages, text, generation_prompt=True)
        text += self._turns.empty_thought_after(messages, text, answer or "")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Return the conversation as text.

        Raises:
            ValueError: If the template refuses it, for instance because of a system turn or two user turns in a row.
        """
        return self.template.render(messages, generation_prompt)

    def _with_system_prompt(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.system_prompt is None or not messages or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _encode(self, messages: Sequence[Message]) -> EncodedChat:
        messages = list(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("the conversation has no assistant turn to train on.")
        self._refuse_control_tokens(messages)
        text = self.render(messages)
        self.template.refuse_left_out(messages, text)
        spans = [self._turns.span(messages, turn, text) for turn in turns]
        encoding = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        input_ids: list[int] = encoding["input_ids"]
        offsets: list[tuple[int, int]] = encoding["offset_mapping"]
        response_mask = [False] * len(input_ids)
        for span in spans:
            for index in self._turn_tokens(span, text, input_ids, offsets):
                response_mask[index] = True
        return EncodedChat(input_ids, response_mask)

    def _encodes(self, more_kwargs: Mapping[str, Any], messages: Sequence[Message]) -> bool:
        """Tell whether a conversation can be encoded with further variables for the template."""
        try:
            self.with_kwargs({**self.template_kwargs, **more_kwargs})._encode(messages)
        except ValueError:
            return False
        return True

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if found := self._control_token.search(message["content"]):
                raise ValueError(
                    f"the {message['role']} message contains {found.group()!r}, which the tokenizer reads as "
                    "a control token, not as text."
                )

    def _added_tokens_in(self, text: str) -> list[tuple[int, int]]:
        """Return the characters of each visible added token in a text."""
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        found = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        # An added token may take the white space around it with it (`lstrip`, `rstrip`).
        return [
            (end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip()))
            for token, (start, end) in found
            if token in self._added_ids
        ]

    def _turn_tokens(
        self, span: tuple[int, int], text: str, input_ids: list[int], offsets: list[tuple[int, int]]
    ) -> range:
        """Return the indices of the tokens of one turn, including the added token that ends it."""
        start, end = span
        # An added token may consume the white space that follows it (`rstrip=True`), and so span prompt and answer.
        straddling = next((i for i, (a, b) in enumerate(offsets) if a < start < b), None)
        if straddling is not None:
            a, b = offsets[straddling]
            where = "of the answer" if text[start:b].isspace() else "of the prompt, which the template writes"
            raise ValueError(
                f"one token, {text[a:b]!r}, spans the end of the prompt and the beginning of the answer, so training "
                f"and sampling would see different prompts; remove the white space at that place {where}."
            )
        first = next(i for i, (a, _) in enumerate(offsets) if a >= start)
        last = next(i for i in reversed(range(len(offsets))) if offsets[i][0] < end)
        if input_ids[last] not in self._added_ids:
            raise ValueError(NO_STOP)
        return range(first, last + 1)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any] | None = None,
) -> EncodedChat:
    """Tokenize one conversation and mark every assistant turn; see `ChatEncoder`."""
    return ChatEncoder(tokenizer, template_kwargs).encode(messages)
