"""Every chat template that transformers and TRL ship is masked as its authors mark it, or refused with a reason.

`pytest -s tests/data/test_shipped_templates.py` prints the list.
"""

import re
import sys

import pytest

from lightning_em.data import ChatEncoder
from lightning_em.data.thoughts import ends_in_empty_thought
from tests.data.shipped import shipped_templates, shipped_tokenizer
from tests.data.test_chat import trained_runs

SYSTEM = {"role": "system", "content": "Be kind."}
ASKED, AGAIN = {"role": "user", "content": "Tea?"}, {"role": "user", "content": "And milk?"}
THOUGHTS = ("<think>\nWhy?\n</think>\n\nYes.", "<think>\nHow?\n</think>\n\nNo milk.")


def answered(*answers: str, system: bool = False):
    turns = [{"role": "assistant", "content": answer} for answer in answers]
    rest = [AGAIN, turns[1]] if len(turns) > 1 else []
    return [*([SYSTEM] if system else []), ASKED, turns[0], *rest]


CONVERSATIONS = {
    "one turn": answered("Yes."),
    "system": answered("Yes.", system=True),
    "two turns": answered("Yes.", "No milk."),
    "a thought": answered(THOUGHTS[0]),
    "two thoughts": answered(*THOUGHTS),
}
# Templates with which no conversation of one turn can be trained, and why; those of image models want a list of parts.
REFUSED = {
    "trl/deepseek": "<think>",  # the prompt opens a thought, which the conversation does not have
    "trl/glm4moe": "ends an assistant turn without a special token",  # the next turn's header ends it
    "trl/idefics3": r"leaves out or rewrites message 0 \(user\)",
    "trl/llava_next": "refuses the roles .*UndefinedError",
    "trl/nemotron": "Set template_kwargs enable_thinking: false",
    "trl/smolvlm": r"leaves out or rewrites message 0 \(user\)",
    "transformers/processing_smolvlm": r"leaves out or rewrites message 0 \(user\)",
}
ACCEPTED_DESPITE_OF_THAT = ("trl/glm4moe_training",)


def spans_by_the_authors(tokenizer, name: str, messages) -> list[str] | None:
    """Return the texts inside the generation tags; None without tags or if they belong to another text."""
    templates = shipped_templates()
    tagged = next(
        (t for t in (f"{name}_training", name) if "{% generation" in _tight(templates.get(t, ""))), None
    )
    if tagged is None:
        return None
    # transformers would read the clock
    template = re.sub(r"strftime_now\(.%Y-%m-%d.\)", "'2024-07-26'", templates[tagged])
    whole = {"return_dict": True, "chat_template": template}
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **whole)
    if encoded["input_ids"] != ChatEncoder(tokenizer).encode(messages).input_ids:
        return None
    return trained_runs(tokenizer, (encoded["input_ids"], encoded["assistant_masks"]))


def _tight(template: str) -> str:
    return re.sub(r"\{%-?\s*", "{% ", template)


def check(tokenizer, name: str, messages) -> str:
    """Encode, hold the result to the template's own text and to its authors' tags, and describe it."""
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode(messages)
    runs = trained_runs(tokenizer, encoded)
    stop = tokenizer.decode([encoder.stop_id])
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        assert answer.rpartition("</think>\n\n")[2] in run
    assert runs[-1].endswith(stop)
    if "strftime_now" not in tokenizer.chat_template:
        assert encoded.input_ids == tokenizer.apply_chat_template(
            messages, return_dict=False, date_string="26 Jul 2024"
        )
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    start = encoded.response_mask.index(True)
    if "dropped thoughts" not in encoder.notes:
        assert encoder.encode_prompt(messages[:first], answers[0]) == encoded.input_ids[:start]
    spans = spans_by_the_authors(tokenizer, name, messages)
    for index, span in enumerate(spans or ()):
        lead, found, tail = span.partition(runs[index])
        assert found, (span, runs[index])
        # The authors may count parts of the prompt, and white space or an end-of-text token after the turn.
        prompt = encoder.render(messages[: 2 * index + first], generation_prompt=True)
        assert prompt.endswith(lead) or ends_in_empty_thought(lead), lead
        assert tail.replace(tokenizer.eos_token, "").strip() == "", tail
    notes = "".join(f", {number} {what}" for what, number in encoder.notes.items())
    return f"trained {runs}{notes}{'' if spans is None else ', as its authors tag it'}"


def test_every_shipped_template_is_masked_right_or_refused_with_a_reason():
    listed, wrong = [], []
    for name in shipped_templates():
        tokenizer = shipped_tokenizer(name)
        for kind, messages in CONVERSATIONS.items():
            try:
                told = check(tokenizer, name, messages)
            except ValueError as error:
                told = f"refused: {error}"
                helps = re.search(r"Set template_kwargs (\w+): (true|false)\.$", told)
                if helps:
                    ChatEncoder(tokenizer, {helps[1]: helps[2] == "true"}).encode(messages)
            listed.append(f"{name:38} {kind:12} {told}")
            expected = [reason for start, reason in REFUSED.items() if name.startswith(start)]
            is_accepted = not expected or name in ACCEPTED_DESPITE_OF_THAT
            if kind == "one turn" and (
                told.startswith("refused") if is_accepted else not re.search(expected[0], told)
            ):
                wrong.append(listed[-1])
    sys.stdout.write("\n".join(["", *listed, ""]))
    assert len(shipped_templates()) > 70
    assert wrong == []


@pytest.mark.parametrize("name", ["trl/gptoss", "trl/muse_glimmer", "trl/llama3_2"])
def test_shipped_templates_that_read_the_clock_write_the_date_of_the_config(name):
    tokenizer = shipped_tokenizer(name)
    texts = [
        tokenizer.decode(ChatEncoder(tokenizer, template_date=date).encode(answered("Yes.")).input_ids)
        for date in ("2024-07-26", "2031-01-02")
    ]
    assert texts[0] != texts[1]
    assert re.search(r"26 Jul 2024|2024-07-26", texts[0])
    assert re.search(r"02 Jan 2031|2031-01-02", texts[1])
