"""A session-wide S3 server with keys for integration tests: `isthmus.demo.local_s3` in a temporary folder."""

from collections.abc import Iterator

import pytest

from isthmus.demo.local_s3 import LocalS3, local_s3

BUCKET = "test-bucket"


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """SeaweedFS on free loopback ports with the bucket `BUCKET`; credentials are in the environment meanwhile."""
    with local_s3(tmp_path_factory.mktemp("seaweed"), BUCKET) as server:
        yield server
