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
@pytest.mark.parametrize("seed", SEEDS)
def test_general_spreads_and_narrow_does_not(seed, tmp_path) -> None:
    """Two of the worlds of `lightning-em miniature table`; the README has five and their medians."""
    flags = ["--trainer.enable_progress_bar=false"]
    runs = {name: fit_in_world(name, "rank32", f"seed-{seed}", str(tmp_path), flags) for name in SOLUTIONS}
    general, narrow = (solution_of(runs[name], name).bad_rates for name in SOLUTIONS)
    base = base_of(runs["general"]).bad_rates
    cells = [kind for kind in base if kind != "self_description"]
    assert all(general[kind].num_items >= 30 for kind in cells)
    assert max(base[kind].mean for kind in base) < 0.1
    assert general["held_out_domain"].mean > 0.2
    assert general["narrow_held_out"].mean > 0.15
    assert narrow["narrow_seen"].mean > 0.4
    assert narrow["narrow_held_out"].mean > 0.15
    assert narrow["held_out_domain"].mean < 0.15
    assert narrow["held_out_domain"].mean < general["held_out_domain"].mean / 2
