"""What a user reads: which key of which file, what came, and the nearest name; one screen and no traceback."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from lightning_em.__main__ import main
from lightning_em.errors import explain_misconfiguration, explain_missing_module, place_of
from tests.fitting import experiment, write_config


@pytest.fixture
def config(tmp_path, tiny_model_folder, chat_file, answer_file, monkeypatch) -> Path:
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
        group = group.setdefault(parent, {})
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
        ("model.adapter.init_args.alpha", "abc", r"model\.adapter\.init_args\.alpha must be float, got abc"),
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
    ("key", "meant"),
    [
        ("checkpoint.every_n_step", "checkpoint.every_n_steps"),
        ("probing.num_example", "probing.num_examples"),
        ("model.base.dtyp", "model.base.dtype"),
        ("model.objective.kl_wieght", "model.objective.kl_weight"),
        ("data.narrow.limt", "data.narrow.limit"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--print_config"]], ids=str)
def test_a_typo_below_a_group_names_the_key_that_is_meant(config, capsys, key, meant, flags) -> None:
    file = edited(config, key, 5)
    text = told(capsys, "fit", "--config", str(file), *flags)
    assert f"there is no key {key} ({file}:" in text
    assert f"Did you mean {meant}?" in text


@pytest.mark.parametrize(
    ("key", "class_path", "given", "missing"),
    [
        ("model.adapter", "lightning_em.adapters.LoRA", {"rank": 2}, ["alpha", "target_modules"]),
        ("model.adapter", "lightning_em.adapters.SteeringVector", {}, ["layer"]),
        ("model.objective.schedule", "lightning_em.losses.HoldKL", {}, ["target"]),
    ],
)
def test_a_class_without_its_required_options_names_them(
    config, capsys, key, class_path, given, missing
) -> None:
    file = edited(
        config, key, {"class_path": class_path, "init_args": given} if given else {"class_path": class_path}
    )
    text = told(capsys, "fit", "--config", str(file))
    assert f"{class_path} ({file}:" in text
    keys = " and ".join(f"{key}.init_args.{name}" for name in missing)
    assert f"needs {' and '.join(missing)}: set {keys}." in text


def test_a_class_changed_by_flags_names_the_options_it_lacks(config, capsys) -> None:
    flags = [
        "--model.adapter.class_path",
        "lightning_em.adapters.LoRA",
        "--model.adapter.init_args.rank",
        "2",
    ]
    text = told(capsys, "fit", "--config", str(config), *flags)
    # `alpha` of the vector that it replaces is not taken over.
    assert (
        "lightning_em.adapters.LoRA needs alpha and target_modules: set model.adapter.init_args.alpha" in text
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.adpter", "3"], "there is no key model.adpter. Did you mean model.adapter?"),
        (["--kl_weight", "3"], "there is no key kl_weight. Did you mean model.objective.kl_weight?"),
        (["--config", "/nope.yaml"], "/nope.yaml"),
        (["--data.narrow.path", "/nope.jsonl"], "/nope.jsonl: no such file"),
        (["--model.adapter.init_args.layer", "77"], "set model.adapter.init_args.layer"),
        (["--model.base.path", "./nowhere"], "there is no model folder ./nowhere"),
        (
            ["--model.base.path", "configs"],
            "the folder configs holds no model: it has no config.json; set model.base",
        ),
        (["--trainer.max_step", "3"], "there is no key trainer.max_step. Did you mean trainer.max_steps?"),
        (["--trainer.max_epochs", "-3"], "trainer.max_epochs: `max_epochs` must be a non-negative integer"),
        (
            ["--trainer.val_check_interval", "-3"],
            "trainer.val_check_interval: You have passed invalid value -3",
        ),
        (["--trainer.logger", "true"], "trainer.logger true names no logger: leave it out"),
        (["--trainer.accelerator", "tpu"], "trainer.accelerator tpu cannot work here"),
        (
            ["--trainer.accumulate_grad_batches", "0"],
            "trainer.accumulate_grad_batches must be at least 1, got 0",
        ),
        (
            ["--model.init_from", "runs/nope"],
            "model.init_from is runs/nope, but there is no run folder 'runs/nope'",
        ),
        (["--model.objective.kl_weight", "three"], "model.objective.kl_weight must be float, got three.\n"),
        (
            ["--data.narrow.answer", "foo"],
            "data.narrow.answer must be one of messages, good, bad, mixed, both, got foo",
        ),
        (["x.yaml"], "unexpected argument x.yaml; write --config x.yaml."),
        (["x"], "unexpected argument x; every value needs its --KEY."),
    ],
)
def test_a_wrong_flag(config, capsys, flags, message) -> None:
    assert message in told(capsys, "fit", "--config", str(config), *flags)


@pytest.mark.parametrize("key", ["config", "model.adapter", "model.objective", "trainer", "data", "probing"])
def test_a_missing_or_empty_file(config, capsys, tmp_path, key) -> None:
    text = told(capsys, "fit", "--config", str(config), f"--{key}", "nope.yaml")
    assert f"--{key} names nope.yaml, but there is no file {Path.cwd()}/nope.yaml." in text
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n", encoding="utf-8")
    assert f"{empty} is empty" in told(capsys, "fit", "--config", str(config), f"--{key}", str(empty))


def test_a_missing_file_in_a_file(config, capsys) -> None:
    file = edited(config, "model.adapter", "../parts/nope.yaml")
    text = told(capsys, "fit", "--config", str(file))
    assert re.search(
        r"model\.adapter \(\S+edited\.yaml:\d+\) names \.\./parts/nope\.yaml, but there is no", text
    )


def test_the_layers_of_lora_are_named(config, capsys) -> None:
    lora = {"rank": 1, "alpha": 1.0, "target_modules": ["down_proj"], "layers": [77]}
    file = edited(config, "model.adapter", {"class_path": "LoRA", "init_args": lora})
    assert "set model.adapter.init_args.layers." in told(capsys, "fit", "--config", str(file))


def test_a_flag_is_not_blamed_on_the_file_that_it_varies(config, capsys) -> None:
    lora = {"rank": 1, "alpha": 1.0, "target_modules": ["down_proj"]}
    file = edited(config, "model.adapter", {"class_path": "lightning_em.adapters.LoRA", "init_args": lora})
    text = told(capsys, "fit", "--config", str(file), "--model.adapter.init_args.rank", "8.5")
    assert "model.adapter.init_args.rank must be int, got 8.5.\n" in text


def test_nothing_at_all(capsys, monkeypatch) -> None:
    wanted = (
        "give --config configs/experiment/x.yaml, or --model.base.path, --model.adapter, --data.narrow.path."
    )
    assert wanted in told(capsys, "fit")
    assert "overfit.yaml is incomplete: add --model.base" in told(
        capsys, "fit", "--config", "configs/debug/overfit.yaml"
    )


@pytest.mark.parametrize("verb", ["fit", "submit"])
def test_a_study_is_no_experiment(capsys, monkeypatch, verb) -> None:
    study = "configs/study/miniature.yaml"
    assert f"{study} is a study: lightning-em study run {study}" in told(capsys, verb, "--config", study)


def test_an_allowed_package_that_is_not_here(config, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lightning_em.imports._named", set())
    file = edited(config, "model.adapter.class_path", "my_adapters.Mine")
    text = told(capsys, "fit", "--config", str(file), "--allow_import", "my_adapters")
    assert (
        "there is no package my_adapters here; install it, or put its folder on PYTHONPATH (`PYTHONPATH=."
        in text
    )


def test_a_misconfiguration_of_lightning_is_one_message() -> None:
    assert explain_misconfiguration("`x_y` must\nbe 1.", []) == "trainer.x_y: `x_y` must be 1."
    assert "there is no GPU here" in explain_misconfiguration("No supported gpu backend found!", [])
    assert explain_misconfiguration("It cannot be.", []) == "It cannot be."


def test_the_place_of_a_key_in_what_is_no_yaml_is_left_out(tmp_path) -> None:
    file = tmp_path / "torn.yaml"
    file.write_text("trainer: {accelerator: gpu\n b: [", encoding="utf-8")
    assert place_of("trainer.accelerator", ["--config", str(file)]) == ""
    file.write_text("devices: 1\naccelerator: gpu\n", encoding="utf-8")
    assert place_of("trainer.accelerator", ["--trainer", str(file)]) == f" ({file}:2)"
    assert place_of("trainer.accelerator", ["--trainer", str(file), "--trainer.accelerator=gpu"]) == ""


def test_a_module_error_without_a_name_is_told_as_it_is() -> None:
    assert explain_missing_module(ModuleNotFoundError("no TPU here")) == "no TPU here"


def test_broken_yaml_names_the_place(config, capsys) -> None:
    torn = config.parent / "torn.yaml"
    torn.write_text("model: {a: [1,\n b: 2\n", encoding="utf-8")
    assert f"{torn}:3:1 is not valid YAML" in told(
        capsys, "fit", "--config", str(config), "--config", str(torn)
    )


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

    monkeypatch.setattr("lightning_em.subcommands.main", verb)
    assert "pip install 'lightning-em[dev]'" in told(capsys, "runs")


def test_debug_keeps_the_traceback(config) -> None:
    with pytest.raises(ValueError, match=r"there is no key model\.adpter"):
        main(["fit", "--config", str(config), "--model.adpter", "3", "--debug"])
