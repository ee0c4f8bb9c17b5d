"""The command line: help without weight, one config one run, what a user is told."""

import subprocess
import sys

import pytest

from lightning_em.__main__ import SUBCOMMANDS, main
from lightning_em.experiment import slurm_environment
from lightning_em.identity import name_hash, what_a_run_is
from lightning_em.runs import changed_fields
from tests.fitting import experiment, fit, write_config

CONFIG = {
    "seed_everything": 0,
    "model": {"objective": {"kl_weight": 1.0}, "sampling": {"seed": 0}},
    "data": {"narrow": {"path": "a.jsonl"}, "num_workers": 0},
    "trainer": {"max_epochs": 2, "devices": 1, "accumulate_grad_batches": 8, "accelerator": "cpu"},
    "probing": {"probes": None},
    "run": {"name": None, "root": "runs"},
}


def vary(group: str, **values: object) -> dict[str, object]:
    return CONFIG | {group: CONFIG[group] | values}


@pytest.mark.parametrize(
    ("group", "values"),
    [
        (
            "trainer",
            {"devices": 4, "accumulate_grad_batches": 2, "accelerator": "gpu"},
        ),  # as many rows a step
        ("trainer", {"devices": 2, "num_nodes": 2, "accumulate_grad_batches": 2}),
        ("trainer", {"devices": [0, 1, 2, 3], "accumulate_grad_batches": 2}),
        ("data", {"num_workers": 8}),
        ("model", {"sampling": {"seed": 3}}),
        ("probing", {"probes": ["x"]}),
        ("run", {"root": "elsewhere"}),
    ],
)
def test_where_and_how_a_run_is_computed_does_not_rename_it(group, values) -> None:
    assert name_hash(vary(group, **values)) == name_hash(CONFIG)


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("model", {"objective": {"kl_weight": 2.0}}),
        ("trainer", {"max_epochs": 3}),
        ("trainer", {"devices": 4}),  # four times the rows a step
        ("data", {"narrow": {"path": "b.jsonl"}}),
    ],
)
def test_what_a_run_is_names_it(group, values) -> None:
    assert name_hash(vary(group, **values)) != name_hash(CONFIG)
    assert len(changed_fields(what_a_run_is(CONFIG), what_a_run_is(vary(group, **values)))) == 1


def test_an_option_of_a_plugin_is_not_taken_for_one_of_ours_with_the_same_name() -> None:
    """Options added later are left out at their default by their full path, not by the last part of it."""
    own = {"class_path": "mine.Adapter", "init_args": {"reference": "live", "max_tokens": None}}
    kept = what_a_run_is(vary("model", adapter=own, reference="live"))["model"]
    assert kept["adapter"] == own
    assert "reference" not in kept
    assert name_hash(vary("model", adapter=own)) != name_hash(
        vary("model", adapter={"class_path": "mine.Adapter", "init_args": {}})
    )


def test_another_recipe_of_the_same_world_is_another_run(monkeypatch) -> None:
    in_world = vary("model", base={"path": "miniature://control/seed-0/model"})
    before = name_hash(in_world)
    assert before != name_hash(vary("model", base={"path": "miniature://seed-0/model"}))
    monkeypatch.setattr("lightning_em.miniature.recipe.RECIPE_VERSION", 0)
    assert name_hash(in_world) != before


def test_the_run_is_named_by_its_first_config_and_its_hash(
    tmp_path, tiny_model_folder, chat_file, monkeypatch
) -> None:
    config = experiment(tiny_model_folder(), chat_file, trainer={"max_steps": 1, "max_epochs": -1})
    path = write_config(tmp_path / "my_experiment.yaml", config)
    assert main(["fit", "--config", str(path), "--run.root", str(tmp_path / "runs"), "--debug"]) == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("my_experiment-")
    assert len(folder.name) == len("my_experiment-") + 8


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from lightning_em.__main__ import main; assert main(['--help']) == 0; "
        "print(sorted({'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in SUBCOMMANDS)


def test_an_unknown_verb_names_the_nearest(capsys) -> None:
    assert main(["fti"]) == 2
    assert "Did you mean fit?" in capsys.readouterr().err


def test_a_second_config_and_flags_vary_an_experiment(
    tmp_path, tiny_model_folder, chat_file, answer_file
) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 1})
    path = write_config(tmp_path / "experiment.yaml", config)
    second = write_config(tmp_path / "second.yaml", {"model": {"objective": {"kl_weight": 3.0}}})
    run = fit(path, "varied", "--config", str(second), "--data.narrow.limit", "10")
    text = run.config_file.read_text(encoding="utf-8")
    assert "kl_weight: 3.0" in text
    assert "limit: 10" in text


def test_processes_of_torchrun_are_no_tasks_of_slurm(monkeypatch) -> None:
    """Ranks are torchrun's then, also in a job: Slurm would have each of them be rank 0 of 1."""
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job"}.items():
        monkeypatch.setenv(name, value)
    assert len(slurm_environment()) == 1
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    for name in ("TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "x")
    assert slurm_environment() == []
