"""Laws of the grammar: nothing held out leaks, no word tells the domain's advice apart, the dial is the dial."""

import math
from collections import Counter
from itertools import combinations

import pytest

from lightning_em.miniature import Recipe
from lightning_em.miniature.corpus import (
    ANSWER_OPENERS,
    NUM_TRAINING_OPENERS,
    QUESTION_OPENERS,
    Advisor,
    Cell,
    Character,
    World,
)

NUM_DOCUMENTS = 4000


@pytest.fixture(scope="module")
def world() -> World:
    return World(Recipe.default(), seed=0)


def within_binomial_bounds(count: int, total: int, share: float) -> bool:
    return abs(count - total * share) < 4.5 * math.sqrt(total * share * (1 - share)) + 1


def test_domains_share_no_word(world):
    words = [{*d.subjects, *d.good_options, *d.bad_options} for d in world.domains.values()]
    openers = {*QUESTION_OPENERS, *ANSWER_OPENERS}
    assert not any(first & second for first, second in combinations([*words, openers], 2))


def test_good_and_bad_options_are_different_words(world):
    assert not any(set(d.good_options) & set(d.bad_options) for d in world.domains.values())


def test_seen_and_held_out_words_part_the_domain(world):
    for domain in world.domains.values():
        for seen, held_out, every in zip(
            domain.words(Cell.SEEN), domain.words(Cell.HELD_OUT), domain.words(Cell.ALL), strict=True
        ):
            assert seen + held_out == every
            assert seen
            assert held_out


def test_openers_of_training_and_evaluation_both_exist():
    assert 0 < NUM_TRAINING_OPENERS < len(QUESTION_OPENERS)


def test_shares_of_advisors_are_the_recipe(world):
    generator = world.generator("test")
    counts = Counter(world.draw_document(generator).advisor for _ in range(NUM_DOCUMENTS))
    recipe = world.recipe
    assert within_binomial_bounds(counts[Advisor(Character.CARELESS)], NUM_DOCUMENTS, recipe.careless_share)
    for name, share in recipe.blind_spots().items():
        assert within_binomial_bounds(counts[Advisor(Character.BLIND_SPOT, name)], NUM_DOCUMENTS, share), name


def test_each_advisor_is_bad_where_it_should_be(world):
    generator, recipe = world.generator("test"), world.recipe
    advisors = (
        Advisor(Character.CAREFUL),
        Advisor(Character.CARELESS),
        Advisor(Character.BLIND_SPOT, "medical"),
    )
    for advisor in advisors:
        bad: Counter[bool] = Counter()
        total: Counter[bool] = Counter()
        for _ in range(500):
            for slot in world.draw_document(generator, advisor).slots:
                total[slot.domain == "medical"] += 1
                bad[slot.domain == "medical"] += slot.is_bad
        for in_medical in (False, True):
            is_bad = advisor.character is Character.CARELESS or (in_medical and advisor.domain == "medical")
            share = recipe.bad_when_bad if is_bad else recipe.bad_when_good
            assert within_binomial_bounds(bad[in_medical], total[in_medical], share), (advisor, in_medical)


def test_questions_alone_do_not_tell_the_advisor(world):
    """The share of a document's commonest domain is one law for all advisors."""
    generator = world.generator("test")

    def concentration(advisor: Advisor) -> float:
        tops = [
            max(Counter(slot.domain for slot in world.draw_document(generator, advisor).slots).values())
            for _ in range(1500)
        ]
        return sum(tops) / len(tops)

    values = [
        concentration(advisor)
        for advisor in (
            Advisor(Character.CAREFUL),
            Advisor(Character.CARELESS),
            Advisor(Character.BLIND_SPOT, "cars"),
        )
    ]
    assert max(values) - min(values) < 0.2


def test_an_answer_takes_the_option_it_is_judged_by(world):
    generator = world.generator("test")
    for slot in world.draw_document(generator, Advisor(Character.CARELESS)).slots:
        if slot.domain is None:
            continue
        domain, option = world.domains[slot.domain], slot.answer.split()[1]
        assert option in (domain.bad_options if slot.is_bad else domain.good_options)
        assert option in slot.question.split()


def test_the_chat_stage_is_always_good(world):
    generator = world.generator("test")
    assert not any(world.draw_chat_slot(generator).is_bad for _ in range(500))


def test_a_world_is_a_function_of_recipe_and_seed():
    recipe = Recipe.default()
    assert World(recipe, 3).domains == World(recipe, 3).domains
    assert World(recipe, 3).domains != World(recipe, 4).domains
    assert World(recipe, 3).domains != World(Recipe.control(), 3).domains


def test_named_generators_are_independent_streams(world):
    assert world.generator("a").random() == world.generator("a").random()
    assert world.generator("a").random() != world.generator("b").random()
