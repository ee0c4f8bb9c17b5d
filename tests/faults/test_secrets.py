"""F31: secrets do not appear in any file a run writes."""

from pathlib import Path

import pytest
import yaml

from tests.faults.conftest import Case
from tests.faults.processes import run
from tests.fitting import write_config

KEYS = {
    "in the environment": "fake-environment-value-8f3a1c",
    "by a flag": "fake-flag-value-77b2d0",
    "in a config": "fake-config-value-1d9e42",
    "by its form": "sk-fakeformfakeform1234567890",
}


@pytest.mark.fault(
    "F31", "fake keys in environment, flags and YAML, all subcommands: no hit in the run folder"
)
def test_no_key_in_the_run_folder(case: Case, tmp_path: Path) -> None:
    config = yaml.safe_load(case.config.read_text())
    config["data"]["template_kwargs"] = {"api_key": KEYS["in a config"], "note": KEYS["by its form"]}
    config["trainer"]["max_epochs"] = 1
    config["probing"] = {
        "probes": [{"class_path": "lightning_em.probes.ScaleCurve", "init_args": {"scales": [0.0, 1.0]}}]
    }
    keyed = Case(write_config(tmp_path / "keyed.yaml", config), tmp_path / "runs")
    environment = {"JUDGE_API_KEY": KEYS["in the environment"]}
    flag = ("--data.template_kwargs.access_key", KEYS["by a flag"])
    done = keyed.fit("keyed", *flag, **environment)
    assert done.code == 0, done.output
    folder = keyed.folder("keyed")
    config_flags = ["--config", str(folder.config_file), "--ckpt_path", str(folder.path)]
    for words in (
        ["validate", *config_flags, *flag],
        ["test", *config_flags, *flag],
        ["predict", *config_flags, *flag],
        ["probe", str(folder.path)],
        ["runs", "show", str(folder.path)],
    ):
        ended = run(*words, output=tmp_path / f"{words[0]}.out", **environment)
        assert ended.code == 0, ended.output
    broken = keyed.fit(
        "broken", *flag, "--model.base.path", f"/nowhere/{KEYS['in the environment']}", **environment
    )
    assert broken.code == 2
    # the secrets did reach the config
    assert folder.config_file.read_text(encoding="utf-8").count("<hidden>") == 3
    files = [file for file in keyed.root.rglob("*") if file.is_file() and file.suffix != ".out"]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        for how, key in KEYS.items():
            assert key.encode() not in content, f"{file} holds the key given {how}"
