"""Tests of every reliability guarantee, on real processes."""
