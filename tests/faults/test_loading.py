"""F12, F13, F14, F29, F30: files that must not be loaded."""

import json
import pickle
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from lightning_em.manifest import MANIFEST, sha256_of
from lightning_em.runs import RunFolder
from tests.faults.conftest import Case, Whole
from tests.faults.processes import Ended, run
from tests.fitting import LORA, cut_after, experiment, write_config
from tests.tiny import make_tiny_folder

ADAPTER = "adapter_model.safetensors"


def evaluate(folder: RunFolder, *flags: str, config: Path | None = None, step: int = 24) -> Ended:
    words = [
        "validate",
        "--config",
        str(config or folder.config_file),
        "--ckpt_path",
        f"{folder.path}@step-{step}",
    ]
    return run(*words, *flags, output=folder.path.parent / f"{folder.path.name}.validate")


def probe(folder: RunFolder, *flags: str) -> Ended:
    probing = folder.path.parent / "probing.yaml"
    probing.write_text(
        "probes: [{class_path: lightning_em.probes.ScaleCurve, init_args: {scales: [0.0, 1.0]}}]\n"
    )
    words = ["probe", f"{folder.path}@step-24", "--config", str(probing), "--num_examples", "4", *flags]
    return run(*words, output=folder.path.parent / f"{folder.path.name}.probe")


def sign_again(checkpoint: Path) -> None:
    """Update the manifest to match the files, like an attacker who edits a checkpoint."""
    files = [file for file in checkpoint.iterdir() if file.name != MANIFEST]
    listing = {file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size} for file in files}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": listing}), encoding="utf-8")


@pytest.fixture(scope="module")
def lora_run(case: Case, tmp_path_factory, tiny_model_folder, chat_file) -> RunFolder:
    folder = tmp_path_factory.mktemp("lora")
    config = experiment(tiny_model_folder(), chat_file, data={"batch_size": 6}, trainer={"max_epochs": 4})
    config["model"]["adapter"] = LORA
    lora = Case(write_config(folder / "lora.yaml", config), folder)
    done = lora.fit("lora")
    assert done.code == 0, done.output
    return lora.folder("lora")


@pytest.mark.fault("F12", "one bit flipped in the adapter: refused by its sha256")
def test_flipped_bit(whole: Whole) -> None:
    cut = cut_after(whole.run, 24, whole.root / "flipped")
    weights = cut.checkpoint(24) / ADAPTER
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    for done in (evaluate(cut), probe(cut)):
        assert done.code == 2
        assert "content changed (sha256 differs from MANIFEST.json)" in done.output
        assert "Traceback" not in done.output


@pytest.mark.fault("F13", "lora_B deleted, layer renamed: refused, missing and unexpected keys listed")
@pytest.mark.parametrize("damage", ["lora_B deleted", "layer renamed"])
def test_adapter_with_other_keys(lora_run: RunFolder, tmp_path: Path, damage: str) -> None:
    cut = cut_after(lora_run, 24, tmp_path / "damaged")
    weights = cut.checkpoint(24) / ADAPTER
    tensors = load_file(weights)
    if damage == "lora_B deleted":
        tensors = {name: tensor for name, tensor in tensors.items() if "lora_B" not in name}
    else:
        tensors = {name.replace("layers.1", "layers.2"): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights)
    sign_again(cut.checkpoint(24))
    for done in (evaluate(cut), probe(cut)):
        assert done.code == 2, done.output
        assert (
            "layers.1.mlp.down_proj.lora_B.weight"
            in done.output.split("Missing: ")[1].split("; unexpected")[0]
        )
        unexpected = done.output.split("unexpected: ")[1].split("; shapes")[0]
        assert unexpected == "none" if damage == "lora_B deleted" else "layers.2.mlp.down_proj" in unexpected
        assert "Traceback" not in done.output


@pytest.mark.fault(
    "F14", "zero adapter or another base given to evaluation: refused; an explicit flag allows the first"
)
def test_zero_adapter(lora_run: RunFolder, tmp_path: Path) -> None:
    cut = cut_after(lora_run, 24, tmp_path / "zero")
    weights = cut.checkpoint(24) / ADAPTER
    save_file({n: t * 0 if "lora_B" in n else t for n, t in load_file(weights).items()}, weights)
    sign_again(cut.checkpoint(24))
    for command in (evaluate, probe):
        done = command(cut)
        assert done.code == 2, done.output
        assert "does not change the logits" in done.output
        allowed = command(cut, "--allow_zero_adapter")
        assert allowed.code == 0, allowed.output


@pytest.mark.fault(
    "F14", "zero adapter or another base given to evaluation: refused; an explicit flag allows the first"
)
def test_another_base(whole: Whole, tmp_path: Path) -> None:
    other = make_tiny_folder(tmp_path / "other", "qwen2", "float32", 1)
    done = evaluate(whole.run, "--model.base.path", str(other))
    assert done.code == 2, done.output
    assert "an adapter only works on its own base" in done.output
    cut = cut_after(whole.run, 12, whole.root / "base-changed")
    cut.update_run(base=cut.read_run()["base"] | {"sha256": "0" * 64})
    resumed = whole.fit("base-changed")
    assert resumed.code == 2
    assert "an adapter only works on its own base" in resumed.output


@pytest.mark.fault(
    "F29", "evil YAML (local module, subprocess, python tag): nothing runs, exit 2, says how to allow"
)
@pytest.mark.parametrize(
    "kind", ["local module", "subprocess", "os.system as adapter", "python tag", "module attribute"]
)
def test_evil_yaml(case: Case, tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "it-ran"
    (tmp_path / "evil_module.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Evil:\n    pass\n", encoding="utf-8"
    )
    config = yaml.safe_load(case.config.read_text())
    touch = {"args": ["touch", str(trace)]}
    if kind == "local module":
        config["model"]["adapter"] = {"class_path": "evil_module.Evil"}
    elif kind == "subprocess":
        config["trainer"]["callbacks"] = [{"class_path": "subprocess.Popen", "init_args": touch}]
    elif kind == "os.system as adapter":
        config["model"]["adapter"] = {"class_path": "os.system", "init_args": {"command": f"touch {trace}"}}
    elif kind == "module attribute":
        reached = "lightning_em.callbacks.provenance.subprocess.Popen"
        config["trainer"]["callbacks"] = [{"class_path": reached, "init_args": touch}]
    text = yaml.safe_dump(config)
    if kind == "python tag":
        text += f"predict: !!python/object/apply:os.system ['touch {trace}']\n"
    file = tmp_path / "evil.yaml"
    file.write_text(text, encoding="utf-8")
    words = ["fit", "--config", str(file), "--run.root", str(tmp_path / "runs")]
    done = run(*words, output=tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert not trace.exists()
    assert done.code == 2, done.output
    assert "Traceback" not in done.output
    assert "--allow_import" in done.output or "YAML tag that would run Python code" in done.output
    assert "evil.yaml:" in done.output


class _Evil:
    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (Path(self.trace),))


@pytest.mark.fault("F30", "evil .ckpt, trainer state, .bin, auto_map model: nothing runs, refused")
@pytest.mark.parametrize("kind", ["ckpt", "trainer state", "bin", "auto_map"])
def test_evil_pickles_and_remote_code(
    whole: Whole, case: Case, tmp_path: Path, tiny_model_folder, kind: str
) -> None:
    import shutil

    import torch

    trace = tmp_path / "it-ran"
    flags: list[str] = []
    if kind == "ckpt":
        file = tmp_path / "evil.ckpt"
        torch.save({"state_dict": _Evil(str(trace))}, file)
        words = ["validate", "--config", str(whole.run.config_file), "--ckpt_path", str(file)]
    elif kind == "trainer state":
        cut = cut_after(whole.run, 12, tmp_path / "evil-state")
        torch.save({"state": _Evil(str(trace))}, cut.checkpoint(12) / "trainer_state.pt")
        sign_again(cut.checkpoint(12))
        words = case.at(tmp_path).words("evil-state")
    else:
        model = tmp_path / "model"
        shutil.copytree(tiny_model_folder(), model)
        if kind == "bin":
            (model / "model.safetensors").unlink()
            with (model / "pytorch_model.bin").open("wb") as file:
                pickle.dump(_Evil(str(trace)), file)
        else:
            (model / "modeling_evil.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")
            config = json.loads((model / "config.json").read_text())
            config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
            config["auto_map"]["AutoConfig"] = "modeling_evil.EvilConfig"
            (model / "config.json").write_text(json.dumps(config))
        flags = ["--model.base.path", str(model)]
        words = case.at(tmp_path).words("evil-model")
    done = run(*words, *flags, output=tmp_path / "out")
    assert not trace.exists()
    assert done.code not in (0, None), done.output
    assert "Traceback" not in done.output, done.output
