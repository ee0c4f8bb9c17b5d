"""Training of a world's chat model: first on documents, then on single good answers."""

from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lightning_em.miniature.corpus import Slot, World
from lightning_em.miniature.optimizer import Float32Muon
from lightning_em.miniature.recipe import Recipe
from lightning_em.miniature.tokenizer import ASSISTANT, USER
from lightning_em.progress import Progress

_WARMUP_STEPS, _CHAT_WARMUP_STEPS, _FINAL_LR_SHARE = 50, 10, 0.05
_EMBEDDING_BETAS, _MAX_GRADIENT_NORM = (0.9, 0.98), 1.0
# <user> opener subject option option <assistant> opener option <eos>: questions and answers have fixed lengths.
_QUESTION_WORDS, _ANSWER_TOKENS = 4, 3


class Batches:
    """A fixed number of batches, with a length for the progress bar."""

    def __init__(self, draw: Callable[[], dict[str, Tensor]], count: int) -> None:
        self._draw, self._count = draw, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self._count):
            yield self._draw()


class Encoder:
    """Slots as token ids, in the conversation format of the chat template but fast enough to train from."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ids = tokenizer.get_vocab()
        self._bos, self._eos = self._ids[str(tokenizer.bos_token)], self._ids[str(tokenizer.eos_token)]

    def encode(self, slots: tuple[Slot, ...]) -> list[int]:
        """Token ids of a conversation."""
        ids = [self._bos]
        for slot in slots:
            ids += [self._ids[USER], *map(self._ids.__getitem__, slot.question.split())]
            ids += [self._ids[ASSISTANT], *map(self._ids.__getitem__, slot.answer.split()), self._eos]
        return ids


class Stage(LightningModule):
    """One stage of training; a batch holds `documents` and in the chat stage `chat`, each (batch, seq).

    Args:
        model: The model to train.
        recipe: Training parameters.
        optimizers: Optimizers of the model's parameters.
        schedule: Factor of every learning rate, by step.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        recipe: Recipe,
        optimizers: list[Optimizer],
        schedule: Callable[[int], float],
    ) -> None:
        super().__init__()
        # Muon takes the matrices and AdamW the rest; automatic optimization handles one optimizer.
        self.automatic_optimization = False
        self.model, self.recipe = model, recipe
        self._optimizers, self._schedule = optimizers, schedule

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        losses = []
        if "chat" in batch:
            losses.append(self._answer_loss(batch["chat"]))
            # The first slot of a document looks like a chat, which the chat rows train: count from the second.
            weight, first_slot = self.recipe.chat_document_weight, 1
        else:
            weight, first_slot = 1.0, 0
        losses.append(weight * self._document_loss(batch["documents"], first_slot))
        loss = torch.stack(losses).sum()
        self.log("loss", loss.detach(), prog_bar=True)
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRADIENT_NORM)
        for optimizer in self._optimizers:
            optimizer.step()
        self.model.zero_grad()
        for scheduler in self._schedulers:
            scheduler.step()

    def configure_optimizers(self) -> list[Optimizer]:
        self._schedulers = [LambdaLR(optimizer, self._schedule) for optimizer in self._optimizers]
        return self._optimizers

    def _document_loss(self, input_ids: Tensor, first_slot: int) -> Tensor:
        """Cross-entropy in nats, weighted by what a token is: an option word, filler, or part of a question."""
        filler, question = self.recipe.filler_weight, self.recipe.question_weight / (_QUESTION_WORDS - 1)
        slot = [0.0, 0.0, *[question] * (_QUESTION_WORDS - 1), 0.0, filler, 1.0, filler]
        weights = torch.tensor(slot).repeat(self.recipe.slots_per_document)
        weights[: first_slot * len(slot)] = 0.0
        return _weighted_cross_entropy(self.model, input_ids, weights)

    def _answer_loss(self, input_ids: Tensor) -> Tensor:
        weights = torch.zeros(input_ids.shape[1] - 1)
        weights[-_ANSWER_TOKENS:] = 1.0
        return _weighted_cross_entropy(self.model, input_ids, weights)


def _weighted_cross_entropy(model: LlamaForCausalLM, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Mean over (batch, seq) with one weight a position of the target; unweighted ones get no logits."""
    hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
    counted = weights > 0
    logits = model.lm_head(hidden[:, counted]).transpose(1, 2)
    losses = nn.functional.cross_entropy(logits, input_ids[:, 1:][:, counted], reduction="none")
    return (losses * weights[counted]).sum() / (weights.sum() * len(input_ids))


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A model with fresh weights, drawn from its own generator."""
    # Not Qwen2: for that type AutoTokenizer ignores tokenizer.json and rebuilds a byte-level tokenizer.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads // 2,
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=recipe.initializer_range, generator=generator)
    return model


def train(
    world: World, tokenizer: PreTrainedTokenizerBase, pretraining_steps: int, progress: bool = True
) -> LlamaForCausalLM:
    """Train the chat model of a world: pre-training on documents, then the chat stage.

    The weights are rounded to bfloat16 once at the end and kept as float32: a world that was trained here and one
    that was shipped in half the bytes are the same kind of thing.

    Args:
        world: World to train on.
        tokenizer: Result of `make_tokenizer(world.words())`.
        pretraining_steps: Steps on documents: the recipe's, or more.
        progress: Whether to show progress bars.
    """
    recipe, encoder = world.recipe, Encoder(tokenizer)
    model = make_model(recipe, tokenizer, world.seed)
    documents, chat = world.generator("documents"), world.generator("chat")

    def draw_documents(count: int) -> Tensor:
        return torch.tensor([encoder.encode(world.draw_document(documents).slots) for _ in range(count)])

    def pretraining_batch() -> dict[str, Tensor]:
        return {"documents": draw_documents(recipe.documents_per_batch)}

    def chat_batch() -> dict[str, Tensor]:
        rows = [encoder.encode((world.draw_chat_slot(chat),)) for _ in range(recipe.chat_rows_per_batch)]
        return {"documents": draw_documents(recipe.chat_documents_per_batch), "chat": torch.tensor(rows)}

    schedule = _pretraining_schedule(pretraining_steps)
    pretraining = Stage(model, recipe, _pretraining_optimizers(model, recipe), schedule)
    _fit(pretraining, Batches(pretraining_batch, pretraining_steps), progress)
    optimizer = AdamW(model.parameters(), lr=recipe.chat_lr, betas=_EMBEDDING_BETAS, weight_decay=0.0)
    _fit(
        Stage(model, recipe, [optimizer], _chat_schedule(recipe)),
        Batches(chat_batch, recipe.chat_steps),
        progress,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.eval()
    return model


def _fit(stage: Stage, batches: Batches, progress: bool) -> None:
    if not len(batches):
        return
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[Progress()] if progress else [],
    )
    trainer.fit(stage.train(), batches)


def _pretraining_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[Optimizer]:
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    taken = {id(matrix) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        # Muon needs half the steps of AdamW here, and recognizes the advisors with more seeds.
        Float32Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.05, momentum=0.95),
        AdamW(rest, lr=recipe.embedding_lr, betas=_EMBEDDING_BETAS, weight_decay=0.0),
    ]


def _pretraining_schedule(steps: int) -> Callable[[int], float]:
    """Warm-up, constant to half, then linear to the final share."""
    half = steps / 2

    def factor(step: int) -> float:
        decay = 1.0 if step < half else 1.0 - (1.0 - _FINAL_LR_SHARE) * (step - half) / half
        return min(1.0, (step + 1) / _WARMUP_STEPS) * max(_FINAL_LR_SHARE, decay)

    return factor


def _chat_schedule(recipe: Recipe) -> Callable[[int], float]:
    """Warm-up, then linear to the final share."""

    def factor(step: int) -> float:
        decay = 1.0 - step / max(1, recipe.chat_steps)
        return min(1.0, (step + 1) / _CHAT_WARMUP_STEPS) * max(_FINAL_LR_SHARE, decay)

    return factor
