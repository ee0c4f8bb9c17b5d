"""A run counts as a planned one if it has the identity of that one: config, data and start."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lightning_em import lock
from lightning_em.__main__ import main
from lightning_em.analysis.cells import StudyFolder
from lightning_em.identity import name_hash
from lightning_em.miniature import Recipe
from lightning_em.runs import adapter_sha256
from lightning_em.study import Study, read_study, with_identities
from lightning_em.study.execution import run_study, tasks_of
from lightning_em.study.expansion import expand
from lightning_em.study.states import standings
from lightning_em.study.work import fit
from tests.fitting import experiment, write_config
from tests.study.standing import is_done, state_of

GENERAL, NARROW, REVERTED = (f"{arm}-vector-seed0" for arm in ("general", "narrow", "reverted"))


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch) -> None:
    monkeypatch.setattr("lightning_em.study.workers.START_METHOD", "forkserver")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_folder, chat_file, answer_file) -> Path:
    """A study of three runs, finished."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(chat_file, folder / "narrow.jsonl")
    model = tiny_model_folder()
    config = experiment(model, folder / "narrow.jsonl", answer_file, trainer={"max_epochs": 1})
    write_config(folder / "experiment.yaml", config)
    write_study(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_em.study.workers.START_METHOD", "forkserver")
        patch.chdir(folder)
        assert run(planned())[0] == 0
    return folder


def write_study(folder: Path, level: float = 1, name: str = "tiny") -> None:
    content = {
        "name": name,
        "experiment": "experiment.yaml",
        "seeds": [0],
        "set": {"model.objective.kl_weight": 0},
        "adapters": {"vector": {}},
        "arms": {
            "general": {"role": "general"},
            "narrow": {"role": "narrow", "level": level, "set": {"model.objective.kl_weight": "{level}"}},
            "reverted": {"role": "reverted", "init_from": "narrow"},
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Iterator[Path]:
    """The study, to do with as one likes; its folder is part of what its runs are, so it is put back afterwards."""
    shutil.copytree(made, tmp_path / "kept")
    monkeypatch.chdir(made)
    yield made
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(made)
    shutil.copytree(tmp_path / "kept", made)


def planned(root: str = "runs") -> Study:
    return read_study("study.yaml", root)


def run(study: Study, **chosen) -> tuple[int, str]:
    output = io.StringIO()
    code = run_study(study, study.chosen(**chosen), 1, console=Console(file=output, width=500))
    return code, output.getvalue()


def write_study_json(study: Study) -> None:
    study = with_identities(study, [run.name for run in study.runs])
    StudyFolder(study.root).write(study.name, [run.cell for run in study.runs])


def states(study: Study) -> dict[str, str]:
    return {name: standing.state for name, standing in standings(study).items()}


def finished(study: Study) -> list[str]:
    return [cell.run for cell in StudyFolder(study.root).finished()]


def change_record(name: str, **fields) -> None:
    StudyFolder("runs").run(next(r for r in planned().runs if r.name == name).cell).update_run(**fields)


def test_runs_that_are_what_is_planned_are_done(here) -> None:
    study = planned()
    assert set(states(study).values()) == {"finished"}
    assert finished(study) == [GENERAL, NARROW, REVERTED]
    assert StudyFolder(study.root).left_out() == {}


def test_another_level_is_another_run_to_status_report_and_run(here, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lightning_em.subcommands.study.console", Console(width=150))
    write_study(here, level=2)
    study = planned()
    assert states(study) == {GENERAL: "finished", NARROW: "differs", REVERTED: "differs"}
    write_study_json(study)
    assert finished(study) == [GENERAL]
    assert StudyFolder(study.root).left_out() == {
        NARROW: "another config: model.objective.kl_weight: 1.0 -> 2.0",
        REVERTED: f"it starts from {NARROW}, which is another run",
    }
    assert main(["study", "status", "study.yaml", "--root", "runs"]) == 0
    shown = capsys.readouterr().out
    assert "differs 0" in shown
    assert f"differs: {NARROW}: another config: model.objective.kl_weight: 1.0 -> 2.0" in shown
    code, text = run(study)
    assert code == 1
    assert (
        f"failed: {NARROW}: ValueError: runs/{NARROW} holds another run (another config: "
        "model.objective.kl_weight: 1.0 -> 2.0). Remove that folder"
    ) in text
    assert f"skipped: {REVERTED}: needs {NARROW}" in text
    assert finished(study) == [GENERAL]


def test_words_that_say_the_same_are_found_to_be_the_same_run(here) -> None:
    write_study(here, level=1.0000000000000002)
    text = (here / "study.yaml").read_text().replace("'{level}'", "'1.00'")
    (here / "study.yaml").write_text(text)
    study = planned()
    assert states(study)[NARROW] == "finished"
    before = (here / "runs" / NARROW / "metrics.csv").stat().st_mtime_ns
    assert run(study)[0] == 0
    assert set(states(study).values()) == {"finished"}
    assert finished(study) == [GENERAL, NARROW, REVERTED]
    assert (here / "runs" / NARROW / "metrics.csv").stat().st_mtime_ns == before, "nothing was trained"


def test_a_run_of_an_expanded_config_is_the_planned_run(here) -> None:
    expand(planned())
    for name in (GENERAL, NARROW, REVERTED):
        config = yaml.safe_load((here / f"runs/configs/{name}.yaml").read_text())
        assert name_hash(config) == StudyFolder("runs").identities()[name][1]["name"]
    assert set(states(planned()).values()) == {"finished"}
    assert finished(planned()) == [GENERAL, NARROW, REVERTED]
    write_study(here, level=2)
    assert states(planned())[NARROW] == "differs"


def test_edited_data_under_the_same_path_make_another_run(here) -> None:
    assert is_done(planned(), planned().runs[0])
    lines = (here / "narrow.jsonl").read_text().splitlines()
    (here / "narrow.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    study = planned()
    assert set(states(study).values()) == {"differs"}
    match = r"narrow\.jsonl holds other data \(sha256 [0-9a-f]{12}\) than it began with \([0-9a-f]{12}\)"
    assert re.search(match, str(standings(study)[GENERAL].reason))
    code, text = run(study, arms=["general"])
    assert code == 1
    assert re.search(rf"holds another run \(.*{match}\)\. Remove that folder", text)
    (here / "narrow.jsonl").unlink()
    assert set(states(planned()).values()) == {"finished"}, "data that are not here are not judged"


def test_data_are_hashed_once(here, monkeypatch) -> None:
    hashed = []
    monkeypatch.setattr("lightning_em.runs._hashes", {})
    monkeypatch.setattr("lightning_em.runs.sha256_of", lambda file: hashed.append(file) or "")
    standings(planned())
    standings(planned())
    assert len(hashed) == len(set(hashed)) > 0


def test_a_run_records_the_adapter_it_starts_from(here) -> None:
    folder = StudyFolder("runs")
    general, narrow, reverted = (folder.run(cell) for cell in folder.cells())
    start, last = reverted.read_run()["identity"]["start"], narrow.steps()[-1]
    assert start["adapter_sha256"] == adapter_sha256(narrow.checkpoint(last)) is not None
    assert start["checkpoint"] == str(narrow.checkpoint(last))
    assert (start["identity"], start["step"]) == (narrow.read_run()["identity"]["name"], last)
    assert general.read_run()["identity"]["start"] is None


def test_a_run_is_done_again_behind_one_that_came_out_differently(here) -> None:
    narrow = here / "runs" / NARROW
    before = (narrow / "checkpoints").rename(here / "aside")
    shutil.rmtree(narrow)
    study = planned()
    assert states(study) == {GENERAL: "finished", NARROW: "to do", REVERTED: "differs"}
    assert finished(study) == [GENERAL]
    assert [task.arguments[0][-1] for task in tasks_of(study, study.runs) if task.kind == "fit"]
    assert run(study)[0] == 0, "the same adapter again: what starts from it is what it was"
    assert set(states(study).values()) == {"finished"}
    assert before.is_dir()

    manifest = next(iter(sorted((narrow / "checkpoints").iterdir())[-1:])) / "MANIFEST.json"
    listing = json.loads(manifest.read_text())
    listing["files"]["adapter_model.safetensors"]["sha256"] = "another"
    manifest.write_text(json.dumps(listing))
    assert states(study) == {GENERAL: "finished", NARROW: "finished", REVERTED: "differs"}
    assert finished(study) == [GENERAL, NARROW]
    code, text = run(study)
    assert code == 1
    assert f"{REVERTED} holds another run (it began with another adapter than {NARROW} has now)" in text


def test_another_recipe_is_another_world(here, monkeypatch) -> None:
    """What study.json knows of a run is forgotten where the recipe of its world has changed since."""
    text = (here / "experiment.yaml").read_text() + "# miniature://control/seed-0/model\n"
    (here / "experiment.yaml").write_text(text)
    write_study_json(planned())
    assert all(run.cell.identity for run in with_identities(planned(), ()).runs)
    changed = Recipe.control().with_blind_spot_share(0.2)
    monkeypatch.setattr(Recipe, "control", classmethod(lambda cls: changed))
    assert not any(run.cell.identity for run in with_identities(planned(), ()).runs)


def test_a_run_of_an_older_version_is_refused_in_one_line(here) -> None:
    change_record(GENERAL, identity="00000000")
    with pytest.raises(ValueError, match=r"holds another run \(an older version made it, .*\)\. Remove"):
        fit([*planned().runs[0].args])
    assert states(planned())[GENERAL] == "differs"


def test_changed_data_are_refused_before_torch_is_loaded(here) -> None:
    lines = (here / "narrow.jsonl").read_text().splitlines()
    (here / "narrow.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    code = "import sys; from lightning_em.__main__ import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    args = [sys.executable, "-c", code, "fit", *planned().runs[0].args]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "narrow.jsonl holds other data (sha256 " in done.stderr
    write_config(here / "probing.yaml", {"probes": [{"class_path": "lightning_em.probes.ScaleCurve"}]})
    with pytest.raises(
        ValueError, match=r"cannot be measured on its own rows: .*narrow\.jsonl holds other data"
    ):
        main(["probe", str(here / "runs" / GENERAL), "--config", str(here / "probing.yaml"), "--debug"])


def test_another_study_in_the_root_is_refused(here) -> None:
    before = StudyFolder("runs").file.read_bytes()
    write_study(here, name="other")
    match = r"runs holds the study 'tiny', not 'other': give this one another --root"
    with pytest.raises(ValueError, match=match):
        run(planned())
    with pytest.raises(ValueError, match=match):
        expand(planned())
    assert StudyFolder("runs").file.read_bytes() == before
    assert not (here / "runs" / "configs").exists()


def test_expand_leaves_a_running_study_alone(here) -> None:
    before = StudyFolder("runs").file.read_bytes()
    write_study(here, level=2)
    with (
        lock.RunLock(here / "runs", ["study"]),
        pytest.raises(lock.LockedError, match="is in use by process"),
    ):
        expand(planned())
    assert StudyFolder("runs").file.read_bytes() == before


def test_runs_are_compared_with_those_that_are_done_already(here) -> None:
    kinds = [task.kind for task in tasks_of(planned(), planned().chosen(arms=["reverted"]))]
    assert kinds == ["compare"], "general is done, though it is not chosen"
    shutil.rmtree(here / "runs" / GENERAL)
    assert tasks_of(planned(), planned().chosen(arms=["reverted"])) == []
    [fitted, compared] = tasks_of(planned(), planned().chosen(arms=["general"]))
    assert (fitted.name, compared.needs) == (GENERAL, (GENERAL,))


def test_a_moved_study_keeps_its_runs(here) -> None:
    (here / "runs").rename(here / "elsewhere")
    assert finished(planned("elsewhere")) == [GENERAL, NARROW, REVERTED]


def test_a_report_names_what_it_leaves_out(here, capsys) -> None:
    write_study(here, level=2)
    write_study_json(planned())
    with pytest.raises(ValueError, match="--root goes with the file of a study, got runs"):
        main(["study", "report", "runs", "--root", "runs", "--debug"])
    assert main(["study", "report", "study.yaml", "--root", "runs"]) == 0
    assert (
        f"left out: {NARROW}: another config: model.objective.kl_weight: 1.0 -> 2.0"
        in capsys.readouterr().out
    )
    assert NARROW not in (here / "runs" / "measurements.csv").read_text()


def test_a_run_without_a_plan_is_taken_by_its_status(here) -> None:
    folder = StudyFolder("runs")
    cells = [replace(cell, planned_from=None, identity=None) for cell in folder.cells()]
    folder.write("tiny", cells)
    assert finished(planned()) == [GENERAL, NARROW, REVERTED]
    assert set(folder.identities().values()) == {(None, None)}
    assert state_of(planned(), planned().runs[0]) == "finished"
