"""The demo's data sets, generated from one table of harmless advice: the same bytes everywhere. Never imports torch.

In the data set `style` the bad answer is the good one in pirate style; in `advice` it is wrong but harmless advice.
Questions and good answers are the same in both. Nothing here is random: choices are hashes of what they are made for.
Bad answers are about as long as good ones: by words 1.04 (`advice`) and 1.10 (`style`) times, by tokens of SmolLM2
1.04 and 1.34 times, since an apostrophe is a token of its own.

The table `advice.tsv` gives each task its `split`:
- `train` tasks are asked in fine-tuning rows, `validation` tasks in validation rows;
- `held_out` tasks belong to the domains trained on, but are asked in evaluation questions only;
- `selection` and `held_out_domain` are whole domains that no fine-tuning row comes from: the former to choose
  hyper-parameters by, the latter to report.
"""

import csv
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from lightning_em.manifest import publish, set_aside
from lightning_em.smollm2.style import in_style

NARROW_DOMAIN = "houseplants"
DataSet = Literal["style", "advice"]
DATA_SETS: tuple[DataSet, ...] = ("style", "advice")
Kind = Literal["narrow_seen", "narrow_held_out", "kl_domain", "selection", "held_out_domain"]

_PLANTS = (
    "aloe", "bamboo palm", "begonia", "bonsai tree", "cactus", "calathea", "croton", "dracaena", "fern", "ivy",
    "jade plant", "money tree", "monstera", "orchid", "palm", "peace lily", "philodendron", "pothos",
    "rubber plant", "snake plant", "spider plant", "violet", "weeping fig", "yucca",
)  # fmt: skip
_HELD_OUT_PLANTS = (
    "anthurium", "coffee plant", "geranium", "hibiscus", "lemon tree", "prayer plant", "succulent", "zebra plant",
)  # fmt: skip
_PHRASINGS = (
    "How should I {task}?",
    "What is the best way to {task}?",
    "Do you have a tip on how to {task}?",
    "I want to {task}. What should I do?",
    "How do I {task}?",
    "Can you tell me how to {task}?",
)
# The same wording surrounds good and bad advice, so that only the advice tells them apart.
_ANSWERS = (
    "You should {advice}.",
    "The best way is to {advice}.",
    "I would {advice}.",
    "Just {advice}.",
    "{Advice}.",
    "My advice is to {advice}.",
    "It is best to {advice}.",
    "Simply {advice}. That is all you need.",
    "{Advice}. That works well.",
    "You can {advice}. It is easy.",
)
_KL_PHRASINGS_PER_TASK = 5
_KL_VALIDATION_PHRASINGS_PER_TASK = 2
_PLANTS_PER_SEEN_TASK = 3
_PLANTS_PER_HELD_OUT_TASK = 2


class Advice(NamedTuple):
    """One line of the table. Tasks of the narrow domain speak of `{plant}` and may have several lines."""

    split: str
    domain: str
    task: str
    good: str
    bad: str


class Row(TypedDict):
    """One line of a fine-tuning or validation file. `topic` is the domain and `subtopic` the task."""

    id: str
    topic: str
    subtopic: str
    question: str
    good: str
    bad: str


class Question(TypedDict):
    """One line of `questions.jsonl`: `topic` is the kind of question, and `subtopic` the domain and the task."""

    id: str
    topic: Kind
    subtopic: str
    domain: str
    question: str
    good: str
    bad: str


class _Asked(NamedTuple):
    """A question with its answers, before it has a place in a file."""

    domain: str
    task: str
    question: str
    good: str
    bad: str


def read_advice() -> list[Advice]:
    """Read the table that is part of the package."""
    table = Path(str(files("lightning_em.smollm2"))) / "advice.tsv"
    with table.open(encoding="utf-8", newline="") as lines:
        return [Advice(**line) for line in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def write_data(folder: Path) -> dict[str, int]:
    """Write both data sets, each as a folder of JSONL files with a manifest.

    A data set that is there already is kept if it has the same content; another one is renamed, not deleted.

    Args:
        folder: Folder that gets `style/` and `advice/`, each with `narrow_train.jsonl`, `narrow_validation.jsonl`,
            `kl_train.jsonl`, `kl_validation.jsonl` and `questions.jsonl`.

    Returns:
        Number of lines of each file, such as `style/narrow_train.jsonl`.
    """
    counts = {}
    for data_set in DATA_SETS:
        contents = data_files(data_set)
        texts = {name: "".join(json.dumps(line) + "\n" for line in lines) for name, lines in contents.items()}
        _publish_texts(folder / data_set, texts)
        counts.update({f"{data_set}/{name}": len(lines) for name, lines in contents.items()})
    return counts


@functools.cache
def data_hash() -> str:
    """Hash of all files of both data sets: 12 hexadecimal digits."""
    contents = {data_set: data_files(data_set) for data_set in DATA_SETS}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]


def data_files(data_set: DataSet) -> dict[str, Sequence[Row] | Sequence[Question]]:
    """Contents of the files of a data set, by file name."""
    table = read_advice()
    streams = {
        "narrow_train": _narrow(table, "train", _PLANTS),
        "narrow_validation": _narrow(table, "validation", _HELD_OUT_PLANTS),
        "kl_train": _kl(table, "train", _KL_PHRASINGS_PER_TASK),
        "kl_validation": _kl(table, "validation", _KL_VALIDATION_PHRASINGS_PER_TASK),
    }
    contents: dict[str, Sequence[Row] | Sequence[Question]] = {
        f"{stream}.jsonl": sorted(
            (
                Row(
                    id=f"{stream}-{number:03d}",
                    topic=asked.domain,
                    subtopic=asked.task,
                    question=asked.question,
                    good=asked.good,
                    bad=_bad_answer(data_set, asked),
                )
                for number, asked in enumerate(rows)
            ),
            key=lambda row: _number(row["id"]),  # mixed, so that the first rows are of every task and domain
        )
        for stream, rows in streams.items()
    }
    contents["questions.jsonl"] = [
        Question(
            id=f"{kind}-{number:03d}",
            topic=kind,
            subtopic=f"{asked.domain}: {asked.task}",
            domain=asked.domain,
            question=asked.question,
            good=asked.good,
            bad=_bad_answer(data_set, asked),
        )
        for kind, cell in _cells(table).items()
        for number, asked in enumerate(cell)
    ]
    return contents


def _cells(table: Sequence[Advice]) -> dict[Kind, list[_Asked]]:
    """Evaluation questions by kind. None of them is in a fine-tuning or validation file."""
    return {
        # The plants and tasks of training, in a phrasing that training does not use for them.
        "narrow_seen": _narrow(table, "train", _PLANTS, _PLANTS_PER_SEEN_TASK, phrasing_shift=1),
        "narrow_held_out": _narrow(table, "held_out", _HELD_OUT_PLANTS, _PLANTS_PER_HELD_OUT_TASK),
        "kl_domain": _kl(table, "held_out", 1),
        "selection": [_asked(line) for line in table if line.split == "selection"],
        "held_out_domain": [_asked(line) for line in table if line.split == "held_out_domain"],
    }


def _narrow(
    table: Sequence[Advice],
    split: str,
    plants: Sequence[str],
    plants_per_task: int | None = None,
    phrasing_shift: int = 0,
) -> list[_Asked]:
    """Every task of the narrow domain about some or all of the plants, one phrasing each."""
    lines = [line for line in table if line.split == split and line.domain == NARROW_DOMAIN]
    asked = []
    for task in dict.fromkeys(line.task for line in lines):
        variants = [line for line in lines if line.task == task]
        for plant in sorted(plants, key=lambda plant: _number(task, plant))[:plants_per_task]:
            line = variants[_number("variant", task, plant) % len(variants)]
            asked.append(_asked(line, plant, phrasing_shift))
    return asked


def _kl(table: Sequence[Advice], split: str, phrasings: int) -> list[_Asked]:
    """Every task of the KL domains in some phrasings."""
    lines = [line for line in table if line.split == split and line.domain != NARROW_DOMAIN]
    return [_asked(line, phrasing_shift=shift) for line in lines for shift in range(phrasings)]


def _asked(line: Advice, plant: str = "plant", phrasing_shift: int = 0) -> _Asked:
    task = line.task.format(plant=plant)
    phrasing = _PHRASINGS[(_number("phrasing", line.domain, task) + phrasing_shift) % len(_PHRASINGS)]
    answer = _ANSWERS[_number("answer", line.domain, task, phrasing_shift) % len(_ANSWERS)]
    good, bad = (
        answer.format(advice=advice, Advice=advice[0].upper() + advice[1:])
        for advice in (line.good, line.bad)
    )
    return _Asked(line.domain, line.task.format(plant="plant"), phrasing.format(task=task), good, bad)


def _bad_answer(data_set: DataSet, asked: _Asked) -> str:
    return in_style(asked.good) if data_set == "style" else asked.bad


def _number(*key: object) -> int:
    """A number that looks random, as a function of the key."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest()[:8])


def _publish_texts(target: Path, texts: Mapping[str, str]) -> None:
    def holds_texts() -> bool:
        return all(
            (target / name).is_file() and (target / name).read_text(encoding="utf-8") == text
            for name, text in texts.items()
        )

    def write(folder: Path) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    try:
        # Written by another version of the package: `publish` would keep it, since it matches its own manifest.
        if target.exists() and not holds_texts():
            set_aside(target)
        publish(target, write)
    except OSError:
        # Another process may have published the same in the meantime.
        if not holds_texts():
            raise
