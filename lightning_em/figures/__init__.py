"""Figures from records: matplotlib on what analysis has put side by side. Never imports torch."""
