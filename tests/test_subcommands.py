"""The subcommands beside those of LightningCLI: messages for arguments that cannot be used."""

import re

import pytest
import yaml

from lightning_em.__main__ import main
from lightning_em.rebuild import device_for, load_probing, rebuild_run
from lightning_em.records import read_results
from lightning_em.runs import RunFolder
from tests.fitting import experiment, fit, write_config
from tests.test_errors import told


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder, chat_file):
    """A run of two steps, with a checkpoint after each."""
    config = experiment(tiny_model_folder(), chat_file, trainer={"max_steps": 2, "max_epochs": -1})
    config["checkpoint"]["every_n_steps"] = 1
    return fit(write_config(tmp_path_factory.mktemp("subcommands") / "experiment.yaml", config), "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read \S+probing\.yaml: No such file"),
        ("", r"probing\.yaml must hold keys, as \S+ does; it is empty"),
        ("num_examples: 3\n", r"probing\.yaml names no probe"),
        ("probs: []\nprobes: [{class_path: ScaleCurve}]\n", r"no key probs \(\S+:1\)\. Did you mean probes"),
        ("probes: [{class_path: ScaleCurve}]\nbatch_size: 0\n", r"batch_size of \S+ must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_probing_file_that_cannot_be_used_is_refused_before_the_model_loads(
    run, tmp_path, capsys, monkeypatch, content, message
) -> None:
    monkeypatch.setattr("lightning_em.rebuild.load_module", lambda *_: pytest.fail("the model was loaded"))
    file = tmp_path / "probing.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert re.search(message, told(capsys, "probe", str(run.path), "--config", str(file)))


@pytest.mark.parametrize(
    ("trainer", "device"),
    [
        ({"accelerator": "cpu", "strategy": "auto"}, "cpu"),
        ({"accelerator": "gpu", "strategy": "auto"}, "cuda"),
        ({"accelerator": "auto", "strategy": "ddp"}, "cuda"),
        ({"accelerator": "gpu", "strategy": {"class_path": "lightning_em.strategies.ShardedBase"}}, "cpu"),
    ],
)
def test_a_run_is_measured_on_where_one_device_held_its_base(trainer, device, tmp_path, monkeypatch) -> None:
    folder = RunFolder(tmp_path)
    folder.config_file.write_text(yaml.safe_dump({"trainer": trainer}))
    assert device_for(folder).type == "cpu", "there is no GPU here"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_for(folder).type == device


def test_a_rebuilt_run_goes_to_its_device(run, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("lightning_em.rebuild.device_for", lambda folder: f"a device for {folder.path.name}")
    monkeypatch.setattr("lightning_em.module.EMModule.to", lambda _, device: asked.append(device))
    rebuild_run(str(run.path), allow_zero_adapter=True)
    assert asked == ["a device for run"]


def test_the_flags_of_probe_win_over_its_file(run, tmp_path, capsys) -> None:
    probe = {"class_path": "lightning_em.probes.ScaleCurve", "init_args": {"scales": [1.0]}}
    file = write_config(tmp_path / "probing.yaml", {"probes": [probe], "num_examples": 8})
    assert load_probing(run, str(file)).num_examples == 8
    assert load_probing(run, str(file)).batch_size == 16
    assert load_probing(run, str(file), batch_size=3).batch_size == 3
    words = ["probe", str(run.path), "--config", str(file), "--num_examples"]
    assert main([*words, "4", "--allow_zero_adapter"]) == 0
    assert {len(result.examples) for result in read_results(run.probe_file("scale_curve"))} == {4}
    assert "--num_examples must be at least 1, got 0" in told(capsys, *words, "0")


def test_a_run_of_an_allowed_package_names_the_flag_it_was_made_with(run, capsys, tmp_path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for file in (run.config_file, run.run_file):
        (copy / file.name).write_text(
            file.read_text().replace("lightning_em.adapters.SteeringVector", "my_own.Mine")
        )
    (copy / "checkpoints").symlink_to(run.checkpoints)
    changed = type(run)(copy)
    changed.update_run(allowed_imports=["my_own"])
    probing = write_config(
        tmp_path / "probing.yaml", {"probes": [{"class_path": "lightning_em.probes.ScaleCurve"}]}
    )
    text = told(capsys, "probe", str(copy), "--config", str(probing))
    assert re.search(r"my_own\.Mine may not be imported by a config \(\S+config\.yaml:\d+\)", text)
    assert "This run was made with --allow_import my_own." in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data", "check", "nope.jsonl"), "expected a JSONL file.\n"),
        (("data", "check", "experiment.yaml"), "experiment.yaml is not a JSONL file: pass an experiment with --config"),
        (("data", "show", "x.jsonl", "--base", "y", "--num_rows", "0"), "--num_rows must be at least 1, got 0"),
        (("study", "status", "configs"), "configs is a folder, expected the file of a study"),
        (("import", "nope", "--base", "some/hub"), "there is no file or folder 'nope'"),
        (("submit", "--config", "x.yaml", "--slurm.gpu", "1"), "no option --slurm.gpu. Did you mean --slurm.gpus?"),
        (("submit", "--config", "x.yaml", "--slurm.zzz", "1"), "no option --slurm.zzz. --slurm has partition, nodes"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_in_the_words_of_the_subcommand(capsys, words, message) -> None:
    assert message in told(capsys, *words)


def test_a_base_is_named_by_the_option_of_the_subcommand(capsys, chat_file) -> None:
    text = told(capsys, "data", "check", str(chat_file), "--base", "configs")
    assert "the folder configs holds no model: it has no config.json; set --base" in text


def test_the_control_world_has_a_share_of_its_own(capsys) -> None:
    assert main(["miniature", "build", "--control", "--blind_spot_share", "0.1"]) == 2
    assert "not allowed with argument --control" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["fit"], ["probe"], ["study", "run"], ["import"], ["submit"]])
def test_help_names_the_flags_of_every_verb(capsys, words) -> None:
    assert main([*words, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--allow_import NAME lets configs name classes of your package NAME" in text
    assert "--debug shows the traceback" in text
