"""An experiment in Python is the run of the command line: folder, name, config.yaml and bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_em
from lightning_em.experiment import Experiment, as_options
from lightning_em.probes import ScaleCurve
from lightning_em.runs import RunFolder
from tests.fitting import VECTOR, command, experiment, final_adapter, metrics_of, write_config

OVERRIDES = {
    "model.objective.kl_weight": 3,
    "data.narrow.topics": None,
    "model.optimizer.init_args.betas": [0.9, 0.99],
    "checkpoint": {"every_n_steps": 3},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_folder, chat_file, answer_file) -> Path:
    """An experiment that refers to a file in another folder."""
    folder = tmp_path_factory.mktemp("experiment")
    content = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 1})
    (folder / "parts").mkdir()
    write_config(folder / "parts" / "vector.yaml", VECTOR)
    content["model"]["adapter"] = "../parts/vector.yaml"
    (folder / "experiments").mkdir()
    return write_config(folder / "experiments" / "tiny.yaml", content)


@pytest.fixture(scope="module")
def in_python(config) -> lightning_em.Experiment:
    made = lightning_em.Experiment.from_yaml(
        config, OVERRIDES | {"run.root": str(config.parents[1] / "python")}
    )
    before = list(sys.argv), dict(os.environ), sys.modules["__main__"].__spec__
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    made.fit()
    assert (list(sys.argv), dict(os.environ), sys.modules["__main__"].__spec__) == before
    assert handlers == [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ]
    return made


def test_python_and_the_command_line_make_the_same_run(config, in_python) -> None:
    root = config.parents[1] / "command"
    done = command("fit", f"--config={config}", *as_options(OVERRIDES), f"--run.root={root}")
    assert done.returncode == 0, done.stderr
    [path] = root.iterdir()
    theirs, ours = RunFolder(path), in_python.folder
    assert in_python.name == theirs.path.name
    assert in_python.name.startswith("tiny-")
    configs = [yaml.safe_load(run.config_file.read_text()) for run in (ours, theirs)]
    assert configs[0].pop("run")["root"] != configs[1].pop("run")["root"]
    assert configs[0] == configs[1]
    assert configs[0]["model"]["objective"]["kl_weight"] == 3
    assert ours.steps() == theirs.steps() == [3, 5]
    assert final_adapter(ours) == final_adapter(theirs)
    assert metrics_of(ours) == metrics_of(theirs)
    records = [run.read_run() for run in (ours, theirs)]
    assert records[0]["identity"] == records[1]["identity"]
    assert records[0]["command"][:-1] == ["lightning-em", *records[1]["command"][1:-1]]


def test_a_fit_is_opened_evaluated_and_probed(in_python) -> None:
    again = in_python.fit()
    assert again.step == 5
    assert again.metrics["train/ce"].notna().sum() == 5
    losses = in_python.validate()
    assert losses["val/ce"] == pytest.approx(again.metrics["val/ce"].dropna().iloc[-1], rel=1e-5)
    assert in_python.probe([ScaleCurve(scales=[0.0, 1.0])], num_examples=4) == 2
    assert in_python.probe([ScaleCurve(scales=[0.0, 1.0])], num_examples=4) == 0
    assert set(lightning_em.load_run(in_python.folder.path).records["step"]) == {3, 5}


def test_module_and_data_are_there_before_a_fit(config) -> None:
    made = Experiment.from_yaml([config], {"data.batch_size": 3})
    assert made.data.batch_size == 3
    assert not hasattr(made.module, "model"), "weights were loaded"
    assert not made.folder.path.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kl_weight": 3}, r"there is no key kl_weight\. Did you mean model\.objective\.kl_weight\?"),
        ({"model.objective.kl_weight": "three"}, r"model\.objective\.kl_weight must be float, got three"),
        ({"model.adapter": "nope.yaml"}, r"--model\.adapter names nope\.yaml, but there is no file"),
        ({"model.objective.kl_weight": object()}, r"model\.objective\.kl_weight must be a string, a number"),
    ],
)
def test_what_cannot_be_used_is_a_value_error_of_one_screen(config, overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        Experiment.from_yaml(config, overrides)
    with pytest.raises(ValueError, match="but there is no file"):
        Experiment.from_yaml("nowhere.yaml")


def test_settings_that_cannot_work_are_refused_before_anything_is_written(config, tmp_path) -> None:
    made = Experiment.from_yaml(config, {"trainer.devices": "auto", "run.root": str(tmp_path / "runs")})
    with pytest.raises(ValueError, match="write the number"):
        made.fit()
    assert not (tmp_path / "runs").exists()


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, lightning_em; print('torch' in sys.modules); lightning_em.load_run; "
    code += "print('torch' in sys.modules); lightning_em.Experiment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        lightning_em.fit  # noqa: B018


@pytest.mark.slow
def test_ranks_that_a_notebook_starts_train_twice_in_one_process(config, tmp_path) -> None:
    """Lightning starts them by `sys.argv`, which is not ours there, and would take a second fit for a rank."""
    code = (
        "import sys; from lightning_em import Experiment\n"
        "for name in ('first', 'second'):\n"
        "    values = {'trainer': 'configs/trainer/cpu_ddp2.yaml', 'trainer.max_epochs': 1, 'run.name': name}\n"
        "    values['run.root'] = sys.argv[2]\n"
        "    print(Experiment.from_yaml(sys.argv[1], values).fit().step)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "3"]  # 5 optimizer steps on one rank
    first, second = (RunFolder(tmp_path / name) for name in ("first", "second"))
    assert first.read_run()["attempts"][0]["world_size"] == 2
    assert final_adapter(first) == final_adapter(second)
