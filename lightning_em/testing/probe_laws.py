"""The contract of `Probe` as a list of laws.

The first docstring line of each law is its name in error messages.
"""

import inspect
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_em.adapters import SteeringVector
from lightning_em.models import AdaptedModel
from lightning_em.probes import Probe, ProbeExamples
from lightning_em.probes.untouched import untouched
from lightning_em.records import Point, ProbeResult
from lightning_em.runs import RunFolder
from lightning_em.testing.law import enforce, require
from lightning_em.testing.samples import rows, small_base


def check_probe(
    probe: Probe, model: AdaptedModel | None = None, examples: ProbeExamples | None = None
) -> list[Point]:
    """Check that a probe fulfills the contract of `Probe`: an observer with finite, repeatable points.

    Args:
        probe: Probe with any settings; a small grid is enough. Pass a probe that reads other checkpoints as
            `probe.for_checkpoint(run, step)`.
        model: Model to measure; it is restored afterwards. Defaults to a two-layer Qwen2 with a steering vector.
        examples: Rows to measure it on. Defaults to a few random rows.

    Returns:
        The points of the first run.

    Raises:
        AssertionError: If the probe breaks a law; the message names it.
    """
    model = AdaptedModel(small_base(), SteeringVector(0.5, alpha=1.0)) if model is None else model
    if examples is None:
        first, second, third = (rows(model.base, seed) for seed in range(3))
        examples = ProbeExamples(narrow=[first, second], kl=[third])
    trial = _Trial(probe, model, examples)
    with untouched(model, check_base=False):  # each run of the probe checks the base model
        _take_a_step(model, examples)
        for law in _PROBE_LAWS:
            enforce(law, type(probe).__name__, trial)
    return trial.points


def _take_a_step(model: AdaptedModel, examples: ProbeExamples) -> None:
    """Take one gradient step with an untrained adapter, because a zero update gives a probe nothing to measure."""
    norm = model.adapter.effective_norm()
    if norm is not None and norm > 0:
        return
    own = list(model.adapter.trainable().values())
    gradients = torch.autograd.grad(model.losses(examples.narrow[0], None).ce.total, own)
    with torch.no_grad():
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.sub_(0.5 * gradient / gradient.norm().clamp_min(1e-12))


class _Trial:
    """A probe, the model and rows it is tested on, and the points of its first run."""

    def __init__(self, probe: Probe, model: AdaptedModel, examples: ProbeExamples) -> None:
        self.probe, self.model, self.examples = probe, model, examples
        self.points: list[Point] = []

    def run(self) -> Any:
        # unwrapped: a runtime type checker such as beartype draws from Python's random generator
        return inspect.unwrap(Probe.run)(self.probe, self.model, self.examples)


def _declares_what_it_measures(trial: _Trial) -> None:
    """It measures what it declares, and needs no more than that: memory is estimated from it."""
    probe, base = trial.probe, trial.model.base
    repetitions = [(f"mean_over of {q.name}", q.mean_over, q.coordinates) for q in probe.quantities]
    named = [("grid", probe.grid, probe.settings()), ("reads", probe.reads, ("narrow", "kl")), *repetitions]
    for what, names, known in named:
        unknown = sorted({*names} - {*known})
        require(not unknown, f"{what} names {unknown}, expected some of {sorted(known)}")

    def generate(*args: Any, **kwargs: Any) -> Any:
        require(probe.needs_generation, "it samples answers: set max_new_tokens")
        return type(base).generate(base, *args, **kwargs)

    def forward(*_: Any) -> None:
        require(
            probe.needs_gradients or not torch.is_grad_enabled(), "it computes gradients: set needs_gradients"
        )

    with ExitStack() as stack:
        stack.callback(delattr, base, "generate")
        base.generate = generate
        trial.run()  # in the first pass the fast backend itself computes gradients, to check the adapter
        stack.callback(register_module_forward_pre_hook(forward).remove)
        trial.run()


def _measures_finite_points(trial: _Trial) -> None:
    """Points are finite and ready for JSON."""
    probe, examples = trial.probe, trial.examples
    require(
        probe.name.isidentifier(), f"the name {probe.name!r} must do as a file name: letters, digits and _"
    )
    settings = json.loads(json.dumps(dict(probe.settings()), allow_nan=False))
    require(
        settings == dict(probe.settings()), "settings() must come back equal from JSON: lists, not tuples"
    )
    trial.points = trial.run()
    require(bool(trial.points), "it found no point")
    result = ProbeResult(probe.name, 0, settings, tuple(trial.points))
    require(ProbeResult.from_json(result.to_json()) == result, "points must come back equal from JSON")
    sizes = {len(examples.narrow_row_ids), len(examples.kl_row_ids)}
    for point in trial.points:
        values = point.per_example
        require(
            values is None or len(values) in sizes, f"per_example of {point.quantity} is not one value a row"
        )


def _is_the_same_measurement_at_every_checkpoint(trial: _Trial) -> None:
    """A probe for a checkpoint has the same name and settings: else nothing on record would be found again."""
    with tempfile.TemporaryDirectory() as folder:
        bound = trial.probe.for_checkpoint(RunFolder(folder), 0)
    same = (bound.name, bound.settings()) == (trial.probe.name, trial.probe.settings())
    require(same, "for_checkpoint(run, step) gives another name or other settings")


def _is_deterministic(trial: _Trial) -> None:
    """The same model gives the same points, whatever the global random state and mode."""
    with _scrambled_random_state():
        require(trial.run() == trial.points, "another global random state gives other points")
    trial.model.train()
    require(trial.run() == trial.points, "a model in training mode gives other points")


def _leaves_no_trace(trial: _Trial) -> None:
    """A probe leaves no trace."""
    # with and without existing gradients, at a scale that is neither 0 nor 1
    for gradient in (None, 1.0):
        for parameter in trial.model.adapter.trainable().values():
            parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
        with trial.model.adapter.at_scale(0.75):
            before = _snapshot(trial.model)
            trial.run()
            _compare(before, _snapshot(trial.model))
    for parameter in trial.model.adapter.trainable().values():
        parameter.grad = None


def _leaves_no_trace_when_it_raises(trial: _Trial) -> None:
    """A probe leaves no trace when it raises."""
    head = trial.model.base.get_decoder()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = head.register_forward_hook(count)
    trial.run()
    handle.remove()
    # raise at the first, a middle and the last but one forward pass of the decoder
    for fatal in sorted({1, calls // 2, calls - 1} - {0, -1}):
        _fail_at(trial, head, fatal)


def _fail_at(trial: _Trial, module: nn.Module, fatal: int) -> None:
    left = fatal

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    before = _snapshot(trial.model)
    handle = module.register_forward_hook(fail)
    try:
        trial.run()
    except KeyboardInterrupt:
        pass
    finally:
        handle.remove()
    _compare(before, _snapshot(trial.model))


_PROBE_LAWS: tuple[Callable[[_Trial], None], ...] = (
    _declares_what_it_measures,
    _measures_finite_points,
    _is_the_same_measurement_at_every_checkpoint,
    _is_deterministic,
    _leaves_no_trace,
    _leaves_no_trace_when_it_raises,
)


def _snapshot(model: AdaptedModel) -> dict[str, Any]:
    """Copy everything that a probe might change, by name."""
    parameters = dict(model.named_parameters())
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    return {
        "weights": {n: t.detach().clone() for n, t in (*parameters.items(), *model.named_buffers())},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "train/eval mode": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: [*m._forward_hooks, *m._forward_pre_hooks] for n, m in model.named_modules()},
        "adapter scale": model.adapter.scale,
        "gradient mode": torch.is_grad_enabled(),
        "random state of torch": torch.get_rng_state(),
        "random state of CUDA": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "random state of Python": python,
        "random state of NumPy": [np.asarray(part).tolist() for part in numpy],
    }


def _compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what, value in before.items():
        require(_same(value, after[what]), f"{what} changed")


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


@contextmanager
def _scrambled_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            torch.manual_seed(1234)
            np.random.seed(1234)  # noqa: NPY002
            random.seed(1234)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
