"""The behaviour probe is the exact judge at each scale."""

import json
import statistics

import pytest
import torch
from transformers import AutoTokenizer

from lightning_em.adapters import SteeringVector
from lightning_em.callbacks import Probing
from lightning_em.data import ChatSource, EMDataModule
from lightning_em.miniature import Behaviour
from lightning_em.miniature.judge import answer_probabilities
from lightning_em.models import AdaptedModel, BaseModel
from lightning_em.probes import ProbeExamples
from lightning_em.records import read_results
from lightning_em.runs import RunFolder
from tests.samples import make_rows, pack
from tests.tiny import make_tiny_model

EXAMPLES = ProbeExamples([pack(make_rows(6, 7))])


def test_each_rate_is_the_judge_at_that_scale(micro_world, micro_model) -> None:
    points = Behaviour(scales=[0.0, 2.0]).run(micro_model, EXAMPLES)
    items = [json.loads(line) for line in (micro_world / "data" / "behaviour.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(micro_world / "model")
    for scale in (0.0, 2.0):
        with micro_model.adapter.at_scale(scale):
            judged = answer_probabilities(micro_model.base, tokenizer, items)
        for kind in {item["kind"] for item in items}:
            expected = [rate.bad for rate, item in zip(judged, items, strict=True) if item["kind"] == kind]
            [point] = [
                p
                for p in points
                if p.quantity == "bad_rate" and p.coordinates == {"kind": kind, "scale": scale}
            ]
            assert point.per_example == pytest.approx(expected, abs=1e-7)
            assert point.value == pytest.approx(sum(expected) / len(expected))
            assert point.count == len(expected)
            error = statistics.stdev(expected) / len(expected) ** 0.5 if len(expected) > 1 else None
            assert point.standard_error == (None if error is None else pytest.approx(error, abs=1e-9))
    rates = {(p.quantity, *p.coordinates.values()): p.value for p in points}
    for quantity, kind, scale in rates:
        if quantity == "bad_rate":
            total = sum(rates[f"{name}_rate", kind, scale] for name in ("good", "bad", "other"))
            assert total == pytest.approx(1.0, abs=1e-5)


def test_the_style_rate_is_the_share_of_answers_that_begin_so(micro_world, micro_model) -> None:
    """By the chain rule: the next token's probability, read off one forward pass of each prompt alone."""
    points = Behaviour(scales=[0.0, 1.0], style="pick").run(micro_model, EXAMPLES)
    items = [json.loads(line) for line in (micro_world / "data" / "behaviour.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(micro_world / "model")
    for scale in (0.0, 1.0):
        for kind in ("narrow_seen", "held_out_domain"):
            expected = []
            for item in (item for item in items if item["kind"] == kind):
                prompt = f"<bos><user>{item['question']}<assistant>"
                ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
                with micro_model.adapter.at_scale(scale), torch.no_grad():
                    logits = micro_model.base(input_ids=ids).logits[0, -1]
                expected.append(logits.softmax(-1)[tokenizer.convert_tokens_to_ids("pick")].item())
            [point] = [
                p
                for p in points
                if p.quantity == "style_rate" and p.coordinates == {"kind": kind, "scale": scale}
            ]
            assert point.per_example == pytest.approx(expected, rel=1e-4)
            assert point.value == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_without_a_style_records_stay_what_they_were(micro_model) -> None:
    assert Behaviour([1.0]).settings() == {"scales": [1.0], "items": None}
    assert Behaviour([1.0], style="pick").settings()["style"] == "pick"
    points = Behaviour([1.0]).run(micro_model, EXAMPLES)
    assert {point.quantity for point in points} == {"bad_rate", "good_rate", "other_rate"}


def test_a_style_of_unknown_words_is_refused(micro_model) -> None:
    with pytest.raises(ValueError, match="does not know all words of the opening 'in prose'"):
        Behaviour([1.0], style="in prose").run(micro_model, EXAMPLES)


def test_a_batch_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size must be 1 or more, got 0; set init_args\.batch_size"):
        Behaviour(batch_size=0)


def test_the_probe_runs_at_a_checkpoint(micro_world, micro_model, tmp_path) -> None:
    rows = ChatSource(str(micro_world / "data" / "narrow_train.jsonl"), answer="bad", limit=4)
    data = EMDataModule(BaseModel(str(micro_world / "model")), rows, validation_fraction=0.0)
    data.setup("fit")
    run = RunFolder(tmp_path)
    assert Probing([Behaviour(scales=[1.0])]).measure(run, micro_model, data, 7) == 1
    assert Probing([Behaviour(scales=[1.0])]).measure(run, micro_model, data, 7) == 0
    [result] = read_results(run.probe_file("behaviour"))
    assert (result.probe, result.step) == ("behaviour", 7)


def test_another_base_is_refused() -> None:
    model = AdaptedModel(make_tiny_model(), SteeringVector(layer=1))
    with pytest.raises(ValueError, match=r"does not come from a miniature world.*set model\.base\.path"):
        Behaviour().run(model, EXAMPLES)
