"""Fixtures of the exchange tests."""

from tests.exchange.made import base_folder

__all__ = ["base_folder"]
