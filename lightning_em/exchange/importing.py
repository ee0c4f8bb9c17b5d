"""Import an adapter of another program as a run folder with config, checkpoints and provenance."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_em import lock
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.callbacks import base_sha256, refuse_idle_adapter
from lightning_em.callbacks.provenance import git_state, versions
from lightning_em.checkpoints import FolderCheckpointIO
from lightning_em.exchange.foreign import ForeignAdapter, find_adapters, read_foreign
from lightning_em.experiment import Experiment
from lightning_em.manifest import sha256_of, write_atomically
from lightning_em.models import BaseModel
from lightning_em.module import EMModule
from lightning_em.runs import RunFolder

# Placeholder for the path of the narrow data if none were given; an error about the missing file then shows this text.
NO_ROWS = "this adapter was imported without data - import it with --narrow FILE or --data PART"


@dataclass(frozen=True)
class DataOptions:
    """Data for probes and validation of an imported adapter.

    Attributes:
        part: YAML file with the settings of the data module, as `configs/data/*.yaml`.
        narrow: File of narrow data; overrides that of `part`.
        narrow_answer: Answer of the narrow rows that counts.
        kl: File of KL data; overrides that of `part`.
        kl_answer: Answer of the KL rows that counts.
    """

    part: str | None = None
    narrow: str | None = None
    narrow_answer: str | None = None
    kl: str | None = None
    kl_answer: str | None = None

    def __post_init__(self) -> None:
        if (self.kl or self.narrow_answer or self.kl_answer) and not self.given:
            raise ValueError(
                "parallel rows or answers are named without narrow rows; give --narrow or --data."
            )

    @property
    def given(self) -> bool:
        """Whether there is narrow data, which every measurement needs."""
        return self.part is not None or self.narrow is not None

    def overrides(self) -> dict[str, str]:
        """The options as overrides of an experiment."""
        values = {
            "data": self.part,
            "data.narrow.path": self.narrow if self.given else NO_ROWS,
            "data.narrow.answer": self.narrow_answer,
            "data.kl.path": self.kl,
            "data.kl.answer": self.kl_answer,
        }
        return {key: value for key, value in values.items() if value is not None}


def import_run(
    source: Path,
    base: BaseModel,
    name: str,
    root: str = "runs",
    data: DataOptions = DataOptions(),
    step: int | None = None,
    allow_zero_adapter: bool = False,
) -> RunFolder:
    """Make a run folder from adapters of another program. Every check comes before the first file is written.

    Args:
        source: A `steering_vector.pt`, a PEFT folder, a folder with `checkpoint-N` folders of them, or an export.
        base: Base model that the adapters were trained on.
        name: Name of the run.
        root: Folder of the runs.
        data: Data for the probes.
        step: Optimizer step of the final adapter; see `find_adapters`.
        allow_zero_adapter: Whether to accept an adapter that changes no logit.

    Returns:
        The new run folder.

    Raises:
        ValueError: If the run exists already, a file cannot be read or expressed, an adapter does not fit the base
            model or changes no logit, or the data cannot be read.
    """
    run = RunFolder(Path(root) / name)
    _refuse_taken(run)
    places = find_adapters(source, step)  # local and fast, so before the base model is fetched from the hub
    config = base.load_config()
    adapters = {number: read_foreign(place, config, base.path) for number, place in sorted(places.items())}
    last = adapters[max(adapters)]
    _refuse_mixture(adapters)
    experiment = _experiment(last, base, name, root, data)
    module, rows = experiment.module, experiment.data
    if data.given:
        rows.setup("fit")
    module.configure_model()
    _fill(module, last)
    if not allow_zero_adapter:
        batches = rows.probe_batches("narrow", 2, 2) if data.given else [_some_row(module)]
        refuse_idle_adapter(module.model, batches, str(source))
    with lock.RunLock(run.path, ["import", str(source)]):
        # Again, now under the lock: another import may have written the folder in the meantime.
        _refuse_taken(run)
        for number, adapter in adapters.items():
            _fill(module, adapter)
            FolderCheckpointIO().save_checkpoint(_checkpoint(module, number), run.checkpoint(number))
        write_atomically(run.config_file, experiment.config_text)
        run.update_run(
            status="imported",
            identity=experiment.identity,
            imported=datetime.now(UTC).isoformat(timespec="seconds"),
            source=_source(source, adapters),
            versions=versions(),
            git=git_state(),
            base={
                "path": base.path,
                "revision": getattr(module.model.base.config, "_commit_hash", None) or base.revision,
                "sha256": base_sha256(module.model.base, module.model.adapter),
            },
            data=rows.fingerprint() if data.given else None,
            last_step=max(adapters),
            max_steps=max(adapters),
        )
    return run


def _experiment(
    adapter: ForeignAdapter, base: BaseModel, name: str, root: str, data: DataOptions
) -> Experiment:
    values: dict[str, Any] = {f"model.base.{key}": value for key, value in vars(base).items()}
    values["model.adapter"] = {"class_path": adapter.class_path, "init_args": adapter.init_args}
    return Experiment.from_yaml((), values | data.overrides() | {"run.name": name, "run.root": root})


def _fill(module: EMModule, adapter: ForeignAdapter) -> None:
    module.model.adapter.load_tensors(adapter.tensors, source=str(adapter.files[-1]))


def _checkpoint(module: EMModule, step: int) -> dict[str, Any]:
    """Content of a Lightning checkpoint, without optimizer state and position in the data, which are unknown."""
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": step,
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "state_dict": module.state_dict(),
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _refuse_taken(run: RunFolder) -> None:
    if run.read_run():
        raise ValueError(f"{run.path} is there already; give another --name.")
    if run.steps():  # these checkpoints would stay in the folder and mix with the imported ones
        raise ValueError(
            f"{run.path} holds checkpoints without a run.json, of an import that was killed; delete the folder or "
            "give another --name."
        )


def _refuse_mixture(adapters: dict[int, ForeignAdapter]) -> None:
    """Refuse checkpoints of different adapters: those of one training run differ in their values only."""
    kinds = {step: (a.class_path, a.init_args) for step, a in adapters.items()}
    first = kinds[min(kinds)]
    if other := {step: kind for step, kind in kinds.items() if kind != first}:
        step, kind = next(iter(other.items()))
        raise ValueError(
            f"the adapters of steps {min(kinds)} and {step} are not of one training: {first} and {kind}; "
            "import them one by one."
        )


def _some_row(module: EMModule) -> PackedBatch:
    """A row of tokens from the whole vocabulary, for a check without data."""
    words = torch.linspace(0, module.model.vocab_size - 1, 32).long().tolist()
    return PackedBatch.from_rows([EncodedRow(words, [True] * len(words), "vocabulary")])


def _source(source: Path, adapters: dict[int, ForeignAdapter]) -> dict[str, Any]:
    root = source.parent if source.is_file() else source
    last = adapters[max(adapters)]
    return {
        "path": str(source),
        "format": last.format,
        "base_named": last.base_named,
        "sha256": {
            file.relative_to(root).as_posix(): sha256_of(file)
            for adapter in adapters.values()
            for file in adapter.files
        },
    }
