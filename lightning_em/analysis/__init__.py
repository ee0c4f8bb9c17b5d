"""Analysis: what the records of runs say, side by side. Reads files, never imports torch."""

from lightning_em.analysis.solutions import Estimate, Solution, base_of, median_solution, solution_of

__all__ = ["Estimate", "Solution", "base_of", "median_solution", "solution_of"]
