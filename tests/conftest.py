"""Fixtures that more than one folder of tests uses."""

import logging
from collections.abc import Iterator

import pytest

from tests.s3_servers import s3_server
from tests.seaweed import seaweed

__all__ = ["s3_server", "seaweed"]


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """What a verb or driver that runs in this process does to the root logger ends with its test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
