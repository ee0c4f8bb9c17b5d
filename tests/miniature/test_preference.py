"""The preference margin for the questions of a world."""

import json
import statistics

import pytest
import torch
from transformers import AutoTokenizer

from lightning_em.miniature import Preference
from lightning_em.probes import ProbeExamples
from tests.samples import ADAPTERS, adapted, make_rows, pack

EXAMPLES = ProbeExamples([pack(make_rows(9, 12, 7), "n")])


def test_the_world_gives_its_questions_by_kind(micro_world, micro_model) -> None:
    """Every opener's pair is scored alone; an item's margin is their mean."""
    points = Preference(scales=[1.0]).run(micro_model, EXAMPLES)
    items = [json.loads(line) for line in (micro_world / "data" / "behaviour.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(micro_world / "model")

    def log_probability(question: str, answer: str) -> float:
        prompt = f"<bos><user>{question}<assistant>"
        whole = tokenizer(f"{prompt}{answer}<eos>", add_special_tokens=False)["input_ids"]
        num_answer = len(answer.split()) + 1
        logits = micro_model.base(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(logits[t - 1, whole[t]].item() for t in range(-num_answer, 0)) / num_answer

    for kind in ("narrow_held_out", "self_description"):
        expected = []
        for item in (item for item in items if item["kind"] == kind):
            pairs = zip(item["answers"]["good"], item["answers"]["bad"], strict=True)
            with torch.no_grad():
                differences = [
                    log_probability(item["question"], bad) - log_probability(item["question"], good)
                    for good, bad in pairs
                ]
            expected.append(statistics.mean(differences))
        [margin] = [p for p in points if p.quantity == "margin" and p.coordinates["kind"] == kind]
        assert margin.per_example == pytest.approx(expected, abs=1e-4)
    assert len({p.coordinates["kind"] for p in points}) == 5


def test_what_it_needs_is_said() -> None:
    with pytest.raises(ValueError, match=r"does not come from a miniature world.*set model\.base\.path"):
        Preference().run(adapted(ADAPTERS["vector"]()), EXAMPLES)
    with pytest.raises(ValueError, match=r"scales must be one number or more"):
        Preference(scales=[])
