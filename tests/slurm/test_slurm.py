"""F5 and F28 on a real Slurm: saved and requeued by a signal, an array for a sweep, one job a run folder.

Everything lies in a folder with spaces and a percent sign in its name.
"""

import re
from pathlib import Path

import pytest

from lightning_em.manifest import manifest_problems
from lightning_em.runs import RunFolder
from tests.faults.processes import wait_until
from tests.fitting import command, experiment, final_adapter, metrics_of, write_config
from tests.slurm.daemons import Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
LAST_STEP = 12
TWO_RANKS = ("--trainer", str(REPOSITORY / "configs/trainer/cpu_ddp2.yaml"), "--trainer.max_epochs", "2")


class Submitter:
    """`lightning-em submit` of one experiment, to one Slurm."""

    def __init__(self, slurm: Slurm, config: Path) -> None:
        self.slurm, self.config, self.root = slurm, config, config.parent
        # one machine has one address; the compute node's own name may not resolve
        self.environment = slurm.environment | {"PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1"}

    def words(self, *flags: str, slow: float = 0.0) -> list[str]:
        words = ["--config", str(self.config), "--run.root", str(self.root), *flags]
        if slow:
            words += ["--trainer.callbacks+=tests.faults.inject.Slow", "--allow_import=tests"]
            words += [f"--trainer.callbacks.init_args.seconds={slow}"]
        return words

    def submit(self, *flags: str, tasks: int = 1, slow: float = 0.0) -> str:
        """Submit; the job's id."""
        asked = ["--slurm.gpus=0", f"--slurm.tasks={tasks}", "--slurm.cpus=1", "--slurm.time=10"]
        done = command("submit", *self.words(*flags, slow=slow), *asked, **self.environment)
        assert done.returncode == 0, done.stderr
        return re.search(r"job (\d+):", done.stdout)[1]

    def logs(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in (self.root / "slurm").glob("*.out"))


@pytest.fixture
def submitter(slurm, tmp_path, tiny_model_folder, chat_file, answer_file) -> Submitter:
    """6 steps an epoch, a checkpoint every second."""
    settings = {"data": {"batch_size": 3, "kl_batch_size": 3}, "checkpoint": {"every_n_steps": 2}}
    config = experiment(tiny_model_folder(), chat_file, answer_file, **settings)
    config["trainer"]["accumulate_grad_batches"] = 2
    folder = tmp_path / "my runs, 100% %j"
    folder.mkdir()
    return Submitter(slurm, write_config(folder / "experiment.yaml", config))


def test_two_tasks_are_requeued_by_a_signal_and_end_as_if_nothing_had_happened(submitter) -> None:
    flags = [*TWO_RANKS, "--trainer.accumulate_grad_batches", "1"]
    run = RunFolder(submitter.root / "requeued")
    job = submitter.submit(*flags, "--run.name", "requeued", tasks=2, slow=0.5)
    assert run.read_run() | {"job": None} == {"status": "queued", "job": None}
    assert run.read_run()["job"]["id"] == job
    wait_until(lambda: len(run.steps()) >= 1, 120, "a checkpoint")
    listing = command(
        "runs", "ls", "--root", str(submitter.root), COLUMNS="200", **submitter.environment
    ).stdout
    assert f"{job} running" in listing
    submitter.slurm.ask("scancel", "--signal=USR1", job)
    wait_until(lambda: run.read_run()["status"] == "preempted", 30, "the run to save")
    saved = run.steps()[-1]
    assert saved == run.read_run()["last_step"] < LAST_STEP
    ended = submitter.slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), submitter.logs()
    attempts = run.read_run()["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["preempted", "finished"]
    assert [attempt["world_size"] for attempt in attempts] == [2, 2]
    assert attempts[1]["from_step"] == saved

    words = submitter.words(*flags, "--run.name", "whole")
    done = command("fit", *words, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    whole = RunFolder(submitter.root / "whole")
    assert whole.steps()[-1] == run.steps()[-1] == LAST_STEP
    assert final_adapter(run) == final_adapter(whole)
    assert metrics_of(run) == metrics_of(whole)
    assert all(manifest_problems(run.checkpoint(step)) == [] for step in run.steps())


def test_a_sweep_is_an_array_of_runs(submitter) -> None:
    weights = [0.0, 0.7, 6.6]
    job = submitter.submit("--sweep=model.objective.kl_weight=0,0.7,6.6", "--trainer.max_epochs=1")
    for index in range(3):
        ended = submitter.slurm.wait_for_end(f"{job}_{index}")
        assert ended["JobState"] == "COMPLETED", submitter.logs()
    runs = {folder.parent: RunFolder(folder.parent) for folder in submitter.root.glob("*/run.json")}
    by_job = {run.read_run()["job"]["id"]: run for run in runs.values()}
    assert sorted(by_job) == [f"{job}_{index}" for index in range(3)]
    for index, weight in enumerate(weights):
        run = by_job[f"{job}_{index}"]
        assert run.read_run()["status"] == "finished"
        assert {row["train/kl_weight"] for row in metrics_of(run).values() if "train/ce" in row} == {weight}
    assert len({final_adapter(run) for run in runs.values()}) == len(weights)


def test_a_second_job_on_a_run_that_is_in_use_is_refused(submitter) -> None:
    run = RunFolder(submitter.root / "wanted by two")
    flags = ["--run.name", "wanted by two", "--trainer.max_epochs=1"]
    first = submitter.submit(*flags, slow=20.0)
    wait_until(lambda: run.read_run()["status"] == "running", 120, "the first job to train")
    refusal = rf"is in use by process \d+ on \S+ \(Slurm job {first}\)"
    done = command("submit", *submitter.words(*flags), "--slurm.gpus=0", **submitter.environment)
    assert done.returncode == 2
    assert re.search(refusal, done.stderr), done.stderr
    second = submitter.slurm.ask("sbatch", "--parsable", run.read_run()["job"]["script"])  # by hand
    ended = submitter.slurm.wait_for_end(second)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), submitter.logs()
    log = (submitter.root / "slurm" / f"wanted by two-{second}.out").read_text(encoding="utf-8")
    assert re.search(refusal, log), log
    assert run.read_run()["job"]["id"] == first
    assert submitter.slurm.job(first)["JobState"] == "RUNNING"
    assert len(run.read_run()["attempts"]) == 1
    submitter.slurm.ask("scancel", first)
    assert submitter.slurm.wait_for_end(first)["JobState"] == "CANCELLED"
