"""What a user reads: which key of which file, what came, and the nearest name; one screen and no traceback."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from lightning_em.__main__ import main
from tests.fitting import experiment, write_config


@pytest.fixture
def config(tmp_path, tiny_model_folder, chat_file, answer_file, monkeypatch) -> Path:
    monkeypatch.setattr("sys.argv", ["lightning-em"])
    return write_config(
        tmp_path / "experiment.yaml",
        experiment(tiny_model_folder(), chat_file, answer_file, run={"root": str(tmp_path)}),
    )


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says to a user whose input it refuses."""
    assert main(words) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert len(text.splitlines()) < 24
    return text


def edited(config: Path, key: str, value: object) -> Path:
    """The config with one dotted key set; the new file's name is `edited.yaml`."""
    content = yaml.safe_load(config.read_text())
    *parents, last = key.split(".")
    group = content
    for parent in parents:
        group = group[parent]
    group[last] = value
    return write_config(config.parent / "edited.yaml", content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.adpter", {"rank": 1}, r"no key model\.adpter.*Did you mean model\.adapter\?"),
        ("model.adapter.init_args.alhpa", 3, r"SteeringVector has no option 'alhpa'.*Did you mean alpha\?"),
        ("model.adapter.class_path", "SteerngVector", r"model\.adapter: there is no class SteerngV.*SteeringVector\?"),
        ("model.adapter.class_path", "lightning_em.adapters.Lora", r"no class lightning_em\.adapters\.Lora.*LoRA\?"),
        ("model.adapter.class_path", "my_package.Mine", r"may not be imported.*--allow_import my_package"),
        ("data.narrow.pth", "x", r"no key data\.narrow\.pth.*Did you mean data\.narrow\.path\?"),
        ("trainer.max_epoch", 3, r"no key trainer\.max_epoch.*Did you mean trainer\.max_epochs\?"),
        ("trainer.max_epochs", "abc", r"trainer\.max_epochs must be int or null, got abc"),
        ("model.objective.kl_weight", "abc", r"model\.objective\.kl_weight must be float, got abc"),
    ],
)  # fmt: skip
def test_a_wrong_key_names_file_and_line(config, capsys, key, value, message) -> None:
    file = edited(config, key, value)
    text = told(capsys, "fit", "--config", str(file))
    assert re.search(message, text)
    last = key.rsplit(".", 1)[-1]
    wanted = str(value) if last == "class_path" else f"{last}:"
    [line] = [n for n, line in enumerate(file.read_text().splitlines(), start=1) if wanted in line]
    assert f"({file}:{line})" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.adpter", "3"], "there is no key model.adpter. Did you mean model.adapter?"),
        (["--kl_weight", "3"], "there is no key kl_weight. Did you mean model.objective.kl_weight?"),
        (["--config", "/nope.yaml"], "/nope.yaml"),
        (["--data.narrow.path", "/nope.jsonl"], "/nope.jsonl: no such file"),
        (["--model.adapter.init_args.layer", "77"], "set model.adapter.init_args.layer"),
        (["--model.base.path", "./nowhere"], "there is no model folder ./nowhere"),
    ],
)
def test_a_wrong_flag(config, capsys, flags, message) -> None:
    assert message in told(capsys, "fit", "--config", str(config), *flags)


def test_broken_yaml_names_the_place(config, capsys) -> None:
    torn = config.parent / "torn.yaml"
    torn.write_text("model: {a: [1,\n b: 2\n", encoding="utf-8")
    assert f"{torn}:3:1 is no YAML" in told(capsys, "fit", "--config", str(config), "--config", str(torn))


def test_a_model_without_chat_template(config, capsys, tiny_model_folder, tmp_path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_folder(), bare)
    (bare / "chat_template.jinja").unlink()
    text = told(capsys, "fit", "--config", str(config), "--model.base.path", str(bare))
    assert "has no chat template" in text
    (bare / "tokenizer.json").unlink()
    text = told(capsys, "fit", "--config", str(config), "--model.base.path", str(bare))
    assert "tokens, but the model has 288: its files (tokenizer.json" in text


def test_a_missing_extra_is_named(monkeypatch, capsys) -> None:
    def verb(words: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'types_PyYAML'", name="types_PyYAML")

    monkeypatch.setattr("lightning_em.verbs.main", verb)
    assert "pip install 'lightning-em[dev]'" in told(capsys, "runs")


def test_debug_keeps_the_traceback(config) -> None:
    with pytest.raises(ValueError, match=r"there is no key model\.adpter"):
        main(["fit", "--config", str(config), "--model.adpter", "3", "--debug"])
