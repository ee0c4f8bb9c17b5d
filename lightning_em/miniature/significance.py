"""Pre-training significance on the documents of a miniature world."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_em.miniature.behaviour import world_folder_of
from lightning_em.miniature.derived import general_documents, world_at
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples
from lightning_em.probes.rows import tokenizer_of
from lightning_em.probes.significance import PretrainingSignificance
from lightning_em.records import Point


class Significance(Probe):
    """`PretrainingSignificance` on documents of the mixture that the base of a miniature world was pre-trained on.

    Args:
        num_texts: Number of documents; none of them was trained on.
        num_draws: Number of random directions.
        norm_ratios: Effective norms to measure, in units of the trained adapter's norm.
    """

    name = PretrainingSignificance.name
    quantities = PretrainingSignificance.quantities
    grid = PretrainingSignificance.grid
    reads = ()

    def __init__(
        self, num_texts: int = 32, num_draws: int = 5, norm_ratios: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> None:
        # only the record shows the text: `measure` gives the documents
        text = "documents of the world"
        self.on_texts = PretrainingSignificance(text, num_texts, num_draws=num_draws, norm_ratios=norm_ratios)
        self.batch_size = self.on_texts.batch_size

    def settings(self) -> Mapping[str, Any]:
        return self.on_texts.settings()

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        return self.on_texts.measure_on(model, self._documents)

    def _documents(self, model: AdaptedModel) -> list[list[int]]:
        world = world_at(world_folder_of(model))
        tokenizer = tokenizer_of(model)
        tokens = []
        for document in general_documents(world, self.on_texts.num_texts):
            turns = [
                {"role": role, "content": said}
                for slot in document.slots
                for role, said in (("user", slot.question), ("assistant", slot.answer))
            ]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            tokens.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokens
