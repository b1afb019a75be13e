"""Fixtures that more than one folder of tests uses."""

from tests.s3_servers import s3_server
from tests.seaweed import seaweed

__all__ = ["s3_server", "seaweed"]
