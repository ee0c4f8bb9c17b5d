"""Values are comparable where everything but the run and the place on a grid is the same."""

from dataclasses import replace

import pytest

from lightning_em.analysis import records_frame
from lightning_em.analysis.protocol import protocol_of
from lightning_em.analysis.readings import readings
from lightning_em.records import Point, ProbeResult, append_lines
from lightning_em.runs import RunFolder

SETTINGS = {
    "behaviour": {"scales": [0, 1], "items": None, "style": "pick"},
    "scale_curve": {"scales": [0, 1], "max_extension": 4, "kl_positions": "response"},
    "perturbation_curve": {"strengths": [0.1], "num_seeds": 10, "seed": 0},
    "significance": {"norm_ratios": [1], "text": None, "seed": 0},
    "preference_margin": {"scales": [0, 1], "rows": "a.jsonl"},
    "chat_kl": {"num_prompts": 100, "seed": 0},
}
GRIDS = ("scales", "max_extension", "strengths", "norm_ratios")


def result(probe: str, **changes) -> ProbeResult:
    """A record of two rows of each stream."""
    return replace(ProbeResult(probe, 4, SETTINGS[probe], (), ("a", "b"), ("c", "d"), "base-1"), **changes)


@pytest.mark.parametrize("probe", SETTINGS)
def test_other_settings_or_another_base_are_another_protocol_and_another_grid_is_not(probe) -> None:
    own = protocol_of(result(probe))
    assert len(own) == 8
    assert own == protocol_of(result(probe, step=8, points=(Point("ce", 1.0, "nats_per_token"),)))
    assert own != protocol_of(result(probe, base="base-2"))
    for key in SETTINGS[probe]:
        is_place = key in (*GRIDS, "kl_positions")
        other = protocol_of(result(probe, settings=SETTINGS[probe] | {key: "another"}))
        assert (own == other) == is_place, key


@pytest.mark.parametrize(
    ("probe", "narrow", "parallel"),
    [
        ("behaviour", True, True),  # asks its own questions, whatever the arm was trained on
        ("preference_margin", True, True),
        ("significance", True, True),
        ("scale_curve", False, True),
        ("perturbation_curve", False, True),
        ("chat_kl", False, False),
    ],
)
def test_rows_count_where_a_probe_looks_at_them(probe, narrow, parallel) -> None:
    own = protocol_of(result(probe))
    assert (own == protocol_of(result(probe, examples=("a",)))) == narrow
    assert (own == protocol_of(result(probe, kl_examples=("c",)))) == parallel


def test_readings_carry_the_protocol_of_their_record_and_the_norm_has_none(tmp_path) -> None:
    run = RunFolder(tmp_path)
    points = [Point("ce", 2.0 - scale, "nats_per_token", {"scale": scale}) for scale in (0.0, 1.0)]
    record = result("scale_curve", points=(*points, Point("effective_norm", 3.0, "norm")))
    append_lines(run.probe_file("scale_curve"), record.to_json())
    protocols = {reading.quantity: reading.protocol for reading in readings(run)}
    own = protocol_of(record)
    assert protocols == {
        "ce@0": own, "ce@1": own, "efficiency": own, "loss_over_norm2": own, "effective_norm": "",
    }  # fmt: skip
    assert set(records_frame(run)["protocol"]) == {own}
