"""Studies that run to their end whatever dies, with the results of an undisturbed one."""

import io
import json
import os
import signal
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lightning_em import imports, load_run, lock
from lightning_em.__main__ import main
from lightning_em.analysis.cells import StudyFolder
from lightning_em.analysis.claims import evaluate
from lightning_em.analysis.measurements import read_measurements
from lightning_em.analysis.pairs import read_pairs
from lightning_em.exchange.exporting import export_run
from lightning_em.runs import RunFolder
from lightning_em.study import Study, read_study
from lightning_em.study.execution import run_study, tasks_of
from lightning_em.study.report import report
from lightning_em.study.states import Durations, budget_of
from tests.faults.processes import Running, wait_until
from tests.fitting import experiment, final_adapter, fit, metrics_of, write_config
from tests.study.standing import is_done, state_of
from tests.test_plugin import PROBE, SOURCE

SLOW = {
    "allow_import": "tests",
    "trainer.callbacks+": "tests.faults.inject.Slow",
    "trainer.callbacks.init_args.seconds": 0.1,
}


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch) -> None:
    """Workers are forked from the server that has imported everything, instead of importing it themselves."""
    monkeypatch.setattr("lightning_em.study.workers.START_METHOD", "forkserver")


def arms(**more: Any) -> dict[str, Any]:
    return {
        "general": {"role": "general"},
        "narrow": {"role": "narrow", "level": 1, "set": {"model.objective.kl_weight": "{level}"}},
        "reverted": {"role": "reverted", "init_from": "narrow"},
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_folder, chat_file, answer_file) -> Path:
    """An experiment of 10 steps with a checkpoint every second one."""
    folder = tmp_path_factory.mktemp("study")
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 2})
    write_config(folder / "experiment.yaml", config)
    return folder


def study_of(
    folder: Path, root: str, arms: dict[str, Any], claims: dict[str, Any] | None = None, **settings: Any
) -> Study:
    content = {
        "name": "tiny",
        "experiment": "experiment.yaml",
        "seeds": [0],
        "set": {"seed_everything": "{seed}", "model.objective.kl_weight": 0, **settings},
        "adapters": {"vector": {}},
        "arms": arms,
        "claims": claims or {},
    }
    file = folder / f"{root}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return read_study(file, folder / root)


@pytest.fixture(scope="module")
def undisturbed(folder) -> Study:
    """All runs by one worker, one after the other; do not change them."""
    study = study_of(folder, "undisturbed", arms())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_em.study.workers.START_METHOD", "forkserver")
        assert run_study(study, workers=1, console=Console(file=io.StringIO())) == 0
    return study


def assert_same_results(study: Study, undisturbed: Study) -> None:
    for run, other in zip(study.runs, undisturbed.runs, strict=True):
        here, there = StudyFolder(study.root).run(run.cell), StudyFolder(undisturbed.root).run(other.cell)
        assert here.status() == "finished", run.name
        assert final_adapter(here) == final_adapter(there), run.name
        assert metrics_of(here) == metrics_of(there), run.name


def test_a_run_of_a_long_lived_worker_is_the_run_of_the_command_line(undisturbed, tmp_path) -> None:
    for number, run in enumerate(undisturbed.runs):
        config = tmp_path / "experiment.yaml"
        config.write_text((undisturbed.file.parent / "experiment.yaml").read_text())
        alone = fit(config, f"alone-{number}", *run.args[1:-2])
        studied = StudyFolder(undisturbed.root).run(run.cell)
        assert final_adapter(alone) == final_adapter(studied), run.name
        assert metrics_of(alone) == metrics_of(studied), run.name


def test_runs_that_start_from_others_start_there(undisturbed) -> None:
    root = StudyFolder(undisturbed.root)
    cells = {cell.arm: cell for cell in root.cells()}
    norms = {arm: metrics_of(root.run(cell)) for arm, cell in cells.items()}
    assert norms["reverted"][1]["train/effective_norm"] > norms["general"][1]["train/effective_norm"] + 0.1
    assert root.finished() == [run.cell for run in undisturbed.runs]


def test_logs_of_a_fit_are_in_its_folder_alone(undisturbed) -> None:
    for run in undisturbed.runs:
        log = StudyFolder(undisturbed.root).run(run.cell).console_log.read_text()
        assert log.count("narrow data") == 1, "another run's lines are here"


def test_pairs_are_compared(undisturbed) -> None:
    assert len(list((undisturbed.root / "pairs").rglob("vector-default-seed0.jsonl"))) >= 3


def test_what_is_finished_is_left_alone(undisturbed) -> None:
    files = [StudyFolder(undisturbed.root).run(run.cell).run_file for run in undisturbed.runs]
    before = [file.stat().st_mtime_ns for file in files]
    assert [task.kind for task in tasks_of(undisturbed, undisturbed.runs)] == ["compare"]
    output = io.StringIO()
    assert run_study(undisturbed, workers=1, console=Console(file=output, width=200)) == 0
    assert "3 runs, 3 done; 0 to do and 1 group to compare" in output.getvalue()
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_finished_run_under_other_settings_is_no_finished_run(undisturbed, folder) -> None:
    study = study_of(folder, "undisturbed", arms(), **{"trainer.max_epochs": 3})
    output = io.StringIO()
    assert run_study(study, study.chosen(arms=["general"]), 1, console=Console(file=output, width=400)) == 1
    text = output.getvalue()
    assert "general-vector-seed0 holds another run (another config: trainer.max_epochs: 2 -> 3)" in text
    assert "Remove that folder to run this one there" in text
    assert state_of(study, study.runs[0]) == "differs"


def test_a_finished_run_whose_files_say_something_else_now_is_no_finished_run(folder, tmp_path) -> None:
    config = yaml.safe_load((folder / "experiment.yaml").read_text())
    optimizer, config["model"]["optimizer"] = config["model"]["optimizer"], "../optimizer.yaml"
    (tmp_path / "parts").mkdir()
    write_config(tmp_path / "optimizer.yaml", optimizer)
    write_config(tmp_path / "parts" / "model.yaml", config["model"])
    write_config(tmp_path / "experiment.yaml", config | {"model": "parts/model.yaml"})
    study = study_of(tmp_path, "runs", {"general": {"role": "general"}})
    assert run_study(study, workers=1, console=Console(file=io.StringIO())) == 0
    assert is_done(study, study.runs[0])

    optimizer["init_args"]["lr"] = 0.01
    write_config(tmp_path / "optimizer.yaml", optimizer)
    study = study_of(tmp_path, "runs", {"general": {"role": "general"}})
    assert not is_done(study, study.runs[0])
    output = io.StringIO()
    assert run_study(study, workers=1, console=Console(file=output, width=400)) == 1
    assert "(another config: model.optimizer.init_args.lr: 0.05 -> 0.01)" in output.getvalue()


def test_an_adapter_and_a_probe_of_another_package_count_in_a_study(folder, tmp_path, monkeypatch) -> None:
    (tmp_path / "my_adapters.py").write_text(SOURCE + PROBE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "_named", {"my_adapters"})
    beyond = {"class_path": "my_adapters.Beyond", "init_args": {"scales": [1.5, 2.0]}}
    probing = {"probing": {"probes": [beyond]}}
    (tmp_path / "experiment.yaml").write_text(
        (folder / "experiment.yaml").read_text() + yaml.safe_dump(probing)
    )
    adapter = {"class_path": "my_adapters.Shift", "init_args": {"layer": 1, "alpha": 4.0}}
    claim = {"more": "narrow", "source": "beyond", "quantity": "ce_change", "coordinates": {"scale": 2}}
    study = study_of(
        tmp_path, "runs", arms(), claims={"differences": {"Q1": claim}}, **{"model.adapter": adapter}
    )
    output = io.StringIO()
    assert run_study(study, workers=1, console=Console(file=output, width=400)) == 0, output.getvalue()
    points = {
        name: read_pairs(StudyFolder(study.root), name)[0].points
        for name in ("adapter_cosine", "effect_cosine")
    }
    assert [point.quantity for point in points["adapter_cosine"]] == 3 * ["cosine"], (
        "its update says how it acts"
    )
    assert any(point.quantity == "effect_cosine" for point in points["effect_cosine"])
    run = StudyFolder(study.root).run(study.runs[0].cell)
    records = load_run(run.path).records
    assert set(records["step"]) == set(run.steps())
    report(study.root)
    frame = read_measurements(study.root / "measurements.csv")
    own = frame[(frame["source"] == "beyond") & (frame["role"] != "study")]
    assert set(zip(own["arm"], own["adapter"], own["seed"], strict=True)) == {
        (arm, "vector", 0) for arm in ("general", "narrow", "reverted")
    }
    assert set(own["unit"]) == {"nats_per_token"}
    for scale in (1.5, 2.0):
        recorded = records[(records["step"] == run.steps()[-1]) & (records["scale"] == scale)]["value"]
        [counted] = own[(own["arm"] == "general") & (own["scale"] == scale)]["value"]
        assert counted == pytest.approx(recorded.item(), rel=1e-5)
    values = own[own["scale"] == 2.0].set_index("arm")["value"]
    [result] = evaluate(frame, ["Q1"])
    assert (result.estimate, result.unit) == (values["narrow"] - values["general"], "nats_per_token")
    said = "**Q1** the narrow solution has more beyond/ce_change[scale=2] than the general one"
    assert said in (study.root / "report.md").read_text()
    of_adapter = {
        "checkpoint",
        "rotation",
        "pca",
        "distance",
        "adapter_cosine",
        "equal_norm",
        "gradient_cosine",
    }
    assert of_adapter <= set(frame["source"]), (
        "its update gives norms, turns, components, distances and cosines"
    )
    export_run(str(run.path), "safetensors", tmp_path / "exported")
    assert (tmp_path / "exported" / "README.md").is_file()
    monkeypatch.setattr(imports, "_named", set())
    assert all(is_done(study, run) for run in study.runs), "what may be imported is no part of a run"


def test_a_killed_worker_is_replaced_and_its_run_continued(folder, undisturbed) -> None:
    study = study_of(folder, "killed", arms(), **SLOW)
    victim = StudyFolder(study.root).run(study.runs[1].cell)
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(victim.steps()) >= 2, what="two checkpoints")
        killed.append(json.loads((victim.path / lock.LOCK).read_text())["pid"])
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    output = io.StringIO()
    assert run_study(study, workers=1, console=Console(file=output, width=200)) == 0
    assert killed
    assert f"{victim.path.name}: its worker died (SIGKILL)" in output.getvalue()
    attempts = victim.read_run()["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["killed", "finished"]
    assert attempts[1]["from_step"] >= 4
    assert_same_results(study, undisturbed)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_takes_its_workers_along_and_goes_on(number, folder, undisturbed) -> None:
    study = study_of(folder, f"stopped-{number.name}", arms(), **SLOW)
    words = ["study", "run", str(study.file), "--root", str(study.root), "--workers", "1"]
    victim = StudyFolder(study.root).run(study.runs[1].cell)
    first = Running(*words, output=folder / "first.out")
    wait_until(lambda: len(victim.steps()) >= 2 or not first.is_alive, what="two checkpoints")
    assert first.is_alive, first.output.read_text()
    worker = json.loads((victim.path / lock.LOCK).read_text())["pid"]
    assert worker != first.pid
    first.send(number)
    assert first.wait().code == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: not is_alive(worker), seconds=5, what="the worker's end")
    state = "killed" if number == signal.SIGKILL else "preempted"
    # its lock goes with its last thread, a moment after it shows as dead
    wait_until(lambda: state_of(study, study.runs[1]) == state, seconds=5, what=f"a run that is {state}")
    assert state_of(study, study.runs[2]) == "to do"
    second = Running(*words, output=folder / "second.out").wait()
    assert second.code == 0, second.output
    assert "3 runs, 1 done; 2 to do" in second.output.replace("\n", " ")
    assert_same_results(study, undisturbed)


def test_a_failure_is_reported_and_stops_only_what_needs_it(folder) -> None:
    more = {
        "broken": {"role": "few_rows", "set": {"data.narrow.path": "nowhere.jsonl"}},
        "behind": {"role": "reverse", "init_from": "broken"},
        "general": {"role": "general"},
    }
    study, output = study_of(folder, "failing", more), io.StringIO()
    assert run_study(study, workers=1, console=Console(file=output, width=200)) == 1
    assert [state_of(study, run) for run in study.runs] == ["to do", "finished", "to do"]
    text = output.getvalue()
    assert "failed: broken-vector-seed0: " in text
    assert "nowhere.jsonl" in text
    assert "skipped: behind-vector-seed0: needs broken-vector-seed0" in text
    assert "1 done, 1 failed, 1 skipped" in text


def test_a_run_that_kills_every_worker_is_given_up(folder) -> None:
    deadly = {"allow_import": "tests", "trainer.callbacks+": "tests.study.trouble.Die"}
    more = {"deadly": {"role": "narrow", "set": deadly}, "general": {"role": "general"}}
    study, output = study_of(folder, "deadly", more), io.StringIO()
    assert run_study(study, workers=1, console=Console(file=output, width=200)) == 1
    assert (
        output.getvalue().count("deadly-vector-seed0: its worker died (SIGKILL)") == 4
    )  # 2 retries, 1 end, summary
    assert [state_of(study, run) for run in study.runs] == ["killed", "finished"]


def test_two_studies_in_one_root_are_refused(undisturbed, folder) -> None:
    other = study_of(folder, "undisturbed", {"general": {"role": "general"}})
    before = StudyFolder(undisturbed.root).cells()
    with (
        lock.RunLock(undisturbed.root, ["study"]),
        pytest.raises(lock.LockedError, match=r"undisturbed is in use by process"),
    ):
        run_study(other, console=Console(file=io.StringIO()))
    assert StudyFolder(undisturbed.root).cells() == before, "the plan of the study that is running is kept"


def test_numbers_of_workers_and_threads_make_sense(undisturbed) -> None:
    with pytest.raises(ValueError, match=r"--workers and --threads must be at least 1, got 0 and 1"):
        run_study(undisturbed, workers=0)


def test_the_budget_is_measured_where_it_can_be(undisturbed, folder, monkeypatch) -> None:
    read, seconds = RunFolder.read_run, iter((10, 20, 90))

    def read_with_times(run_folder: RunFolder) -> dict[str, Any]:
        record = read(run_folder)
        for attempt in record.get("attempts", []):
            start = datetime.fromisoformat(attempt["started"])
            attempt["ended"] = (start + timedelta(seconds=next(seconds))).isoformat()
        return record

    more = study_of(folder, "undisturbed", arms(reverse={"role": "reverse", "init_from": "general"}))
    tasks = tasks_of(more, more.runs)
    monkeypatch.setattr(RunFolder, "read_run", read_with_times)
    budget = budget_of(more.runs, tasks, Durations(more, more.runs))
    assert (budget.runs, budget.done, budget.comparisons) == (4, 3, 1)
    assert "measured on 3 finished runs" in budget.basis
    assert budget.seconds == 20 + 5  # no run of this arm yet: the median of all, and a comparison


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_smallest_study_runs_and_is_reported(tmp_path, capsys) -> None:
    """In two shipped worlds, as `miniature table` uses them."""
    file = Path(__file__).parents[2] / "configs" / "study" / "ci.yaml"
    assert main(["study", "run", str(file), "--root", str(tmp_path), "--workers", "2"]) == 0
    study = read_study(file, tmp_path)
    assert {state_of(study, run) for run in study.runs} == {"finished"}
    assert len(list((tmp_path / "pairs").rglob("rank32-default-seed*.jsonl"))) >= 6
    assert main(["study", "report", str(tmp_path), "--markdown", str(tmp_path / "report.md")]) == 0
    assert (tmp_path / "measurements.csv").is_file()
    assert "C1" in (tmp_path / "report.md").read_text()
