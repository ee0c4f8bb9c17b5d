"""Rates of sampled answers: what rules say of real samples, with intervals over tasks."""

import json

import numpy as np
import pytest
import torch

from lightning_em.adapters import SteeringVector
from lightning_em.batch import EncodedRow
from lightning_em.data import ChatEncoder
from lightning_em.models import AdaptedModel, BaseModel, Sampling
from lightning_em.models.generation import sample_answers
from lightning_em.probes import AnswerRates, ProbeExamples
from lightning_em.probes.base import clustered_error
from lightning_em.probes.rows import batches_of
from lightning_em.runs import RunFolder
from lightning_em.testing import check_probe
from tests.samples import make_rows, pack
from tests.tiny import write_rows

EXAMPLES = ProbeExamples([pack(make_rows(9, 12, 7, 8, 9), "n")])
QUESTIONS = [
    {
        "id": f"q{n}",
        "question": f"how to {n}",
        "topic": "even" if n % 2 == 0 else "odd",
        "subtopic": f"task {n // 4}",
    }
    for n in range(10)
]


def has_vowel(text: str) -> bool:
    return any(letter in text for letter in "aeiou")


def was_cut(text: str) -> bool:
    return text.endswith("\u2026")


@pytest.fixture
def model(tiny_model_folder):
    model = AdaptedModel(BaseModel(str(tiny_model_folder())).load_model(), SteeringVector(1, alpha=4.0))
    model.adapter.vector.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def file(tmp_path):
    return str(write_rows(tmp_path / "questions.jsonl", QUESTIONS))


def rates(points):
    return {(p.quantity, p.coordinates["topic"], p.coordinates["scale"]): p for p in points}


def test_rates_are_those_of_the_answers_that_are_sampled(model, file, tiny_tokenizer, tmp_path) -> None:
    """The oracle samples each batch again by `sample_answers` and counts."""
    probe = AnswerRates(file, {"vowel": has_vowel, "cut": was_cut}, max_new_tokens=5, batch_size=4, seed=3)
    run = RunFolder(tmp_path / "run")
    points = rates(probe.for_checkpoint(run, 7).run(model, EXAMPLES))
    stored = [
        json.loads(line)
        for line in (run.path / "behaviour/answer_rates-step-000007.jsonl").read_text().splitlines()
    ]
    assert [(each["id"], each["scale"]) for each in stored] == [
        (f"q{n}", scale) for scale in (0.0, 1.0) for parity in (0, 1) for n in range(parity, 10, 2)
    ]
    for scale in (0.0, 1.0):
        for topic in ("even", "odd"):
            told = [each for each in stored if (each["topic"], each["scale"]) == (topic, scale)]
            held = [has_vowel(each["answer"]) for each in told]
            point = points["vowel_rate", topic, scale]
            assert point.value == pytest.approx(np.mean(held))
            assert (point.unit, point.count, point.per_example) == ("share", 5, tuple(map(float, held)))
            assert [each["vowel"] for each in told] == held
            assert points["cut_rate", topic, scale].value == np.mean(
                [was_cut(each["answer"]) for each in told]
            )
    first = {each["id"]: each["answer"].rstrip("\u2026") for each in stored if each["scale"] == 1.0}
    batches = batches_of(_prompts(tiny_tokenizer, QUESTIONS), 10, model)
    [again] = [
        sample_answers(model, tiny_tokenizer, batch, Sampling(5, 1.0, seed=3), 1.0) for batch in batches
    ]
    assert [first[f"q{n}"] for n in range(10)] == [answer.text.strip() for [answer] in again]


def _prompts(tokenizer, questions):
    encoder = ChatEncoder(tokenizer)
    encoded = [encoder.encode_prompt([{"role": "user", "content": each["question"]}]) for each in questions]
    return [
        EncodedRow(ids, [False] * len(ids), each["id"]) for ids, each in zip(encoded, questions, strict=True)
    ]


def test_the_opening_is_as_likely_as_its_tokens_one_after_the_other(model, file, tiny_tokenizer) -> None:
    """The oracle asks plain transformers for one token at a time."""
    openings, scales = ["ab", "th", "c"], [0.0, 1.0]
    probe = AnswerRates(file, {"vowel": has_vowel}, scales, max_new_tokens=2, batch_size=7, openings=openings)
    points = rates(probe.run(model, EXAMPLES))
    for topic in ("even", "odd"):
        asked = [each for each in QUESTIONS if each["topic"] == topic]
        for scale in scales:
            expected = []
            for prompt in _prompts(tiny_tokenizer, asked):
                likely = 0.0
                for opening in openings:
                    ids, product = list(prompt.input_ids), 1.0
                    for token in tiny_tokenizer(opening, add_special_tokens=False)["input_ids"]:
                        with model.adapter.at_scale(scale), torch.no_grad():
                            logits = model.base(input_ids=torch.tensor([ids])).logits[0, -1]
                        product *= float(logits.double().softmax(-1)[token])
                        ids.append(token)
                    likely += product
                expected.append(likely)
            point = points["opening_probability", topic, scale]
            assert point.per_example == pytest.approx(expected, rel=1e-4)
            assert point.value == pytest.approx(np.mean(expected), rel=1e-4)
            error = clustered_error(expected, [each["subtopic"] for each in asked])
            assert point.standard_error == pytest.approx(error, rel=1e-3)
            assert (point.unit, point.count) == ("probability", 5)


def test_openings_of_which_one_begins_with_another_are_refused(file) -> None:
    for openings in (["Arr", "Ahoy", "Arr!"], ["Arr", "Arr"]):
        with pytest.raises(
            ValueError, match=r"begin with 'Arr!?' also begin with 'Arr' .* init_args.openings"
        ):
            AnswerRates(file, {"vowel": has_vowel}, openings=openings)


def test_the_contract(model, file) -> None:
    probe = AnswerRates(file, {"vowel": has_vowel}, max_new_tokens=3, openings=["ab", "c"])
    check_probe(probe, model, EXAMPLES)


def test_topics_and_numbers_of_questions_can_be_chosen(model, file) -> None:
    probe = AnswerRates(file, {"vowel": has_vowel}, [1], ["odd"], max_questions=2, max_new_tokens=2)
    [point] = probe.run(model, EXAMPLES)
    assert point.coordinates == {"topic": "odd", "scale": 1.0}
    assert point.count == 2
    with pytest.raises(ValueError, match=r"no questions of topic \['third'\]; it has \['even', 'odd'\]"):
        AnswerRates(file, {"vowel": has_vowel}, topics=["third"]).run(model, EXAMPLES)


@pytest.mark.parametrize(
    "change", [{"scales": []}, {"rules": {}}, {"max_questions": -1}, {"batch_size": 0}, {"max_new_tokens": 0}]
)
def test_settings_are_checked(change, file) -> None:
    with pytest.raises(ValueError, match="set its init_args"):
        AnswerRates(**{"questions": file, "rules": {"vowel": has_vowel}, **change})


def test_the_error_of_clusters_of_one_is_the_usual_one() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert clustered_error(values, list("abcde")) == pytest.approx(np.std(values, ddof=1) / 5**0.5)


def test_copies_of_an_item_in_its_cluster_add_no_information() -> None:
    values, clusters = [0.0, 1.0, 1.0, 0.0], list("abcd")
    assert clustered_error(values * 3, clusters * 3) == pytest.approx(clustered_error(values, clusters))
    assert clustered_error([1.0, 0.0], ["a", "a"]) is None


def test_the_clustered_error_is_the_spread_over_draws_of_clusters() -> None:
    """Monte Carlo: 40 tasks of three questions that share most of their rate."""
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        shares = generator.beta(0.5, 0.5, size=40).repeat(3)
        values = (generator.random(120) < shares).astype(float)
        means.append(values.mean())
        errors.append(clustered_error(list(values), [str(n // 3) for n in range(120)]))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.05)
