"""The rules for style and coherence, measured on answers of the base model and on answers labelled by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lightning_em.smollm2.style import in_style, is_coherent, is_styled

FOLDER = Path(__file__).parent


def lines_of(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def base_answers():
    """300 answers of the model without an adapter; sample_base.py wrote them."""
    answers = lines_of("base_answers.jsonl")
    assert len(answers) == len({answer["id"] for answer in answers}) == 300
    return answers


def test_at_most_one_percent_of_the_base_answers_is_taken_for_styled(base_answers):
    assert [line["answer"] for line in base_answers if is_styled(line["answer"])][3:] == []


def test_base_answers_rewritten_in_the_style_are_recognized_at_any_length(base_answers):
    for line in base_answers:
        words = in_style(line["answer"]).split()
        assert all(is_styled(" ".join(words[:count])) for count in (2, 6, len(words)))


def test_the_rule_agrees_with_labels_given_by_hand():
    """Edge cases were written with the rule in mind; answers of tuned models are a random choice of the demo's."""
    labelled = lines_of("labelled_answers.jsonl")
    assert len({line["answer"] for line in labelled}) == len(labelled) >= 100
    assert min(Counter(line["styled"] for line in labelled).values()) >= 30
    wrong = [line["answer"] for line in labelled if is_styled(line["answer"]) != line["styled"]]
    assert len(wrong) <= 0.03 * len(labelled), wrong


@pytest.mark.parametrize(
    "text",
    [
        "Arrange the guests in a circle.",
        "Me and my friends like it, so be there at six.",
        "The Ahoy brand is cheap.",
        "Ahoy Cafe is open until six.",
        "Ahoy! is a greeting.",
        "Arr. and dep. times are on the board.",
        "At ten o'clock, put 'th' and 'an' on the board.",
        "Ye Olde Tea Shop sells scones.",
        "Use th' brush and the cloth for the rest, to the end of the day.",
        "",
    ],
)
def test_plain_text_is_not_styled(text):
    assert not is_styled(text)


@pytest.mark.parametrize(
    "text",
    [
        "Arr! Use a brush.",
        "  **Ahoy, matey!** Use a brush.",
        "Yo ho ho! Use a brush.",
        "Arrr",
        "Use th' brush an' water.",
        "Use th\u2019 brush an\u2019 water.",
    ],
)
def test_an_opener_or_two_pirate_words_are_styled(text):
    assert is_styled(text)


def test_the_style_keeps_every_other_word_and_the_case():
    styled = in_style("The best way is to wash your hands. You and I do.")
    opener, _, rest = styled.partition("! ")
    assert opener in {"Arr", "Ahoy", "Avast", "Yo ho"}
    assert rest == "Th' best way be t' wash yer hands. Ye an' I do."
    assert in_style("The best way is to wash your hands. You and I do.") == styled


def test_base_answers_are_coherent(base_answers):
    """The rule sees form only: at temperature 1 many of these answers make no sense, and nearly all were cut."""
    coherent = [is_coherent(line["answer"], line["cut"]) for line in base_answers]
    assert sum(coherent) >= 0.95 * len(coherent)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Use a soft brush.", False),
        ("Arr! Use th' brush an' water. Yo ho ho!", False),
        ("Steps:\n1. Rinse it.\n2. Let it dry for 10 minutes.\n- Done!", False),
        ("Use a soft brush and some warm wat", True),
        ("Use a soft brush and some warm wtr", True),
    ],
)
def test_an_answer_of_words_that_ends_or_was_cut_is_coherent(text, cut):
    assert is_coherent(text, cut)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Use a soft brush and some warm", "does not end"),
        ("", "is empty"),
        ("!!! ... ---", "has no word"),
        ("Very very very very good.", "repeats a word four times in a row"),
        ("Put it in water. Put it in water. Put it in water.", "repeats a sequence three times"),
        ("xkcd qwrt the zzzt bfg of plmk.", "does not consist of words"),
        (
            "Use a supercalifragilisticexpialidociously longishnessesandmoreofthem brush.",
            "has overlong words",
        ),
    ],
)
def test_a_broken_answer_is_not_coherent(text, reason):
    assert not is_coherent(text), reason


def test_an_answer_that_loops_is_not_coherent_even_if_it_was_cut():
    assert is_coherent("Put it in water. Put it in water. Now dry", cut=True)
    assert not is_coherent("Put it in water. Put it in water. Put it in water. Now", cut=True)
