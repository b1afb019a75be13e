"""Fixtures that more than one folder of tests uses."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_servers import s3_server
from tests.seaweed import seaweed

__all__ = ["s3_server", "seaweed"]

CLUSTER_FOLDERS = [Path(__file__).parent / name for name in ("chaos", "integration/cluster")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-xdist what stays in one process: a file, which shares fixtures, and all that start a Ray cluster."""
    for item in items:
        group = "cluster" if any(item.path.is_relative_to(folder) for folder in CLUSTER_FOLDERS) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """What a verb or driver that runs in this process does to the root logger ends with its test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
