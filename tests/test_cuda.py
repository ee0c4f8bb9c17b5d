"""What only a GPU runs: its kernels, dtypes and strategies, each against the same on a CPU or in float64."""

from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import model_sizes
from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.losses import LossWeights, token_cross_entropy, token_kl
from lightning_em.models import ActivationStore, AdaptedModel, StoreOptions
from lightning_em.models.fast.fused_head import FrozenHead, head_cross_entropy, head_kl
from lightning_em.runs import RunFolder
from tests.fitting import (
    LORA,
    VECTOR,
    command,
    cut_after,
    experiment,
    fit,
    metrics_of,
    train_metrics,
    write_config,
)
from tests.models.architectures import QUIRKS, build, rows
from tests.models.fast.test_fused_head import HEADS, made, naive_logits
from tests.oracle import entirely_float64
from tests.test_distributed import CURVES, assert_equal_per_step, assert_equal_probes, probes_of_files

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CE, KL = (rows(lengths, seed).to(DEVICE) for lengths, seed in (((11, 7, 9), 1), ((8, 12), 2)))
LINEAR = {"phi3": ["qkv_proj", "down_proj"], "gpt_neox": ["query_key_value", "dense_4h_to_h"]}
ADAPTERS = {
    "vector": lambda _: SteeringVector(1, alpha=1.0),
    "lora": lambda name: LoRA(2, 4.0, LINEAR.get(name, ["q_proj", "down_proj"]), layers=[2]),
    "lora_everywhere": lambda name: LoRA(2, 4.0, LINEAR.get(name, ["q_proj", "down_proj"])),
}
WAYS = {"live": {}, "store": {"store": {"device_gib": 1.0}}, "cached": {"store": {}, "reference": "cached"}}


def model_of(name, adapter, backend, dtype, way="live"):
    """Weights are those of bfloat16 in every dtype, so that all compute the same function."""
    options = dict(WAYS[way])
    if "store" in options:
        options["store"] = ActivationStore(StoreOptions(**options["store"]))
    base = build(name, dtype=torch.bfloat16).to(dtype)
    if dtype == torch.float64:
        entirely_float64(base)
    model = AdaptedModel(base, ADAPTERS[adapter](name), backend=backend, **options).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter.trainable().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
            if dtype == torch.float64:
                parameter.data = parameter.data.double()
    return model


def measured(model, one_pass):
    """Losses and gradient of a step: both streams in one tuned pass, or one after the other."""
    own = list(model.adapter.trainable().values())
    if one_pass:
        found = model.step_loss(CE, KL, LossWeights(1.0, 4.0))
        total, ce, kl = found.total, found.ce.total, found.kl.total
    else:
        found = model.losses(CE, KL)
        total, ce, kl = found.ce.total + 4 * found.kl.total, found.ce.total, found.kl.total
    gradients = torch.autograd.grad(total, own)
    return torch.stack([ce.detach(), kl.detach()]).double(), torch.cat(
        [g.flatten().double() for g in gradients]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", QUIRKS)
def test_the_fast_path_is_as_exact_as_the_plain_one(name, adapter, dtype):
    exact, exact_gradient = measured(model_of(name, adapter, "plain", torch.float64), one_pass=False)
    naive, naive_gradient = measured(model_of(name, adapter, "plain", dtype), one_pass=False)
    floor = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for way in WAYS:
        model = model_of(name, adapter, "auto", dtype, way)
        for one_pass in (False, True):  # the second finds the store filled
            values, gradient = measured(model, one_pass)
            assert (values - exact).norm() <= 2 * (naive - exact).norm() + floor * exact.norm(), way
            allowed = 2 * (naive_gradient - exact_gradient).norm() + floor * exact_gradient.norm()
            assert (gradient - exact_gradient).norm() <= allowed, way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUIRKS)
def test_without_an_adapter_the_kl_is_exactly_zero(name, dtype):
    model = AdaptedModel(build(name, dtype=dtype), SteeringVector(1, alpha=1.0)).to(DEVICE)
    assert model.losses(CE, KL).kl.total == 0
    assert model.step_loss(CE, KL, LossWeights(1.0, 4.0)).kl.total == 0


@pytest.mark.parametrize(
    "tier", [{"device_gib": 1.0}, {"ram_gib": 1.0}, {"ram_gib": 0.0, "folder": "store"}], ids=str
)
def test_what_the_store_gives_is_what_was_computed(tier, tmp_path):
    options = tier | ({"folder": str(tmp_path)} if "folder" in tier else {})
    model = AdaptedModel(
        build("qwen2", dtype=torch.bfloat16),
        SteeringVector(1),
        store=ActivationStore(StoreOptions(**options)),
    ).to(DEVICE)
    first, second = (model.backend.hidden.prefix(CE) for _ in range(2))
    assert first.device.type == second.device.type == DEVICE.type
    assert torch.equal(first, second)
    used = model.backend.hidden.cache.store.used
    assert used["disk" if "folder" in tier else next(iter(tier)).removesuffix("_gib")] > 0


@pytest.mark.parametrize("nats", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("fields", HEADS, ids=str)
def test_bf16_gradients_of_the_head_are_within_one_percent(fields, nats):
    on_cpu = made(torch.bfloat16, **fields)
    bias = None if on_cpu.bias is None else on_cpu.bias.to(DEVICE)
    head = FrozenHead(on_cpu.weight.to(DEVICE), bias, on_cpu.logit_scale, on_cpu.soft_cap, on_cpu.chunk_bytes)
    generator = torch.Generator().manual_seed(3)
    reference, noise = (
        torch.randn(37, 24, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(2)
    )
    reference, size = reference.bfloat16(), 1.0
    for _ in range(20):  # find the distance that gives this KL
        hidden = (reference.double() + size * noise).bfloat16()
        exact = hidden.double().requires_grad_()
        kl = token_kl(naive_logits(head, reference.double()), naive_logits(head, exact)).mean()
        size *= (nats / float(kl.detach())) ** 0.5
    tracked = hidden.clone().requires_grad_()
    targets = torch.arange(37, device=DEVICE)
    cross_entropy = token_cross_entropy(naive_logits(head, exact), targets).mean()
    for found, expected in (
        (head_kl(head, reference, tracked).mean(), kl),
        (head_cross_entropy(head, tracked, targets).mean(), cross_entropy),
    ):
        (gradient,) = torch.autograd.grad(found, tracked)
        (right,) = torch.autograd.grad(expected, exact)
        assert (gradient.double() - right).norm() <= 0.01 * right.norm()
        # tensor cores add up with fewer bits than float32 has
        torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=5e-3, atol=0)


CONFIGS = Path(__file__).parent.parent / "configs" / "trainer"
ON_GPU = ("--trainer.accelerator", DEVICE.type.replace("cuda", "gpu"), "--trainer.devices", "1")


@pytest.mark.parametrize("adapter", [VECTOR, LORA], ids=["vector", "lora"])
def test_a_fit_on_a_gpu_is_that_of_a_cpu_and_resumes(
    adapter, tmp_path, tiny_model_folder, chat_file, answer_file
):
    probing = CURVES | {"probes": CURVES["probes"] + probes_of_files(tmp_path)}
    given = experiment(tiny_model_folder(), chat_file, answer_file, probing=probing)
    given["model"]["adapter"] = adapter
    config = write_config(tmp_path / "c.yaml", given)
    on_cpu, on_gpu = fit(config, "cpu"), fit(config, "gpu", *ON_GPU)
    cut_after(on_gpu, 6, tmp_path / "resumed")
    for run in (on_gpu, fit(config, "resumed", *ON_GPU)):
        assert run.read_run()["status"] == "finished"
        assert_equal_per_step(metrics_of(on_cpu), metrics_of(run), 1e-3)
        assert_equal_probes(on_cpu, run, 1e-3)


@pytest.mark.parametrize("trainer", ["ddp4", "fsdp2"])
def test_strategies_of_many_gpus_run_on_one(trainer, tmp_path, tiny_model_folder, chat_file, answer_file):
    given = experiment(tiny_model_folder(dtype="bfloat16"), chat_file, answer_file)
    given["model"]["base"]["dtype"] = "bfloat16"
    config = write_config(tmp_path / "c.yaml", given)
    strategy = yaml.safe_load((CONFIGS / f"{trainer}.yaml").read_text())["strategy"]
    given = given | {"trainer": given["trainer"] | {"strategy": strategy}}
    many = write_config(tmp_path / "many.yaml", given | {"run": {"root": str(tmp_path), "name": "many"}})
    alone, done = fit(config, "alone", *ON_GPU), command("fit", "--config", str(many), *ON_GPU)
    assert done.returncode == 0, done.stderr
    together = train_metrics(RunFolder(tmp_path / "many"))
    for step, row in train_metrics(alone).items():
        assert together[step] == pytest.approx(row, rel=2e-2, abs=1e-3), step


@pytest.mark.parametrize("kind", ["vector", "LoRA", "LoRA in all layers"])
def test_a_step_takes_no_more_memory_than_estimated(kind) -> None:
    config = model_sizes.qwen(512, 24, (8, 2), 1408)
    config.vocab_size = 4096
    needed = model_sizes.estimated(config, kind)
    tensors, _ = model_sizes.taken(config, kind)
    without_reserve = needed.total - needed.reserve
    assert 0.3 * without_reserve <= tensors <= without_reserve
