"""Rotation against cosines made by hand, against the offline analysis, and in real runs."""

import json
import logging
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from lightning_em.__main__ import main
from lightning_em.adapters import SteeringVector
from lightning_em.analysis import rotation
from lightning_em.callbacks import Probing
from lightning_em.data import ChatSource, EMDataModule
from lightning_em.manifest import publish
from lightning_em.models import AdaptedModel, BaseModel
from lightning_em.probes import Rotation
from lightning_em.records import read_results
from lightning_em.runs import RunFolder
from lightning_em.testing import check_probe
from tests.fitting import LORA, VECTOR, command, cut_after, experiment, fit, write_config
from tests.probes.test_scale import EXAMPLES, value
from tests.samples import adapted, lora_config, vector_config

ALPHA = 4.0
SITES = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
MODEL = adapted(SteeringVector(1, alpha=ALPHA))


def checkpoint(run, step, config, tensors):
    def fill(folder):
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))

    publish(run.checkpoint(step), fill)


def vector_run(folder, path, kind="lightning_em.adapters.SteeringVector"):
    run = RunFolder(folder)
    for step, point in path.items():
        vector = {"vector": np.asarray(point, dtype=np.float32)}
        checkpoint(run, step, vector_config(ALPHA, 2, kind, has_update=kind != "mine.Shift"), vector)
    return run


def lora_run(folder, steps, rank=3):
    """Random A, which does not matter, and B; and the path of B."""
    run, generator, path = RunFolder(folder), np.random.default_rng(0), {}
    for step in steps:
        tensors = {}
        for name, out, inner in zip(SITES, (6, 5), (9, 4), strict=True):
            start = f"base_model.model.{name}"
            tensors[f"{start}.lora_A.weight"] = generator.normal(size=(rank, inner)).astype(np.float32)
            tensors[f"{start}.lora_B.weight"] = generator.normal(size=(out, rank)).astype(np.float32)
        checkpoint(run, step, lora_config(SITES, 16.0 / rank), tensors)
        written = (tensors[f"base_model.model.{name}.lora_B.weight"].ravel() for name in SITES)
        path[step] = np.concatenate(list(written)).astype(float)
    return run, path


def turns_of(run, step, **settings):
    return Rotation(**settings).for_checkpoint(run, step).run(MODEL, EXAMPLES)


def by_hand(path, span=1):
    """Cosine and longer arm by the step where they are known, and the step of the turn."""
    steps, found = sorted(path), {}
    for index in range(2 * span, len(steps)):
        before, here, after = (steps[index - back] for back in (2 * span, span, 0))
        back, on = path[before] - path[here], path[after] - path[here]
        arms = np.sqrt((back**2).sum()), np.sqrt((on**2).sum())
        if here - before == after - here:
            found[after] = (here, (back * on).sum() / (arms[0] * arms[1]), max(arms))
    return found


def assert_known(run, path, unit, span=1):
    expected = by_hand(path, span)
    assert expected
    offline = {turn.step: turn for turn in rotation(run, span=span)}
    assert {here for here, _, _ in expected.values()} == offline.keys()
    for step in run.steps():
        points = turns_of(run, step, span=span)
        if step not in expected:
            assert points == []
            continue
        here, cosine, arm = expected[step]
        assert {p.quantity: p.unit for p in points} == {"local_cosine": "cosine", "longer_arm": unit}
        assert value(points, "local_cosine", at_step=here) == pytest.approx(cosine, rel=1e-6)
        assert value(points, "longer_arm", at_step=here) == pytest.approx(arm, rel=1e-6)
        assert value(points, "local_cosine", at_step=here) == offline[here].cosine
        assert value(points, "longer_arm", at_step=here) == offline[here].longer_arm


@pytest.mark.parametrize(
    ("path", "cosine"),
    [
        ({1: [0, 0], 2: [1, 0], 3: [2, 0]}, -1.0),
        ({1: [0, 0], 2: [1, 0], 3: [1, 5]}, 0.0),
        ({1: [0, 0], 2: [1, 0], 3: [0, 0]}, 1.0),
    ],
)
def test_straight_right_angle_and_reversal(tmp_path, path, cosine) -> None:
    points = turns_of(vector_run(tmp_path, path), 3)
    assert value(points, "local_cosine", at_step=2) == pytest.approx(cosine)
    longest = max(np.linalg.norm(np.subtract(path[a], path[2])) for a in (1, 3))
    assert value(points, "longer_arm", at_step=2) == pytest.approx(ALPHA * longest)


@pytest.mark.parametrize("span", [1, 2])
def test_random_paths_against_the_definition_and_the_offline_analysis(tmp_path, span) -> None:
    generator = np.random.default_rng(1)
    points = {step: generator.normal(size=7).astype(np.float32) for step in (2, 4, 6, 8, 10, 11, 12, 20)}
    run = vector_run(tmp_path / "vector", points)
    assert_known(run, {step: ALPHA * p.astype(float) for step, p in points.items()}, "norm", span)
    run, path = lora_run(tmp_path / "lora", [5, 10, 15, 20, 25, 26])
    assert_known(run, path, "parameter_norm", span)


def test_short_arms_are_left_out(tmp_path) -> None:
    run = vector_run(tmp_path, {1: [0, 0], 2: [1, 0], 3: [1, 0.5]})
    assert turns_of(run, 3, shortest_arm=0.99 * ALPHA)
    assert turns_of(run, 3, shortest_arm=ALPHA) == []
    assert [turn.step for turn in rotation(run, k=0.99 * ALPHA)] == [2]
    assert rotation(run, k=ALPHA) == []


def test_a_standstill_has_no_direction(tmp_path) -> None:
    run = vector_run(tmp_path, {1: [0, 0], 2: [0, 0], 3: [1, 0]})
    assert turns_of(run, 3) == []


def test_broken_and_missing_checkpoints_are_passed_over(tmp_path, caplog) -> None:
    generator = np.random.default_rng(2)
    points = {step: generator.normal(size=5).astype(np.float32) for step in (1, 2, 3, 4, 5)}
    run = vector_run(tmp_path, points)
    for step in (2, 4):
        weights = run.checkpoint(step) / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    path = {step: ALPHA * points[step].astype(float) for step in (1, 3, 5)}
    with caplog.at_level(logging.WARNING):
        assert_known(run, path, "norm")
    assert "checkpoint step 2 is corrupt and skipped" in caplog.text
    assert turns_of(run, 7) == []
    shutil.rmtree(run.checkpoint(1))
    assert turns_of(run, 5) == []


def test_a_turn_is_not_known_from_a_checkpoint_before_it(tmp_path) -> None:
    """Step 5 is missing; 1, 3 and 5 would be even."""
    assert turns_of(vector_run(tmp_path, {1: [0, 0], 3: [1, 0], 4: [1, 1]}), 5) == []


def test_an_adapter_without_low_rank_parts_is_skipped_with_a_message(tmp_path, caplog) -> None:
    run = vector_run(tmp_path, {1: [0], 2: [1], 3: [2]}, kind="mine.Shift")
    assert turns_of(run, 3) == []
    assert "rotation measures nothing" in caplog.text
    assert "mine.Shift" in caplog.text


@pytest.mark.parametrize("settings", [{"span": 0}, {"shortest_arm": -1.0}, {"shortest_arm": float("nan")}])
def test_settings_out_of_range_are_refused(settings) -> None:
    with pytest.raises(ValueError, match="span must be 1 checkpoint or more and shortest_arm not negative"):
        Rotation(**settings)


def test_without_a_run_it_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"use its for_checkpoint\(run, step\)"):
        Rotation().run(MODEL, EXAMPLES)


def test_contract(tmp_path) -> None:
    run = vector_run(tmp_path, {1: [0, 0], 2: [1, 0], 3: [1, 1]})
    assert len(check_probe(Rotation().for_checkpoint(run, 3))) == 2


def test_an_empty_record_is_a_record(tiny_model_folder, chat_file, tmp_path) -> None:
    run = vector_run(tmp_path, {1: [0, 0], 2: [1, 0], 3: [1, 1]})
    base = BaseModel(str(tiny_model_folder()))
    model = AdaptedModel(base.load_model(), SteeringVector(1))
    data = EMDataModule(base, ChatSource(str(chat_file), limit=4), validation_fraction=0.0)
    data.setup("fit")
    probing = Probing([Rotation()])
    assert [probing.measure(run, model, data, step) for step in (1, 2, 3, 1, 2, 3)] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    assert [len(result.points) for result in read_results(run.probe_file("rotation"))] == [0, 0, 2]


def records(run):
    """What is on record, by step."""
    return {result.step: result for result in read_results(run.probe_file("rotation"))}


@pytest.fixture
def config(request, tmp_path, tiny_model_folder, chat_file):
    """8 steps, one checkpoint each."""
    settings = experiment(
        tiny_model_folder(),
        chat_file,
        trainer={"max_epochs": 2, "max_steps": 8},
        checkpoint={"every_n_steps": 1},
        probing={"num_examples": 2, "probes": [{"class_path": "lightning_em.probes.Rotation"}]},
    )
    settings["model"]["adapter"] = request.param
    return write_config(tmp_path / "experiment.yaml", settings)


@pytest.mark.parametrize("config", [VECTOR, LORA], indirect=True, ids=["vector", "lora"])
def test_callback_resumed_run_verb_and_analysis_agree(config) -> None:
    run = fit(config, "whole")
    whole, offline = records(run), rotation(run)
    assert list(whole) == run.steps() == list(range(1, 9))
    assert [turn.step for turn in offline] == list(range(2, 8))
    for turn in offline:
        points = whole[turn.step + 1].points
        assert value(points, "local_cosine", at_step=turn.step) == turn.cosine
        assert value(points, "longer_arm", at_step=turn.step) == turn.longer_arm
    assert whole[1].points == whole[2].points == ()

    cut = cut_after(run, 4, config.parent / "cut")
    cut.probe_file("rotation").unlink()
    fit(config, "cut")
    assert records(cut) == {step: result for step, result in whole.items() if step >= 4}

    run.probe_file("rotation").unlink()
    assert main(["probe", str(run.path)]) == 0
    assert records(run) == whole
    assert main(["probe", str(run.path)]) == 0
    assert len(read_results(run.probe_file("rotation"))) == len(whole)


@pytest.mark.slow
@pytest.mark.parametrize("config", [VECTOR], indirect=True, ids=["vector"])
def test_two_ranks_and_few_checkpoints_kept(config) -> None:
    words = ["fit", "--config", str(config), "--run.root", str(config.parent), "--run.name", "two"]
    words += ["--trainer", "configs/trainer/cpu_ddp2.yaml", "--trainer.max_steps", "6"]
    words += ["--data.batch_size", "4", "--checkpoint.keep_last", "3"]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    run = RunFolder(config.parent / "two")
    assert run.steps() == [4, 5, 6]
    assert [len(result.points) for result in records(run).values()] == [0, 0, 2, 2, 2, 2]
    [turn] = rotation(run)
    assert value(records(run)[6].points, "local_cosine", at_step=5) == turn.cosine
