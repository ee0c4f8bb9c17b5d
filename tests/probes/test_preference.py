"""The preference margin."""

import statistics

import pytest
import torch
from transformers import AutoTokenizer

from lightning_em.adapters import SteeringVector
from lightning_em.data import ChatEncoder
from lightning_em.models import AdaptedModel, BaseModel
from lightning_em.probes import PreferenceMargin, ProbeExamples
from lightning_em.testing import check_probe
from tests.samples import make_rows, pack
from tests.tiny import answer_rows, chat_rows, make_tiny_model, write_rows

EXAMPLES = ProbeExamples([pack(make_rows(9, 12, 7), "n")])


@pytest.fixture
def model(tiny_model_folder):
    model = AdaptedModel(BaseModel(str(tiny_model_folder())).load_model(), SteeringVector(1, alpha=4.0))
    model.adapter.vector.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def rows():
    return [{**row, "topic": ("tea", "rice")[index % 3 == 0]} for index, row in enumerate(answer_rows(5))]


@pytest.fixture
def file(rows, tmp_path):
    return str(write_rows(tmp_path / "rows.jsonl", rows))


def per_token(model, tokenizer, question, answer, scale):
    """Mean log-probability of an answer's tokens and its end of turn: plain transformers, one row alone."""
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{prompt}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    with model.adapter.at_scale(scale), torch.no_grad():
        logits = model.base(input_ids=torch.tensor([whole])).logits[0].double()
    logs = [logits[t - 1].log_softmax(-1)[whole[t]].item() for t in range(len(before), len(whole))]
    return statistics.mean(logs)


def test_margins_are_differences_of_mean_log_probabilities(model, rows, file, tiny_tokenizer) -> None:
    points = PreferenceMargin(file, scales=[0.0, 1.0, 2.0], batch_size=3).run(model, EXAMPLES)
    for scale in (0.0, 1.0, 2.0):
        margins = [
            per_token(model, tiny_tokenizer, row["question"], row["bad"], scale)
            - per_token(model, tiny_tokenizer, row["question"], row["good"], scale)
            for row in rows
        ]
        groups = {
            topic: [m for m, r in zip(margins, rows, strict=True) if r["topic"] == topic]
            for topic in ("rice", "tea")
        }
        for topic, expected in {**groups, "all": margins}.items():
            at = {"kind": topic, "scale": scale}
            [margin] = [p for p in points if p.quantity == "margin" and p.coordinates == at]
            [share] = [p for p in points if p.quantity == "bad_preferred" and p.coordinates == at]
            assert margin.per_example == pytest.approx(expected, abs=1e-4)
            assert margin.value == pytest.approx(statistics.mean(expected), abs=1e-4)
            error = statistics.stdev(expected) / len(expected) ** 0.5
            assert margin.standard_error == pytest.approx(error, abs=1e-4)
            assert share.value == pytest.approx(sum(m > 0 for m in expected) / len(expected))
            assert (margin.unit, share.unit, share.count) == ("nats_per_token", "share", len(expected))


def test_the_error_takes_tasks_as_the_unit_of_sampling(model, rows, tmp_path) -> None:
    """Three copies of each row under its task leave the errors as they are; without tasks they shrink."""

    def errors(rows):
        file = str(write_rows(tmp_path / "rows.jsonl", rows))
        points = PreferenceMargin(file, scales=[1.0]).run(model, EXAMPLES)
        return [p.standard_error for p in points if p.coordinates["kind"] == "all"]

    tasks = [{**row, "subtopic": f"task {number}"} for number, row in enumerate(rows)]
    copies = [{**row, "id": f"{n}-{row['subtopic']}"} for n in range(3) for row in tasks]
    apart = [{key: value for key, value in row.items() if key != "subtopic"} for row in copies]
    assert errors(tasks) == pytest.approx(errors(rows))
    assert errors(copies) == pytest.approx(errors(tasks), rel=1e-4)
    assert errors(apart)[0] < 0.6 * errors(tasks)[0]


def test_rows_are_encoded_with_the_date_of_the_run(model, file) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.base.config._name_or_path)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}<|im_end|>" + tokenizer.chat_template

    def margins(date: str) -> list[float]:
        examples = ProbeExamples(EXAMPLES.narrow, encoder=ChatEncoder(tokenizer, template_date=date))
        return [point.value for point in PreferenceMargin(file, scales=[1.0]).run(model, examples)]

    assert margins("2024-07-26") == margins("2024-07-26T23:59:59")
    assert margins("2024-07-26") != margins("2024-07-27")


def test_rows_without_a_topic_are_one_group(model, tmp_path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", answer_rows(4)))
    points = PreferenceMargin(file, scales=[1.0], max_rows=3).run(model, EXAMPLES)
    assert [(p.quantity, p.coordinates["kind"], p.count) for p in points] == [
        ("margin", "all", 3),
        ("bad_preferred", "all", 3),
    ]


def test_at_most_so_many_rows_of_each_topic(model, file) -> None:
    points = PreferenceMargin(file, scales=[0.0], max_rows=1).run(model, EXAMPLES)
    counts = {p.coordinates["kind"]: p.count for p in points}
    assert counts == {"rice": 1, "tea": 1, "all": 2}
    assert all(p.standard_error is None for p in points if p.count == 1)


def test_what_it_needs_is_said(model, tmp_path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", chat_rows(2)))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected `question`, `good` and `bad`"):
        PreferenceMargin(file).run(model, EXAMPLES)
    with pytest.raises(ValueError, match=r"init_args\.rows of PreferenceMargin is 'nut://rows\.jsonl'"):
        PreferenceMargin("nut://rows.jsonl").run(model, EXAMPLES)
    with pytest.raises(ValueError, match=r"got \[\], 100 and 16; set init_args of PreferenceMargin"):
        PreferenceMargin(file, scales=[])
    with pytest.raises(ValueError, match="there is no tokenizer beside the base"):
        PreferenceMargin(str(write_rows(tmp_path / "good.jsonl", answer_rows(2)))).run(
            AdaptedModel(make_tiny_model(), SteeringVector(1)), EXAMPLES
        )


def test_contract(model, tmp_path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", answer_rows(3)))
    check_probe(PreferenceMargin(file), model, EXAMPLES)
