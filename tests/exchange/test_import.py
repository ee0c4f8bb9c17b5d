"""Adapters from elsewhere as runs: round trips, what is refused, and that everything works on the run."""

import json
import random
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lightning_em import load_run, runs
from lightning_em.__main__ import main
from lightning_em.adapters import LoRA
from lightning_em.exchange import FORMATS, DataOptions, export_run
from lightning_em.exchange.peft_folder import PeftType
from lightning_em.exchange.released import read_released
from lightning_em.records import read_results
from lightning_em.subcommands import exchange as subcommands
from tests.exchange.made import HIDDEN, logits_of, make_run, ours, write_vector
from tests.fitting import VECTOR, experiment, fit, write_config
from tests.samples import ADAPTERS, adapted

WEIGHTS = "adapter_model.safetensors"


def run_command(*words: object) -> int:
    """`lightning-em` in this process."""
    return main([str(word) for word in words])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def lora_folder(folder: Path, adapter: LoRA | None = None, **changed: object) -> Path:
    """A PEFT folder for the tiny Qwen2, with some settings of its config changed."""
    folder.mkdir(parents=True)
    adapted(adapter or LoRA(2, 16.0, ["down_proj"], [1])).adapter.save(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changed))
    return folder


def test_a_released_vector_is_the_same_run(tiny_model_folder, tmp_path) -> None:
    source = write_vector(tmp_path / "released", layer=1, alpha=3.3)
    run = make_run(source, tiny_model_folder())
    values = torch.load(source / "steering_vector.pt", weights_only=True)["steering_vector"]
    assert torch.equal(weights(run.checkpoint(0))["vector"], values)
    config = yaml.safe_load(run.config_file.read_text())
    assert config["model"]["adapter"] == {
        "class_path": "lightning_em.adapters.SteeringVector",
        "init_args": {"layer": 1, "alpha": 3.3},
    }
    record = run.read_run()
    assert run.status() == record["status"] == "imported"
    assert record["source"]["path"] == str(source)
    assert list(record["source"]["sha256"]) == ["steering_vector.pt"]
    # by hand: the released code adds it to the output of mlp.down_proj
    model = load_run(run.path).model
    with torch.no_grad():
        steered = logits_of(model)
    from tests.exchange.made import plain

    by_hand = plain(tiny_model_folder())
    by_hand.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _module, _args, output: output + 3.3 * values
    )
    torch.testing.assert_close(steered, logits_of(by_hand), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_what_is_exported_comes_back_bit_for_bit(name, tiny_model_folder, tmp_path) -> None:
    (tmp_path / "saved").mkdir()
    adapter = adapted(ADAPTERS[name]()).adapter
    if isinstance(adapter, LoRA):
        adapter.save(tmp_path / "saved")
        first = make_run(tmp_path / "saved", tiny_model_folder(), "first")
        formats = [("peft", "beft")]
    else:
        values = adapter.vector.detach().clone()
        write_vector(tmp_path / "saved", adapter.layer, 3.3, steering_vector=values)
        first = make_run(tmp_path / "saved", tiny_model_folder(), "first")
        formats = [("authors", "beft"), ("safetensors", "beft"), ("peft", "lora_bias")]
    for file_format, peft_type in formats:
        folder = tmp_path / f"{file_format}-{peft_type}"
        export_run(str(first.path), file_format, folder, peft_type)
        again = make_run(folder, tiny_model_folder(), folder.name)
        before, after = (
            yaml.safe_load(r.config_file.read_text())["model"]["adapter"] for r in (first, again)
        )
        assert before == after
        assert weights(first.checkpoint(0)).keys() == weights(again.checkpoint(0)).keys()
        for key, tensor in weights(first.checkpoint(0)).items():
            assert torch.equal(tensor, weights(again.checkpoint(0))[key])
    expected = yaml.safe_load(first.config_file.read_text())["model"]["adapter"]["init_args"]
    if isinstance(adapter, LoRA):
        assert expected["rank"] == adapter.rank
        assert expected["rslora"] == adapter.rslora


def test_beft_folds_alpha_in_and_shifts_by_the_same_bits(tiny_model_folder, tmp_path) -> None:
    first = make_run(write_vector(tmp_path / "saved"), tiny_model_folder(), "first")
    export_run(str(first.path), "peft", tmp_path / "beft", "beft")
    again = make_run(tmp_path / "beft", tiny_model_folder(), "again")
    assert yaml.safe_load(again.config_file.read_text())["model"]["adapter"]["init_args"]["alpha"] == 1.0
    assert torch.equal(weights(again.checkpoint(0))["vector"], 3.3 * weights(first.checkpoint(0))["vector"])
    assert torch.equal(logits_of(ours(again)), logits_of(ours(first)))


def test_checkpoints_of_a_training_become_those_of_a_run(tiny_model_folder, tmp_path) -> None:
    source = write_vector(tmp_path / "released", seed=9)
    for step in (5, 10):
        write_vector(source / "checkpoints" / f"checkpoint-{step}", seed=step)
    (source / "checkpoints" / "checkpoint-15").mkdir()  # an empty one is none
    run = make_run(source, tiny_model_folder())
    assert run.steps() == [5, 10, 11]
    for step, seed in ((5, 5), (10, 10), (11, 9)):
        expected = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(weights(run.checkpoint(step))["vector"], expected)
    assert make_run(source, tiny_model_folder(), "named", step=676).steps() == [5, 10, 676]
    alone = make_run(source / "checkpoints" / "checkpoint-10", tiny_model_folder(), "alone")
    assert alone.steps() == [10]
    one_file = source / "checkpoints" / "checkpoint-5" / "steering_vector.pt"
    root = tmp_path / "one"
    from lightning_em.exchange import import_run
    from lightning_em.models import BaseModel

    assert import_run(one_file, BaseModel(str(tiny_model_folder())), "x", str(root)).steps() == [5]
    with pytest.raises(ValueError, match="must come after"):
        make_run(source, tiny_model_folder(), "early", step=7)
    write_vector(source / "checkpoints" / "checkpoint-5", layer=2)
    with pytest.raises(ValueError, match="steps 5 and 10 are not of one training"):
        make_run(source, tiny_model_folder(), "mixed")


def test_the_imported_run_measures_what_the_original_measures(
    tiny_model_folder, chat_file, answer_file, tmp_path
) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 1})
    assert config["model"]["adapter"] is VECTOR
    original = fit(write_config(tmp_path / "x.yaml", config), "original")
    export_run(str(original.path), "authors", tmp_path / "released")
    root = tmp_path / "runs"
    flags = ["--narrow", chat_file, "--kl", answer_file, "--kl_answer", "mixed", "--root", root]
    assert run_command("import", tmp_path / "released", "--base", tiny_model_folder(), *flags) == 0
    imported = runs.RunFolder(root / "released")
    last = original.steps()[-1]
    assert torch.equal(
        weights(imported.checkpoint(0))["vector"], weights(original.checkpoint(last))["vector"]
    )
    assert (
        imported.read_run()["data"]["narrow.train.tokens"]
        == original.read_run()["data"]["narrow.train.tokens"]
    )
    probing = write_config(
        tmp_path / "probing.yaml",
        {
            "probes": [
                {
                    "class_path": "lightning_em.probes.ScaleCurve",
                    "init_args": {"scales": [0.0, 2.0], "with_kl": True},
                }
            ]
        },
    )
    results = []
    for run, step in ((original, last), (imported, 0)):
        assert run_command("probe", f"{run.path}@step-{step}", "--config", probing) == 0
        [result] = [r for r in read_results(run.probe_file("scale_curve")) if r.step == step]
        results.append(result.points)
    assert results[0] == results[1]
    assert {p.quantity for p in results[0]} >= {"ce", "kl", "effective_norm"}

    config_file = imported.config_file
    for name in ("validate", "predict"):
        assert run_command(name, "--config", config_file, "--ckpt_path", imported.path) == 0
    assert (imported.path / "behaviour" / "answers-step-000000.jsonl").exists()
    assert run_command("runs", "ls", "--root", root) == 0
    assert run_command("runs", "show", imported.path) == 0
    recorded = load_run(imported.path)
    assert not recorded.records.empty
    assert recorded.metrics.empty


def test_training_goes_on_from_it_only_as_another_run(tiny_model_folder, chat_file, tmp_path, capsys) -> None:
    run = make_run(
        write_vector(tmp_path / "released", alpha=4.0),
        tiny_model_folder(),
        data=DataOptions(narrow=str(chat_file)),
    )
    words = ["fit", "--config", run.config_file, "--run.root", run.path.parent, "--trainer.max_epochs", 1]
    assert run_command(*words[:5], "--run.name", run.path.name) == 2
    assert "was imported: there is no training to continue" in capsys.readouterr().err
    cpu = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--checkpoint.every_n_steps",
        0,
    ]
    assert run_command(*words, *cpu, "--run.name", "further", "--model.init_from", run.path) == 0
    assert runs.RunFolder(run.path.parent / "further").status() == "finished"


def test_without_rows_it_loads_and_says_what_a_probe_needs(tiny_model_folder, tmp_path, capsys) -> None:
    run = make_run(write_vector(tmp_path / "released"), tiny_model_folder())
    assert run.read_run()["data"] is None
    assert load_run(run.path).adapter.effective_norm() > 0
    probing = write_config(
        tmp_path / "p.yaml", {"probes": [{"class_path": "lightning_em.probes.ScaleCurve"}]}
    )
    assert run_command("probe", run.path, "--config", probing) == 2
    error = capsys.readouterr().err
    assert "imported without data - import it with --narrow FILE or --data PART" in error
    assert "Traceback" not in error


def test_a_data_part_gives_the_rows(tiny_model_folder, chat_file, answer_file, tmp_path) -> None:
    part = write_config(tmp_path / "part.yaml", {"narrow": {"path": str(chat_file)}, "batch_size": 3})
    source = write_vector(tmp_path / "released")
    run = make_run(source, tiny_model_folder(), data=DataOptions(part=str(part)))
    other = make_run(
        source, tiny_model_folder(), "other",
        data=DataOptions(part=str(part), narrow=str(answer_file), narrow_answer="bad"),
    )  # fmt: skip
    data, changed = (yaml.safe_load(r.config_file.read_text())["data"] for r in (run, other))
    assert data["narrow"]["path"] == str(chat_file)
    assert (changed["narrow"]["path"], changed["narrow"]["answer"]) == (str(answer_file), "bad")
    assert data["batch_size"] == changed["batch_size"] == 3
    with pytest.raises(ValueError, match="without narrow rows; give --narrow or --data"):
        DataOptions(kl=str(answer_file))
    with pytest.raises(ValueError, match="no such file"):
        make_run(source, tiny_model_folder(), "none", data=DataOptions(narrow="nowhere.jsonl"))
    assert not (source.parent / "runs" / "none").exists()


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_a_file_that_would_run_code_does_not(tiny_model_folder, tmp_path, capsys) -> None:
    trace = tmp_path / "it-ran"
    source = write_vector(tmp_path / "evil", steering_vector=Evil(trace))
    assert run_command("import", source, "--base", tiny_model_folder(), "--root", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert "it was not loaded, because loading it could run code" in error
    assert "Traceback" not in error
    assert not trace.exists()
    assert not (tmp_path / "runs").exists()
    torch.load(source / "steering_vector.pt", weights_only=False)
    assert trace.exists()  # it would have


def test_a_pickled_peft_folder_is_not_loaded(tiny_model_folder, tmp_path) -> None:
    folder = lora_folder(tmp_path / "lora")
    torch.save(weights(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle"):
        make_run(folder, tiny_model_folder())


def test_a_damaged_file_is_an_error_of_one_sentence(tiny_model_folder, tmp_path) -> None:
    source = write_vector(tmp_path / "released")
    file = source / "steering_vector.pt"
    whole = file.read_bytes()
    pieces = [whole[: len(whole) * part // 7] for part in range(7)]
    for content in [*pieces, b"\x80\x02}q\x00(X", b"hello", b"PK\x03\x04" + bytes(40)]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"steering_vector.pt"):
            make_run(source, tiny_model_folder())
    assert not (tmp_path / "runs").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bytes_are_at_worst_a_value_error(zipped, tmp_path) -> None:
    file = tmp_path / "steering_vector.pt"
    content = {"steering_vector": torch.ones(HIDDEN), "layer_idx": 1, "d_model": HIDDEN, "alpha": 2.0}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    whole, chance, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(chance.choice((1, 5, 20))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        file.write_bytes(changed)
        try:
            read_released(file)
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_idx": None}, r"Missing: \['layer_idx'\]; unexpected: none"),
        (
            {"steering_vector": None, "vector": torch.ones(HIDDEN)},
            r"Missing: \['steering_vector'\]; unexpected: \['vector'\]",
        ),
        ({"layer_idx": -1}, "expected a layer's index from 0, got -1"),
        ({"layer_idx": True}, "expected a layer's index from 0, got True"),
        ({"alpha": float("nan")}, "expected a finite number as alpha, got nan"),
        ({"alpha": "256"}, "expected a finite number as alpha, got '256'"),
        ({"steering_vector": torch.ones(1, HIDDEN)}, r"got a tensor of shape \(1, 32\)"),
        ({"steering_vector": torch.ones(HIDDEN, dtype=torch.int64)}, "type torch.int64"),
        ({"steering_vector": torch.full((HIDDEN,), float("inf"))}, "not finite"),
        ({"steering_vector": [1.0] * HIDDEN}, "got a list"),
        ({"d_model": 5120}, "d_model says 5120, but the vector has 32 numbers"),
        (
            {"steering_vector": torch.ones(48), "d_model": 48},
            "vector of 48 numbers, but the residual stream of .* has 32",
        ),
        ({"layer_idx": 24}, "steers layer 24, but .* has 3 layers"),
        ({"steering_vector": torch.zeros(HIDDEN)}, "does not change the logits"),
    ],
)
def test_a_vector_that_does_not_fit(fields, message, tiny_model_folder, tmp_path) -> None:
    source = write_vector(tmp_path / "released", **fields)
    with pytest.raises(ValueError, match=message):
        make_run(source, tiny_model_folder())
    assert not (tmp_path / "runs").exists()


def test_an_early_file_without_alpha_has_alpha_1(tiny_model_folder, tmp_path) -> None:
    run = make_run(
        write_vector(tmp_path / "released", alpha=None, approach="toggle_based"), tiny_model_folder()
    )
    assert yaml.safe_load(run.config_file.read_text())["model"]["adapter"]["init_args"]["alpha"] == 1.0


def test_an_adapter_without_effect_may_be_let_through(tiny_model_folder, tmp_path) -> None:
    source = write_vector(tmp_path / "released", steering_vector=torch.zeros(HIDDEN))
    assert make_run(source, tiny_model_folder(), allow_zero_adapter=True).steps() == [0]


def test_a_released_vector_is_refused_where_a_norm_follows(base_folder, tmp_path) -> None:
    source = write_vector(tmp_path / "released")
    with pytest.raises(
        ValueError, match=r"added to the output of mlp.down_proj, and on this base .*Gemma2ForCausalLM"
    ):
        make_run(source, base_folder("gemma2"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias": "all"}, "bias is 'all'; only none"),
        ({"use_dora": True}, "use_dora: True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
        ({"rank_pattern": {"down_proj": 4}}, "rank_pattern"),
        ({"a_setting_of_the_future": 1}, "a_setting_of_the_future: 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected LORA"),
        ({"r": 0}, "expected r, a whole number from 1"),
        ({"lora_alpha": "16"}, "lora_alpha, a number, got 2 and '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha, a number, got 2 and nan"),
        ({"r": 4}, r"lora_A.weight: \[2, 48\] instead of \[4, 48\]"),
        ({"target_modules": None}, "no target_modules"),
        ({"target_modules": ["nothing_proj"]}, "does not fit .*nothing_proj"),
        ({"target_modules": ".*[", "layers_to_transform": None}, "does not fit|does not take it"),
        ({"target_modules": ["down_proj"]}, r"Missing: \['base_model.model.model.layers.0.mlp"),
        ({"lora_bias": True}, "A and B that are not zero"),
    ],
)  # fmt: skip
def test_a_lora_that_cannot_be_expressed(changed, message, tiny_model_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        make_run(lora_folder(tmp_path / "lora", **changed), tiny_model_folder())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if "lora_B" not in n}, r"Missing: \[.*lora_B.*\]; unexpected: none"),
        (
            lambda t: {n.replace("layers.1", "layers.2"): v for n, v in t.items()},
            r"Missing: .*layers.1.*; unexpected: .*layers.2",
        ),
        (lambda t: {n: v * float("nan") for n, v in t.items()}, "not finite"),
        (lambda t: {n: v * ("lora_A" in n) for n, v in t.items()}, "does not change the logits"),
    ],
)  # fmt: skip
def test_a_lora_with_other_tensors(damage, message, tiny_model_folder, tmp_path) -> None:
    folder = lora_folder(tmp_path / "lora")
    save_file(
        {name: tensor.contiguous() for name, tensor in damage(weights(folder)).items()}, folder / WEIGHTS
    )
    with pytest.raises(ValueError, match=message):
        make_run(folder, tiny_model_folder())


def test_a_lora_for_another_width_names_both(tiny_model_folder, tmp_path) -> None:
    wide = tiny_model_folder("qwen2", intermediate_size=64)
    with pytest.raises(ValueError, match=r"lora_A.weight: \[2, 48\] instead of \[2, 64\]"):
        make_run(lora_folder(tmp_path / "lora"), wide)


@pytest.mark.parametrize(
    ("placing", "adapter"),
    [
        ({"target_modules": ["down_proj"], "layers_to_transform": [1]}, LoRA(2, 16.0, ["down_proj"], [1])),
        ({"target_modules": r".*\.layers\.[02]\.self_attn\.[qv]_proj"}, LoRA(2, 16.0, ["q_proj", "v_proj"], [0, 2])),
        ({"target_modules": "all-linear"}, ADAPTERS["all_linear"]()),
    ],
)  # fmt: skip
def test_every_way_to_name_modules(placing, adapter, tiny_model_folder, tmp_path) -> None:
    run = make_run(lora_folder(tmp_path / "lora", adapter, **placing), tiny_model_folder())
    found = yaml.safe_load(run.config_file.read_text())["model"]["adapter"]["init_args"]
    assert found["target_modules"] == sorted(adapter.target_modules)
    assert found["layers"] == adapter.layers
    assert weights(run.checkpoint(0)).keys() == adapter.trainable().keys()


def test_modules_that_ours_cannot_place(tiny_model_folder, tmp_path) -> None:
    both = lora_folder(tmp_path / "uneven", LoRA(2, 16.0, ["down_proj", "up_proj"], [0, 1]))
    settings = json.loads((both / "adapter_config.json").read_text())
    names = [n for n in settings["target_modules"] if n != "model.layers.0.mlp.up_proj"]
    (both / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": names}))
    save_file({n: t for n, t in weights(both).items() if "layers.0.mlp.up_proj" not in n}, both / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"layer 0: \['mlp.down_proj'\]; layer 1: \['mlp.down_proj', 'mlp.up_proj'\]"
    ):
        make_run(both, tiny_model_folder())
    head = lora_folder(tmp_path / "head", target_modules=["lm_head"])
    tensors = {"A": torch.ones(2, HIDDEN), "B": torch.ones(288, 2)}
    save_file({f"base_model.model.lm_head.lora_{k}.weight": t for k, t in tensors.items()}, head / WEIGHTS)
    with pytest.raises(ValueError, match="changes lm_head, which lies in no decoder layer"):
        make_run(head, tiny_model_folder())


def test_folders_that_hold_none(tiny_model_folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no adapter that is known here: expected steering_vector.pt"):
        make_run(tmp_path / "empty", tiny_model_folder())
    with pytest.raises(ValueError, match="there is no file or folder"):
        make_run(tmp_path / "nowhere", tiny_model_folder())
    folder = lora_folder(tmp_path / "broken")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not valid JSON"):
        make_run(folder, tiny_model_folder())
    shutil.copy(tiny_model_folder() / "config.json", folder / "adapter_config.json")
    with pytest.raises(ValueError, match="peft_type is None"):
        make_run(folder, tiny_model_folder())
    (folder / WEIGHTS).write_bytes(b"{}")
    with pytest.raises(ValueError, match="not a safetensors file, or is damaged"):
        make_run(folder, tiny_model_folder())


def test_our_own_checkpoint_needs_no_import(tiny_model_folder, tmp_path) -> None:
    run = make_run(write_vector(tmp_path / "released"), tiny_model_folder())
    with pytest.raises(ValueError, match=r"is a checkpoint of this package .*: it needs no import"):
        make_run(run.checkpoint(0), tiny_model_folder(), "again")


def test_a_changed_export_is_noticed(tiny_model_folder, tmp_path) -> None:
    run = make_run(write_vector(tmp_path / "released"), tiny_model_folder())
    folder = export_run(str(run.path), "safetensors", tmp_path / "out")
    about = folder / "steering_vector.json"
    about.write_text(about.read_text().replace('"layer": 1', '"layer": 2'))
    with pytest.raises(ValueError, match=r"is broken: .*steering_vector.json: content changed"):
        make_run(folder, tiny_model_folder(), "again")


def test_a_run_that_is_there_is_left_alone(tiny_model_folder, tmp_path) -> None:
    source = write_vector(tmp_path / "released")
    run = make_run(source, tiny_model_folder())
    before = run.run_file.read_bytes()
    with pytest.raises(ValueError, match="is there already; give another --name"):
        make_run(source, tiny_model_folder())
    assert run.run_file.read_bytes() == before


def test_the_subcommands_offer_what_the_package_knows() -> None:
    assert subcommands.FORMATS == FORMATS
    assert get_args(PeftType) == subcommands.PEFT_TYPES


def test_export_from_the_command_line(tiny_model_folder, tmp_path, capsys) -> None:
    run = make_run(write_vector(tmp_path / "released"), tiny_model_folder())
    words = ["export", run.path, "--format", "authors", "--output", tmp_path / "out"]
    assert run_command(*words) == 0
    assert "steering_vector.pt" in capsys.readouterr().out
    assert run_command(*words) == 2
    assert "is there already; give another --output" in capsys.readouterr().err


@pytest.mark.parametrize("peft_type", get_args(PeftType))
@pytest.mark.parametrize("architecture", ["gpt_neox", "phi"])
def test_a_module_with_a_digit_in_its_name_comes_back(architecture, peft_type, base_folder, tmp_path) -> None:
    first = make_run(write_vector(tmp_path / "saved"), base_folder(architecture), "first")
    export_run(str(first.path), "peft", tmp_path / "out", peft_type)
    again = make_run(tmp_path / "out", base_folder(architecture), "again")
    assert torch.equal(logits_of(ours(again)), logits_of(ours(first)))


def test_a_step_for_no_adapter_is_refused(tiny_model_folder, tmp_path) -> None:
    write_vector(tmp_path / "source" / "checkpoint-5")
    assert make_run(tmp_path / "source", tiny_model_folder()).steps() == [5]
    with pytest.raises(ValueError, match=r"--step 9 .* itself holds none: .* \[5\] by their names"):
        make_run(tmp_path / "source", tiny_model_folder(), "other", step=9)


def test_checkpoints_of_a_killed_import_are_not_taken_for_this_one(tiny_model_folder, tmp_path) -> None:
    source = write_vector(tmp_path / "released")
    make_run(source, tiny_model_folder()).run_file.unlink()
    with pytest.raises(ValueError, match=r"checkpoints without a run\.json"):
        make_run(write_vector(tmp_path / "other", seed=3), tiny_model_folder())
    assert not (tmp_path / "runs" / "taken" / "run.json").exists()
