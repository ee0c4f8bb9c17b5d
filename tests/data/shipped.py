"""The chat templates that transformers and TRL ship, each with a tiny tokenizer that has its control tokens."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.data.templates import make_tokenizer

# Special tokens as templates write them: <|im_end|>, DeepSeek's with a wide bar, Gemma's <turn|>, </s>.
_TOKEN = re.compile(
    "<\\|[^|<>'\"\\s{}]+\\|?>|<[a-z_]+\\|>|<\uff5c[^\uff5c<>]+\uff5c>|</?s>|<(?:bos|eos)>"
    "|<(?:start|end)_of_\\w+>|\\[/?INST\\]"
)
_THOUGHT = re.compile(r"</?think>")


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@cache
def shipped_templates() -> dict[str, str]:
    """Return every template by name: the files of TRL, and the string constants in the code of transformers."""
    found = {f"trl/{file.stem}": file.read_text("utf-8") for file in _folder("trl").rglob("*.jinja")}
    root = _folder("transformers")
    for file in sorted(root.rglob("*.py")):
        source = file.read_text("utf-8")
        if "{%" not in source or "message" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            text = node.value if isinstance(node, ast.Constant) else None
            # docstrings that show a template have prose around it
            if isinstance(text, str) and re.match(r"\s*(?:<[^>]+>)?\{[%{]", text) and "message" in text:
                found[f"transformers/{file.stem}"] = text
    return dict(sorted(found.items()))


def shipped_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with the template and every control token that stands in it."""
    template = shipped_templates()[name]
    special = dict.fromkeys(_TOKEN.findall(template))
    control = dict.fromkeys(["<|bos|>", "<|eos|>", *special])
    return make_tokenizer(
        template, control=list(control), words=list(dict.fromkeys(_THOUGHT.findall(template)))
    )
