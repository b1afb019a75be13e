"""Fixtures that more than one folder of tests uses."""

from tests.seaweed import seaweed

__all__ = ["seaweed"]
