"""Keys are hidden, everything else is left as it is."""

import pytest

from lightning_em.redaction import HIDDEN, redacted, redacted_text, redacted_words


@pytest.mark.parametrize(
    "name", ["api_key", "OPENAI_API_KEY", "judge.api_key", "password", "auth_token", "hf_token", "token"]
)
def test_values_of_secret_names_are_hidden(name) -> None:
    assert redacted({"a": [{name: "value"}]}) == {"a": [{name: HIDDEN}]}
    assert redacted_words([f"--{name}", "value", "x"]) == [f"--{name}", HIDDEN, "x"]
    assert redacted_words([f"--{name}=value"]) == [f"--{name}={HIDDEN}"]


@pytest.mark.parametrize("value", ["sk-0123456789abcdef", "hf_abcdefghijklmnop", "AKIAABCDEFGHIJKLMNOP"])
def test_values_that_look_like_keys_are_hidden(value) -> None:
    assert redacted({"note": f"use {value}!"}) == {"note": f"use {HIDDEN}!"}


def test_values_of_the_environment_are_hidden(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "a-very-plain-value")
    assert redacted_text("got a-very-plain-value back") == "got <JUDGE_API_KEY> back"


def test_a_plain_config_is_left_alone() -> None:
    config = {
        "model": {
            "adapter": {"class_path": "lightning_em.adapters.LoRA", "init_args": {"rank": 1, "layers": [0.5]}}
        },
        "data": {"max_tokens": 5, "pad_token": "<pad>", "path": "task-force-of-somebody/model", "seed": None},
    }
    assert redacted(config) == config
