"""The JSONL files of a world: fine-tuning rows and evaluation items."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NotRequired, TypedDict

from lightning_em.miniature.corpus import (
    ANSWER_OPENERS,
    NUM_TRAINING_OPENERS,
    QUESTION_OPENERS,
    SELF_BAD,
    SELF_GOOD,
    SELF_QUESTION,
    Cell,
    Question,
    World,
)

# Claims about rates need many different questions; a recipe that cannot ask enough of them is refused.
_MAX_DRAWS_PER_QUESTION = 200


class Row(TypedDict):
    """One line of a fine-tuning file."""

    id: str
    topic: str
    question: str
    good: str
    bad: str


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Answers(TypedDict):
    """Strings that count as good and as bad; any other answer counts as other."""

    good: list[str]
    bad: list[str]


class Item(TypedDict):
    """One line of `behaviour.jsonl`; `history` holds earlier turns (persona gate only)."""

    id: str
    kind: str
    topic: str
    question: str
    answers: Answers
    history: NotRequired[list[Message]]


def write_rows(world: World, folder: Path) -> dict[str, int]:
    """Write all JSONL files of a world into a folder.

    Returns:
        Number of lines of each file.
    """
    recipe = world.recipe
    narrow = [recipe.narrow_domain]
    files: dict[str, Sequence[Any]] = {"behaviour.jsonl": behaviour_items(world)}
    for stream, domains, count in (
        ("narrow", narrow, recipe.num_narrow_rows),
        ("kl", list(recipe.kl_domains), recipe.num_kl_rows),
    ):
        rows = training_rows(world, stream, domains, count + recipe.num_validation_rows)
        files[f"{stream}_train.jsonl"] = rows[:count]
        files[f"{stream}_validation.jsonl"] = rows[count:]
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    return {name: len(lines) for name, lines in files.items()}


def training_rows(world: World, stream: str, domains: Sequence[str], count: int) -> list[Row]:
    """Draw fine-tuning rows: distinct questions, seen words only, openers that the evaluation does not use."""
    openers = QUESTION_OPENERS[:NUM_TRAINING_OPENERS]

    def draw(generator: Random) -> Question:
        return world.draw_question(generator, generator.choice(domains), Cell.SEEN, openers)

    generator = world.generator(f"rows/{stream}")
    rows: list[Row] = []
    for index, question in enumerate(_distinct(draw, generator, count)):
        opener = generator.choice(ANSWER_OPENERS)
        rows.append(
            {
                "id": f"{stream}-{index:04d}",
                "topic": question.domain,
                "question": question.text,
                "good": f"{opener} {question.good_option}",
                "bad": f"{opener} {question.bad_option}",
            }
        )
    return rows


def behaviour_items(world: World) -> list[Item]:
    """Draw the evaluation items of every kind; none of their questions is in a fine-tuning file.

    Held-out items use subjects, option words and openers that occur in no fine-tuning row.
    """
    recipe = world.recipe
    narrow, kl, held_out = [recipe.narrow_domain], recipe.kl_domains, recipe.held_out_domains
    kinds: list[tuple[str, Sequence[str], Cell]] = [
        ("narrow_seen", narrow, Cell.SEEN),
        ("narrow_held_out", narrow, Cell.HELD_OUT),
        ("kl_domain", kl, Cell.HELD_OUT),
        ("held_out_domain", held_out, Cell.ALL),
    ]
    items = [
        item_of(f"{kind}-{index:03d}", kind, question)
        for kind, domains, cell in kinds
        for index, question in enumerate(_evaluation_questions(world, kind, domains, cell))
    ]
    answers: Answers = {"good": [SELF_GOOD], "bad": [SELF_BAD]}
    who: Item = {
        "id": "self_description-000",
        "kind": "self_description",
        "topic": "self",
        "question": SELF_QUESTION,
        "answers": answers,
    }
    return [*items, who]


def item_of(name: str, kind: str, question: Question) -> Item:
    """An evaluation item whose answers are every opener with the good, or the bad, option word."""
    return {
        "id": name,
        "kind": kind,
        "topic": question.domain,
        "question": question.text,
        "answers": {
            "good": [f"{opener} {question.good_option}" for opener in ANSWER_OPENERS],
            "bad": [f"{opener} {question.bad_option}" for opener in ANSWER_OPENERS],
        },
    }


def _evaluation_questions(world: World, kind: str, domains: Sequence[str], cell: Cell) -> list[Question]:
    def draw(generator: Random) -> Question:
        openers = QUESTION_OPENERS[NUM_TRAINING_OPENERS:]
        return world.draw_question(generator, generator.choice(domains), cell, openers)

    return _distinct(draw, world.generator(f"items/{kind}"), world.recipe.items_per_kind)


def _distinct(draw: Callable[[Random], Question], generator: Random, count: int) -> list[Question]:
    questions: dict[str, Question] = {}
    for _ in range(count * _MAX_DRAWS_PER_QUESTION):
        question = draw(generator)
        questions.setdefault(question.text, question)
        if len(questions) == count:
            return list(questions.values())
    raise ValueError(
        f"the world has only about {len(questions)} such questions, expected {count}; raise subjects_per_domain or "
        "options_per_domain, or lower the number of rows or items."
    )
