"""The doctor finds what would fail in the queue, says what to change, and lets a sound machine pass."""

import hashlib
import http.server
import importlib.metadata
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_em.__main__ import main
from lightning_em.cluster.doctor import _versions, check
from lightning_em.cluster.files import ModelFiles
from lightning_em.models import BaseModel
from tests.fitting import LORA, command, experiment, write_config
from tests.tiny import VOCAB_SIZE

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path, tiny_model_folder, chat_file, answer_file) -> Path:
    """An experiment with a copy of the tiny model, to be broken."""
    shutil.copytree(tiny_model_folder(), tmp_path / "model")
    settings = experiment(tmp_path / "model", chat_file, answer_file, run={"root": str(tmp_path / "runs")})
    return write_config(tmp_path / "x.yaml", settings)


def findings(config: Path, *flags: str, **options) -> dict[str, tuple[str, str]]:
    found = check(["--config", str(config), *flags], **options)
    return {finding.topic: (finding.level, finding.text) for finding in found}


def test_a_sound_experiment_passes(config, capsys) -> None:
    assert main(["doctor", "--config", str(config), "--debug"]) == 0
    assert "ready" in capsys.readouterr().out
    found = findings(config)
    assert {level for level, _ in found.values()} == {"ok"}
    assert set(found) == {
        "versions", "settings", "device", "disk", "cache", "model files", "chat template", "end of turn", "data narrow",
        "data kl", "mask sample", "adapter", "memory",
    }  # fmt: skip
    assert not (config.parent / "runs").exists(), "looking leaves nothing behind"


def test_the_mask_sample_brackets_what_is_trained(config, chat_file) -> None:
    _, text = findings(config)["mask sample"]
    rows = [json.loads(line) for line in Path(chat_file).read_text().splitlines()]
    trained = [part.partition("]]")[0] for part in text.split("[[")[1:]][1:]  # the first is the legend
    answers = [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]
    assert trained
    assert all(part.removesuffix("<|im_end|>") in answers for part in trained)
    assert all(part.endswith("<|im_end|>") for part in trained), "the stop token is trained"


@pytest.mark.parametrize("broken", ["tokenizer", "generation_config.json", "config.json"])
def test_an_end_of_turn_at_which_others_do_not_stop_is_said(config, broken) -> None:
    """Base models that were given a chat template keep the end of a text as their only end."""
    model = config.parent / "model"
    if broken == "tokenizer":
        tokenizer = BaseModel(str(model)).load_tokenizer()
        tokenizer.eos_token = "<|endoftext|>"
        tokenizer.save_pretrained(model)
    else:
        if broken == "config.json":
            (model / "generation_config.json").unlink()
        settings = json.loads((model / broken).read_text())
        (model / broken).write_text(json.dumps(settings | {"eos_token_id": [VOCAB_SIZE - 6]}))
    level, text = findings(config)["end of turn"]
    where = "the tokenizer" if broken == "tokenizer" else broken
    assert level == "warning"
    assert f"answers end with '<|im_end|>', but {where} has '<|endoftext|>' as the end of a text" in text
    assert f"programs to stop at token {VOCAB_SIZE - 3} as well" in text


@pytest.mark.parametrize("broken", ["{{ 1 / 0 }}", "{{ messages[9].content }}"])
def test_error_inside_a_template_is_one_finding(config, broken) -> None:
    file = config.parent / "model" / "chat_template.jinja"
    file.write_text(file.read_text() + broken)
    level, text = findings(config)["chat template"]
    assert level == "fault"
    assert "the chat template refuses the roles ['user', 'assistant']: " in text


def test_faults_make_the_exit_code_1(config, capsys) -> None:
    (config.parent / "model" / "model.safetensors").unlink()
    assert main(["doctor", "--config", str(config)]) == 1
    assert "1 fault" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "topic", "words"),
    [
        (["--model.adapter.init_args.layer=7"], "memory", "layer must be 0..2"),
        (["--data.narrow.path=nowhere.jsonl"], "data", "nowhere.jsonl"),
        (["--data.max_length=20"], "data", "20"),
        (["--trainer.strategy=fsdp"], "settings", "ShardedBase"),
        (["--model.base.path=/nowhere/model"], "model files", "set model.base.path"),
        (["--model.base.path=org/never-downloaded"], "model files", "add --prefetch"),
        (["--model.objective.kl_wait=1"], "settings", "kl_weight"),
        (["--model.base.path=miniature://seed-99999/model"], "model files", "miniature build --seed 99999"),
    ],
)
def test_each_fault_is_found_and_named(config, flags, topic, words) -> None:
    level, text = findings(config, *flags)[topic]
    assert level == "fault"
    assert words in text


def test_missing_and_broken_files_of_a_model(config) -> None:
    model = config.parent / "model"
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    (model / "model-1.safetensors").touch()
    level, text = findings(config)["model files"]
    assert level == "fault"
    assert "lacks model-2.safetensors:" in text
    assert findings(config)["memory"][0] == "ok", "the config is enough for the estimate"
    (model / "chat_template.jinja").unlink()
    level, text = findings(config)["chat template"]
    assert level == "fault"
    assert "no chat template" in text
    assert findings(config, "--data.narrow.path=nowhere.jsonl")["data"][0] == "fault", (
        "found without a tokenizer"
    )


def test_too_little_memory_says_what_would_do(config) -> None:
    gpu = ["--trainer.accelerator=gpu"]
    assert findings(config, *gpu, gpu_gib=4.0)["memory"][0] == "ok"
    level, text = findings(config, *gpu, gpu_gib=1.0)["memory"]
    assert level == "fault"
    assert "model.base.dtype=bfloat16" in text
    _, text = findings(config, *gpu, "--model.base.dtype=bfloat16", gpu_gib=1.0)["memory"]
    assert "most of it is reserve; lower data.batch_size" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to compare with")
@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_what_was_compared_with_nothing_is_not_ready(config, accelerator, capsys) -> None:
    flags = [f"--trainer.accelerator={accelerator}"]
    found = findings(config, *flags)
    assert found["device"][0] == found["memory"][0] == "warning"
    assert "give --gpu_gib" in found["device"][1]
    assert "compared with nothing: give --gpu_gib" in found["memory"][1]
    assert main(["doctor", "--config", str(config), *flags]) == 0
    shown = capsys.readouterr().out
    assert "ready" not in shown
    assert "2 warnings" in shown
    assert {level for level, _ in findings(config, *flags, gpu_gib=8.0).values()} == {"ok"}


def test_gpus_that_are_elsewhere_are_not_counted_here(config, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "little one")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    flags = ["--trainer.accelerator=gpu", "--trainer.devices=8", "--model.base.dtype=bfloat16"]
    assert findings(config, *flags, gpu_gib=80.0)["device"] == (
        "ok", "for GPUs of 80 GiB; this machine's are not looked at",
    )  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    level, text = findings(config, *flags)["device"]
    assert level == "fault"
    assert "bfloat16" in text


def test_probes_count(config) -> None:
    def activations(*flags: str) -> float:
        _, text = findings(config, *flags, "--trainer.accelerator=gpu", gpu_gib=80.0)["memory"]
        return float(re.search(r"activations ([\d.]+)", text)[1]) if "activations" in text else 0.0

    file = config.parent / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 100_000}))
    alone = activations("--data.batch_size=1", "--data.kl_batch_size=1")
    probing = '--probing={"probes": [{"class_path": "lightning_em.probes.GradientNorm"}], "batch_size": 16}'
    assert activations("--data.batch_size=1", "--data.kl_batch_size=1", probing) > 6 * alone > 0


@pytest.mark.parametrize(
    ("names", "lacks"),
    [(["vocab.json", "merges.txt"], False), (["vocab.json"], True), (["tokenizer.model"], False)],
)
def test_a_tokenizer_may_be_written_in_several_ways(config, names, lacks) -> None:
    model = config.parent / "model"
    (model / "tokenizer.json").unlink()
    for name in names:
        (model / name).touch()
    files = ModelFiles.find(BaseModel(str(model)))
    assert ("tokenizer.json" in files.missing) is lacks


def test_a_base_too_large_for_one_gpu_is_to_be_shared(config) -> None:
    """13 billion weights by their config; the weights themselves are not looked at."""
    file = config.parent / "model" / "config.json"
    sizes = {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "layer_types": ["full_attention"] * 48,
    }  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    flags = ["--model.base.dtype=bfloat16", "--trainer.accelerator=gpu"]
    level, text = findings(config, *flags, gpu_gib=12.0)["memory"]
    assert level == "fault"
    advice = "share the base over 8 GPUs: --trainer configs/trainer/fsdp2.yaml --trainer.devices 8"
    assert (
        f"{advice} --trainer.accumulate_grad_batches 1 with smaller batches: a step has 1 micro-batches"
        in text
    )
    same_rows = ["--trainer.accumulate_grad_batches=16"]
    _, text = findings(config, *flags, *same_rows, gpu_gib=12.0)["memory"]
    assert f"{advice} --trainer.accumulate_grad_batches 2 (the same rows a step)" in text
    flags += ["--trainer", str(REPOSITORY / "configs/trainer/fsdp2.yaml"), "--trainer.devices=8"]
    assert findings(config, *flags, gpu_gib=12.0)["memory"][0] == "ok"
    assert findings(config, *flags[:-1], "--trainer.devices=2", gpu_gib=12.0)["memory"][0] == "fault"


def test_lora_of_every_kind_has_a_size(config) -> None:
    settings = LORA["init_args"]
    flags = [f"--model.adapter={json.dumps(LORA)}"]
    level, text = findings(config, *flags)["adapter"]
    assert level == "ok"
    assert text.startswith(f"{settings['rank'] * (32 + 48)} parameters from layer 1 of 3 up")


def test_a_full_or_closed_disk(config, monkeypatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert findings(config)["disk"][0] == "warning"
    real = os.access

    def access(path, mode, **kwargs) -> bool:
        return not (mode == os.W_OK and Path(path) == config.parent) and real(path, mode, **kwargs)

    monkeypatch.setattr("os.access", access)
    assert findings(config)["disk"][0] == "fault"


REVISION = "5" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as a download asks for."""

    folder: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.requests.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny"):
            names = sorted(file.name for file in self.folder.iterdir())
            files = [{"rfilename": name} for name in names]
            body = json.dumps(
                {"id": "org/tiny", "sha": REVISION, "siblings": files, "private": False}
            ).encode()
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": "0"}
                    for n in names
                ]
                body = json.dumps(tree).encode()
        elif not (self.folder / path.rsplit("/", 1)[-1]).is_file():
            self.send_error(404)
            return
        else:
            body = (self.folder / path.rsplit("/", 1)[-1]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny_model_folder, tmp_path) -> Iterator[str]:
    """A hub with one model, and a pickle that nobody should take."""
    folder = tmp_path / "hub"
    shutil.copytree(tiny_model_folder(), folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    handler = type("OneModel", (Hub,), {"folder": folder, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_was_prefetched_is_there_without_a_network(config, hub, tmp_path) -> None:
    words = ["doctor", "--config", str(config), "--model.base.path=org/tiny"]
    home = {"HF_HOME": str(tmp_path / "home"), "COLUMNS": "500", "HF_HUB_DISABLE_XET": "1"}
    before = command(*words, HF_HUB_OFFLINE="1", **home)
    assert before.returncode == 1
    assert "not in the hub's cache" in before.stdout
    fetched = command(*words, "--prefetch", HF_HUB_OFFLINE="0", HF_ENDPOINT=hub, **home)
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    assert "HF_HUB_OFFLINE=1 works" in fetched.stdout
    assert not list((tmp_path / "home").rglob("*.bin"))
    done = command(
        *("fit", *words[1:], "--trainer.max_epochs=1"),
        HF_HUB_OFFLINE="1",
        HF_ENDPOINT="http://127.0.0.1:9",
        **home,
    )
    assert done.returncode == 0, done.stderr


def test_a_hub_that_cannot_be_reached_is_a_fault(config, tmp_path) -> None:
    words = ["doctor", "--config", str(config), "--model.base.path=org/tiny", "--prefetch"]
    home = {"HF_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    done = command(*words, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", **home)
    assert done.returncode == 1
    assert "could not download org/tiny" in done.stdout


def test_a_package_that_is_only_on_the_path_is_no_traceback(monkeypatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", requires)
    (finding,) = _versions()
    assert finding.level == "warning"
    assert "not installed" in finding.text
