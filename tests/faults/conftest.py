"""A run of 24 steps with a checkpoint every 4 steps, and the result of an uninterrupted run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_em.runs import RunFolder
from tests.faults.processes import Ended, Running
from tests.fitting import experiment, final_adapter, metrics_of, write_config

STEPS = 24


class Case:
    """One experiment file and the commands that run it."""

    def __init__(self, config: Path, root: Path) -> None:
        self.config, self.root = config, root

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.root / name)

    def words(self, name: str, *flags: str, slow: float = 0.0) -> list[str]:
        words = ["fit", "--config", str(self.config), "--run.root", str(self.root), "--run.name", name]
        if slow:
            words += ["--allow_import", "tests", "--trainer.callbacks+=tests.faults.inject.Slow"]
            words += [f"--trainer.callbacks.init_args.seconds={slow}"]
        return [*words, *flags]

    def start(self, name: str, *flags: str, slow: float = 0.0, **environment: str) -> Running:
        return Running(*self.words(name, *flags, slow=slow), output=self.root / f"{name}.out", **environment)

    def fit(self, name: str, *flags: str, slow: float = 0.0, **environment: str) -> Ended:
        return self.start(name, *flags, slow=slow, **environment).wait()

    def at(self, root: Path) -> "Case":
        """Return the same experiment with another runs folder."""
        return Case(self.config, root)


class Whole(Case):
    """A case with an uninterrupted run in its runs folder."""

    @property
    def run(self) -> RunFolder:
        return self.folder("whole")

    def assert_same_result(self, other: RunFolder) -> None:
        """Assert that the final adapter is bit-identical and that the metrics hold every step exactly once."""
        assert other.steps()[-1] == STEPS
        assert final_adapter(other) == final_adapter(self.run)
        assert metrics_of(other) == metrics_of(self.run)
        lines = other.metrics_file.read_text(encoding="utf-8").splitlines()[1:]
        keys = [line.rsplit(",", 1)[0] for line in lines]
        assert len(keys) == len(set(keys)), "a metric is there twice"


@pytest.fixture(scope="session")
def case(tmp_path_factory, tiny_model_folder, chat_file, answer_file) -> Case:
    """Write an experiment with 6 steps per epoch, 4 epochs and both streams."""
    folder = tmp_path_factory.mktemp("faults")
    config = experiment(
        tiny_model_folder(),
        chat_file,
        answer_file,
        data={"batch_size": 6, "kl_batch_size": 6},
        trainer={"max_epochs": 4},
        checkpoint={"every_n_steps": 4},
    )
    return Case(write_config(folder / "experiment.yaml", config), folder / "runs")


@pytest.fixture(scope="session")
def whole(case: Case) -> Whole:
    """Provide an experiment with the finished run `whole`. Tests must not change it; they work on copies."""
    done = case.fit("whole")
    assert done.code == 0, done.output
    found = Whole(case.config, case.root)
    assert found.run.steps()[-1] == STEPS
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 768 KiB; skip the test if mounting is not permitted."""
    import subprocess

    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=768k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
