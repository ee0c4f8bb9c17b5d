"""From a study's file to command lines, whole configs, and a schedule."""

import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lightning_em import imports
from lightning_em.__main__ import main
from lightning_em.analysis.cells import StudyFolder
from lightning_em.analysis.claims.rules import Difference, Rules
from lightning_em.experiment import Experiment
from lightning_em.identity import name_hash
from lightning_em.study import read_study, with_identities
from lightning_em.study.expansion import expand
from lightning_em.study.schedule import Schedule, State, Task
from tests.fitting import experiment, write_config

CONFIGS = Path(__file__).parents[2] / "configs"
STUDIES = sorted((CONFIGS / "study").glob("*.yaml"))


@pytest.fixture
def content(tmp_path, chat_file, answer_file) -> dict[str, Any]:
    """A study of four arms; the model need not be there to plan it."""
    config = experiment(tmp_path / "model", chat_file, answer_file)
    write_config(tmp_path / "experiment.yaml", config)
    write_config(tmp_path / "vector.yaml", config["model"]["adapter"])
    return {
        "name": "tiny",
        "experiment": "experiment.yaml",
        "seeds": [3, 5],
        "worlds": {"default": "", "control": "control/"},
        "fill": {"place": "somewhere/{world}{seed}"},
        "set": {"seed_everything": "{seed}", "model.objective.kl_weight": 0},
        "adapters": {
            "vector": {"set": {"model.adapter": "./vector.yaml"}},
            "long": {"set": {"model.adapter.init_args.alpha": 9}},
        },
        "arms": {
            "reverted": {"role": "reverted", "init_from": "narrow", "seeds": [5]},
            "general": {"role": "general", "worlds": ["default", "control"]},
            "narrow": {
                "role": "narrow",
                "level": 10,
                "set": {"model.objective.kl_weight": "{level}", "data.narrow.topics": ["a", "b"]},
                "per_adapter": {"long": {"level": 2.5, "set": {"data.batch_size": 4}}},
            },
        },
    }


def test_an_arm_with_a_kl_weight_and_no_kl_data_is_refused_by_its_name(content, tmp_path, chat_file) -> None:
    write_config(tmp_path / "experiment.yaml", experiment(tmp_path / "model", chat_file))
    study = read_study(write_study(tmp_path / "study.yaml", content))
    general = [run.name for run in study.runs if run.cell.role == "general"]
    with_identities(study, general)  # their weight is 0
    with pytest.raises(ValueError, match=r"^narrow-\S+: data\.kl is missing while .*kl_weight is 10:"):
        with_identities(study, [run.name for run in study.runs if run.cell.role == "narrow"])


def write_study(file: Path, content: dict[str, Any]) -> Path:
    """The order of arms and worlds means something."""
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def plan(folder: Path, content: dict[str, Any]):
    return read_study(write_study(folder / "study.yaml", content), folder / "runs")


def test_runs_are_arms_x_adapters_x_worlds_x_seeds(content, tmp_path) -> None:
    names = [run.name for run in plan(tmp_path, content).runs]
    expected = [
        f"{arm}-{a}-seed{s}" for arm in ("general", "narrow") for a in ("vector", "long") for s in (3, 5)
    ]
    expected += [f"general-{adapter}-control-seed{seed}" for adapter in ("vector", "long") for seed in (3, 5)]
    expected += ["reverted-vector-seed5", "reverted-long-seed5"]
    assert sorted(names) == sorted(expected)
    assert all("seed3" in name for name in names[:6]), "a whole seed before the next one"


def test_a_run_comes_after_the_one_it_starts_from(content, tmp_path) -> None:
    study = plan(tmp_path, content)
    names = [run.name for run in study.runs]
    for run in study.runs:
        if run.cell.init_from:
            assert names.index(run.cell.init_from) < names.index(run.name)
            assert f"--model.init_from={tmp_path / 'runs' / run.cell.init_from}" in run.args


def test_words_fill_places_and_later_layers_win(content, tmp_path) -> None:
    content["set"]["data.kl.path"] = "{place}/kl.jsonl"
    content["arms"]["general"]["set"] = {"data.num_workers": None, "trainer.deterministic": True}
    runs = {run.name: run for run in plan(tmp_path, content).runs}
    narrow = runs["narrow-long-seed5"]
    assert narrow.cell.level == 2.5
    assert "--model.objective.kl_weight=2.5" in narrow.args
    assert "--model.objective.kl_weight=0" not in narrow.args
    assert '--data.narrow.topics=["a", "b"]' in narrow.args
    assert "--data.batch_size=4" in narrow.args
    assert "--seed_everything=5" in narrow.args
    assert "--model.objective.kl_weight=10" in runs["narrow-vector-seed3"].args
    assert f"--model.adapter={tmp_path / 'vector.yaml'}" in runs["narrow-vector-seed3"].args
    control = runs["general-vector-control-seed3"]
    assert "--data.kl.path=somewhere/control/3/kl.jsonl" in control.args
    assert {"--data.num_workers=null", "--trainer.deterministic=true"} <= set(control.args)
    assert control.args[-2:] == (
        f"--run.root={tmp_path / 'runs'}",
        "--run.name=general-vector-control-seed3",
    )


def test_places_are_filled_inside_lists_and_mappings(content, tmp_path) -> None:
    content["set"]["data.narrow.topics"] = ["{place}", {"name": "seed {seed}", "deep": ["{world}", 1, None]}]
    content["arms"]["narrow"]["set"] = {
        "trainer.callbacks+": {"init_args": {"steps": "{level}", "file": "./vector.yaml"}}
    }
    runs = {run.name: run for run in plan(tmp_path, content).runs}
    filled = '["somewhere/control/3", {"name": "seed 3", "deep": ["control/", 1, null]}]'
    assert f"--data.narrow.topics={filled}" in runs["general-vector-control-seed3"].args
    beside = f'{{"init_args": {{"steps": "10", "file": "{tmp_path / "vector.yaml"}"}}}}'
    assert f"--trainer.callbacks+={beside}" in runs["narrow-vector-seed3"].args


def test_a_value_may_name_a_folder_beside_the_study(content, tmp_path) -> None:
    (tmp_path / "base").mkdir()
    content["set"]["model.base.path"] = "./base"
    assert f"--model.base.path={tmp_path / 'base'}" in plan(tmp_path, content).runs[0].args
    content["experiment"] = "base"
    with pytest.raises(ValueError, match=r"experiment names base, but there is no file "):
        plan(tmp_path, content)


def test_a_study_like_another_changes_single_keys(content, tmp_path) -> None:
    write_study(tmp_path / "other.yaml", content)
    own = {"like": "other.yaml", "name": "mine", "seeds": [5], "set": {"data.max_length": 7}}
    study = plan(tmp_path, own | {"arms": {"narrow": {"level": 4}}})
    assert study.name == "mine"
    assert {run.cell.seed for run in study.runs} == {5}
    narrow = next(run for run in study.runs if run.name == "narrow-vector-seed5")
    assert {"--data.max_length=7", "--model.objective.kl_weight=4"} <= set(narrow.args)


def test_a_choice_brings_the_runs_it_starts_from(content, tmp_path) -> None:
    study = plan(tmp_path, content)
    chosen = study.chosen(arms=["reverted"], adapters=["vector"])
    assert [run.name for run in chosen] == ["narrow-vector-seed5", "reverted-vector-seed5"]
    assert study.chosen() == list(study.runs)
    with pytest.raises(ValueError, match=r"--arms: .* has no 'narow'.*Did you mean narrow"):
        study.chosen(arms=["narow"])
    with pytest.raises(ValueError, match=r"no run of .* has --seeds 3 --arms reverted together"):
        study.chosen(seeds=[3], arms=["reverted"])


def test_a_level_keeps_all_its_digits(content, tmp_path) -> None:
    content["arms"]["narrow"]["level"] = 1234567.25
    runs = {run.name: run for run in plan(tmp_path, content).runs}
    assert "--model.objective.kl_weight=1234567.25" in runs["narrow-vector-seed3"].args


def change(content: dict[str, Any], place: str, value: Any) -> None:
    *path, last = place.split("/")
    for key in path:
        content = content.setdefault(key, {})
    content[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("seedz", [1], "top level has a key 'seedz'.*Did you mean seeds"),
        ("name", "a/b", "study.yaml: name must be letters"),
        ("seeds", [1, 1], "seeds must be a list of different whole numbers"),
        ("seeds", "1", "seeds must be a list"),
        ("seeds", list(range(17)), "seeds, with those of arms, must be at most 16, .* got 17: "),
        (
            "arms/narrow/seeds",
            list(range(10, 26)),
            "seeds, with those of arms, must be at most 16, .* got 18: ",
        ),
        ("experiment", "nowhere.yaml", "experiment names nowhere.yaml, but there is no file"),
        ("adapters", {}, "adapters must be a mapping with one entry"),
        ("adapters/vector/sett", {}, "adapters.vector has a key 'sett'.*Did you mean set"),
        (
            "adapters/vector/set/model.adapter",
            "./gone.yaml",
            "adapters.vector.set.model.adapter names ./gone.yaml",
        ),
        ("arms/narrow/roll", "narrow", "arms.narrow has a key 'roll'.*Did you mean role"),
        ("arms/narrow/role", "tiny", "arms.narrow.role is 'tiny', expected one of general"),
        ("arms/narrow/level", "ten", "arms.narrow.level must be a number"),
        ("arms/narrow/init_from", "genral", "arms.narrow.init_from names arm 'genral'.*Did you mean general"),
        ("arms/narrow/init_from", "reverted", "in a circle: reverted <- narrow <- reverted"),
        (
            "arms/reverted/worlds",
            ["control"],
            "arms.reverted.init_from must be an arm that is run with .* control",
        ),
        ("arms/narrow/adapters", ["rank1"], "arms.narrow.adapters names 'rank1', expected one of vector"),
        ("arms/narrow/worlds", ["mars"], "arms.narrow.worlds names 'mars'"),
        ("arms/narrow/per_adapter/rank1", {}, "per_adapter names 'rank1'"),
        ("arms/narrow/probing", "gone.yaml", "arms.narrow.probing names gone.yaml"),
        ("arms/general/set", {"x": "{level}"}, r"arms.general.set.x must be a text whose places are of"),
        ("set/x", "{sed}", r"set.x must be .*\{seed\}, .* got '\{sed\}'"),
        ("set/x", ["a", {"b": ["{sed}"]}], r"set.x must be a text whose places are of .* got \['a', "),
        ("set/x", ["./gone.yaml"], "set.x names ./gone.yaml, but there is no file or folder"),
        ("arms/nar row", {"role": "narrow"}, "arm 'nar row' must be letters"),
        ("arms/narrow", [], r"arms.narrow must be a mapping, got \[\]"),
        ("arms/narrow", None, "arms.narrow.role is"),
        ("arms", [1], "arms must be a mapping"),
        ("like", "../x.yaml", "like must be a file in the same folder"),
        ("like", "study.yaml", "like must be a file that is not like this one itself"),
        ("adapters/a b", {}, "adapters: 'a b' must be letters"),
        ("worlds/a b", "", "worlds: 'a b' must be letters"),
        ("arms/narrow/adapters", [], "arms.narrow.adapters must be a text or a list of texts"),
        ("arms/narrow/set", False, "arms.narrow.set must be a mapping, got False"),
        ("arms/narrow/set/x", date(2026, 1, 1), "arms.narrow.set.x must be a text, a number"),
        ("arms/narrow/set", {True: 1}, "arms.narrow.set has the key True, no text"),
        ("fill/seed", "7", "fill.seed must be under another name"),
        ("claims/rise", 2, "claims.rise must be a probability between 0 and 1, got 2"),
        ("claims/hidden_scale", 1, "claims.hidden_scale must be a scale above 1, got 1"),
        ("claims/exact_rates", "yes", "claims.exact_rates must be true or false"),
        ("claims/narow", 0.1, "claims has a key 'narow'.*Did you mean narrow"),
        (
            "claims/differences",
            {"C4": {"more": "narrow"}},
            "claims.differences.C4 has the key of a claim of the lit",
        ),
        (
            "claims/differences",
            {"Q": {"more": "narow"}},
            "differences.Q.more is 'narow'.*Did you mean narrow",
        ),
        ("claims/differences", {"Q": {"more": "narrow", "at": 1}}, "claims.differences.Q has a key 'at'"),
        (
            "claims/differences",
            {"Q": {"more": "narrow"}},
            "claims.differences.Q.source must be a name, got None",
        ),
        (
            "claims/differences",
            {"Q": {"more": "narrow", "source": "s", "quantity": "q", "coordinates": {"scale": [1]}}},
            "claims.differences.Q.coordinates.scale must be a coordinate of the quantity, a number or a text, got",
        ),
    ],
)
def test_what_cannot_be_meant_names_file_and_key(place, value, message, content, tmp_path) -> None:
    change(content, place, value)
    with pytest.raises(ValueError, match=message) as caught:
        plan(tmp_path, content)
    assert "study.yaml" in str(caught.value)


def test_a_study_names_margins_and_roles_of_its_own(content, tmp_path) -> None:
    assert plan(tmp_path, content).rules == Rules()
    change(content, "claims", {"rise": 0.2, "narrow": 0.01, "hidden_scale": 5})
    change(content, "roles", "tiny")
    change(content, "arms/narrow/role", "tiny")
    study = plan(tmp_path, content)
    assert study.rules == Rules(rise=0.2, narrow=0.01, hidden_scale=5)
    assert {run.cell.role for run in study.runs} >= {"general", "tiny"}


def test_a_study_names_claims_of_its_own(content, tmp_path) -> None:
    own = {
        "more": "narrow",
        "source": "beyond",
        "quantity": "ce_change",
        "coordinates": {"scale": 2},
        "margin": 0.1,
    }
    change(content, "claims", {"differences": {"Q1": own}})
    assert plan(tmp_path, content).rules == Rules(
        differences={"Q1": Difference("narrow", "beyond", "ce_change", {"scale": 2}, 0.1)}
    )


def test_a_file_that_is_none(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*gone.yaml"):
        read_study(tmp_path / "gone.yaml")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_study(tmp_path / "bad.yaml")


def test_expanded_configs_are_the_planned_runs(content, tmp_path) -> None:
    change(content, "arms/narrow/set", {"model.objective.kl_weight": "{level}"})
    study = plan(tmp_path, content)
    runs = study.chosen(seeds=[5])
    folder = expand(study, runs=runs)
    assert {file.stem for file in folder.iterdir()} == {run.name for run in runs}
    assert StudyFolder(study.root).cells() == [run.cell for run in study.runs]
    identities = {name: identity for name, (_, identity) in StudyFolder(study.root).identities().items()}
    assert {name for name, identity in identities.items() if identity} == {run.name for run in runs}
    again = with_identities(plan(tmp_path, content), ())
    assert {run.name: run.cell.identity for run in again.runs} == identities, "known as long as it is true"
    for run in runs:
        again, planned = (
            Experiment([f"--config={folder / run.name}.yaml"]).config,
            Experiment(run.args).config,
        )
        assert {**again, "config": None} == {**planned, "config": None}
        assert (again["run"]["root"], again["run"]["name"]) == (str(study.root), run.name)
        assert name_hash(again) == name_hash(planned) == identities[run.name]["name"]
    narrow = yaml.safe_load((folder / "narrow-long-seed5.yaml").read_text())
    assert narrow["model"]["objective"]["kl_weight"] == 2.5
    assert narrow["model"]["adapter"]["init_args"]["alpha"] == 9


def test_an_adapter_of_another_package_is_expanded(content, tmp_path, monkeypatch) -> None:
    # A module of its own: jsonargparse keeps what was ever allowed in a process, by whichever test.
    (tmp_path / "package_of_expansion.py").write_text(
        "from tests.test_testing import Shift\n\n\nclass Own(Shift):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    content["adapters"]["vector"]["set"] = {"model.adapter": {"class_path": "package_of_expansion.Own"}}
    study = plan(tmp_path, content)
    runs = study.chosen(arms=["general"], adapters=["vector"])
    with pytest.raises(ValueError, match="--allow_import package_of_expansion"):
        expand(study, runs=runs)
    imports.restrict(["package_of_expansion"])
    config = yaml.safe_load((expand(study, runs=runs) / f"{runs[0].name}.yaml").read_text())
    assert config["model"]["adapter"]["class_path"] == "package_of_expansion.Own"


def test_a_run_whose_words_make_no_config_is_named(content, tmp_path) -> None:
    change(content, "arms/general/set", {"model.objective.kl_wait": 1})
    with pytest.raises(ValueError, match=r"general-vector-seed3: .*kl_wait"):
        expand(plan(tmp_path, content))


def test_status_shows_seeds_by_state(content, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lightning_em.subcommands.study.console", Console(width=120))
    study = plan(tmp_path, content)
    folder = StudyFolder(study.root).run(study.runs[0].cell)
    folder.update_run(status="failed")
    assert main(["study", "status", str(study.file), "--root", str(study.root)]) == 0
    shown = capsys.readouterr().out
    cells = {line.split()[1]: line for line in reversed(shown.splitlines()) if len(line.split()) > 4}
    assert "failed 3, to do 5" in cells["general"]
    assert "to do 3 5" in cells["narrow"]


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_of_the_repository_plans_and_parses_offline(file, tmp_path) -> None:
    study = read_study(file, tmp_path)
    assert {run.cell.role for run in study.runs} >= {"general", "narrow", "reverted"}
    assert len({run.name for run in study.runs}) == len(study.runs)
    config = Experiment(study.runs[-1].args).config
    assert config["run"]["name"] == study.runs[-1].name


@pytest.mark.slow
def test_every_arm_of_the_miniature_study_instantiates_offline(tmp_path) -> None:
    study = read_study(CONFIGS / "study" / "miniature.yaml", tmp_path)
    arms = {run.cell.arm: run for run in study.runs}
    assert len(arms) >= 15
    for run in arms.values():
        experiment = Experiment(run.args)
        experiment._make(())
        assert experiment.name == run.name


def test_planning_and_status_import_no_torch(content, tmp_path) -> None:
    file = write_study(tmp_path / "study.yaml", content)
    code = (
        "import sys; from lightning_em.__main__ import main; "
        f"main(['study', 'status', {str(file)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


def test_a_schedule_keeps_order_and_skips_what_needs_a_failure() -> None:
    tasks = [
        Task("world", "w"),
        Task("a", "f", needs=("world",)),
        Task("b", "f"),
        Task("a2", "f", needs=("a",)),
        Task("pairs", "p", needs=("b",), wants=("a2",)),
    ]
    schedule = Schedule(tasks)
    first, second = schedule.next(), schedule.next()
    assert (first, second, schedule.next()) == (tasks[0], tasks[2], None)
    schedule.put_back(tasks[0])
    assert schedule.next() == tasks[0]
    schedule.finish(tasks[2])
    assert schedule.next() is None, "the pairs wait for a2"
    assert schedule.fail(tasks[0], "broke") == [tasks[1], tasks[3]]
    assert schedule.reasons == {"world": "broke", "a": "needs world", "a2": "needs a"}
    assert not schedule.is_over
    assert schedule.next() == tasks[4], "what is wanted may fail"
    schedule.finish(tasks[4])
    assert schedule.is_over
    assert schedule.named(State.SKIPPED) == [tasks[1], tasks[3]]


def test_a_schedule_refuses_what_would_wait_forever() -> None:
    with pytest.raises(AssertionError, match="stands before what it needs"):
        Schedule([Task("a", "f", needs=("b",)), Task("b", "f")])
