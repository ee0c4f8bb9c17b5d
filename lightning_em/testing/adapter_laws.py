"""The contract of `Adapter` as a list of laws.

The first docstring line of each law is its name in error messages.
"""

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter, decoder_layers
from lightning_em.losses import cross_entropy, kl_from_reference
from lightning_em.testing.bench import Bench
from lightning_em.testing.law import enforce, require
from lightning_em.testing.samples import row, small_base

_SCALES = (0.25, 0.5, 1.5, 2.0)
_MakeBench = Callable[..., Bench]


def check_adapter(
    adapter: Adapter | Callable[[], Adapter], base: PreTrainedModel | None = None, seed: int = 0
) -> None:
    """Check that an adapter fulfills the contract of `Adapter`, on a small model, within seconds.

    Each law attaches fresh adapters. Most laws add random noise to the parameters, so that the update is not zero.

    Args:
        adapter: Adapter that is not attached yet, or a function that returns one.
        base: Base model, small enough to be copied a few times; it is not changed. Defaults to a random two-layer
            Qwen2.
        seed: Seed of the rows and of the random parameters.

    Raises:
        AssertionError: If the adapter breaks a law; the message names it.
        ValueError: If the adapter is already attached.
    """
    if isinstance(adapter, Adapter) and adapter.lowest_layer >= 0:
        raise ValueError(
            "check_adapter needs an adapter that is not attached; pass a new one, or its factory."
        )
    template = copy.deepcopy(adapter) if isinstance(adapter, Adapter) else None
    make: Callable[[], Adapter] = adapter if template is None else lambda: copy.deepcopy(template)
    base = small_base() if base is None else base
    name = type(template or make()).__name__

    def bench(
        dtype: torch.dtype = torch.float32,
        seed: int = seed,
        *,
        trained: bool = True,
        adapter: Adapter | None = None,
    ) -> Bench:
        return Bench(make() if adapter is None else adapter, base, dtype, seed, trained=trained)

    for law in _ADAPTER_LAWS:
        enforce(law, name, bench)


def _attaches(make: _MakeBench) -> None:
    """Attach makes trainable float32 parameters and leaves the base as it was."""
    bench = make(trained=False)
    layers = len(decoder_layers(bench.base))
    lowest = bench.adapter.lowest_layer
    require(0 <= lowest <= layers, f"lowest_layer is {lowest}, the base has layers 0..{layers - 1}")
    require(bench.adapter.scale == 1, f"the scale is {bench.adapter.scale} after attach instead of 1")
    own = {id(parameter) for parameter in bench.adapter.trainable().values()}
    taken = [name for name, (parameter, _) in bench.frozen.items() if id(parameter) in own]
    require(not taken, f"trainable() holds parameters of the base: {taken[:3]}")
    changed = [name for name, (p, value) in bench.frozen.items() if not torch.equal(p, value)]
    require(not changed, f"attach wrote into {changed[:3]}")
    start, plain = bench.logits(1.0).double(), bench.plain_logits.double()
    require(
        (start - plain).norm().item() <= 1e-4 * plain.norm().item(),
        "the model changes before the first training step: parameters must start at no update",
    )


def _scale_zero_is_base(make: _MakeBench) -> None:
    """Scale 0 is the frozen base exactly."""
    bench = make()
    for visited in (0.0, 1.0, 2.0):
        bench.logits(visited)
        same = torch.equal(bench.logits(0.0), bench.plain_logits)
        require(
            same, f"logits at scale 0 (after scale {visited}) differ from those of the base without adapter"
        )
    require(torch.equal(bench.logits(1.0), bench.logits(None)), "scale 1 is not what training runs with")


def _effect_is_linear_in_scale(make: _MakeBench) -> None:
    """||effect(s)|| = s ||effect(1)||."""
    place, (full, *effects), rounding = make().effect(1.0, *_SCALES)
    for scale, effect in zip(_SCALES, effects, strict=True):
        error = (effect - scale * full).norm().item()
        ratio = effect.norm().item() / full.norm().item()
        require(
            error <= 1e-3 * scale * full.norm().item() + rounding,
            f"at scale {scale} the {place} changes by {ratio:.4g} times what it changes by at scale 1",
        )


def _every_row_changes(make: _MakeBench) -> None:
    """Every batch row changes, whatever shares its batch."""
    bench = make()
    lengths = bench.batch.lengths
    changed, plain = (torch.split(bench.logits(scale), list(lengths)) for scale in (1.0, 0.0))
    same = [index for index in range(len(lengths)) if torch.equal(changed[index], plain[index])]
    require(not same, f"rows {same} of {len(lengths)} are the same as without the adapter")
    for index, together in enumerate(changed):
        alone = bench.logits(1.0, row(bench.batch, index))
        error = (alone - together).norm().item()
        require(
            error <= 1e-3 * alone.norm().item(), f"row {index} comes out differently in a batch and alone"
        )


def _gradients_reach_only_the_adapter(make: _MakeBench) -> None:
    """Gradients reach only the adapter."""
    bench = make()
    batch, seen = bench.batch, list[Tensor]()
    with bench.raw_input_of(bench.adapter.lowest_layer, seen):
        logits = bench.grad_logits()
    lowest = bench.adapter.lowest_layer
    require(
        not seen[0].requires_grad,
        f"it changes a layer below lowest_layer, which is {lowest}; set it to the lowest layer changed in `attach`",
    )
    cross_entropy(logits, batch.targets(), batch.counted("response")).total.backward()  # type: ignore[no-untyped-call]
    own = bench.adapter.trainable()
    gradients = {name: p.grad for name, p in own.items() if p.grad is not None}
    require(gradients.keys() == own.keys(), f"no gradient reaches {sorted(own.keys() - gradients.keys())}")
    require(all(g.isfinite().all() for g in gradients.values()), "a gradient is not finite")
    require(any(bool(g.any()) for g in gradients.values()), "all gradients are zero")
    wrong = [name for name, (p, _) in bench.frozen.items() if p.requires_grad or p.grad is not None]
    require(not wrong, f"the base is trained too: {wrong[:3]}")


def _works_on_a_bfloat16_base(make: _MakeBench) -> None:
    """A bf16 base works, with float32 parameters and the stream's own dtype."""
    bench = make(torch.bfloat16)
    wrong = [name for name, p in bench.adapter.trainable().items() if p.dtype != torch.float32]
    require(not wrong, f"parameters {wrong} are not float32")
    require(torch.equal(bench.logits(0.0), bench.plain_logits), "scale 0 differs from the base in bf16")
    for plain, event in zip(bench.plain_events, bench.events(1.0), strict=True):
        before, after = ([str(t.dtype) for t in e.tensors] for e in (plain, event))
        require(before == after, f"{event.place} is {after} instead of {before}: cast to the stream's dtype")
    require(bool(bench.logits(1.0).isfinite().all()), "logits are not finite")
    require(not torch.equal(bench.logits(1.0), bench.logits(0.0)), "the update is lost in bf16")


def _lowest_layer_is_honest(make: _MakeBench) -> None:
    """Nothing changes below lowest_layer."""
    bench = make()
    lowest = bench.adapter.lowest_layer
    for layer in range(lowest + 1):
        seen: list[Tensor] = []
        with bench.raw_input_of(layer, seen):
            bench.logits(0.0)
            bench.logits(1.0)
        require(
            torch.equal(seen[0], seen[1]),
            f"what reaches layer {layer} changes with the scale, but lowest_layer is {lowest}",
        )


def _split_forward_is_plain_forward(make: _MakeBench) -> None:
    """Split forward = plain forward, logits and gradients.

    Whatever optimizations `AdaptedModel` uses (packed rows, shared prefix, chunked losses), its results must match
    those of the base model's own forward pass with full logits.
    """
    bench = make()
    batch, own = bench.batch, bench.adapter.trainable()
    for scale in (0.0, 1.0, 0.5):
        with torch.no_grad():
            error = (bench.model.logits(batch, scale) - bench.logits(scale)).norm().item()
        require(error <= 1e-4 * bench.logits(scale).norm().item(), f"logits differ at scale {scale}")
    adapted = bench.grad_logits()
    plain_ce = cross_entropy(adapted, batch.targets(), batch.counted("response"))
    plain_kl = kl_from_reference(bench.plain_logits, adapted, batch.counted("response"))
    sums = bench.model.losses(batch, batch)
    assert sums.kl is not None
    for term, plain, split in (("CE", plain_ce, sums.ce), ("KL", plain_kl, sums.kl)):
        error = abs((split.total - plain.total).item())
        require(error <= 1e-4 * (1e-3 + abs(plain.total.item())), f"the {term} differs")
    wanted = torch.autograd.grad(plain_ce.total + plain_kl.total, list(own.values()))
    found = torch.autograd.grad(sums.ce.total + sums.kl.total, list(own.values()))
    for name, one, two in zip(own, wanted, found, strict=True):
        error = (one - two).norm().item()
        require(error <= 1e-3 * one.norm().item() + 1e-6, f"the gradient of {name} differs")


def _saves_and_loads(make: _MakeBench) -> None:
    """Save and load round-trip to the bit."""
    written, read = make(seed=1), make(seed=2)
    is_own = type(read.adapter).save is not Adapter.save
    require(not is_own, "it overrides `save`, but a run writes `trainable()` and `config_dict()` itself")
    with tempfile.TemporaryDirectory() as folder:
        written.adapter.save(Path(folder))
        read.adapter.load(Path(folder))
    old, new = written.adapter.trainable(), read.adapter.trainable()
    require(list(old) == list(new), f"names differ: {sorted(old.keys() ^ new.keys())}")
    wrong = [name for name in old if not torch.equal(old[name], new[name])]
    require(not wrong, f"{wrong} differ after loading")
    same = torch.equal(written.logits(1.0), read.logits(1.0, written.batch))
    require(same, "the loaded adapter gives other logits: something that matters is not in trainable()")


def _checkpoint_rebuilds_it(make: _MakeBench) -> None:
    """A checkpoint alone rebuilds it."""
    written = make(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        written.adapter.save(Path(folder))
        rebuilt = make(seed=2, adapter=Adapter.from_checkpoint(Path(folder)), trained=False)
        rebuilt.adapter.load(Path(folder))
    own = type(rebuilt.adapter) is type(written.adapter)
    require(own, f"adapter_config.json gives a {type(rebuilt.adapter).__name__}")
    same = torch.equal(written.logits(1.0), rebuilt.logits(1.0, written.batch))
    require(
        same, "the rebuilt adapter gives other logits: something that matters is not an argument of its class"
    )


def _perturbation_is_undone(make: _MakeBench) -> None:
    """A perturbed adapter comes back to the bit, also after an error."""
    bench = make()
    before = {name: p.detach().clone() for name, p in bench.adapter.trainable().items()}

    def changed() -> list[str]:
        return [n for n, p in bench.adapter.trainable().items() if not torch.equal(p, before[n])]

    try:
        with bench.adapter.perturbed(0.5, torch.Generator().manual_seed(0)):
            rotatable = any(value.numel() > 1 for value in before.values())
            require(bool(changed()) or not rotatable, "no parameter is perturbed")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    require(not changed(), f"{changed()} are not restored")
    with bench.adapter.perturbed(0.0, torch.Generator().manual_seed(0)):
        require(not changed(), f"strength 0 changes {changed()}")


def _norm_follows_the_effect(make: _MakeBench) -> None:
    """The effective norm is that of the update at scale 1, or None."""
    bench = make()
    own = bench.adapter.trainable()
    if (norm := bench.adapter.effective_norm()) is None:
        return
    value = norm.item()
    require(math.isfinite(value) and value > 0, f"the norm is {value} with random parameters")
    with bench.adapter.at_scale(2.0):
        require(_close(_norm(bench.adapter), value), "the norm depends on the scale the adapter is set to")
    _, (effect,), rounding = bench.effect(1.0)
    # if every position changes by the same vector, the adapter is a shift and its norm is that vector's length
    shift = effect.flatten(0, -2)
    if len(own) == 1 and (shift - shift[0]).norm().item() <= 1e-3 * shift.norm().item() + rounding:
        length = shift[0].norm().item()
        require(_close(value, length), f"the stream is shifted by {length:.4g}, but the norm is {value:.4g}")
    # doubling all parameters doubles an update that is linear in them, and quadruples one of two factors, such as B A;
    # the norm must grow by the same factor
    with torch.no_grad():
        for parameter in own.values():
            parameter.mul_(2)
    _, (larger,), _ = bench.effect(1.0)
    for factor in (2, 4):
        if (larger - factor * effect).norm().item() <= 1e-3 * larger.norm().item():
            grown = _norm(bench.adapter) / value
            require(_close(grown, factor), f"the effect grows {factor}-fold, but the norm {grown:.4g}-fold")


def _update_is_what_it_does(make: _MakeBench) -> None:
    """The update it declares is what it does."""
    bench = make()
    own, parts = bench.adapter.trainable(), bench.adapter.update() or []
    trained = {name: parameter.detach().clone() for name, parameter in own.items()}
    for part in parts:
        with torch.no_grad():  # only this part, so that no other part changes the input of its site
            for name, parameter in own.items():
                others = {other.write for other in parts} - {part.write}
                parameter.copy_(trained[name] * (name not in others))
        change, read = bench.change_at(part.site)
        write = trained[part.write].double()
        shapes = [tuple(trained[name].shape) for name in (part.write, part.read) if name is not None]
        require(
            part.read is None or (len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] == shapes[1][0]),
            f"site {part.site}: `write` must be [out, rank] and `read` [rank, in], got {shapes}",
        )
        if part.read is None:
            wanted = (part.factor * write).expand_as(change)
        else:
            wanted = part.factor * read @ trained[part.read].double().T @ write.T
        error = (change - wanted).norm().item()
        require(
            error <= 1e-3 * wanted.norm().item() + 1e-6,
            f"site {part.site} changes by {change.norm().item():.4g}, declared is {wanted.norm().item():.4g} "
            f"(they differ by {error:.4g})",
        )


_ADAPTER_LAWS: tuple[Callable[[_MakeBench], None], ...] = (
    _attaches,
    _scale_zero_is_base,
    _effect_is_linear_in_scale,
    _every_row_changes,
    _gradients_reach_only_the_adapter,
    _works_on_a_bfloat16_base,
    _lowest_layer_is_honest,
    _split_forward_is_plain_forward,
    _saves_and_loads,
    _checkpoint_rebuilds_it,
    _perturbation_is_undone,
    _norm_follows_the_effect,
    _update_is_what_it_does,
)


def _norm(adapter: Adapter) -> float:
    norm = adapter.effective_norm()
    assert norm is not None
    return norm.item()


def _close(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= 1e-3 * abs(wanted)
