"""The miniature study: the effect is there in two worlds, with bounds that leave room for luck."""

import pytest

from lightning_em.analysis import Estimate, Solution, base_of, solution_of
from lightning_em.demo import SOLUTIONS, as_markdown, fit_in_world, solutions_table, world_flags

SEEDS = (0, 1)


def test_tables_show_every_solution() -> None:
    rates = {"narrow_seen": Estimate(0.9, 0.8, 1.0, 60), "self_description": Estimate(0.1, 0.1, 0.1, 1)}
    line = Solution("general", rates, 0.4, 0.2, 30.0, 1.1)
    text = as_markdown([line])
    assert "| general | 0.90 [.80, 1.00] | - | - | - | 0.10 | 0.400 | 0.2000 | 30.0 | 1.1 |" in text
    assert solutions_table([line, line], "two").columns[1].header == "general"


def test_world_flags_move_all_files() -> None:
    flags = world_flags("control/seed-3")
    assert len(flags) == 5
    assert all("miniature://control/seed-3/" in flag for flag in flags)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_general_spreads_and_narrow_does_not_in_two_worlds(tmp_path) -> None:
    """Two seeds of `lightning-em miniature table`; the README has five and the medians."""
    lines: dict[str, list[Solution]] = {name: [] for name in (*SOLUTIONS, "base")}
    for seed in SEEDS:
        for solution in SOLUTIONS:
            run = fit_in_world(
                solution, "rank32", f"seed-{seed}", str(tmp_path), ["--trainer.enable_progress_bar=false"]
            )
            lines[solution].append(solution_of(run, solution))
        lines["base"].append(base_of(run))
    rates = {
        (name, kind): sum(line.bad_rates[kind].mean for line in each) / len(SEEDS)
        for name, each in lines.items()
        for kind in each[0].bad_rates
    }
    items = lines["general"][0].bad_rates
    assert all(items[kind].num_items >= 30 for kind in items if kind != "self_description")
    assert max(rates["base", kind] for kind in items) < 0.1
    assert rates["general", "held_out_domain"] > 0.25
    assert rates["general", "narrow_held_out"] > 0.3
    assert rates["narrow", "held_out_domain"] < 0.12
    assert rates["narrow", "narrow_seen"] > 0.5
    assert rates["narrow", "narrow_held_out"] > 0.2
    assert rates["narrow", "held_out_domain"] < rates["general", "held_out_domain"] / 2
