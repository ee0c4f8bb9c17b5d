"""Pair analyses: comparisons of the general, narrow, reverted and reverse solutions of one seed."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lightning_em.analysis.cells import StudyFolder
from lightning_em.analysis.pairs import ROLES, SOLUTIONS, PairResult, pair_file, read_pair_file
from lightning_em.analysis.updates import Part, read_update, update_cosine
from lightning_em.batch import PackedBatch, PaddedRows
from lightning_em.models import AdaptedModel
from lightning_em.models.padding import run_padded
from lightning_em.probes import ce_gradient
from lightning_em.probes.base import RowMeans
from lightning_em.records import Point
from lightning_em.runs import adapter_sha256
from lightning_em.study.group import RunGroup, by_role

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairSettings:
    """Amount of data and grid of norms of the pair analyses.

    Attributes:
        num_examples: Number of training rows of each stream.
        batch_size: Number of rows in one forward pass.
        norm_ratios: Effective norms of `equal_norm`, in units of the smaller of the two trained norms.
    """

    num_examples: int = 64
    batch_size: int = 16
    norm_ratios: tuple[float, ...] = tuple(step / 5 for step in range(1, 11))


class Analysis(Protocol):
    """An analysis that compares the runs of a group."""

    def __call__(self, group: RunGroup, settings: PairSettings) -> list[Point]: ...


def analyse_pairs(
    study: StudyFolder, adapter: str, world: str, seed: int, settings: PairSettings | None = None
) -> int:
    """Compare the finished runs of one adapter, world and seed; skips what is on record already.

    At most one process at a time may do this for the same adapter, world and seed.

    Args:
        study: Study folder with the runs and the records.
        adapter: Name of the adapter in the study.
        world: Name of the world in the study.
        seed: Training seed.
        settings: Amount of data to use; the defaults of `PairSettings` if not given.

    Returns:
        Number of records written; 0 if the general or the narrow run is not finished.

    Raises:
        ValueError: If the runs cannot be compared, or two runs have the same role.
    """
    settings = settings or PairSettings()
    cells = [c for c in study.finished() if (c.adapter, c.world, c.seed) == (adapter, world, seed)]
    runs = by_role(study, cells, ROLES)
    if missing := [role for role in SOLUTIONS if role not in runs]:
        logger.info("no pairs of %s, world %s, seed %d: %s not finished", adapter, world, seed, missing)
        return 0
    group = RunGroup(runs)
    weights = {role: _weights_of(run.checkpoint(group.last_steps[role])) for role, run in runs.items()}
    written = 0
    for name, (analysis, roles) in ANALYSES.items():
        used = [role for role in roles if role in runs]
        result = PairResult(
            analysis=name,
            adapter=adapter,
            world=world,
            seed=seed,
            runs={role: runs[role].path.name for role in used},
            steps={role: group.last_steps[role] for role in used},
            settings={**asdict(settings), "norm_ratios": list(settings.norm_ratios)},
            adapter_sha256={role: weights[role] for role in used},
        )
        known = read_pair_file(pair_file(study, name, adapter, world, seed))
        if known and known[-1].measures_the_same_as(result):  # reports use the newest record
            continue
        logger.info("%s of %s, world %s, seed %d", name, adapter, world, seed)
        points = tuple(analysis(group, settings))
        rows = group.narrow_rows(settings.num_examples, settings.batch_size) if _by_row(points) else []
        examples = tuple(row_id for batch in rows for row_id in batch.row_ids)
        replace(result, points=points, examples=examples).append_to(study)
        written += 1
    return written


def equal_norm(group: RunGroup, settings: PairSettings) -> list[Point]:
    """Cross-entropy of the general and the narrow solution at equal effective norm, on the same training rows.

    Points, in nats per token unless stated otherwise: `ce` of each `solution` at each `norm_ratio`;
    `ce_difference`, narrow - general, paired by row; `ce_base`; `effective_norm` of each as trained
    and `common_norm`, the smaller of the two (unit norm); `ce_tokens`, counted tokens of each row (unit tokens).
    No points for an adapter without a norm, or if the norm of one of the two solutions is zero.

    Source: arXiv:2602.07852 (efficiency).
    """
    norms = {role: group.model_of(role).adapter.effective_norm() for role in SOLUTIONS}
    own = {role: norm.item() for role, norm in norms.items() if norm is not None}
    if len(own) < len(SOLUTIONS) or min(own.values()) == 0:
        logger.info("no comparison at equal norm: the effective norms are %s", own or "not defined")
        return []
    common, rows = min(own.values()), group.narrow_rows(settings.num_examples, settings.batch_size)
    curves = {}
    for role in SOLUTIONS:
        at_scale = group.model_of(role).adapter.at_scale
        # The effective norm is proportional to the scale. Scale 0 is the base model, for `ce_base`.
        scales = [0.0, *(ratio * common / own[role] for ratio in settings.norm_ratios)]
        curves[role] = RowMeans.of_ce(group.model_of(role), rows, [partial(at_scale, s) for s in scales])
    points = [curves["general"][0].point("ce_base", {}), curves["general"][0].token_counts("ce_tokens")]
    points.append(Point("common_norm", common, "norm"))
    points += [Point("effective_norm", own[role], "norm", {"solution": role}) for role in SOLUTIONS]
    for number, ratio in enumerate(settings.norm_ratios, start=1):
        general, narrow = (curves[role][number] for role in SOLUTIONS)
        points.append(general.point("ce", {"solution": "general", "norm_ratio": ratio}))
        points.append(narrow.point("ce", {"solution": "narrow", "norm_ratio": ratio}))
        points.append((narrow - general).point("ce_difference", {"norm_ratio": ratio}))
    return points


def gradient_cosine(group: RunGroup, settings: PairSettings) -> list[Point]:
    """Cosine between the negative gradient of the cross-entropy and the directions to the final solutions.

    Measured at every checkpoint of every run, for the final general and the final narrow solution.

    Points, by `solution` (the role of the run) and `step`: `gradient_cosine` (unit cosine) of the negative gradient of
    the training rows' cross-entropy with two directions to each `target`. `direction: final`, as in the paper, is what
    the final solution writes (the vector, or the B of a LoRA); the gradient is that of the same tensors.
    `direction: remaining` is the difference between the parameters of the final solution and those of the checkpoint,
    over all parameters. No point where the gradient or the direction is zero. `ce_gradient_norm` is the norm over all
    parameters, as in the probe `gradient`; where it is small, the direction of the gradient matters little.

    Source: arXiv:2602.07852 (gradient).
    """
    rows = group.narrow_rows(settings.num_examples, settings.batch_size)
    count = int(torch.stack([batch.counted("response").sum() for batch in rows]).sum())
    targets = {target: group.parameters_of(target) for target in SOLUTIONS}
    reads = {part.read for part in group.model_of("narrow").adapter.update() or ()}
    points = []
    for role in group.runs:
        for step in group.steps(role):
            here = group.parameters_of(role, step)
            pull = {name: -slope for name, slope in ce_gradient(group.model_of(role, step), rows).items()}
            place: dict[str, str | int] = {"solution": role, "step": step}
            norm = _flat(pull.values()).norm().item()
            points.append(Point("ce_gradient_norm", norm, "nats_per_token_per_unit", place, count=count))
            for target, there in targets.items():
                for direction, way in _ways(reads, here, there).items():
                    value = _cosine(_flat(pull[name] for name in way), _flat(way.values()))
                    aim = {"target": target, "direction": direction}
                    points += _cosine_point("gradient_cosine", value, place | aim, count)
    return points


def _ways(
    reads: Collection[str | None], here: Mapping[str, Tensor], there: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Directions to a final solution, by parameter; `final` leaves out the tensors that the update reads with."""
    return {
        "final": {name: value for name, value in there.items() if name not in reads},
        "remaining": {name: value - here[name] for name, value in there.items()},
    }


def adapter_cosine(group: RunGroup, settings: PairSettings) -> list[Point]:  # noqa: ARG001 (an Analysis)
    """Cosine between the updates of every two runs: of the whole update, and of B and A separately for a LoRA.

    Points: `cosine` (unit cosine) by `first`, `second` and `part`. No point where one of the two is zero, and no
    points for an adapter whose `update` gives no low-rank parts.
    """
    try:
        updates = {
            role: read_update(run.checkpoint(group.last_steps[role])) for role, run in group.runs.items()
        }
    except ValueError as error:
        logger.info("no cosine between adapters: %s", error)
        return []
    points = []
    for first, second in combinations(updates, 2):
        parts: tuple[Part, ...] = ("update", "B", "A") if updates[first].kind == "low-rank" else ("update",)
        for part in parts:
            place = {"first": first, "second": second, "part": part}
            points += _cosine_point(
                "cosine", update_cosine(updates[first], updates[second], part), place, None
            )
    return points


def effect_cosine(group: RunGroup, settings: PairSettings) -> list[Point]:
    """Cosine between the effects of two adapters on the final hidden states of the same rows.

    The effect is the mean over response positions of the final hidden states after the last norm, tuned - base. It is
    measured on rows of the narrow data (`prompts: in_domain`) and of the KL data (`prompts: general`).

    Points: `effect_cosine` (unit cosine) by `first`, `second`, `prompts`; `effect_norm` (unit norm) by `solution`.
    """
    prompts = {
        "in_domain": group.narrow_rows(settings.num_examples, settings.batch_size),
        "general": group.parallel_rows(settings.num_examples, settings.batch_size),
    }
    points = []
    for name, rows in prompts.items():
        if not rows:
            logger.info("the narrow run has no parallel rows: no effect on %s prompts is measured", name)
            continue
        count = int(torch.stack([batch.counted("response").sum() for batch in rows]).sum())
        effects = {role: mean_effect(group.model_of(role), rows) for role in group.runs}
        for role, effect in effects.items():
            place = {"solution": role, "prompts": name}
            points.append(Point("effect_norm", effect.norm().item(), "norm", place, count=count))
        for first, second in combinations(effects, 2):
            pair = {"first": first, "second": second, "prompts": name}
            value = _cosine(effects[first], effects[second])
            points += _cosine_point("effect_cosine", value, pair, count)
    return points


@torch.no_grad()
def mean_effect(model: AdaptedModel, batches: Sequence[PackedBatch]) -> Tensor:
    """Mean change of the final hidden states at response positions, `[hidden]`, as float64 on the CPU."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        mask, states = batch.counted("response"), []
        for scale in (1.0, 0.0):
            with model.adapter.at_scale(scale):
                hidden = run_padded(model.base, batch, partial(_final_hidden, model))
            states.append(hidden[mask].cpu().double())
        total = total + (states[0] - states[1]).sum(0)
        count += len(states[0])
    return total / count


def _final_hidden(model: AdaptedModel, rows: PaddedRows) -> Tensor:
    decoder = model.base.get_decoder()
    output = decoder(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


ANALYSES: Mapping[str, tuple[Analysis, tuple[str, ...]]] = {
    "equal_norm": (equal_norm, SOLUTIONS),
    "gradient_cosine": (gradient_cosine, ROLES),
    "adapter_cosine": (adapter_cosine, ROLES),
    "effect_cosine": (effect_cosine, ROLES),
}
"""Each analysis with the roles it compares. It is repeated when a run of one of these roles finishes later."""


def _weights_of(checkpoint: Path) -> str:
    found = adapter_sha256(checkpoint)
    assert found is not None, "a valid checkpoint lists its adapter"
    return found


def _by_row(points: Sequence[Point]) -> bool:
    return any(point.per_example is not None for point in points)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _cosine(first: Tensor, second: Tensor) -> float | None:
    norms = (first.norm() * second.norm()).item()
    return (first @ second).item() / norms if norms > 0 else None


def _cosine_point(
    quantity: str, value: float | None, place: Mapping[str, str | int], count: int | None
) -> list[Point]:
    return [] if value is None else [Point(quantity, value, "cosine", dict(place), count=count)]
