"""Updates read from checkpoints, and the way they take; each against explicit matrices or a known curve."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from lightning_em.analysis.trajectory import distance_share, norms_by_step, rotation, trajectory_pca
from lightning_em.analysis.updates import (
    inner_product,
    last_update,
    read_update,
    update_cosine,
    updates_by_step,
)
from lightning_em.manifest import publish
from lightning_em.runs import RunFolder
from tests.samples import ADAPTERS, adapted, lora_config, vector_config

SITES = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
SHAPES = ((6, 9), (5, 4))


def vector_run(folder, path, alpha=4.0, kind="lightning_em.adapters.SteeringVector", layer=2):
    """A run of a steering vector whose checkpoints are the points of `path`, by step."""
    config = vector_config(alpha, layer, kind, has_update=kind != "mine.Shift")
    run = RunFolder(folder)
    for step, point in path.items():
        write(run, step, config, {"vector": np.asarray(point, dtype=np.float32)})
    return run


def write(run, step, config, tensors):
    def fill(temporary):
        save_file(tensors, temporary / "adapter_model.safetensors")
        (temporary / "adapter_config.json").write_text(json.dumps(config))

    publish(run.checkpoint(step), fill)


def lora_tensors(seed, rank=3, sites=SITES):
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, (out, inner) in zip(sites, SHAPES, strict=False):
        tensors[f"base_model.model.{name}.lora_A.weight"] = generator.normal(size=(rank, inner))
        tensors[f"base_model.model.{name}.lora_B.weight"] = generator.normal(size=(out, rank))
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def lora_run(folder, checkpoints, alpha=16.0, rslora=False):
    run = RunFolder(folder)
    for step, tensors in checkpoints.items():
        sites = [site for site in SITES if f"base_model.model.{site}.lora_A.weight" in tensors]
        rank = len(tensors[f"base_model.model.{SITES[0]}.lora_A.weight"])
        config = lora_config(sites, alpha / (math.sqrt(rank) if rslora else rank))
        write(run, step, config, tensors)
    return run


def matrix(tensors, alpha=16.0, rslora=False, sites=SITES):
    """The whole weight change as one flat array."""
    flat = []
    for name in sites:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].astype(float) for part in "AB")
        flat.append((alpha / (math.sqrt(len(a)) if rslora else len(a)) * b @ a).ravel())
    return np.concatenate(flat)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_inner_products_equal_those_of_the_whole_matrices(tmp_path, rslora) -> None:
    first, second = lora_tensors(0), lora_tensors(1, rank=2)
    run = lora_run(tmp_path, {1: first, 2: second}, rslora=rslora)
    (_, one), (_, two) = updates_by_step(run)
    a, b = matrix(first, rslora=rslora), matrix(second, rslora=rslora)
    assert inner_product(one, two) == pytest.approx(a @ b, rel=1e-12)
    assert one.effective_norm == pytest.approx(np.linalg.norm(a), rel=1e-12)
    assert update_cosine(one, two) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)


def test_cosines_of_b_and_a_are_those_of_the_flat_matrices(tmp_path) -> None:
    first, second = lora_tensors(0), lora_tensors(1)
    (_, one), (_, two) = updates_by_step(lora_run(tmp_path, {1: first, 2: second}))
    for part in "AB":
        flat = [
            np.concatenate(
                [t[f"base_model.model.{n}.lora_{part}.weight"].astype(float).ravel() for n in SITES]
            )
            for t in (first, second)
        ]
        expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
        assert update_cosine(one, two, part) == pytest.approx(expected, rel=1e-12)


def test_a_site_that_only_one_has_adds_nothing(tmp_path) -> None:
    whole, half = lora_tensors(0), lora_tensors(1, sites=SITES[:1])
    (_, one), (_, two) = updates_by_step(lora_run(tmp_path, {1: whole, 2: half}))
    shared = matrix(whole, sites=SITES[:1]) @ matrix(half, sites=SITES[:1])
    assert inner_product(one, two) == pytest.approx(shared, rel=1e-12)
    with pytest.raises(ValueError, match="the B parts have 33 and 18 numbers"):
        update_cosine(one, two, "B")


def test_vectors_of_two_layers_are_orthogonal_and_those_of_one_are_not(tmp_path) -> None:
    here = last_update(vector_run(tmp_path / "a", {1: [3.0, 4.0]}))
    same = last_update(vector_run(tmp_path / "b", {1: [3.0, 0.0]}, alpha=-2.0))
    above = last_update(vector_run(tmp_path / "c", {1: [3.0, 4.0]}, layer=3))
    assert here.effective_norm == 20.0
    assert inner_product(here, same) == pytest.approx(4 * -2 * 9)
    assert update_cosine(here, same) == pytest.approx(-0.6)
    assert inner_product(here, above) == 0.0
    assert update_cosine(here, last_update(vector_run(tmp_path / "d", {1: [0.0, 0.0]}))) is None


@pytest.mark.parametrize("name", ADAPTERS)
def test_norms_are_the_adapters_own(tmp_path, name) -> None:
    adapter = adapted(ADAPTERS[name]()).adapter
    run = RunFolder(tmp_path)
    publish(run.checkpoint(3), adapter.save)
    assert norms_by_step(run) == {3: pytest.approx(adapter.effective_norm().item(), rel=1e-6)}


def test_what_cannot_be_read_or_compared_is_refused(tmp_path, caplog) -> None:
    run = vector_run(tmp_path / "other", {1: [1.0]}, kind="mine.Shift")
    with pytest.raises(ValueError, match=r"holds a mine\.Shift, which has no method `update` that gives"):
        last_update(run)
    run = vector_run(tmp_path / "foreign", {1: [1.0]})
    (run.checkpoint(1) / "adapter_config.json").write_text('{"peft_type": "LORA", "auto_mapping": null}')
    with pytest.raises(ValueError, match=r"names no class_path: this package did not write it"):
        read_update(run.checkpoint(1))
    vector, lora = vector_run(tmp_path / "v", {1: [1.0]}), lora_run(tmp_path / "l", {1: lora_tensors(0)})
    with pytest.raises(ValueError, match="a shift update cannot be compared with a low-rank one"):
        inner_product(last_update(vector), last_update(lora))
    longer = vector_run(tmp_path / "longer", {1: [1.0, 2.0]})
    with pytest.raises(ValueError, match="has another shape in the other run"):
        inner_product(last_update(vector), last_update(longer))
    (vector.checkpoint(1) / "adapter_model.safetensors").write_bytes(b"")
    assert list(updates_by_step(vector)) == []
    assert "checkpoint step 1 is corrupt and skipped" in caplog.text
    with pytest.raises(ValueError, match="has no valid checkpoint"):
        last_update(vector)


def two_runs(tmp_path):
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(8, 8))
    paths = [(generator.normal(size=(6, 8)) * [5, 3, 1, 1, 0.5, 0.1, 0, 0]) @ mixing for _ in range(2)]
    runs = {
        name: vector_run(tmp_path / name, {5 * i + 5: point for i, point in enumerate(path)})
        for name, path in zip(("general", "narrow"), paths, strict=True)
    }
    return runs, 4.0 * np.concatenate(paths).astype(np.float32).astype(float)


def test_pca_equals_an_eigen_decomposition(tmp_path) -> None:
    runs, features = two_runs(tmp_path)
    standard = (features - features.mean(0)) / features.std(0)
    shares, directions = np.linalg.eigh(standard.T @ standard)
    shares, directions = shares[::-1] / shares.sum(), directions[:, ::-1]
    found = trajectory_pca(runs, num_components=3)
    assert found.explained_shares == pytest.approx(shares[:3], rel=1e-9)
    coordinates = found.coordinates[["pc1", "pc2", "pc3"]].to_numpy()
    expected = standard @ directions[:, :3]
    signs = np.sign((coordinates * expected).sum(0))  # an axis has no sign of its own
    np.testing.assert_allclose(coordinates, signs * expected, atol=1e-9)
    assert list(found.coordinates["run"]) == ["general"] * 6 + ["narrow"] * 6
    assert list(found.coordinates["step"]) == [5, 10, 15, 20, 25, 30] * 2
    assert found.coordinates["effective_norm"].to_numpy() == pytest.approx(np.linalg.norm(features, axis=1))


def test_pca_equals_scikit_learn(tmp_path) -> None:
    runs, features = two_runs(tmp_path)
    pca = PCA(5)
    expected = pca.fit_transform(StandardScaler().fit_transform(features))
    found = trajectory_pca(runs)
    names = [f"pc{number}" for number in range(1, 6)]
    np.testing.assert_allclose(found.coordinates[names].to_numpy(), expected, atol=1e-9)
    assert found.explained_shares == pytest.approx(pca.explained_variance_ratio_, abs=1e-12)


def test_pca_of_a_lora_follows_b_alone(tmp_path) -> None:
    checkpoints = {step: lora_tensors(step) for step in (1, 2, 3)}
    same_b = {step: lora_tensors(step + 10) for step in (1, 2, 3)}
    for step, tensors in same_b.items():
        tensors.update({name: v for name, v in checkpoints[step].items() if "lora_B" in name})
    first = trajectory_pca({"x": lora_run(tmp_path / "x", checkpoints)})
    second = trajectory_pca({"x": lora_run(tmp_path / "y", same_b)})
    assert first.explained_shares == second.explained_shares
    columns = ["pc1", "pc2", "pc3"]
    assert first.coordinates[columns].equals(second.coordinates[columns])
    assert not first.coordinates["effective_norm"].equals(second.coordinates["effective_norm"])


def test_pca_of_two_kinds_or_one_checkpoint_is_refused(tmp_path) -> None:
    one = vector_run(tmp_path / "one", {1: [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"need two checkpoints or more .* got 1 of \[2\] numbers"):
        trajectory_pca({"one": one})
    with pytest.raises(ValueError, match=r"got 2 of \[2, 33\] numbers from \['lora', 'one'\]"):
        trajectory_pca({"one": one, "lora": lora_run(tmp_path / "lora", {1: lora_tensors(0)})})


def test_rotation_of_known_curves(tmp_path) -> None:
    straight = vector_run(tmp_path / "straight", {5 * i: [i, 2.0 * i] for i in range(1, 5)})
    assert [turn.step for turn in rotation(straight)] == [10, 15]
    assert [turn.cosine for turn in rotation(straight)] == pytest.approx([-1.0, -1.0])
    corner = vector_run(tmp_path / "corner", {1: [0.0, 0.0], 2: [3.0, 0.0], 3: [3.0, 1.0]})
    [turn] = rotation(corner)
    assert (turn.step, turn.cosine, turn.longer_arm) == (2, pytest.approx(0.0), pytest.approx(4 * 3.0))
    back = vector_run(tmp_path / "back", {1: [0.0, 0.0], 2: [3.0, 3.0], 3: [1.0, 1.0]})
    assert rotation(back)[0].cosine == pytest.approx(1.0)
    angles = 2 * np.pi * np.arange(9) / 12
    circle = vector_run(
        tmp_path / "circle", {10 * i + 10: [math.cos(a), math.sin(a)] for i, a in enumerate(angles)}
    )
    for span, count in ((1, 7), (2, 5)):
        inner_angle = math.pi - span * 2 * math.pi / 12  # of a regular polygon
        turns = rotation(circle, span=span)
        assert [turn.cosine for turn in turns] == pytest.approx([math.cos(inner_angle)] * count, abs=1e-6)


def test_turns_on_short_arms_or_uneven_steps_are_left_out(tmp_path) -> None:
    path = {1: [0.0], 2: [1.0], 3: [1.01], 4: [1.0], 5: [1.0], 9: [5.0]}
    run = vector_run(tmp_path, path, alpha=1.0)
    assert [turn.step for turn in rotation(run)] == [2, 3]  # 4 does not move, 5 has uneven neighbours
    assert [turn.step for turn in rotation(run, k=0.5)] == [2]
    with pytest.raises(ValueError, match="span must be 1 checkpoint or more, got 0"):
        rotation(run, span=0)


def test_distance_share_of_known_places(tmp_path) -> None:
    run = vector_run(
        tmp_path, {1: [1.0, 0.0], 2: [11.0, 0.0], 3: [6.0, 0.0], 4: [6.0, 5.0], 5: [-9.0, 0.0]}, alpha=3.0
    )
    start, end, halfway, sideways, away = (update for _, update in updates_by_step(run))
    assert distance_share(start, end, start) == pytest.approx((0.0, 0.0))
    assert distance_share(start, end, end) == pytest.approx((1.0, 1.0))
    assert distance_share(start, end, halfway) == pytest.approx((0.5, 0.5))
    assert distance_share(start, end, sideways) == pytest.approx((0.5, 1 - math.sqrt(50) / 10))
    assert distance_share(start, end, away) == pytest.approx((-1.0, -1.0))
    with pytest.raises(ValueError, match="start and end are the same update"):
        distance_share(start, start, end)


def test_distance_share_of_loras_is_that_of_the_whole_matrices(tmp_path) -> None:
    checkpoints = {step: lora_tensors(step) for step in (1, 2, 3)}
    start, end, other = (update for _, update in updates_by_step(lora_run(tmp_path, checkpoints)))
    a, b, c = (matrix(tensors) for tensors in checkpoints.values())
    line = np.linalg.norm(b - a)
    expected = ((c - a) @ (b - a) / line**2, 1 - np.linalg.norm(b - c) / line)
    assert distance_share(start, end, other) == pytest.approx(expected, rel=1e-9)
