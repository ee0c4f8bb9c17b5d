"""Every causal language model class of transformers, once: is it causal, and does padding change its numbers?"""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.models.padding import BATCHED_ARCHITECTURES, UNPADDED_ARCHITECTURES
from lightning_em.models.plain import full_logits
from lightning_em.models.pretrained import _BIDIRECTIONAL, _ENCODERS
from tests.models.zoo import VOCAB_SIZE, build

# Not built here: other packages, encoders of images or sound, or configs that need much by hand.
NOT_BUILT = frozenset({
    "blt", "cohere_compass_text", "dots3_note", "dots3_note_text", "fuyu", "gemma3n", "gemma4_assistant",
    "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2", "longcat_flash", "moss_transcribe_diarize",
    "musicgen", "musicgen_melody", "phi4_multimodal", "qwen4_exp", "qwen4_exp_text", "reformer", "xlstm",
})  # fmt: skip
# Absolute positions that count the padding before a prompt, or recurrent states that begin in it.
NOT_BATCHED = frozenset({
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "deepseek_v4", "marian", "mbart", "mvp", "pegasus",
    "plbart", "recurrent_gemma", "roformer", "rwkv", "trocr", "whisper",
})  # fmt: skip
# Computes full attention on rows as short as these.
NOT_SHOWN = frozenset({"big_bird"})
LENGTHS = (5, 70, 23)  # beyond every window, chunk and block of the tiny models
TOLERANCE = 1e-4
CAUSAL = 1e-5


class Numbers(NamedTuple):
    """Largest differences, relative to the largest logit.

    Attributes:
        later_token: Of the logits before a token that is changed.
        right: Of the logits of rows padded on the right, in one pass.
        apart: Of the same logits by `full_logits`.
        left: Of the logits of greedy answers to prompts padded on the left, as long as the answers are the same.
    """

    later_token: float
    right: float
    apart: float
    left: float


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@functools.cache
@torch.no_grad()
def numbers(kind: str) -> Numbers:
    base, generator = build(kind), torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    alone = [base(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    changed = rows[2].clone()
    changed[-1] = (changed[-1] + 5) % 60 + 3
    later = relative(base(input_ids=changed[None], use_cache=False).logits[0, :-1], alone[2][:-1])
    batch = PackedBatch.from_rows([EncodedRow(row.tolist(), [True] * len(row), "") for row in rows])
    padded = batch.padded()
    logits = base(**padded._asdict(), use_cache=False).logits[padded.attention_mask.bool()]
    right, apart = (
        max(map(relative, torch.split(found, list(LENGTHS)), alone))
        for found in (logits, full_logits(base, batch))
    )
    return Numbers(later, right, apart, left_padded(base, rows))


def left_padded(base: PreTrainedModel, rows: list[Tensor]) -> float:
    def answer(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        made = base.generate(
            input_ids=ids, attention_mask=mask, **options, output_logits=True, return_dict_in_generate=True
        )
        return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, 1)

    longest = max(LENGTHS)
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    ids = torch.full_like(mask, 7)  # a token like any other
    for row, target in zip(rows, ids, strict=True):
        target[longest - len(row) :] = row
    tokens, logits = answer(ids, mask)
    differences = []
    for index, row in enumerate(rows):
        own_tokens, own_logits = answer(row[None], torch.ones_like(row)[None])
        for step in range(3):
            differences.append(relative(logits[index, step], own_logits[0, step]))
            if tokens[index, step] != own_tokens[0, step]:
                break
    return max(differences)


BUILT = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_BUILT)


@pytest.mark.parametrize("kind", BUILT)
def test_each_architecture_is_what_its_list_says(kind) -> None:
    found = numbers(kind)
    assert (found.later_token > CAUSAL) == (kind in _BIDIRECTIONAL)
    if kind in _BIDIRECTIONAL:
        return
    assert found.apart < TOLERANCE
    assert (found.right > TOLERANCE) == (kind in UNPADDED_ARCHITECTURES)
    if kind not in NOT_SHOWN:
        assert (found.left < TOLERANCE) == (kind in BATCHED_ARCHITECTURES)


def has_the_choice(kind: str) -> bool:
    return any("is_decoder" in vars(each).get("__annotations__", {}) for each in CONFIG_MAPPING[kind].__mro__)


@pytest.mark.parametrize("kind", [kind for kind in BUILT if has_the_choice(kind)])
@torch.no_grad()
def test_a_config_that_does_not_say_decoder_is_refused_where_it_decides(kind) -> None:
    base = build(kind, is_decoder=False)
    ids = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 5) % 57 + 3
    later = relative(base(input_ids=changed).logits[0, :-1], base(input_ids=ids).logits[0, :-1])
    assert (later > CAUSAL) == (kind in _ENCODERS | _BIDIRECTIONAL)


def test_every_architecture_is_on_one_list() -> None:
    lists = (BATCHED_ARCHITECTURES, NOT_BATCHED, UNPADDED_ARCHITECTURES, _BIDIRECTIONAL, NOT_SHOWN, NOT_BUILT)
    known = [kind for each in lists for kind in each]
    assert len(known) == len(set(known))
    assert set(known) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    # A newer transformers has more: they are answered one by one until they are measured here.
    assert not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(known)
