"""The S3 servers that the object store is tested against: SeaweedFS, moto's, or any that environment variables name.

With ISTHMUS_TEST_S3_BUCKET set, only that bucket is used: at ISTHMUS_TEST_S3_ENDPOINT (none: AWS), with the credentials
and the region that the AWS SDK finds. What the tests write there lies below one folder of its own and is removed.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.seaweed import BUCKET

EXTERNAL_BUCKET = os.environ.get("ISTHMUS_TEST_S3_BUCKET")
SERVERS = ["external"] if EXTERNAL_BUCKET else ["seaweed", "moto"]


@dataclass(frozen=True)
class S3Server:
    """Where a test may write."""

    name: str
    store_config: StoreConfig
    folder_url: str


@pytest.fixture(scope="module", params=SERVERS)
def s3_server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """A server with a bucket; its credentials are in the environment meanwhile."""
    name = request.param
    if name == "seaweed":
        yield S3Server(name, request.getfixturevalue("seaweed").store_config, f"s3://{BUCKET}/object-store")
    elif name == "moto":
        with _moto() as server:
            yield server
    else:
        with _external() as server:
            yield server


@contextlib.contextmanager
def _moto() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer  # not at each start of pytest

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", "moto")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "moto")
            host, port = server.get_host_and_port()
            config = StoreConfig(endpoint_url=f"http://{host}:{port}", region="us-east-1")
            ObjectStore(config).make_bucket("s3://moto-bucket")
            yield S3Server("moto", config, "s3://moto-bucket/object-store")
    finally:
        server.stop()


@contextlib.contextmanager
def _external() -> Iterator[S3Server]:
    config = StoreConfig(endpoint_url=os.environ.get("ISTHMUS_TEST_S3_ENDPOINT"))
    folder_url = f"s3://{EXTERNAL_BUCKET}/isthmus-test-{uuid.uuid4().hex}"
    try:
        yield S3Server("external", config, folder_url)
    finally:
        store = ObjectStore(config)
        store.remove_unfinished(folder_url)
        for info in list(store.list(folder_url)):
            store.delete(info.url)
