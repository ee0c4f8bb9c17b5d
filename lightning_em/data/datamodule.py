"""The LightningDataModule: narrow data for cross-entropy, KL data for the KL term, and the position in both."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase

from lightning_em.batch import CountedPositions, EncodedRow, PackedBatch, TrainBatch
from lightning_em.data.chat import ChatEncoder
from lightning_em.data.encoding import EncodedRows, LengthLimit, TooLong
from lightning_em.data.limits import ModelLimits
from lightning_em.data.loaders import BatchLoader, EvaluationRows, TrainRows
from lightning_em.data.position import Position, Regearing, current_position, refuse_cut_steps, same_steps
from lightning_em.data.rows import Row
from lightning_em.data.sampler import RowCounts, StepSampler
from lightning_em.data.sources import ChatSource
from lightning_em.data.steps import BatchGeometry, permutation
from lightning_em.data.streams import Split, Stream, Streams
from lightning_em.data.template import DEFAULT_TEMPLATE_DATE


@runtime_checkable
class TokenizerSource(Protocol):
    """Provides the tokenizer and the limits of the model; implemented by the base model."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that belongs to the model."""
        ...

    def load_limits(self) -> ModelLimits:
        """Return which rows the model can read."""
        ...


class EMDataModule(LightningDataModule):
    """Narrow data for cross-entropy and, alongside it, KL data.

    The narrow rows define the epoch; their order depends only on the seed and the epoch. The KL rows are
    repeated as often as needed. Held-out rows come from the validation files or, without these, are a fixed
    share of the questions that is the same for every seed.

    Args:
        base: Source of the tokenizer, usually the base model.
        narrow: Narrow data to train on.
        kl: KL data, on which the model stays close to the reference; not needed without a KL term.
        narrow_validation: Held-out narrow rows.
        kl_validation: Held-out KL rows.
        narrow_extra: Additional rows mixed into the narrow data, such as good answers of other domains; none
            of them is held out.
        validation_fraction: Share of the questions to hold out if no validation file is given; 0 for none.
        batch_size: Narrow rows in a micro-batch of one rank.
        kl_batch_size: KL rows in a micro-batch of one rank.
        max_tokens: Token budget of one rank's micro-batch, over both streams. The batch sizes then only give the
            ratio of KL rows to narrow rows. An optimizer step is still `trainer.accumulate_grad_batches`
            micro-batches of each rank, and its loss is divided by its own token count.
        length_buckets: Number of consecutive micro-batches whose rows are sorted by length, cut again and put
            in random order. This saves padding where rows are padded.
        validation_batch_size: Rows in a validation batch of one rank.
        max_length: Tokens of the longest row.
        on_too_long: What to do with longer rows: refuse the file, drop the row, or truncate it.
        max_lost_fraction: Largest share of a file's rows that may be lost this way.
        seed: Seed of the row order and of the choice of answers in mixed rows.
        num_workers: Processes that assemble batches. The rows are in memory, so 0 is fast.
        template_kwargs: Variables for the chat template, such as `enable_thinking: false`.
        template_date: Date, or date and time, in ISO format for chat templates that write the current one. The
            clock is never read, so that the same rows give the same tokens on every day.
        train_empty_thoughts: Whether an empty thought that the chat template writes before an answer is trained. It
            belongs to the prompt otherwise.
        system_prompt: System prompt of conversations that do not begin with one, in training, validation, probes and
            sampling. Many chat templates write one of their own if there is none; an empty one leaves that out.
    """

    def __init__(
        self,
        base: TokenizerSource,
        narrow: ChatSource,
        kl: ChatSource | None = None,
        narrow_validation: ChatSource | None = None,
        kl_validation: ChatSource | None = None,
        narrow_extra: ChatSource | None = None,
        validation_fraction: float = 0.1,
        batch_size: int = 2,
        kl_batch_size: int = 8,
        max_tokens: int | None = None,
        length_buckets: int | None = None,
        validation_batch_size: int = 8,
        max_length: int = 2048,
        on_too_long: TooLong = "error",
        max_lost_fraction: float = 0.01,
        seed: int = 0,
        num_workers: int = 0,
        template_kwargs: dict[str, Any] | None = None,
        template_date: str = DEFAULT_TEMPLATE_DATE,
        train_empty_thoughts: bool = False,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must lie in [0, 1), got {validation_fraction}.")
        if kl_validation is not None and kl is None:
            raise ValueError(
                "data.kl_validation is set, but data.kl is not: there is no KL stream to validate."
            )
        BatchGeometry(batch_size, kl_batch_size, max_tokens=max_tokens, length_buckets=length_buckets)
        if validation_batch_size < 1:
            raise ValueError(f"data.validation_batch_size must be at least 1, got {validation_batch_size}.")
        self.base = base
        self.sources: dict[Stream, tuple[ChatSource, ChatSource | None]] = {
            "narrow": (narrow, narrow_validation)
        }
        if kl is not None:
            self.sources["kl"] = (kl, kl_validation)
        self.narrow_extra = narrow_extra
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.kl_batch_size = kl_batch_size
        self.max_tokens, self.length_buckets = max_tokens, length_buckets
        self.validation_batch_size = validation_batch_size
        self.limit = LengthLimit(max_length, on_too_long, max_lost_fraction)
        self.seed = seed
        self.num_workers = num_workers
        self.template_kwargs, self.template_date = template_kwargs, template_date
        self.train_empty_thoughts, self.system_prompt = train_empty_thoughts, system_prompt
        self._streams: Streams | None = None
        self._resumed: Position | None = None
        self._sampler: StepSampler | None = None

    def setup(self, stage: str) -> None:
        """Read and tokenize all files, once.

        Raises:
            ValueError: If a file, a row or the tokenizer cannot be used; the message says where and why.
        """
        self._resumed = self._sampler = None  # a trainer that resumes calls load_state_dict after this
        if self._streams is None:
            streams = Streams(self.sources, self.narrow_extra, self.validation_fraction, self.seed)
            streams.read(self.encoder, replace(self.limit, model=self.base.load_limits()))
            self._streams = streams

    @cached_property
    def encoder(self) -> ChatEncoder:
        """The encoder of the rows: the base model's tokenizer with this run's settings of the chat template.

        Raises:
            ValueError: If the tokenizer or a setting cannot be used.
        """
        return ChatEncoder(
            self.base.load_tokenizer(),
            self.template_kwargs,
            self.template_date,
            self.train_empty_thoughts,
            self.system_prompt,
        )

    def train_dataloader(self) -> BatchLoader[TrainBatch]:
        """Return this rank's micro-batches of both streams, starting at the resumed position."""
        sampler = self._make_sampler()
        if self.trainer is not None:
            refuse_cut_steps(self.trainer, self.geometry.accumulate, len(sampler))
        if self._resumed is not None:
            sampler.start_at(*self._resumed)
        self._sampler = sampler
        rows = TrainRows(self.rows("narrow").rows, self.rows("kl").rows)
        return BatchLoader(rows, sampler, self.num_workers)

    def val_dataloader(self) -> list[BatchLoader[PackedBatch]]:
        """Return held-out rows: the narrow stream's, then the KL stream's, each row on exactly one rank."""
        return [
            self._evaluation_loader(self.rows(stream, "validation").rows)
            for stream in self.validation_streams
        ]

    @property
    def validation_streams(self) -> list[Stream]:
        """Return the streams that have held-out rows, in the order of the loaders."""
        return [stream for stream in self.sources if self.rows(stream, "validation").rows]

    def test_dataloader(self) -> list[BatchLoader[PackedBatch]]:
        """Return the held-out rows, as in validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> BatchLoader[PackedBatch]:
        """Return the prompts of the held-out narrow rows: everything before the first answer.

        Raises:
            ValueError: If no rows are held out.
        """
        prompts = self._loaded.held_out_prompts
        if not prompts:
            raise ValueError(
                "there are no held-out questions to answer: set data.narrow_validation or "
                "data.validation_fraction."
            )
        return self._evaluation_loader(prompts)

    def held_out_questions(self) -> list[Row]:
        """Read the held-out narrow rows, without tokenizing anything; empty if none are held out.

        Raises:
            ValueError: If a file or a row cannot be used.
        """
        return Streams(self.sources, None, self.validation_fraction, self.seed).held_out("narrow")

    def probe_batches(
        self, stream: Stream, num_examples: int, batch_size: int, split: Split = "train"
    ) -> list[PackedBatch]:
        """Return a fixed subset of a stream, shortest rows first: the same for every rank and every call.

        Args:
            stream: `narrow` or `kl` stream, by its name.
            num_examples: Number of rows; all rows if there are fewer.
            batch_size: Rows in a batch.
            split: `train` or the held-out split.
        """
        rows = self.rows(stream, split).rows
        if not rows:
            raise ValueError(f"there are no {split} rows of the {stream} stream; set data.{stream}.")
        chosen = permutation(len(rows), self.seed, "probe", stream)[:num_examples]
        chosen.sort(key=lambda index: (len(rows[index].input_ids), index))
        return [
            PackedBatch.from_rows([rows[index] for index in chosen[first : first + batch_size]])
            for first in range(0, len(chosen), batch_size)
        ]

    def rows(self, stream: Stream, split: Split = "train") -> EncodedRows:
        """Return the tokenized rows of a stream; empty if the stream or its held-out part does not exist."""
        return self._loaded.rows(stream, split)

    def num_tokens(self, stream: Stream, counted: CountedPositions = "all") -> int:
        """Count the tokens of a stream, training and held-out rows together; the store is sized by it."""
        splits = [self.rows(stream, "train"), self.rows(stream, "validation")]
        return sum(sum(rows.all_counts if counted == "all" else rows.response_counts) for rows in splits)

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each file and of each stream's tokens and masks, and the commits of hub data sets."""
        return self._loaded.fingerprint()

    @property
    def geometry(self) -> BatchGeometry:
        """Return the batch sizes together with the trainer's accumulation and number of ranks."""
        ranks = (
            (1, 1)
            if self.trainer is None
            else (self.trainer.accumulate_grad_batches, self.trainer.world_size)
        )
        return BatchGeometry(
            self.batch_size, self.kl_batch_size, *ranks, self.max_tokens, self.length_buckets
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data and the settings under which it is valid."""
        if self.trainer is None or self._streams is None:
            return {}
        cut_epochs = self._resumed.cut_epochs if self._resumed else 0
        return current_position(self.trainer, cut_epochs)._asdict() | {"order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped.

        Raises:
            ValueError: If batch sizes, ranks, seed or data differ from the checkpoint's.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        saved, now, consumed = state_dict["order"], self._order(), state_dict["consumed"]
        if (regear := self.regearing(state_dict)) is not None:
            consumed = regear(consumed)
            saved = saved | {key: now[key] for key in ("accumulate", "world_size")}
        if changed := [key for key in sorted(saved | now) if saved.get(key) != now.get(key)]:
            listed = "; ".join(f"{key}: checkpoint {saved.get(key)}, now {now.get(key)}" for key in changed)
            raise ValueError(
                f"the checkpoint was written with different batches, so its position is not valid here: {listed}."
            )
        self._resumed = Position(state_dict["epoch"], consumed, state_dict["cut_epochs"])
        if self._resumed.cut_epochs and self.trainer is not None and self.trainer.max_steps == -1:
            raise ValueError(
                "the checkpoint was written after training had stopped within an epoch, which trainer.max_epochs "
                "counts as a complete one: resume from the checkpoint before it, or set trainer.max_steps."
            )
        if self._sampler is not None:
            self._sampler.start_at(*self._resumed)

    def regearing(self, state_dict: dict[str, Any]) -> Regearing | None:
        """Return how to convert a checkpoint's counters if only the number of ranks differs, else None."""
        if not same_steps(order := state_dict.get("order", {}), self.geometry):
            return None
        return Regearing(order["accumulate"], self.geometry.accumulate, len(self._make_sampler()))

    def _order(self) -> dict[str, Any]:
        """Return everything that determines the order of the batches."""
        order = vars(self.geometry) | {"seed": self.seed, "narrow_sha256": self.rows("narrow").sha256()}
        if "kl" in self.sources:
            return order | {"kl_sha256": self.rows("kl").sha256()}
        del order["kl_batch_size"]
        return order

    @property
    def _loaded(self) -> Streams:
        if self._streams is None:
            raise RuntimeError("EMDataModule.setup has not run yet.")
        return self._streams

    def _make_sampler(self) -> StepSampler:
        """Return this rank's micro-batches, from the first one on."""
        narrow, kl = self.rows("narrow"), self.rows("kl")
        return StepSampler(
            RowCounts(narrow.response_counts, narrow.all_counts),
            RowCounts(kl.response_counts, kl.all_counts),
            self.geometry,
            rank=self.trainer.global_rank if self.trainer else 0,
            seed=self.seed,
        )

    def _evaluation_loader(self, rows: Sequence[EncodedRow]) -> BatchLoader[PackedBatch]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        dataset = EvaluationRows(rows, self.validation_batch_size, rank, world_size)
        return BatchLoader(dataset, SequentialSampler(dataset), self.num_workers)
