"""KL to the chat model, on the chat model's own answers."""

import logging

import pytest
import torch

from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.data import ChatEncoder
from lightning_em.models import AdaptedModel
from lightning_em.probes import ChatKL, ProbeExamples
from lightning_em.testing import check_probe
from tests.oracle import kl, row_logits, steered
from tests.samples import ADAPTERS, adapted, make_rows, pack
from tests.tiny import VOCAB_SIZE, make_tiny_model, make_tiny_tokenizer, write_answer_rows

EOS = VOCAB_SIZE - 3
EXAMPLES = ProbeExamples(
    [pack(make_rows(9, 12), "n"), pack(make_rows(7, seed=3), "m")], [pack(make_rows(8, 15, seed=5), "k")]
)


def by_prompts(points):
    return {point.coordinates["prompts"]: point for point in points}


def answers_of(probe: ChatKL) -> list[tuple[list[int], list[bool]]]:
    rows = []
    for batches in probe._answers.values():
        for batch in batches:
            ids, masks = batch.input_ids.split(batch.lengths), batch.response_mask.split(batch.lengths)
            rows += [(i.tolist(), m.tolist()) for i, m in zip(ids, masks, strict=True)]
    return rows


def test_each_value_is_the_divergence_on_the_sampled_answers() -> None:
    """Plain transformers, row by row, float64."""
    model = adapted(ADAPTERS["vector"]())
    probe = ChatKL(max_new_tokens=6)
    points = by_prompts(probe.run(model, EXAMPLES))
    rows = answers_of(probe)
    prompts = [row[0][:2] for row in (*make_rows(9, 12), *make_rows(7, seed=3), *make_rows(8, 15, seed=5))]
    assert [ids[:2] for ids, _ in rows] == prompts
    plain, shift = make_tiny_model(), 4.0 * model.adapter.vector.detach()
    divergences, counts = [], []
    with torch.no_grad():
        for ids, mask in rows:
            assert mask == [False] * 2 + [True] * (len(ids) - 2)
            reference = row_logits(plain, (ids, mask))
            with steered(plain, 1, shift):
                tuned = row_logits(plain, (ids, mask))
            divergences.append(kl(reference, tuned, (ids, mask)).item())
            counts.append(len(ids) - 2)
    for kind, span in (("in_domain", slice(0, 3)), ("general", slice(3, 5))):
        total, count = sum(divergences[span]), sum(counts[span])
        assert points[kind].value == pytest.approx(total / count, rel=1e-4)
        assert (points[kind].count, points[kind].coordinates["scale"]) == (count, 1.0)
        each = [d / n for d, n in zip(divergences[span], counts[span], strict=True)]
        assert points[kind].per_example == pytest.approx(each, rel=1e-4)


def test_the_batch_size_changes_no_answer() -> None:
    model = adapted(ADAPTERS["vector"]())
    probes = [ChatKL(max_new_tokens=6, batch_size=size) for size in (1, 2, 16)]
    for probe in probes:
        probe.run(model, EXAMPLES)
    alone, *together = [answers_of(probe) for probe in probes]
    assert together == [alone, alone]


def test_answers_are_the_bases_own_at_temperature_one() -> None:
    """First tokens fall among the likeliest eight as often as the base says, whatever the adapter does."""
    model = adapted(ADAPTERS["vector"](), size=3.0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCAB_SIZE, (400, 3), generator=generator)
    rows = [
        EncodedRow([*ids, 7], [False, False, False, True], f"{i}") for i, ids in enumerate(prompts.tolist())
    ]
    probe = ChatKL(num_prompts=400, max_new_tokens=1, batch_size=200)
    probe.run(model, ProbeExamples([PackedBatch.from_rows(rows)]))
    drawn = torch.tensor([ids[3] for ids, _ in answers_of(probe)])
    shares = []
    for scale in (0.0, 1.0):
        with torch.no_grad(), model.adapter.at_scale(scale):
            probabilities = model.base(prompts).logits[:, -1].softmax(-1)
        top = probabilities.topk(8)
        hits = (top.indices == drawn[:, None]).any(1).double()
        wanted = top.values.sum(1).double()
        error = (wanted * (1 - wanted)).sum().sqrt() / 400
        shares.append(float((hits.mean() - wanted.mean()).abs() / error))
    assert shares[0] < 4
    assert shares[1] > 5  # the adapter would have drawn others


def test_published_generation_settings_do_not_bend_the_draws() -> None:
    """Qwen2.5 comes with a repetition penalty and narrow sampling; transformers would apply them."""
    model, plain = adapted(ADAPTERS["vector"]()), ChatKL(max_new_tokens=8)
    plain.run(model, EXAMPLES)
    bent, probe = adapted(ADAPTERS["vector"]()), ChatKL(max_new_tokens=8)
    settings = {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "min_p": 0.9, "typical_p": 0.1}
    bent.base.generation_config.update(top_k=1, top_p=0.01, temperature=0.1, **settings)
    probe.run(bent, EXAMPLES)
    assert answers_of(probe) == answers_of(plain)
    assert bent.base.generation_config.repetition_penalty == 50.0


def test_batches_draw_apart() -> None:
    """The same prompt behind another in two batches of one: one stream would answer it alike."""
    ids = torch.randint(VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(0))
    asked = [
        EncodedRow([*ids[0, :20].tolist(), last, 7], [False] * 21 + [True], f"{last}") for last in (1, 2)
    ]
    model = adapted(ADAPTERS["vector"]())
    model.base.get_output_embeddings().weight.data.zero_()  # every token is as likely, whatever the prompt
    probe = ChatKL(max_new_tokens=6, batch_size=1)
    probe.run(model, ProbeExamples([PackedBatch.from_rows(asked)]))
    first, second = (row[21:] for row, _ in answers_of(probe))
    assert first != second


def test_an_answer_ends_with_the_first_end_token(monkeypatch) -> None:
    model = adapted(ADAPTERS["vector"]())

    def generate(input_ids, **settings):
        answer = torch.tensor([[7, EOS, 8], [EOS, 9, 9], [7, 8, 9]])
        return torch.cat([input_ids, answer[: len(input_ids)]], dim=1)

    monkeypatch.setattr(model.base, "generate", generate)
    probe = ChatKL(max_new_tokens=3)
    probe.run(model, ProbeExamples([pack(make_rows(9, 12, 7), "n")]))
    assert [ids[2:] for ids, _ in answers_of(probe)] == [[7, EOS], [EOS], [7, 8, 9]]


@pytest.mark.parametrize("with_file", [False, True])
def test_sampling_stops_where_the_chat_template_ends_an_answer(monkeypatch, tmp_path, with_file) -> None:
    """The model's generation config names another token: without the template, invented turns would count."""
    model = adapted(ADAPTERS["vector"]())
    model.base.generation_config.eos_token_id = EOS - 2
    encoder = ChatEncoder(make_tiny_tokenizer())
    asked = []

    def generate(input_ids, eos_token_id, **settings):
        asked.append(eos_token_id)
        return torch.cat([input_ids, torch.tensor([[7, EOS, 8]] * len(input_ids))], dim=1)

    monkeypatch.setattr(model.base, "generate", generate)
    file = str(write_answer_rows(tmp_path / "rows.jsonl", 3)) if with_file else None
    probe = ChatKL(max_new_tokens=3, in_domain=file)
    probe.run(model, ProbeExamples([pack(make_rows(9, 12, 7), "n")], encoder=encoder))
    assert encoder.stop_id == EOS
    assert asked == [[EOS - 2, EOS]]
    assert [ids[-2:] for ids, _ in answers_of(probe)] == [[7, EOS]] * 3


def test_answers_are_drawn_once_for_all_checkpoints_of_a_base(monkeypatch) -> None:
    model = adapted(ADAPTERS["vector"]())
    calls, generate = [], model.base.generate
    monkeypatch.setattr(model.base, "generate", lambda **s: calls.append(1) or generate(**s))
    probe = ChatKL(max_new_tokens=4)
    first = probe.run(model, EXAMPLES)
    assert len(calls) == 2
    model.adapter.vector.data.mul_(2)
    second = probe.run(model, EXAMPLES)
    assert len(calls) == 2
    assert second[0].value > first[0].value
    assert ChatKL(max_new_tokens=4).run(model, EXAMPLES) == second
    other_base = adapted(ADAPTERS["vector"](), architecture="llama")
    assert probe.run(other_base, EXAMPLES) == ChatKL(max_new_tokens=4).run(other_base, EXAMPLES)


def test_without_an_effect_there_is_no_divergence() -> None:
    points = ChatKL(max_new_tokens=4).run(adapted(ADAPTERS["rank_1"](), size=0.0), EXAMPLES)
    assert [point.value for point in points] == [0.0, 0.0]


def test_without_parallel_rows_there_is_a_message(caplog) -> None:
    with caplog.at_level(logging.INFO, "lightning_em.probes"):
        points = ChatKL(max_new_tokens=2).run(adapted(ADAPTERS["vector"]()), ProbeExamples(EXAMPLES.narrow))
    assert "there are no parallel rows: chat_kl" in caplog.text
    assert list(by_prompts(points)) == ["in_domain"]


def test_prompts_come_from_files_and_are_the_first_ones(tmp_path, tiny_model_folder) -> None:
    from lightning_em.adapters import SteeringVector
    from lightning_em.models import BaseModel

    base = BaseModel(str(tiny_model_folder()))
    model = AdaptedModel(base.load_model(), SteeringVector(1))
    file = str(write_answer_rows(tmp_path / "rows.jsonl", 5))
    probe = ChatKL(num_prompts=3, max_new_tokens=2, general=file)
    probe.run(model, ProbeExamples(EXAMPLES.narrow))
    tokenizer = base.load_tokenizer()
    asked = [tokenizer.decode(ids[:-2]) for ids, _ in answers_of(probe)[3:]]
    assert len(asked) == 3
    assert asked[0] == "<|im_start|>user\nDay 0: what helps with bread?<|im_end|>\n<|im_start|>assistant\n"


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 0, 200 and 16; set init_args of ChatKL"):
        ChatKL(num_prompts=0)


def test_contract() -> None:
    check_probe(ChatKL(max_new_tokens=4))
