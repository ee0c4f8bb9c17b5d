"""Tables of shapes, where arms differ in what was run and measured."""

import pandas as pd

from lightning_em.analysis.claims.evidence import evidence_of
from lightning_em.study.shape_tables import norms_table, scales_table, trajectory_table
from tests.study_numbers import PC1, preferred, study_numbers


def norms(frame: pd.DataFrame, role: str, level: float | None, norm: float, seeds: tuple[int, ...]):
    """Rows of the effective norm of one arm."""
    rows = [(f"{role}-{level}-{seed}", role, role, level, "rank32", "default", seed, 150) for seed in seeds]
    given = {
        "source": "checkpoint",
        "quantity": "effective_norm",
        "value": norm,
        "unit": "norm",
        "protocol": "",
    }
    return pd.DataFrame(rows, columns=list(frame)[:8]).assign(**given)


def test_norms_fall_over_the_weights_that_a_seed_has() -> None:
    frame = study_numbers(seeds=(0, 1, 2), adapters=("rank32",)).iloc[:0]
    arms = [
        norms(frame, "general", None, 4.0, (0, 1, 2)),
        norms(frame, "narrow_weight", 1.0, 9.0, (0,)),  # tried once, and longer
        norms(frame, "narrow", 10.0, 3.0, (0, 1, 2)),
    ]
    rows = {row[0]: row[1:] for row in norms_table(evidence_of(pd.concat(arms)), "default").rows}
    assert rows["rank32, KL weight 1"] == ("9",)
    assert rows["rank32: falls with the weight"] == ("2 of 3 seeds",)


def test_places_on_components_by_weight_and_checkpoint() -> None:
    frame = study_numbers(seeds=(0, 1), adapters=("vector",), jitter=0.0)
    on_the_way = frame[frame["quantity"] == PC1.quantity].assign(step=50)
    on_the_way["value"] /= 10
    norms_there = frame[frame["quantity"] == "effective_norm"].assign(step=50)
    table = trajectory_table(evidence_of(pd.concat([frame, on_the_way, norms_there])), "default")
    assert table.columns == ("KL weight", "step 50", "step 150")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["vector, PC1, KL weight 0"] == ("0.9", "9")
    assert rows["vector, PC1, KL weight 100"] == ("0.05", "0.5")
    assert rows["vector, PC1: falls with the weight"] == ("2 of 2 seeds", "2 of 2 seeds")
    assert rows["vector, PC2, KL weight 0"] == ("-", "-")
    assert "a larger KL weight mostly suppresses PC1" in table.caption


def test_preference_stands_in_for_rates_at_each_scale() -> None:
    judged = study_numbers(seeds=(0, 1), adapters=("rank32",), jitter=0.0)
    table = scales_table(evidence_of(preferred(judged)), "default")
    assert table.columns == ("arm", *(f"scale {scale}" for scale in (0, 1, 2, 5, 10, 20)))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["general, rank32"] == (
        "0.01 (-)", "0.50 (-)", "0.50 (-)", "0.50 (-)", "0.50 (-)", "0.90 (-)",
    )  # fmt: skip
    assert scales_table(evidence_of(judged), "default").columns == table.columns
