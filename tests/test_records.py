"""Records: they come back equal, and survive a kill."""

import json

import pytest

from lightning_em.records import (
    SCHEMA_VERSION,
    Point,
    ProbeResult,
    append_lines,
    read_lines,
    read_metrics,
    read_results,
    repair_tail,
)

RESULT = ProbeResult(
    probe="scale_curve",
    step=40,
    settings={"scales": [0.0, 0.1], "kl_positions": None},
    points=(
        Point("ce", 1.25, "nats_per_token", {"scale": 0.1, "noise": 3}, 0.01, 12, (0.1, 1 / 3)),
        Point("best_scale", 1.0, "scale", {"method": "grid"}),
        Point("nothing", 0.0, "nats_per_token", per_example=()),
    ),
    examples=("a.jsonl:1", "a.jsonl:2"),
    kl_examples=("b.jsonl:9",),
    base="0f" * 32,
    data={"narrow": "1e" * 32, "kl": "2d" * 32},
)


def test_a_result_comes_back_equal() -> None:
    line = RESULT.to_json()
    assert "\n" not in line
    assert ProbeResult.from_json(line) == RESULT
    assert json.loads(line)["schema"] == SCHEMA_VERSION
    assert ProbeResult.from_json(line).to_json() == line


def test_a_line_without_the_newer_keys_is_read() -> None:
    fields = json.loads(RESULT.to_json())
    del fields["kl_examples"]
    assert ProbeResult.from_json(json.dumps(fields)).kl_examples == ()


def test_records_of_another_schema_are_refused_with_what_to_do(tmp_path) -> None:
    run = tmp_path / "run"
    old = {"probe": "p", "step": 1, "settings": {}, "points": [], "world": None, "schema": 1}
    append_lines(run / "probes" / "p.jsonl", RESULT.to_json(), json.dumps(old))
    with pytest.raises(ValueError, match="record 2 has schema 1, but this version reads schema 2") as told:
        read_results(run / "probes" / "p.jsonl")
    assert str(told.value).endswith(
        f"move {run / 'probes'} elsewhere and measure again with `lightning-em probe {run} --config PROBING_FILE`."
    )
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(value) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        ProbeResult("p", 0, {}, (Point("ce", value, "nats_per_token"),)).to_json()


def test_lines_are_appended_in_order(tmp_path) -> None:
    file = tmp_path / "probes" / "p.jsonl"
    assert list(read_lines(file)) == []
    append_lines(file, "1")
    append_lines(file, "2", "3")
    assert list(read_lines(file)) == ["1\n", "2\n", "3\n"]


def test_a_newline_inside_a_record_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="a record is one line"):
        append_lines(tmp_path / "p.jsonl", "1\n2")
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("kept", [b"", b'{"a": 1}\n', b'{"a": 1}\n' * 20_000])
@pytest.mark.parametrize("torn", [b"{", b'{"b": "\xc3', b"x" * 200_000])
def test_a_torn_last_line_is_passed_over_and_cut_off(kept, torn, tmp_path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(kept + torn)
    lines = kept.decode().splitlines(keepends=True)
    assert list(read_lines(file)) == lines
    append_lines(file, "2")
    assert list(read_lines(file)) == [*lines, "2\n"]


def test_a_whole_file_is_left_alone(tmp_path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"1\n2\n")
    repair_tail(file)
    assert file.read_bytes() == b"1\n2\n"
    repair_tail(tmp_path / "absent.jsonl")


def test_every_prefix_of_a_record_file_can_be_read(tmp_path) -> None:
    """A kill may come at any byte."""
    file = tmp_path / "p.jsonl"
    append_lines(file, RESULT.to_json(), RESULT.to_json())
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for size in (0, 1, first - 1, first, first + 1, len(whole) - 1, len(whole)):
        file.write_bytes(whole[:size])
        assert read_results(file) == [RESULT] * ((size >= first) + (size == len(whole)))


@pytest.mark.parametrize(
    ("first", "second"),
    [("0.5", "0.5"), ("0.5", "0.5000000001"), ("nan", "nan"), ("inf", "inf")],
)
def test_metric_of_a_step_may_be_measured_twice_and_the_later_value_counts(first, second, tmp_path) -> None:
    file = tmp_path / "metrics.csv"
    append_lines(file, "step,name,value", f"10,val/ce,{first}", "9,val/kl,0.1", f"10,val/ce,{second}")
    assert repr(read_metrics(file)) == repr({9: {"val/kl": 0.1}, 10: {"val/ce": float(second)}})


@pytest.mark.parametrize(("first", "second"), [("0.5", "0.500001"), ("nan", "0.5"), ("0.5", "nan")])
def test_two_values_of_a_metric_are_refused(first, second, tmp_path) -> None:
    file = tmp_path / "metrics.csv"
    append_lines(file, "step,name,value", f"10,val/ce,{first}", f"10,val/ce,{second}")
    with pytest.raises(ValueError, match=rf"has val/ce twice at step 10: {first} and {second}"):
        read_metrics(file)


def test_run_without_metrics_has_none(tmp_path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == {}


@pytest.mark.parametrize(
    "line", ["{}", "[]", "not json", '{"probe": "p", "step": 1, "settings": {}, "points": [{}]}']
)
def test_a_damaged_record_is_named(line, tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    append_lines(path, ProbeResult("p", 1, {}, ()).to_json(), line)
    with pytest.raises(ValueError, match=r"p\.jsonl: record 2 is damaged .*remove the line"):
        read_results(path)
