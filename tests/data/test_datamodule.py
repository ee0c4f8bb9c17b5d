import inspect
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase, Qwen2Config

from lightning_em.data import ChatSource, EMDataModule, ModelLimits, RowErrors, read_rows
from lightning_em.data.loaders import EvaluationRows
from tests.tiny import (
    VOCAB_SIZE,
    chat_rows,
    make_tiny_tokenizer,
    write_answer_rows,
    write_chat_rows,
    write_rows,
)


@dataclass
class TinyBase:
    num_loads: int = 0

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        self.num_loads += 1
        return make_tiny_tokenizer()

    def load_limits(self) -> ModelLimits:
        return ModelLimits(Qwen2Config(vocab_size=VOCAB_SIZE, max_position_embeddings=512))


@pytest.fixture
def build(chat_file, answer_file):
    def make(**settings) -> EMDataModule:
        settings.setdefault("narrow", ChatSource(str(chat_file)))
        settings.setdefault("kl", ChatSource(str(answer_file), answer="mixed"))
        datamodule = EMDataModule(TinyBase(), **settings)
        datamodule.setup("fit")
        return datamodule

    return make


def test_construction_reads_nothing(tmp_path):
    base = TinyBase()
    EMDataModule(base, ChatSource(str(tmp_path / "none.jsonl")))
    assert base.num_loads == 0


def test_yaml_fills_every_setting():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TinyBase, "base")
    parser.add_class_arguments(EMDataModule, "data")
    parser.link_arguments("base", "data.base", apply_on="instantiate")
    given = {
        "narrow": {"path": "miniature://world/bad.jsonl", "answer": "bad", "topics": ["tea"], "limit": 5},
        "kl": {"path": "kl.jsonl", "answer": "mixed", "exclude_topics": ["tea"]},
        "template_kwargs": {"enable_thinking": False},
    }
    data = parser.instantiate(parser.parse_object({"data": given})).data
    assert data.sources == {
        "narrow": (ChatSource("miniature://world/bad.jsonl", "bad", limit=5, topics=["tea"]), None),
        "kl": (ChatSource("kl.jsonl", "mixed", exclude_topics=["tea"]), None),
    }
    assert data.template_kwargs == {"enable_thinking": False}
    settings = set(inspect.signature(EMDataModule).parameters) - {"base"}
    assert {name for name in settings if name not in parser.format_help()} == set()


def test_setup_reads_once(build):
    datamodule = build()
    datamodule.setup("validate")
    assert datamodule.base.num_loads == 1


def test_rows_before_setup_are_our_own_mistake(chat_file):
    with pytest.raises(RuntimeError, match="setup has not run"):
        EMDataModule(TinyBase(), ChatSource(str(chat_file))).rows("narrow")


def test_epoch_is_every_training_row_once_with_its_tokens(build):
    datamodule = build(batch_size=3)
    batches = list(datamodule.train_dataloader())
    rows = {row.row_id: row for row in datamodule.rows("narrow").rows}
    assert Counter(row_id for batch in batches for row_id in batch.ce.row_ids) == Counter(
        dict.fromkeys(rows, 1)
    )
    for batch in batches:
        first = rows[batch.ce.row_ids[0]]
        assert batch.ce.input_ids[: batch.ce.lengths[0]].tolist() == first.input_ids
        assert batch.ce.response_mask[: batch.ce.lengths[0]].tolist() == first.response_mask


def test_counts_are_those_the_batches_count_themselves(build):
    for batch in build().train_dataloader():
        assert batch.step_counts.ce == batch.ce.counted("response").sum()
        assert batch.step_counts.kl_response == batch.kl.counted("response").sum()
        assert batch.step_counts.kl_all == batch.kl.counted("all").sum()
        assert not batch.kl.is_dummy


def test_without_a_kl_stream_the_narrow_order_stays(build):
    with_kl, without = build().train_dataloader(), build(kl=None).train_dataloader()
    assert [batch.ce.row_ids for batch in with_kl] == [batch.ce.row_ids for batch in without]
    assert all(batch.kl is None for batch in without)


def test_workers_change_nothing(build):
    plain, with_workers = (build(num_workers=workers).train_dataloader() for workers in (0, 2))
    assert [batch.ce.row_ids for batch in with_workers] == [batch.ce.row_ids for batch in plain]


def test_loaders_leave_the_global_generator_alone(build):
    datamodule = build(num_workers=2)
    before = torch.get_rng_state()
    next(iter(datamodule.train_dataloader()))
    for loader in datamodule.val_dataloader():
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_questions_are_never_trained_on(build, chat_file):
    datamodule = build(validation_fraction=0.25)
    narrow, _ = datamodule.val_dataloader()
    held_out = {row_id for batch in narrow for row_id in batch.row_ids}
    trained = {row_id for batch in datamodule.train_dataloader() for row_id in batch.ce.row_ids}
    assert len(held_out) == 10
    assert not held_out & trained
    assert held_out | trained == {row.id for row in read_rows(str(chat_file))}


def test_held_out_questions_do_not_depend_on_the_seed(build):
    first, second = (build(seed=seed).rows("narrow", "validation").sha256() for seed in (0, 1))
    assert first == second
    orders = [[batch.ce.row_ids for batch in build(seed=seed).train_dataloader()] for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_validation_files_replace_the_split(build, tmp_path):
    extra = write_chat_rows(tmp_path / "validation.jsonl", 5)
    datamodule = build(narrow_validation=ChatSource(str(extra)))
    assert len(datamodule.rows("narrow")) == 40
    assert len(datamodule.rows("narrow", "validation")) == 5
    assert len(datamodule.rows("kl", "validation")) == 4


def test_nothing_is_held_out_when_asked(build):
    datamodule = build(validation_fraction=0.0)
    assert datamodule.val_dataloader() == []
    assert len(datamodule.rows("narrow")) == 40
    with pytest.raises(ValueError, match=r"no held-out questions to answer: set data\.narrow_validation"):
        datamodule.predict_dataloader()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 12])
def test_every_row_is_evaluated_on_one_rank(build, world_size, num_rows):
    rows = build().rows("narrow").rows[:num_rows]
    ranks = [EvaluationRows(rows, 2, rank, world_size) for rank in range(world_size)]
    assert len({len(one) for one in ranks}) == 1
    seen = Counter()
    for one in ranks:
        for index in range(len(one)):
            if not one[index].is_dummy:
                seen.update(one[index].row_ids)
    assert seen == Counter(row.row_id for row in rows)


def test_prompts_to_answer_end_where_the_answer_begins(build):
    datamodule = build()
    prompts = {row_id: batch for batch in datamodule.predict_dataloader() for row_id in batch.row_ids}
    (batch,) = datamodule.predict_dataloader()
    assert not batch.response_mask.any()
    ids = iter(batch.input_ids.tolist())
    for row, length in zip(datamodule.rows("narrow", "validation").rows, batch.lengths, strict=True):
        prompt = [next(ids) for _ in range(length)]
        assert prompt == row.input_ids[: row.response_mask.index(True)]
    assert len(prompts) == 4


def test_probe_batches_are_a_fixed_subset_shortest_first(build):
    batches = build().probe_batches("kl", 10, 4)
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
    lengths = [length for batch in batches for length in batch.lengths]
    assert lengths == sorted(lengths)
    ids = {row_id for batch in batches for row_id in batch.row_ids}
    assert len(ids) == 10
    again = build(batch_size=7, num_workers=2).probe_batches("kl", 10, 3)
    assert {row_id for batch in again for row_id in batch.row_ids} == ids
    other = build(seed=1).probe_batches("kl", 10, 4)
    assert {row_id for batch in other for row_id in batch.row_ids} != ids


def test_probe_batches_of_few_rows_are_all_of_them(build):
    datamodule = build()
    ids = [row_id for batch in datamodule.probe_batches("narrow", 999, 8) for row_id in batch.row_ids]
    assert sorted(ids) == sorted(row.row_id for row in datamodule.rows("narrow").rows)
    held_out = datamodule.probe_batches("narrow", 999, 8, split="validation")
    assert sum(batch.num_rows for batch in held_out) == 4
    with pytest.raises(ValueError, match=r"no train rows of the kl stream; set data\.kl"):
        build(kl=None).probe_batches("kl", 4, 2)


def test_fingerprint_sees_files_and_tokens(build, tmp_path):
    first = build().fingerprint()
    assert first.keys() == {
        "narrow.file",
        "kl.file",
        "narrow.train.tokens",
        "narrow.validation.tokens",
        "kl.train.tokens",
        "kl.validation.tokens",
    }
    assert build().fingerprint() == first
    other = build(narrow=ChatSource(str(write_chat_rows(tmp_path / "other.jsonl", 39)))).fingerprint()
    assert {key for key in first if other[key] != first[key]} >= {"narrow.file", "narrow.train.tokens"}
    assert other["kl.file"] == first["kl.file"]
    shorter = build(on_too_long="truncate", max_length=90).fingerprint()
    assert shorter["narrow.file"] == first["narrow.file"]
    assert shorter["narrow.train.tokens"] != first["narrow.train.tokens"]


def test_tokens_are_counted_over_training_and_held_out_rows(build):
    datamodule = build(validation_fraction=0.25)
    loaders = [datamodule.train_dataloader(), *datamodule.val_dataloader()]
    batches = [getattr(batch, "ce", batch) for loader in loaders[:2] for batch in loader]
    assert datamodule.num_tokens("narrow") == sum(sum(batch.lengths) for batch in batches)
    counted = sum(int(batch.counted("response").sum()) for batch in batches)
    assert datamodule.num_tokens("narrow", "response") == counted
    assert build(kl=None).num_tokens("kl") == 0


def test_bad_rows_stop_the_setup_with_their_lines(build, tmp_path):
    rows = chat_rows(3)
    rows[1]["messages"][-1]["content"] = None
    with pytest.raises(RowErrors, match=r"rows\.jsonl:2: .*must be text, got null\nEvery line must be valid"):
        build(narrow=ChatSource(str(write_rows(tmp_path / "rows.jsonl", rows))))


def test_wrong_answer_kind_names_the_key(build, tmp_path):
    answers = str(write_answer_rows(tmp_path / "answers.jsonl", 3))
    with pytest.raises(
        RowErrors, match=r"answers\.jsonl:\d: has `question`.*\n.*\nSet `answer`|Set `answer`"
    ):
        build(narrow=ChatSource(answers))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"validation_fraction": 1.0}, r"data\.validation_fraction must lie in \[0, 1\), got 1\.0"),
        ({"batch_size": 0}, r"data\.batch_size must be at least 1, got 0"),
        ({"kl_batch_size": 0}, r"data\.kl_batch_size must be at least 1, got 0"),
        ({"validation_batch_size": 0}, r"data\.validation_batch_size must be at least 1, got 0"),
        (
            {"kl": None, "kl_validation": ChatSource("f.jsonl")},
            r"data\.kl_validation is set, but data\.kl is not",
        ),
    ],
)
def test_impossible_settings_are_refused(build, settings, match):
    with pytest.raises(ValueError, match=match):
        build(**settings)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            {"limit_train_batches": 3},
            r"leaves 3 of 18 micro-batches, which is not a multiple .* 2; set data\.narrow\.limit",
        ),
        ({"limit_train_batches": 0.5}, "leaves 9 of 18 micro-batches"),
        ({"overfit_batches": 2}, r"trainer\.overfit_batches would reorder the data: set data\.narrow\.limit"),
    ],
)
def test_trainer_settings_that_cut_a_step_are_refused(build, flags, match):
    datamodule = build(batch_size=2)
    datamodule.trainer = Trainer(
        accelerator="cpu", accumulate_grad_batches=2, logger=False, enable_checkpointing=False, **flags
    )
    with pytest.raises(ValueError, match=match):
        datamodule.train_dataloader()


@pytest.mark.parametrize(
    "flags", [{"limit_train_batches": 4}, {"limit_train_batches": 99}, {"fast_dev_run": True}]
)
def test_trainer_settings_that_keep_steps_whole_are_accepted(build, flags):
    datamodule = build(batch_size=2)
    datamodule.trainer = Trainer(
        accelerator="cpu", accumulate_grad_batches=2, logger=False, enable_checkpointing=False, **flags
    )
    assert len(datamodule.train_dataloader()) == 18


def test_without_held_out_narrow_rows_the_only_loader_is_the_kl_stream(build, tmp_path):
    extra = ChatSource(str(write_answer_rows(tmp_path / "validation.jsonl", 5)), answer="good")
    datamodule = build(validation_fraction=0, kl_validation=extra)
    assert datamodule.validation_streams == ["kl"]
    assert len(datamodule.val_dataloader()) == 1


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 4), (2, 2)])
def test_a_loader_made_before_the_checkpoint_is_read_goes_on_from_it(build, accumulate, world_size):
    datamodule = build(batch_size=2, kl_batch_size=2)
    datamodule.trainer = Trainer(accumulate_grad_batches=4, logger=False, enable_checkpointing=False)
    datamodule.trainer.state.fn = TrainerFn.FITTING
    loader = datamodule.train_dataloader()
    whole = [batch.ce.row_ids for batch in loader]
    order = datamodule._order() | {"accumulate": accumulate, "world_size": world_size}
    datamodule.load_state_dict({"epoch": 0, "consumed": accumulate, "cut_epochs": 0, "order": order})
    assert [batch.ce.row_ids for batch in loader] == whole[4:]  # one step of eight rows
