"""Batch files say what was asked for, once; the shell reads from them the words that were given."""

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from lightning_em import imports
from lightning_em.__main__ import main
from lightning_em.analysis.cells import StudyFolder
from lightning_em.cluster import FitJob, JobArray, SlurmOptions, arrays_of, batch_script, queue
from lightning_em.cluster.jobs import variations
from lightning_em.cluster.queue import described, job_of, job_states, status_in_queue
from lightning_em.lock import LOCK, LockedError
from lightning_em.runs import RunFolder
from lightning_em.study import read_study
from tests.fitting import command, experiment, write_config

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
LOGS = Path("runs/slurm")
OWN = 4  # words of srun, lightning-em and fit before those of a run


def directives(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


def words_read_by_the_shell(script: str, folder: Path, **environment: str) -> list[str]:
    """Run a batch file with an srun that prints its words, one a line."""
    (folder / "srun").write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\nexit 3\n")
    (folder / "srun").chmod(0o755)
    (folder / "job").write_text(script)
    known = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "7",
    }
    done = subprocess.run(
        ["bash", str(folder / "job")], capture_output=True, text=True, env=known | environment, check=False
    )
    assert done.returncode == 3, "a failed step must fail its job"
    return done.stdout.splitlines()


def test_the_template_stands_for_itself(tmp_path) -> None:
    script = (CONFIGS / "slurm/fit.sbatch").read_text()
    assert "#SBATCH --signal=SIGUSR1@90" in script
    assert "#SBATCH --requeue" in script
    assert "#SBATCH --open-mode=append" in script
    assert script.rstrip().endswith("exit $?")
    (tmp_path / "as_given").write_text(script.replace('"$@"', "--config x.yaml"))
    read = words_read_by_the_shell((tmp_path / "as_given").read_text(), tmp_path)
    # srun has not taken over the cores of a task since Slurm 22.05
    assert read == [
        *("--kill-on-bad-exit=1", "--cpus-per-task=7"),
        *("lightning-em", "fit", "--config", "x.yaml"),
        *("--trainer.num_nodes", "2", "--trainer.devices", "4"),
    ]


def test_options_replace_those_of_the_template_and_stand_once() -> None:
    options = SlurmOptions(
        partition="gpu", nodes=2, gpus=4, time="2:00:00", memory="64G", extra=("--exclusive", "mail-type=END")
    )
    script = batch_script(JobArray({0: FitJob(("--config", "x.yaml"), Path("runs/x"))}), "x", options, LOGS)
    lines = directives(script)
    for line in (
        "partition=gpu",
        "nodes=2",
        "gpus-per-node=4",
        "ntasks-per-node=4",
        "time=2:00:00",
        "mem=64G",
    ):
        assert lines.count(f"#SBATCH --{line}") == 1
    assert {"#SBATCH --exclusive", "#SBATCH --mail-type=END", "#SBATCH --job-name=x"} <= set(lines)
    keys = [line.partition("=")[0] for line in lines]
    assert len(keys) == len(set(keys))
    assert not any("array" in key for key in keys)


def test_a_job_without_gpus_asks_for_none() -> None:
    script = batch_script(JobArray({0: FitJob((), Path("x"))}), "x", SlurmOptions(gpus=0, tasks=2), LOGS)
    assert "gpus" not in "".join(directives(script))
    assert "#SBATCH --ntasks-per-node=2" in script


def test_the_shell_reads_the_words_that_were_given(tmp_path) -> None:
    words = ("--config", "my file.yaml", "--model.base={path: $HOME}", "--run.name=it's")
    script = batch_script(JobArray({0: FitJob(words, Path("x"))}), "x", SlurmOptions(), LOGS)
    assert words_read_by_the_shell(script, tmp_path)[OWN : OWN + len(words)] == list(words)


BREAK = "x\ntouch PWNED #"


@pytest.mark.parametrize(
    ("job", "name", "options", "logs"),
    [
        (FitJob((), Path("runs") / BREAK), "x", SlurmOptions(), LOGS),
        (FitJob((), Path("x")), BREAK, SlurmOptions(), LOGS),
        (FitJob((), Path("x")), "x", SlurmOptions(partition=BREAK), LOGS),
        (FitJob((), Path("x")), "x", SlurmOptions(extra=(f"comment={BREAK}",)), LOGS),
        (FitJob((), Path("x")), "x", SlurmOptions(), Path(BREAK)),
        (FitJob((), Path("x")), "x\rtouch PWNED", SlurmOptions(), LOGS),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_nothing_breaks_out_of_its_line(job, name, options, logs, alone) -> None:
    jobs = {0: job} if alone else {0: job, 1: FitJob((), Path("y"))}
    with pytest.raises(ValueError, match=r"must have no line breaks .* got '.*PWNED"):
        batch_script(JobArray(jobs), name, options, logs)


HOSTILE = "$(touch PWNED) `touch PWNED` ; touch PWNED & 'touch PWNED' \"touch PWNED\" ;; esac #"


@pytest.mark.parametrize("alone", [True, False])
def test_nothing_of_a_name_is_run(tmp_path, monkeypatch, alone) -> None:
    monkeypatch.chdir(tmp_path)
    job = FitJob((f"--run.name={BREAK}{HOSTILE}",), Path(HOSTILE))
    jobs = {0: job} if alone else {0: job, 1: FitJob((HOSTILE,), Path("y"))}
    options = SlurmOptions(partition=HOSTILE, extra=(f"comment={HOSTILE}",))
    script = batch_script(JobArray(jobs), HOSTILE, options, Path(HOSTILE))
    read = words_read_by_the_shell(script, tmp_path, SLURM_ARRAY_TASK_ID="0")
    assert "\n".join(read[OWN:]).startswith(job.args[0])
    assert not (tmp_path / "PWNED").exists()


def test_a_config_of_somebody_else_cannot_name_a_run_over_two_lines(config, tmp_path) -> None:
    for key in ("name", "root"):
        settings = experiment(Path("/nowhere"), Path("x.jsonl"), run={key: BREAK})
        file = write_config(tmp_path / "evil.yaml", settings)
        with pytest.raises(ValueError, match=r"run\.root, run\.name .* no line breaks"):
            main(["submit", "--config", str(file), "--dry_run", "--debug"])
        assert main(["fit", "--config", str(file)]) == 2


def read_by_sbatch(line: str) -> str:
    """A directive as sbatch takes it apart: quotes and backslashes like a shell, whose backslash is literal in ''."""
    (word,) = shlex.split(line.removeprefix("#SBATCH "))
    return word


def test_spaces_and_percent_signs_reach_sbatch(tmp_path) -> None:
    script = batch_script(
        JobArray({0: FitJob((), Path("x"))}),
        'my "best" run\\',
        SlurmOptions(extra=("comment=a b # c",)),
        Path("my runs/50%/slurm"),
    )
    read = [read_by_sbatch(line) for line in directives(script)]
    assert {
        '--job-name=my "best" run\\',
        "--comment=a b # c",
        "--output=my runs/50%%/slurm/%x-%j.out",
    } <= set(read)
    assert all("'" not in line for line in directives(script))


@pytest.mark.parametrize("option", ["-p gpu", "-N2", "--Exclusive", "--", "#x"])
def test_an_option_that_the_template_cannot_hold_is_refused(option) -> None:
    with pytest.raises(ValueError, match="expects a long option of sbatch"):
        SlurmOptions(extra=(option,)).directives()


def test_each_index_of_an_array_has_its_own_words(tmp_path) -> None:
    jobs = {
        i: FitJob(("--config", "x.yaml", f"--model.objective.kl_weight={i}"), Path(f"x-{i}"))
        for i in (0, 1, 5)
    }
    script = batch_script(JobArray(jobs), "x", SlurmOptions(at_once=2), LOGS)
    assert "#SBATCH --array=0-1,5%2" in script
    for index, job in jobs.items():
        read = words_read_by_the_shell(script, tmp_path, SLURM_ARRAY_TASK_ID=str(index))
        assert read[OWN : OWN + 3] == list(job.args)
    assert script.count("x.yaml") == 1


def test_a_fit_waits_for_the_one_it_starts_from_under_the_same_index() -> None:
    first = [FitJob((), Path(name)) for name in ("general-0", "narrow-0", "general-1", "narrow-1")]
    children = [
        FitJob((), Path("reverted-0"), Path("narrow-0")),
        FitJob((), Path("reverse-1"), Path("general-1")),
        FitJob((), Path("again-0"), Path("narrow-0")),
        FitJob((), Path("third-0"), Path("reverted-0")),
        FitJob((), Path("elsewhere"), Path("runs/finished-long-ago")),
    ]
    arrays = arrays_of([*first, *children])
    assert sum(len(array.jobs) for array in arrays) == len(first) + len(children)
    for number, array in enumerate(arrays):
        for index, job in array.jobs.items():
            if array.after is None:
                assert job in (*first, children[-1])
            else:
                assert array.after in arrays[:number], "an array must be submitted before those behind it"
                assert array.after.jobs[index].folder == job.starts_from
    assert len(arrays) == 4  # the first ones, one child each, a second child, a grandchild


def test_sweeps_multiply() -> None:
    assert variations([]) == [()]
    assert variations(["a=0,0.7", "b=[1, 2],null"]) == [
        ("--a=0", "--b=[1, 2]"), ("--a=0", "--b=null"), ("--a=0.7", "--b=[1, 2]"), ("--a=0.7", "--b=null"),
    ]  # fmt: skip
    nested = ["a=[1,[2,3]],4", 'b={"x": [1, 2], "y": {"z": 1, "w": 2}},null']
    assert variations(nested)[0] == ("--a=[1,[2,3]]", '--b={"x": [1, 2], "y": {"z": 1, "w": 2}}')
    assert len(variations(nested)) == 4
    for wrong in ("a", "a=", "a=1,,2", "--a=1"):
        with pytest.raises(ValueError, match="--sweep expects key=value,value"):
            variations([wrong])


@pytest.fixture
def config(tmp_path, tiny_model_folder, chat_file, answer_file) -> Path:
    return write_config(tmp_path / "x.yaml", experiment(tiny_model_folder(), chat_file, answer_file))


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """An sbatch that writes its words down and gives out ids."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/bash\necho "$@" >> "{tmp_path}/calls"\necho $((100 + $(wc -l < "{tmp_path}/calls")))\n'
    )
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> "{tmp_path}/released"\n')
    (folder / "squeue").write_text("#!/bin/bash\necho '101_0|RUNNING|None'\necho '101_1|PENDING|Resources'\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "calls"


def submit(config: Path, *flags: str) -> None:
    words = [
        "submit",
        "--config",
        str(config),
        "--run.root",
        str(config.parent / "runs"),
        "--slurm.gpus",
        "0",
    ]
    assert main([*words, *flags, "--debug"]) == 0


def test_a_sweep_is_submitted_and_noted_in_every_run(config, sbatch, capsys) -> None:
    submit(config, "--sweep", "model.objective.kl_weight=0,2", "--slurm.time=10")
    (call,) = sbatch.read_text().splitlines()
    file = Path(call.split()[-1])
    assert call.startswith("--parsable --hold "), "a fit that runs by now would write into the same run.json"
    assert (config.parent / "released").read_text() == "release 101\n"
    assert "#SBATCH --array=0-1" in file.read_text()
    records = {
        path.parent.name: json.loads(path.read_text()) for path in (config.parent / "runs").glob("*/run.json")
    }
    assert {record["job"]["id"] for record in records.values()} == {"101_0", "101_1"}
    assert {record["status"] for record in records.values()} == {"queued"}
    assert all(name in file.read_text() for name in records)
    capsys.readouterr()
    assert main(["runs", "ls", "--root", str(config.parent / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "101_0 running" in shown
    assert "queued" in shown


def test_the_named_folder_is_the_one_that_fit_takes(config, sbatch) -> None:
    submit(config, "--trainer.max_epochs", "1")
    (run_file,) = (config.parent / "runs").glob("*/run.json")
    words = [
        "fit",
        "--config",
        str(config),
        "--run.root",
        str(config.parent / "runs"),
        "--trainer.max_epochs=1",
    ]
    assert main([*words, "--debug"]) == 0
    record = RunFolder(run_file.parent).read_run()
    assert record["status"] == "finished"
    assert record["job"]["id"] == "101"


def test_dry_run_only_prints(config, sbatch, capsys) -> None:
    submit(config, "--sweep", "model.objective.kl_weight=0,2", "--dry_run")
    shown, remarks = capsys.readouterr()
    assert shown.startswith("#!/bin/bash\n#SBATCH "), "it may be put into a file"
    assert remarks.startswith("# ")
    assert ".sbatch" in remarks
    assert "#SBATCH --array=0-1" in shown
    assert "--model.objective.kl_weight=2" in shown
    assert not sbatch.exists()
    assert not (config.parent / "runs").exists()


def test_the_readme_shows_what_a_dry_run_prints(monkeypatch, capsys) -> None:
    monkeypatch.setattr(imports, "_named", set())  # what other tests of this process have allowed
    monkeypatch.chdir(REPOSITORY)
    text = Path("README.md").read_text(encoding="utf-8")
    [asked] = re.findall(r"^lightning-em submit --config (?:.*\\\n)*.*--dry_run$", text, re.MULTILINE)
    [shown] = re.findall(r"^```\n(# .*\.sbatch\n#!/bin/bash\n(?:.*\n)*?)```$", text, re.MULTILINE)
    assert main([*shlex.split(asked.replace("\\\n", " "))[1:], "--debug"]) == 0
    script, remarks = capsys.readouterr()
    this_machine = "export PATH="
    lines = [line for line in script.splitlines() if not line.startswith(this_machine)]
    assert (remarks + "\n".join(lines)).splitlines() == shown.splitlines()


def test_a_sweep_into_one_folder_is_refused(config) -> None:
    with pytest.raises(ValueError, match=r"several fits would write into .*wanted"):
        submit(config, "--sweep", "model.objective.kl_weight=0,2", "--run.name", "wanted")


def test_devices_are_part_of_what_a_run_is(config, capsys) -> None:
    """Two tasks make a step of twice the rows, unless they accumulate half as often: then it is the same run."""

    def name(*flags: str) -> str:
        submit(config, "--dry_run", *flags)
        return capsys.readouterr().err.splitlines()[0].rsplit("/", 1)[-1]

    one = name("--trainer.accumulate_grad_batches=4")
    assert name("--slurm.tasks=2", "--trainer.accumulate_grad_batches=2") == one
    assert name("--slurm.tasks=2", "--trainer.accumulate_grad_batches=4") != one


def test_what_cannot_work_is_refused_before_it_is_queued(config, sbatch, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"trainer\.strategy fsdp cannot work"):
        submit(config, "--trainer.strategy", "fsdp")
    with pytest.raises(ValueError, match="kl_wait"):
        submit(config, "--sweep", "model.objective.kl_wait=1")
    assert not sbatch.exists()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="there is no sbatch on this machine"):
        submit(config)


def test_an_sbatch_that_never_answers_is_no_failure_to_repeat(config, sbatch, monkeypatch) -> None:
    (sbatch.parent / "bin/sbatch").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(queue, "SUBMIT_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"may have accepted the job: check `squeue --me`"):
        submit(config)


def test_a_study_is_submitted_in_arrays_that_wait_for_each_other(
    tmp_path, sbatch, config, monkeypatch
) -> None:
    study = {
        "name": "small", "experiment": str(config), "seeds": [0, 1], "adapters": {"vector": {}},
        "set": {"seed_everything": "{seed}"},
        "arms": {
            "narrow": {"role": "narrow", "set": {"model.objective.kl_weight": 1}},
            "reverted": {"role": "reverted", "init_from": "narrow", "set": {"model.objective.kl_weight": 0}},
        },
    }  # fmt: skip
    file = write_config(tmp_path / "study.yaml", study)
    root = tmp_path / "study-small"
    monkeypatch.setattr(imports, "_named", set())
    words = ["--study", str(file), "--root", str(root), "--allow_import", "my_adapters", "--slurm.gpus=0"]
    assert main(["submit", *words, "--debug"]) == 0
    first, second = (call.split() for call in sbatch.read_text().splitlines())
    assert not any("dependency" in word for word in first)
    assert "--dependency=aftercorr:101" in second
    assert all("--allow_import=my_adapters" in Path(call[-1]).read_text() for call in (first, second))
    waiting = Path(second[-1]).read_text()
    assert "#SBATCH --array=0-1" in waiting
    assert (
        f"0) set -- --config={config}" in Path(first[-1]).read_text()
        or "narrow" in Path(first[-1]).read_text()
    )
    jobs = {path.parent.name: json.loads(path.read_text())["job"]["id"] for path in root.glob("*/run.json")}
    for seed in (0, 1):
        parent, child = jobs[f"narrow-vector-seed{seed}"], jobs[f"reverted-vector-seed{seed}"]
        assert (parent[:4], child[:4]) == ("101_", "102_")
        assert parent[4:] == child[4:], "aftercorr pairs equal indices"
    assert len(json.loads((root / "study.json").read_text())["cells"]) == 4


def test_a_study_is_submitted_again_after_its_jobs(tmp_path, sbatch, config, capsys) -> None:
    study = {
        "name": "small", "experiment": str(config), "seeds": [0, 1], "adapters": {"vector": {}},
        "arms": {"narrow": {"role": "narrow", "set": {"trainer.max_steps": 1}}},
    }  # fmt: skip
    file, root = write_config(tmp_path / "study.yaml", study), tmp_path / "study-small"
    words = ["submit", "--study", str(file), "--root", str(root), "--slurm.gpus=0", "--debug"]
    assert main(words) == 0
    done = read_study(str(file), str(root)).runs[0]
    on_devices = ["--trainer.num_nodes", "1", "--trainer.devices", "1"]  # as configs/slurm/fit.sbatch ends
    assert command("fit", *done.args, *on_devices).returncode == 0
    capsys.readouterr()
    assert main(words) == 0
    assert f"{root / done.name} is finished: nothing to submit" in " ".join(capsys.readouterr().err.split())
    assert StudyFolder(root).left_out() == {}


def test_a_study_is_not_submitted_over_runs_it_does_not_mean(tmp_path, sbatch, config, capsys) -> None:
    study = {
        "name": "small", "experiment": str(config), "seeds": [0], "adapters": {"vector": {}},
        "arms": {"narrow": {"role": "narrow", "set": {"model.objective.kl_weight": 1}}},
    }  # fmt: skip
    file, root = write_config(tmp_path / "study.yaml", study), tmp_path / "study-small"
    run = RunFolder(root / "narrow-vector-seed0")
    run.path.mkdir(parents=True)
    run.update_run(
        status="finished",
        identity={"name": "01234567", "config": {"seed_everything": 7}, "data": {}, "start": None},
    )
    words = ["submit", "--study", str(file), "--root", str(root), "--slurm.gpus=0"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert str(run.path) in said
    assert "Remove these folders" in " ".join(said.split())
    assert not sbatch.exists()


@pytest.mark.parametrize(
    ("flags", "trainer", "numbers"),
    [
        (["--slurm.gpus=4"], {}, "4 processes a run, but a run of .* trains with 1: .* 4/1"),
        (
            ["--slurm.gpus=1", "--slurm.nodes=2"],
            {},
            "2 processes a run, but a run of .* trains with 1: .* 2/1",
        ),
        (
            ["--slurm.gpus=1"],
            {"trainer.devices": 4},
            "1 processes a run, but a run of .* trains with 4: .* 1/4",
        ),
        (["--slurm.gpus=1"], {"trainer.strategy": "fsdp"}, "fsdp cannot work"),
        (["--slurm.gpus=4"], {"trainer.devices": "auto"}, "trainer.devices auto depends on the machine"),
    ],
)
def test_devices_that_change_the_runs_of_a_study_are_refused(
    tmp_path, config, sbatch, flags, trainer, numbers
) -> None:
    study = {
        "name": "small", "experiment": str(config), "seeds": [0], "adapters": {"vector": {}}, "set": trainer,
        "arms": {"narrow": {"role": "narrow"}},
    }  # fmt: skip
    file = write_config(tmp_path / "study.yaml", study)
    words = ["submit", "--study", str(file), "--root", str(tmp_path / "study"), "--debug"]
    with pytest.raises(ValueError, match=numbers):
        main([*words, *flags])
    assert not sbatch.exists()
    file.write_text(json.dumps(study | {"set": {"trainer.devices": 4, "trainer.accumulate_grad_batches": 2}}))
    assert main([*words, "--slurm.gpus=4", "--dry_run"]) == 0


def test_what_is_finished_is_left_out_and_what_is_in_use_refused(config, sbatch, capsys) -> None:
    words = ["--sweep", "model.objective.kl_weight=0,2"]
    submit(config, *words)
    one, other = (RunFolder(file.parent) for file in (config.parent / "runs").glob("*/run.json"))
    one.update_run(status="finished")
    capsys.readouterr()
    submit(config, *words)
    said = capsys.readouterr()
    assert f"{one.path} is finished: nothing to submit." in said.err
    assert "job 102: 1 fit," in said.out
    (other.path / LOCK).write_text(json.dumps({"host": "node17", "pid": 1, "job": "102"}))
    with pytest.raises(LockedError, match=r"in use by process 1 on node17 \(Slurm job 102\)"):
        submit(config, *words)
    os.utime(other.path / LOCK, (time.time() - 3600,) * 2)
    other.update_run(status="finished")
    submit(config, *words)
    assert len(sbatch.read_text().splitlines()) == 2, "there was nothing left"


def test_a_folder_with_another_run_is_refused_before_the_queue(config, sbatch) -> None:
    RunFolder(config.parent / "runs" / "mine").update_run(
        status="finished", identity={"name": "01234567", "config": {}, "data": {}, "start": None}
    )
    with pytest.raises(ValueError, match=r"mine holds another run \(another config: .* --run\.name"):
        submit(config, "--run.name", "mine")
    assert not sbatch.exists()


def test_a_job_that_cannot_be_released_says_how(config, sbatch) -> None:
    (sbatch.parent / "bin/scontrol").write_text("#!/bin/sh\necho 'slurm is down' >&2; exit 1\n")
    with pytest.raises(
        ValueError, match=r"job 101 is submitted but held: slurm is down.*`scontrol release 101`"
    ):
        submit(config)


def test_who_asks_for_a_held_job_gets_one(config, sbatch) -> None:
    submit(config, "--slurm.extra=--hold")
    assert not (config.parent / "released").exists()


def test_remarks_of_a_site_are_no_job_id(config, sbatch) -> None:
    (sbatch.parent / "bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: lua: be nice'\necho '101;cluster'\n")
    submit(config)
    (run_file,) = (config.parent / "runs").glob("*/run.json")
    assert json.loads(run_file.read_text())["job"]["id"] == "101"


def test_a_job_that_the_queue_has_forgotten_is_its_id() -> None:
    assert described(None, {}) == ""
    assert described("7", {}) == described("7", None) == "7"
    assert described("7_1", {"7_1": "pending (Priority)"}) == "7_1 pending (Priority)"


def test_a_queued_run_whose_job_is_not_in_the_queue_is_gone(sbatch, monkeypatch) -> None:
    known = job_states()
    assert known == {"101_0": "running", "101_1": "pending (Resources)"}
    assert status_in_queue("queued", "101_1", known) == "queued"
    assert status_in_queue("queued", "99", known) == "gone"
    assert status_in_queue("finished", "99", known) == "finished"
    (sbatch.parent / "bin/squeue").write_text("#!/bin/sh\necho '7|PENDING|Nodes required: a|b'\n")
    assert job_states() == {"7": "pending (Nodes required: a|b)"}
    monkeypatch.setenv("PATH", "/nowhere")
    assert job_states() is None
    assert status_in_queue("queued", "99", None) == "queued", "nobody to ask"


def test_the_latest_job_of_a_run_is_shown() -> None:
    submitted, attempt = {"id": "7", "submitted": "2026-01-02T00"}, {"started": "2026-01-03T00", "job": "8"}
    assert job_of({}) is None
    assert job_of({"job": submitted}) == "7"
    assert job_of({"attempts": [attempt]}) == "8", "sbatch configs/slurm/fit.sbatch"
    assert job_of({"job": submitted, "attempts": [attempt]}) == "8"
    assert job_of({"job": submitted | {"submitted": "2026-01-04T00"}, "attempts": [attempt]}) == "7"
    assert job_of({"job": submitted, "attempts": [{"started": "2026-01-03T00"}]}) == "7"
