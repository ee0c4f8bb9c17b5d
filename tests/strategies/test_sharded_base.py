"""Ranks that share a base stay in step, whatever each of them has to do."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from lightning.pytorch import Trainer
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_em.adapters import SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.models import AdaptedModel, Sampling
from lightning_em.models.generation import sample_tokens
from lightning_em.strategies.sharded_base import average_gradients, leave_inference_mode, shard_blocks
from tests.slurm.daemons import free_port
from tests.tiny import make_tiny_model


def gradients_after(rank: int) -> list[list[float] | None]:
    """Both ranks have one for the first, one rank for the second, none for the third."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank == 1:
        parameters[1].grad = torch.tensor([3.0, 5.0])
    average_gradients(parameters, 2)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def answers_of(rank: int) -> list[list[list[int]]]:
    """Of a sharded base; one rank's answers are longer."""
    model = AdaptedModel(make_tiny_model(), SteeringVector(1))
    shard_blocks(model, init_device_mesh("cpu", (2,)))
    prompts = PackedBatch.from_rows([EncodedRow([5, 6, 7], [False] * 3, "row")])
    return sample_tokens(model, prompts, Sampling(max_new_tokens=(2, 9)[rank], temperature=0))


def of_rank(
    call: Callable[[int], object], rank: int, port: int, results: "multiprocessing.Queue[tuple[int, object]]"
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results.put((rank, call(rank)))
    distributed.barrier()
    distributed.destroy_process_group()


def on_two_ranks(call: Callable[[int], object]) -> list[object]:
    """What each rank returns; an assertion error if they do not end."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    ranks = [context.Process(target=of_rank, args=(call, rank, port, results)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [value for _, value in sorted((results.get(timeout=5) for _ in ranks), key=lambda pair: pair[0])]


def test_a_gradient_that_one_rank_lacks_counts_as_zero() -> None:
    expected = [[1.5, 3.0], [1.5, 2.5], None]
    assert on_two_ranks(gradients_after) == [expected, expected]


def test_a_rank_with_short_answers_waits_for_the_others() -> None:
    model = AdaptedModel(make_tiny_model(), SteeringVector(1))
    prompts = PackedBatch.from_rows([EncodedRow([5, 6, 7], [False] * 3, "row")])
    alone = [sample_tokens(model, prompts, Sampling(max_new_tokens=n, temperature=0)) for n in (2, 9)]
    assert [len(answers[0][0]) for answers in alone] == [2, 9], "no answer ends by itself"
    assert on_two_ranks(answers_of) == alone


def test_evaluation_stays_out_of_inference_mode() -> None:
    """Lightning sees to it for gloo, on which every other test here is, and not for NCCL."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loops = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    assert all(loop.inference_mode for loop in loops)
    leave_inference_mode(trainer)
    assert not any(loop.inference_mode for loop in loops)


def test_drawing_answers_leaves_the_random_state() -> None:
    model = AdaptedModel(make_tiny_model(), SteeringVector(1))
    before = torch.get_rng_state()
    prompts = PackedBatch.from_rows([EncodedRow([5, 6, 7], [False] * 3, "row")])
    sample_tokens(model, prompts, Sampling(max_new_tokens=2))
    assert torch.equal(torch.get_rng_state(), before)
