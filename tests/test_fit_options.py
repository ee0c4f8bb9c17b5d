"""Options of a fit that change how a step is computed, not what it computes: backend, store, token budget."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_em.batch import StepCounts, TrainBatch
from lightning_em.callbacks import Probing
from lightning_em.data import DEFAULT_TEMPLATE_DATE
from lightning_em.identity import name_hash
from lightning_em.losses import Objective
from lightning_em.models import BaseModel, StoreOptions
from lightning_em.module import EMModule
from lightning_em.probes import PerturbationCurve, ScaleCurve
from lightning_em.rebuild import rebuild_run
from lightning_em.runs import RunFolder
from tests import oracle
from tests.fitting import (
    LORA,
    VECTOR,
    command,
    cut_after,
    experiment,
    final_adapter,
    fit,
    metrics_of,
    train_metrics,
    write_config,
)
from tests.samples import ADAPTERS, make_rows, pack

CE_ROWS, KL_ROWS = make_rows(11, 7, 12, seed=1), make_rows(9, 13, seed=2)
# Of a step that these rows are part of.
COUNTS, KL_WEIGHT = StepCounts(ce=31, kl_response=17, kl_all=66), 3.7


def trained_module(folder: Path, adapter: str, dtype: str, kl_positions: str, **settings) -> EMModule:
    """A module as `fit` makes it, with an adapter away from zero; everything in float64 if the base is."""
    objective = Objective(KL_WEIGHT, kl_positions=kl_positions)
    module = EMModule(BaseModel(str(folder), dtype=dtype), ADAPTERS[adapter](), objective, **settings)
    module.configure_model()
    module.trainer = Trainer(accelerator="cpu", barebones=True)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.model.adapter.trainable().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        parameter.data = parameter.data.to(getattr(torch, dtype))
    if dtype == "float64":
        oracle.entirely_float64(module.model.base)
    return module


def step(module: EMModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of one training step."""
    ce, kl = pack(CE_ROWS, "ce"), pack(KL_ROWS, "kl")
    parameters = list(module.model.adapter.trainable().values())
    loss = module.training_step(TrainBatch(ce, kl, COUNTS), 0)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach().double(), torch.cat([g.flatten().double() for g in gradients])


def exact_step(module: EMModule, kl_positions: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the oracle, whose arithmetic is its own; the adapter's hooks are the module's."""
    base, adapter = module.model.base, module.model.adapter
    total = torch.zeros((), dtype=torch.float64)
    with adapter.at_scale(1.0):
        for row in CE_ROWS:
            logits = oracle.row_logits(base, row)
            total = total + oracle.cross_entropy(logits, row) / COUNTS.ce
        count = COUNTS.kl_all if kl_positions == "all" else COUNTS.kl_response
        for row in KL_ROWS:
            with torch.no_grad(), adapter.at_scale(0.0):
                reference = oracle.row_logits(base, row)
            tuned = oracle.row_logits(base, row)
            total = total + KL_WEIGHT * oracle.kl(reference, tuned, row, kl_positions) / count
    gradients = torch.autograd.grad(total, list(adapter.trainable().values()))
    return total.detach(), torch.cat([g.flatten().double() for g in gradients])


OPTIONS = {
    "plain": {"backend": "plain"},
    "auto": {},
    "store": {"store": StoreOptions()},
    "store, no room": {"store": StoreOptions(ram_gib=0.0)},
    "reference": {"store": StoreOptions(), "reference": "cached"},
    "plain, reference": {"backend": "plain", "store": StoreOptions(), "reference": "cached"},
}


@pytest.mark.filterwarnings("ignore:.*srun:UserWarning")
# Which positions count is a mask, the same for every adapter: one of them meets both kinds.
@pytest.mark.parametrize(
    ("adapter", "kl_positions"),
    [
        *((adapter, "response") for adapter in ("vector", "last_vector", "rank_1", "rank_32", "all_linear")),
        ("rank_1", "all"),
    ],
)
def test_every_combination_of_keys_equals_the_oracle(adapter, kl_positions, tiny_model_folder) -> None:
    folder = tiny_model_folder()
    plain = trained_module(folder, adapter, "float64", kl_positions, backend="plain")
    loss, gradient = exact_step(plain, kl_positions)
    naive_loss, naive_gradient = step(
        trained_module(folder, adapter, "float32", kl_positions, backend="plain")
    )
    for name, options in OPTIONS.items():
        module = trained_module(folder, adapter, "float64", kl_positions, **options)
        for _ in range(2):  # the second finds the store filled
            got, got_gradient = step(module)
            assert (got - loss).abs() <= 1e-10 * loss.abs(), name
            assert (got_gradient - gradient).norm() <= 1e-10 * gradient.norm(), name
        module = trained_module(folder, adapter, "float32", kl_positions, **options)
        for _ in range(2):
            got, got_gradient = step(module)
            floor = 1e-7  # one rounding: naive may hit the exact value by luck
            assert (got - loss).abs() <= 2 * (naive_loss - loss).abs() + floor * loss.abs(), name
            error = (got_gradient - gradient).norm()
            assert error <= 2 * (naive_gradient - gradient).norm() + floor * gradient.norm(), name


@pytest.fixture(scope="module", params=["live", "cached"])
def stored_run(request, tmp_path_factory, tiny_model_folder, chat_file, answer_file):
    """A config with a store, its uninterrupted run, and the folder that run has filled."""
    folder = tmp_path_factory.mktemp(request.param)
    config = experiment(
        tiny_model_folder(),
        chat_file,
        answer_file,
        data={"batch_size": 4, "kl_batch_size": 4},
        trainer={"accumulate_grad_batches": 2, "max_epochs": 2},
        checkpoint={"every_n_steps": 1},
    )
    config["model"] |= {"store": {"folder": str(folder / "states")}, "reference": request.param}
    path = write_config(folder / "experiment.yaml", config)
    return path, fit(path, "whole"), folder / "states"


def _as_it_is(_: list[Path]) -> None:
    pass


def _empty(files: list[Path]) -> None:
    for file in files:
        file.unlink()


def _half(files: list[Path]) -> None:
    _empty(files[::2])


def _corrupt(files: list[Path]) -> None:
    for file in files[::3]:
        content = bytearray(file.read_bytes())
        content[-7] ^= 8
        file.write_bytes(content)


@pytest.mark.parametrize("change", [_as_it_is, _empty, _half, _corrupt])
def test_a_resumed_run_does_not_depend_on_what_the_store_holds(stored_run, change, tmp_path) -> None:
    config, whole, states = stored_run
    copy = tmp_path / "states"
    shutil.copytree(states, copy)
    change(sorted(copy.glob("*/??/*")))
    name = f"cut{change.__name__}"
    cut = cut_after(whole, 3, config.parent / name)
    fit(config, name, "--model.store.folder", str(copy))
    assert final_adapter(cut) == final_adapter(whole)
    assert metrics_of(cut) == metrics_of(whole)
    assert sorted(file.name for file in copy.glob("*/??/*")) == sorted(
        file.name for file in states.glob("*/??/*")
    )


def test_where_the_store_is_kept_and_how_much_changes_no_bit(stored_run) -> None:
    config, whole, _ = stored_run
    for name, flags in {
        "warm": [],
        "ram": ["--model.store.folder", "null"],
        "nothing": ["--model.store.folder", "null", "--model.store.ram_gib", "0"],
        "disk": ["--model.store.ram_gib", "0"],
    }.items():
        assert final_adapter(fit(config, name, *flags)) == final_adapter(whole), name


def test_a_run_without_a_store_differs_in_the_last_digits(stored_run, caplog) -> None:
    config, whole, _ = stored_run
    without = fit(config, "without", "--model.store", "null", "--model.reference", "live")
    for number, row in train_metrics(without).items():
        assert train_metrics(whole)[number] == pytest.approx(row, rel=1e-4, abs=1e-6)


def test_one_row_a_pass_gives_the_same_run_with_and_without_a_store(
    tmp_path, tiny_model_folder, chat_file
) -> None:
    config = experiment(
        tiny_model_folder(), chat_file, data={"batch_size": 1}, trainer={"max_epochs": 2, "max_steps": 50}
    )
    path = write_config(tmp_path / "experiment.yaml", config)
    runs = [fit(path, name, *flags) for name, flags in {"a": [], "b": ["--model.store.ram_gib", "1"]}.items()]
    assert final_adapter(runs[0]) == final_adapter(runs[1])


def test_the_size_is_said_before_the_first_step(stored_run, caplog) -> None:
    config, whole, _ = stored_run
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        fit(config, "announced", "--trainer.max_epochs", "1")
    said = [
        message for message in caplog.messages if message.startswith("activation store: hidden states of")
    ]
    assert len(said) == 1
    data = rebuild_run(str(whole.path)).data
    tokens = data.num_tokens("narrow") + data.num_tokens("kl")
    if "cached" in config.read_text(encoding="utf-8"):
        tokens += data.num_tokens("kl", "response")
    assert f"of {tokens} tokens will take" in said[0]


def test_probes_find_the_states_of_the_training_rows(stored_run) -> None:
    _, whole, states = stored_run
    before = set(states.glob("*/??/*"))
    loaded = rebuild_run(str(whole.path))
    probing = Probing(
        [ScaleCurve([0.5], with_kl=True), PerturbationCurve([0.5], num_seeds=2)], num_examples=8
    )
    assert probing.measure(whole, loaded.module.model, loaded.data, loaded.step) == 2
    assert set(states.glob("*/??/*")) == before
    assert loaded.module.model.backend.hidden.cache.store.used["ram"] > 0


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path, tiny_model_folder, chat_file, answer_file) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 2})
    config["model"] |= {
        "store": {"folder": str(tmp_path / "states")},
        "reference": "cached",
        "adapter": VECTOR,
    }
    path = write_config(tmp_path / "experiment.yaml", config)
    words = ["fit", "--config", str(path), "--run.root", str(tmp_path)]
    words += [
        "--data.batch_size",
        "4",
        "--data.kl_batch_size",
        "4",
        "--trainer",
        "configs/trainer/cpu_ddp2.yaml",
    ]
    runs = []
    for name in ("cold", "warm"):
        done = command(*words, "--run.name", name)
        assert done.returncode == 0, done.stderr
        runs.append(RunFolder(tmp_path / name))
        files = list((tmp_path / "states").glob("*/??/*"))
        assert files
        assert all(file.suffix == ".safetensors" for file in files)
    assert final_adapter(runs[0]) == final_adapter(runs[1])
    one = fit(path, "one", "--model.store.folder", str(tmp_path / "other"))
    keys = [{file.name for file in (tmp_path / at).glob("*/??/*")} for at in ("states", "other")]
    assert keys[0] == keys[1]
    for number, row in train_metrics(one).items():
        assert train_metrics(runs[0])[number] == pytest.approx(row, rel=1e-5, abs=1e-9)


def test_a_cached_reference_without_a_store_is_refused(stored_run) -> None:
    with pytest.raises(ValueError, match=r"there is no store; set model\.store or reference: live"):
        fit(stored_run[0], "refused", "--model.store", "null", "--model.reference", "cached")


def test_store_and_new_keys_at_rest_rename_no_run() -> None:
    before = {
        "model": {"base": {"path": "x"}, "backend": "auto"},
        "data": {"batch_size": 2, "kl": {"path": "k", "answer": "mixed"}},
    }
    now = {
        "model": before["model"] | {"store": {"ram_gib": 2.0}, "reference": "live"},
        "data": {
            "batch_size": 2,
            "kl": {"path": "k", "answer": "mixed"},
            "max_tokens": None,
            "length_buckets": None,
            "template_date": DEFAULT_TEMPLATE_DATE,
            "train_empty_thoughts": False,
            "system_prompt": None,
        },
    }
    assert name_hash(now) == name_hash(before)
    for group, key, value in (
        ("model", "reference", "cached"),
        ("data", "max_tokens", 512),
        ("data", "length_buckets", 4),
        ("data", "template_date", "2024-07-27"),
        ("data", "train_empty_thoughts", True),
        ("data", "system_prompt", ""),
    ):
        assert name_hash(now | {group: now[group] | {key: value}}) != name_hash(before)


# How rows are put together does not depend on the adapter.
@pytest.mark.parametrize(
    ("adapter", "flags"),
    [("vector", ["--data.max_tokens", "2000"]), ("lora", ["--data.length_buckets", "3"])],
    ids=str,
)
def test_any_batching_resumes_exactly_and_keeps_global_counts(
    adapter, flags, tmp_path, tiny_model_folder, chat_file, answer_file
) -> None:
    config = experiment(
        tiny_model_folder(),
        chat_file,
        answer_file,
        data={"batch_size": 3, "kl_batch_size": 6},
        trainer={"accumulate_grad_batches": 2, "max_epochs": 2},
        checkpoint={"every_n_steps": 1},
    )
    config["model"]["adapter"] = {"vector": VECTOR, "lora": LORA}[adapter]
    path = write_config(tmp_path / "experiment.yaml", config)
    whole = fit(path, "whole", *flags)
    steps = whole.steps()
    assert len(steps) > 3
    for number in steps[1:-1:4]:
        cut = cut_after(whole, number, tmp_path / f"cut-{number}")
        fit(path, cut.path.name, *flags)
        assert final_adapter(cut) == final_adapter(whole), number
    with pytest.raises(ValueError, match=r"another config: data\."):
        fit(path, "whole", *flags[:1], str(int(flags[1]) + 1))


@pytest.mark.slow
def test_two_processes_with_a_token_budget_equal_one(
    tmp_path, tiny_model_folder, chat_file, answer_file
) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 2})
    config["data"] |= {"max_tokens": 2000, "batch_size": 1, "kl_batch_size": 2}
    path = write_config(tmp_path / "experiment.yaml", config)
    one = fit(path, "one", "--trainer.accumulate_grad_batches", "2")
    ranks = ["--trainer", "configs/trainer/cpu_ddp2.yaml"]
    done = command(*("fit", "--config", str(path), "--run.root", str(tmp_path), "--run.name", "two", *ranks))
    assert done.returncode == 0, done.stderr
    two = RunFolder(tmp_path / "two")
    assert len(train_metrics(one)) > 3
    assert train_metrics(one).keys() == train_metrics(two).keys()
    for number, row in train_metrics(one).items():
        assert train_metrics(two)[number] == pytest.approx(row, rel=1e-5, abs=1e-9)
