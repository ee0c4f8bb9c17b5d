"""What an adapter changes, read from its checkpoint: inner products, norms and cosines. Never imports torch."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from safetensors.numpy import load_file

from lightning_em.manifest import manifest_problems
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)

Part = Literal["update", "B", "A"]
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


class LowRank(NamedTuple):
    """The change `factor x write @ read` of one place of the model.

    Attributes:
        write: B, `[out rank]`.
        read: A, `[rank in]`; a single 1 for a steering vector, which writes whatever it reads.
        factor: alpha / rank or alpha / sqrt(rank); 1 for a steering vector, whose `write` holds alpha.
    """

    write: npt.NDArray[np.floating[Any]]
    read: npt.NDArray[np.floating[Any]]
    factor: float = 1.0


@dataclass(frozen=True)
class Update:
    """The whole change of the model by an adapter at scale 1.

    Attributes:
        kind: `vector` or `lora`.
        sites: The change of each place, by its name.
    """

    kind: Literal["vector", "lora"]
    sites: Mapping[str, LowRank]

    @property
    def write_direction(self) -> npt.NDArray[np.float64]:
        """Where the adapter writes, one flat array: alpha x vector, or every B end to end as it is saved.

        The paper follows a LoRA's B alone: it starts at zero, while A starts at random values that hardly
        move and would drown it. Only directions of one initialisation are comparable for a rank above 1,
        as (B R)(R^-1 A) is the same update.
        """
        return np.concatenate([site.write.astype(np.float64).ravel() for site in self._in_order])

    @property
    def read_direction(self) -> npt.NDArray[np.float64]:
        """Every A end to end."""
        return np.concatenate([site.read.astype(np.float64).ravel() for site in self._in_order])

    @cached_property
    def effective_norm(self) -> float:
        """Alpha x ||vector||, or the Frobenius norm of the weight change over all sites."""
        return math.sqrt(max(0.0, inner_product(self, self)))

    @property
    def _in_order(self) -> list[LowRank]:
        return [self.sites[name] for name in sorted(self.sites)]


def inner_product(first: Update, second: Update) -> float:
    """Frobenius product of two updates; <B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T)) without forming a matrix.

    Sites add up; a site that only one of them has adds nothing.

    Raises:
        ValueError: If a vector meets a LoRA, or one site has two shapes.
    """
    _refuse_other_kind(first, second)
    total = 0.0
    for name in first.sites.keys() & second.sites.keys():
        a, b = first.sites[name], second.sites[name]
        if (a.write.shape[0], a.read.shape[1]) != (b.write.shape[0], b.read.shape[1]):
            raise ValueError(f"{name} has another shape in the other run: compare runs of one base model.")
        writes = a.write.T.astype(np.float64) @ b.write.astype(np.float64)
        reads = a.read.astype(np.float64) @ b.read.T.astype(np.float64)
        total += a.factor * b.factor * float((writes * reads).sum())
    return total


def update_cosine(first: Update, second: Update, part: Part = "update") -> float | None:
    """Cosine between two updates, or between their B or A parts; None where one of them is zero.

    Args:
        first: One adapter's change.
        second: Another's, of the same kind.
        part: `B` or `A` compare the flattened matrices, which depend on how a rank above 1 is written.

    Raises:
        ValueError: If the two cannot be compared.
    """
    if part == "update":
        return _over(inner_product(first, second), first.effective_norm * second.effective_norm)
    _refuse_other_kind(first, second)
    a, b = (each.write_direction if part == "B" else each.read_direction for each in (first, second))
    if a.shape != b.shape:
        raise ValueError(f"the {part} parts have {a.size} and {b.size} numbers: compare runs of one adapter.")
    return _over(float(a @ b), float(np.linalg.norm(a) * np.linalg.norm(b)))


def updates_by_step(run: RunFolder) -> Iterator[tuple[int, Update]]:
    """Step and update of each valid checkpoint, ascending; broken ones are passed over aloud.

    Raises:
        ValueError: If an adapter is of another kind than those read here.
    """
    for step in run.steps():
        if problems := manifest_problems(run.checkpoint(step)):
            logger.warning("checkpoint step %d is broken and passed over: %s", step, "; ".join(problems))
            continue
        yield step, read_update(run.checkpoint(step))


def last_update(run: RunFolder) -> Update:
    """The update of the newest valid checkpoint.

    Raises:
        ValueError: If there is none, or its adapter is of another kind than those read here.
    """
    step = run.newest_valid_step()
    if step is None:
        raise ValueError(f"{run.path} has no valid checkpoint under {run.checkpoints}.")
    return read_update(run.checkpoint(step))


def read_update(checkpoint: Path) -> Update:
    """The update of one checkpoint folder: a `SteeringVector`, or a PEFT LoRA.

    The folder of a vector does not tell its alpha: it is read from the config of the run around it.

    Raises:
        ValueError: If the adapter is of another kind, or a vector's alpha is not to be found.
    """
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    if config.get("peft_type") == "LORA":
        return Update("lora", _lora_sites(config, tensors, checkpoint))
    if str(config.get("adapter_class")).endswith(".SteeringVector"):
        alpha = _alpha(config, checkpoint)
        site = LowRank(alpha * tensors["vector"].astype(np.float64)[:, None], np.ones((1, 1)))
        return Update("vector", {f"stream entering layer {config['lowest_layer']}": site})
    raise ValueError(
        f"{checkpoint} holds {config.get('adapter_class') or config.get('peft_type')}; "
        "trajectories and cosines are read from SteeringVector and LoRA only."
    )


def _lora_sites(
    config: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]], checkpoint: Path
) -> dict[str, LowRank]:
    names = sorted(name.removesuffix(_LORA_A) for name in tensors if name.endswith(_LORA_A))
    other = tensors.keys() - {f"{name}{end}" for name in names for end in (_LORA_A, _LORA_B)}
    if other or not names or config.get("alpha_pattern") or config.get("use_dora"):
        raise ValueError(
            f"{checkpoint} is no plain LoRA (one alpha, no DoRA, nothing but A and B); "
            f"it also holds {sorted(other)[:3] or 'other settings'}."
        )
    sites = {}
    for name in names:
        write, read = tensors[f"{name}{_LORA_B}"], tensors[f"{name}{_LORA_A}"]
        rank = read.shape[0]
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        sites[name] = LowRank(write, read, config["lora_alpha"] / divisor)
    return sites


def _alpha(config: Mapping[str, Any], checkpoint: Path) -> float:
    if "alpha" in config:
        return float(config["alpha"])
    file = RunFolder(checkpoint.parent.parent).config_file
    run_config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    try:
        return float(run_config["model"]["adapter"]["init_args"]["alpha"])
    except (KeyError, TypeError):
        raise ValueError(
            f"the alpha of the vector in {checkpoint} is unknown: expected model.adapter.init_args.alpha "
            f"in {file}."
        ) from None


def _refuse_other_kind(first: Update, second: Update) -> None:
    if first.kind != second.kind:
        raise ValueError(f"a {first.kind} cannot be compared with a {second.kind}: they change other things.")


def _over(product: float, norms: float) -> float | None:
    return product / norms if norms > 0 else None
