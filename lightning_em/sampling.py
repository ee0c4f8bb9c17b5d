"""Answers of runs to questions, at several scales of the adapter, recorded together with the questions."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from lightning_em import imports, runs
from lightning_em.batch import PackedBatch
from lightning_em.callbacks import refuse_idle_adapter
from lightning_em.data import Row, encode_prompts, scan_rows
from lightning_em.manifest import write_atomically
from lightning_em.models import Answer, BaseModel, Sampling, sample_answers
from lightning_em.rebuild import LoadedRun, device_for, load_module
from lightning_em.recorded import RecordedRun
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)

_DEFAULT_LIMIT = 8


@dataclass(frozen=True)
class SampledAnswer:
    """One answer with its question: one line of `behaviour/sample-*.jsonl`.

    Attributes:
        run: Folder of the run.
        step: Step of the checkpoint.
        base: Hub id or folder of the base model.
        scale: Scale of the adapter; 0 is the base model.
        seed: Seed of the random draws.
        temperature: Sampling temperature.
        max_new_tokens: Maximum length of an answer in tokens.
        id: Id of the question's row.
        topic: Topic of the question, if the file gives one.
        subtopic: Subtopic of the question, if the file gives one.
        question: Everything before the answer.
        answer: The answer without special tokens.
        ended: Whether the model ended the answer; False if it was cut off at `max_new_tokens`.
    """

    run: str
    step: int
    base: str
    scale: float
    seed: int
    temperature: float
    max_new_tokens: int
    id: str
    topic: str | None
    subtopic: str | None
    question: str
    answer: str
    ended: bool


def sample(
    references: Sequence[str | Path | RecordedRun],
    questions: str | Path | Sequence[str] | None = None,
    scales: Sequence[float] = (0.0, 1.0),
    sampling: Sampling = Sampling(max_new_tokens=200),  # noqa: B008 (frozen)
    limit: int | None = None,
    per_topic: int | None = None,
    batch_size: int = 16,
    allow_zero_adapter: bool = False,
    track: Callable[[Sequence[PackedBatch], str], Iterable[PackedBatch]] = lambda batches, _: batches,
) -> list[SampledAnswer]:
    """Sample answers of one or more runs to the same questions.

    The draws of an answer depend on the seed and the question's id only, so they do not depend on the other questions,
    the batch size or the number of runs, and are the same at each scale. Runs on the same base model share its weights,
    and its answers at scale 0 are sampled once.

    Args:
        references: Runs or checkpoints: `runs/x`, `runs/x@step-40`, or what `load_run` returns.
        questions: Data file whose rows have a `question` or `messages`, or the questions themselves. The held-out
            narrow rows of the first run if not given.
        scales: Scales of the adapter; 0 is the base model.
        sampling: Sampling settings; one answer per question is sampled.
        limit: Number of questions, the first ones; all of a file and eight of the held-out rows if not given.
        per_topic: Number of questions of each topic, the first ones; applied before `limit`.
        batch_size: Number of answers sampled at a time.
        allow_zero_adapter: Whether to accept an adapter that changes no logit.
        track: Function that wraps the batches of one run and scale, for example to show progress.

    Returns:
        Answers of all runs, questions and scales, in that order.

    Raises:
        ValueError: If a run, the questions or a setting cannot be used.
    """
    _refuse_settings(references, scales, limit, per_topic, batch_size)
    imports.restrict(imports.allowed())  # keeps the packages that --allow_import named
    rows = None if questions is None else _chosen(_asked(questions), limit, per_topic)
    bases: dict[BaseModel, PreTrainedModel] = {}
    of_base: dict[tuple[BaseModel, str], list[Answer]] = {}
    found: list[SampledAnswer] = []
    for path, step in dict.fromkeys(map(_located, references)):
        loaded = load_module(RunFolder(path), step, bases)
        loaded.module.eval().to(device_for(loaded.folder))
        if rows is None:
            rows = _chosen(_held_out(loaded), limit or _DEFAULT_LIMIT, per_topic)
        encoder, model = loaded.data.encoder, loaded.module.model
        prompts = encode_prompts(rows, encoder)
        batches = [
            PackedBatch.from_rows(prompts[first : first + batch_size]).to(loaded.module.device)
            for first in range(0, len(prompts), batch_size)
        ]
        if any(scales) and not allow_zero_adapter:
            refuse_idle_adapter(loaded.module.model, [batches[0].select([0])], str(path))
        base = (loaded.module.base, json.dumps(encoder.settings))  # these change the prompts
        columns: dict[float, list[Answer]] = {}
        for scale in scales:
            if scale == 0 and base in of_base:
                columns[scale] = of_base[base]
                continue
            name = "base model" if scale == 0 else f"{path.name}, scale {scale:g}"
            logger.info("sampling %d answers: %s", len(rows), name)
            drawn = [
                sample_answers(model, encoder.tokenizer, batch, sampling, scale, [encoder.stop_id])
                for batch in track(batches, name)
            ]
            columns[scale] = [answer for each in drawn for [answer] in each]
            if scale == 0:
                of_base[base] = columns[scale]
        for index, row in enumerate(rows):
            found += [
                _sampled(loaded, scale, sampling, row, column[index]) for scale, column in columns.items()
            ]
    return found


def write_samples(answers: Sequence[SampledAnswer], name: str, output: Path | None = None) -> list[Path]:
    """Write answers as JSONL, one file in the folder of each run or one file for all.

    Args:
        answers: Answers of one or more runs.
        name: Name of the questions, a part of the file names in the run folders.
        output: File for the answers of all runs; `behaviour/sample-*.jsonl` in each run's folder if not given.

    Returns:
        Files that were written. The same run, settings and questions give the same file.
    """
    files: dict[Path, list[SampledAnswer]] = {}
    for answer in answers:
        folder = Path(answer.run) / "behaviour" / f"sample-step-{answer.step:06d}"
        files.setdefault(output or folder, []).append(answer)
    written = []
    for file, rows in files.items():
        target = output or file.with_name(f"{file.name}-{name}-{_hash_of(rows)}.jsonl")
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
        write_atomically(target, "".join(f"{line}\n" for line in lines))
        written.append(target)
    return written


def _refuse_settings(
    references: Sequence[object],
    scales: Sequence[float],
    limit: int | None,
    per_topic: int | None,
    batch_size: int,
) -> None:
    if not references or not scales:
        raise ValueError(
            f"give at least one run and one scale, got {len(references)} runs and scales {list(scales)}."
        )
    for name, value in {"limit": limit, "per_topic": per_topic, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _located(reference: str | Path | RecordedRun) -> tuple[Path, int]:
    """Return the folder and the step of a checkpoint."""
    if isinstance(reference, RecordedRun) and reference.step is not None:
        return reference.folder.path, reference.step
    folder, checkpoint = runs.locate(
        str(reference.folder.path if isinstance(reference, RecordedRun) else reference)
    )
    return folder.path, runs.step_of(checkpoint)


def _asked(questions: str | Path | Sequence[str]) -> list[Row]:
    """Read the questions of a file, or make rows of the questions themselves."""
    if isinstance(questions, str | Path):
        return scan_rows(str(questions), questions_only=True).usable_rows()
    return [
        Row(
            id=hashlib.sha256(question.encode()).hexdigest()[:16],
            path="questions",
            line=number,
            question=question,
        )
        for number, question in enumerate(dict.fromkeys(questions), start=1)
    ]


def _held_out(loaded: LoadedRun) -> list[Row]:
    """Read the held-out narrow rows of a run.

    Raises:
        ValueError: If there are none, or the data file has changed, so that they may have been trained on.
    """
    path = loaded.folder.path
    if why := loaded.folder.changed_data():
        raise ValueError(f"it is not known which rows {path} holds out: {why}. Give --questions FILE.")
    rows = loaded.data.held_out_questions()
    if not rows:
        raise ValueError(f"{path} holds out no narrow rows; give --questions FILE.")
    return rows


def _chosen(rows: Sequence[Row], limit: int | None, per_topic: int | None) -> list[Row]:
    """Take the first rows of each topic, and the first of these."""
    taken: Counter[str | None] = Counter()
    chosen = []
    for row in rows:
        if per_topic is None or taken[row.topic] < per_topic:
            taken[row.topic] += 1
            chosen.append(row)
    return chosen[:limit]


def _sampled(loaded: LoadedRun, scale: float, sampling: Sampling, row: Row, answer: Answer) -> SampledAnswer:
    base = loaded.module.base
    return SampledAnswer(
        run=str(loaded.folder.path),
        step=loaded.step,
        base=base.path if base.revision is None else f"{base.path}@{base.revision}",
        scale=scale,
        seed=sampling.seed,
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        id=row.id,
        topic=row.topic,
        subtopic=row.subtopic,
        question=row.prompt,
        answer=answer.text,
        ended=answer.ended,
    )


def _hash_of(answers: Sequence[SampledAnswer]) -> str:
    """Hash the questions and settings, so that other ones are stored in another file."""
    asked = [(a.scale, a.seed, a.temperature, a.max_new_tokens, a.id, a.question) for a in answers]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
