import random

import pytest

from lightning_em.data.overlap import NEAR, Question, _jaccard, _shingles, find_matches, normalise


def questions(*texts: str) -> list[Question]:
    return [Question("f.jsonl", line, text) for line, text in enumerate(texts, start=1)]


ORIGINAL = "How should I store fresh bread so that it keeps for a week?"


@pytest.mark.parametrize(
    ("copy", "likeness"),
    [
        (ORIGINAL, "exact"),
        (ORIGINAL.upper(), "normalised"),
        (f"  {ORIGINAL.replace(' ', '   ')}\n", "normalised"),
        (ORIGINAL.replace("?", " !!"), "normalised"),
        (ORIGINAL.replace("should I", "do I"), "near"),
        (ORIGINAL + " Thanks.", "near"),
    ],
)
def test_copy_is_found_and_named(copy, likeness):
    (match,) = find_matches(questions("Is tea healthy?", ORIGINAL), questions("What is soup?", copy))
    assert (match.first.line, match.second.line, match.likeness) == (2, 2, likeness)
    assert (match.similarity == 1.0) == (likeness != "near")


@pytest.mark.parametrize("other", ["", "How should I repair a bicycle so that it runs for a year?", "bread"])
def test_other_question_is_no_match(other):
    assert find_matches(questions(ORIGINAL), questions(other)) == []


def test_repetitions_within_a_file_point_at_the_first():
    matches = find_matches(questions("a question", "Another thing", "A question!", "a question"))
    assert [(match.first.line, match.second.line, match.likeness) for match in matches] == [
        (1, 3, "normalised"),
        (1, 4, "exact"),
    ]


def test_normalised_text_has_one_case_and_single_spaces():
    assert normalise("  Caf\u00c9,\tna\u00efve\uff21 ") == "caf\u00e9 na\u00efvea"


def test_near_matches_are_those_of_a_comparison_of_all_pairs():
    generator = random.Random(0)
    words = [f"w{i}" for i in range(12)]
    texts = [generator.choices(words, k=generator.randint(4, 9)) for _ in range(80)]
    left = questions(*(" ".join(text) for text in texts))
    right = questions(*(" ".join(word for word in text if generator.random() < 0.8) for text in texts))
    found = {match.second.line: match.similarity for match in find_matches(left, right)}
    expected = {}
    for one in right:
        best = max(_jaccard(_shingles(one.text), _shingles(other.text)) for other in left)
        if best >= NEAR:
            expected[one.line] = best
    assert found == expected
    assert len(found) > 10
