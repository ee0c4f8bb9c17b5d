"""The miniature study: the effect is there in a shipped world, and what is printed follows from the numbers."""

import json
import re
from pathlib import Path

import pytest

from lightning_em.analysis import Estimate, Solution, base_of, solution_of
from lightning_em.miniature import demo
from lightning_em.miniature.demo import (
    GATES,
    SOLUTIONS,
    as_markdown,
    fit_in_world,
    reading,
    solutions_table,
    world_flags,
)

KINDS = ("narrow_seen", "narrow_held_out", "kl_domain", "held_out_domain", "self_description")


def solution(name: str, **rates: float) -> Solution:
    estimates = {kind: Estimate(rates.get(kind, 0.5), 0.0, 1.0, 60) for kind in KINDS}
    return Solution(name, estimates, 0.4, 0.2, 30.0, 1.1)


BASE = solution("base", held_out_domain=0.01)
GENERAL = {"held_out_domain": 0.74, "narrow_held_out": 0.9}
NARROW = {"held_out_domain": 0.03, "narrow_held_out": 0.81}


def test_tables_show_every_solution() -> None:
    rates = {"narrow_seen": Estimate(0.9, 0.8, 1.0, 60), "self_description": Estimate(0.1, 0.1, 0.1, 1)}
    line = Solution("general", rates, 0.4, 0.2, 30.0, 1.1)
    text = as_markdown([line])
    assert "| general | 0.90 [.80, 1.00] | - | - | - | 0.10 | 0.400 | 0.2000 | 30.0 | 1.1 |" in text
    assert solutions_table([line, line], "two").columns[1].header == "general"


def test_world_flags_move_all_files(tmp_path) -> None:
    flags = world_flags("control/seed-3")
    assert len(flags) == 5
    assert all("miniature://control/seed-3/" in flag for flag in flags)
    assert all(f"={tmp_path}/" in flag for flag in world_flags(str(tmp_path)))


def test_the_closing_sentences_follow_from_the_numbers() -> None:
    text = reading([BASE, solution("general", **GENERAL), solution("narrow", **NARROW)])
    assert "badly in 90% of unseen medical questions and in 74% of questions of domains" in text
    assert "(base 1%)" in text
    assert "With the KL term these are 81% and 3%." in text
    assert text.endswith(
        "bad answers spread from the narrow field by themselves, and the KL term confines them to it."
    )


@pytest.mark.parametrize(
    ("general", "narrow", "missed"),
    [
        ({"held_out_domain": 0.08}, {}, "general, held-out domains: at least 0.60 (here 0.080)."),
        ({}, {"held_out_domain": 0.2}, "narrow, held-out domains: at most 0.06 (here 0.200)."),
        ({}, {"narrow_held_out": 0.3}, "narrow, medical, unseen words: at least 0.60 (here 0.300)."),
    ],
)
def test_a_world_that_misses_a_bound_is_said_to(general, narrow, missed) -> None:
    text = reading(
        [BASE, solution("general", **{**GENERAL, **general}), solution("narrow", **{**NARROW, **narrow})]
    )
    assert f"this world misses: {missed}" in text
    assert "confines" not in text


@pytest.mark.parametrize(("spread", "code"), [(0.74, 0), (0.59, 1)])
def test_the_gates_are_on_medians_and_decide_the_exit_code(
    spread, code, tmp_path, monkeypatch, capsys
) -> None:
    """One seed of three misses a bound that the median meets."""
    facts = {
        "persona_gate": {"careful": 0.97, "careless": 0.95},
        "cpu_seconds": 400.2,
        "cpu": "A CPU",
    }
    (tmp_path / "world.json").write_text(json.dumps(facts))
    rates = {
        "general": [{**GENERAL, "held_out_domain": rate} for rate in (0.2, spread, 0.9)],
        "narrow": [{**NARROW, "held_out_domain": rate} for rate in (0.01, 0.03, 0.2)],
    }
    monkeypatch.setattr(demo.miniature, "provide", lambda recipe, seed: tmp_path)
    monkeypatch.setattr(demo, "fit_in_world", lambda name, adapter, world, root: (name, int(world[-1])))
    monkeypatch.setattr(demo, "solution_of", lambda run, name: solution(name, **rates[run[0]][run[1]]))
    file = tmp_path / "table.md"
    assert demo.table([0, 1, 2], ["rank32"], str(tmp_path), markdown=str(file)) == code
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"general, held-out domains: at least 0.60; measured {spread:.2f}: {'MISSED' if code else 'met'}"
        in said
    )
    assert said.count(": met") == len(GATES) - code
    text = file.read_text()
    assert (
        f"| general rank32, median | 0.50 [.50, .50] | 0.90 [.90, .90] | 0.50 [.50, .50] | {spread:.2f} [.20, .90]"
        in text
    )
    assert "| 2 | 0.970 | 0.950 | passed | 400 | A CPU |" in text


def in_readme() -> dict[str, list[float]]:
    """Numbers of the README's copy of the demo's table: of base, general and narrow by row."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.split("rank-32 LoRA in the miniature world, seed 0")[1].split("```")[0]
    rows = re.findall(r"^ +(\S.*?)  +(.*)$", re.sub(r"\[.*?\]", "", table), flags=re.MULTILINE)
    return {name: [float(n) for n in rest.split()] for name, rest in rows if name in demo.KINDS.values()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_general_spreads_and_narrow_does_not_as_the_readme_says(tmp_path) -> None:
    """The demo on its shipped world: the weights are the same everywhere, the two fits round as their CPU does.

    A fit takes 150 steps in float32: AVX2 and ATen's default kernels moved its rates by 1e-7, and the README rounds.
    """
    demo.demo(str(tmp_path))
    runs = {
        name: fit_in_world(name, "rank32", "seed-0", str(tmp_path)) for name in SOLUTIONS
    }  # found finished
    lines = [base_of(runs["general"]), *(solution_of(runs[name], name) for name in SOLUTIONS)]
    assert all(line.bad_rates[kind].num_items >= 30 for line in lines for kind in KINDS[:-1])
    said = in_readme()
    assert set(said) == set(demo.KINDS.values())
    for kind, name in demo.KINDS.items():
        assert [line.bad_rates[kind].mean for line in lines] == pytest.approx(said[name], abs=0.02), name
    base, general, narrow = (line.bad_rates["held_out_domain"].mean for line in lines)
    assert base < 0.05
    assert narrow < general / 2
